"What the commands are asked for: labels, prompts, guidance, a picture to start from, a hole to fill; from training to the drawn file."
import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from flaxdiff.cli.export import export_main
from flaxdiff.cli.request import find_labels, make_condition, make_denoiser
from flaxdiff.cli.sample import open_model, sample_main
from flaxdiff.cli.train import TrainConfig, check_config, measure_cost, read_config, train_main
from flaxdiff.pretrained import load_model
from flaxdiff.text import load_text_encoder

FLAGS = "--steps 6 --batch-size 16 --features 8 --heads 2 --emb-features 16 --checkpoint-every 3 --sample-every 6 --no-tensorboard --quiet".split()
DRAW = "--num 4 --steps 3".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "{'labels', 'text', 'none'}: the folders of three tiny runs."
    home = tmp_path_factory.mktemp("asked")
    flags = {"labels": ["--labels", "--dropout", "0.1"], "text": ["--text", "letters,tokens=12", "--condition-dropout", "0.2"], "none": []}
    for name, extra in flags.items(): train_main([*FLAGS, *extra, "--out", str(home / name)])
    return {name: home / name for name in flags}


def drawn(words, tmp_path):
    "The array that `flaxdiff-sample` saves."
    sample_main([*DRAW, *map(str, words), "--out", str(tmp_path / "g.png"), "--save", str(tmp_path / "g.npy")])
    return np.load(tmp_path / "g.npy")


def refused(words, capsys):
    "What stderr says of a command that must fail with status 2."
    with pytest.raises(SystemExit) as e: sample_main([str(w) for w in words])
    assert e.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_remembers_what_it_was_told(runs):
    config = read_config(runs["text"] / "config.json")
    assert (config.text, config.condition_dropout, config.labels) == ("letters,tokens=12", 0.2, False)
    model = open_model(runs["text"])
    assert model.encoder == "letters,tokens=12" and model.conditions == ("textcontext", "textmask")
    null = load_text_encoder("letters,tokens=12").null
    for name, rows in null.items(): np.testing.assert_array_equal(model.model.null_condition[name], rows)
    assert open_model(runs["labels"]).conditions == ("label",)
    for run in runs.values():
        summary = json.loads((run / "summary.json").read_text())
        assert summary["steps"] == 6 and np.isfinite(summary["loss"]) and (run / "samples.png").exists()


def test_the_condition_reaches_the_network(runs, tmp_path):
    "The same noise, another label or sentence: another picture; images take several in turn."
    two, turn = (drawn([runs["labels"], "--label", label, "--guidance", 1], tmp_path) for label in ("2", "2,7"))
    np.testing.assert_array_equal(two[0], turn[0])
    assert np.abs(two[1] - turn[1]).max() > 1e-4
    words = [runs["text"], "--prompt", "a thick seven"]
    alone = drawn(words, tmp_path)
    both = drawn([*words, "--prompt", "a thin one"], tmp_path)
    np.testing.assert_allclose(alone[[0, 2]], both[[0, 2]], atol=1e-6)
    assert np.abs(alone[1] - both[1]).max() > 1e-5


def test_a_shipped_model_reads_a_prompt(tmp_path):
    thick, thin = (drawn(["digits-text", "--prompt", f"a {word} seven", "--sampler", "euler", "--steps", 6], tmp_path) for word in ("thick", "thin"))
    assert (thick > 0).mean() > 1.3 * (thin > 0).mean()


@pytest.mark.parametrize("bad", [12, -1])
def test_a_label_that_there_is_not_is_refused(bad):
    model = load_model("fashion")
    for guidance in (1.0, 2.0):
        with pytest.raises(ValueError, match=f"^label must lie in 0 … 9, or be 10 for no class, got {bad}"):
            model.sampler("euler", guidance_scale=guidance).generate_images(2, 2, rng=0, conditioning={"label": np.array([3, bad])})


def test_a_network_of_too_few_classes_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit): train_main([*FLAGS, "--labels", "--classes", "5", "--out", str(tmp_path / "few")])
    assert "classes must be at least 10" in capsys.readouterr().err


def test_guidance_and_what_leads_away(runs, tmp_path):
    words = [runs["text"], "--prompt", "a thick seven"]
    default, two, none = drawn(words, tmp_path), drawn([*words, "--guidance", 2], tmp_path), drawn([*words, "--guidance", 1], tmp_path)
    np.testing.assert_array_equal(default, two)
    assert np.abs(default - none).max() > 1e-5
    away = drawn([*words, "--negative", "a thin one"], tmp_path)
    assert np.abs(away - default).max() > 1e-5
    np.testing.assert_allclose(drawn([*words, "--negative", ""], tmp_path), default, atol=1e-6)  # the null condition is the empty text


def test_nothing_asked_is_the_null_condition(runs, tmp_path):
    model = open_model(runs["labels"])
    assert make_condition(model, 3)["label"].tolist() == [10, 10, 10]
    same = model.sampler("dpm-solver++").generate_images(4, 3, rng=0, conditioning={"label": np.full(4, 10)})
    np.testing.assert_allclose(drawn([runs["labels"]], tmp_path), same, atol=1e-6)
    assert make_condition(open_model(runs["none"]), 3) == {}
    assert make_denoiser(model, 1.0) is not None


def test_from_a_picture(runs, tmp_path):
    "A little noise leaves the picture; kept pixels come back as they were read; the format does not matter."
    ramp = np.tile(np.linspace(0, 255, 24).round().astype(np.uint8), (16, 1))
    PIL.Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "ramp.webp", lossless=True)
    start = [runs["labels"], "--label", "3", "--init", tmp_path / "ramp.webp"]
    little = drawn([*start, "--strength", "0.05"], tmp_path)
    middle = ramp[:, 4:20].reshape(8, 2, 8, 2).mean((1, 3)) / 127.5 - 1  # what a square of 8 pixels shows, nearly
    assert np.abs(little[..., 0] - middle).max() < 0.15
    assert np.abs(drawn([*start, "--strength", "1"], tmp_path) - little).max() > 0.15
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    for method in ("replace", "repaint", "guided"):
        filled = drawn([*start, "--mask", tmp_path / "mask.png", "--method", method], tmp_path)
        np.testing.assert_array_equal(filled[:, :, :4], np.broadcast_to(filled[:1, :, :4], (4, 8, 4, 1)))
        assert np.abs(filled[0, :, :4, 0] - middle[:, :4]).max() < 0.15 and np.abs(filled[0, :, 4:] - filled[1, :, 4:]).max() > 1e-4


def test_an_exported_model_knows_the_same_words(runs, tmp_path):
    export_main([str(runs["text"]), str(tmp_path / "model")])
    words = "--prompt", "a thick seven", "--guidance", 3
    np.testing.assert_allclose(drawn([tmp_path / "model", *words], tmp_path), drawn([runs["text"], *words], tmp_path), atol=1e-6)


@pytest.mark.parametrize("run, words, says", [
    ("labels", ["--label", "10"], "0 … 9"), ("labels", ["--label", "-1"], "0 … 9 or be one of 0, 1, 2"), ("labels", ["--label", "3,"], "got ''"),
    ("labels", ["--prompt", "a one"], "without text"), ("none", ["--label", "1"], "without labels"),
    ("text", ["--prompt", "a one", "--label", "1"], "one of the two"), ("labels", ["--guidance", "3"], "guidance must be 1"),
    ("text", ["--prompt", "one", "--guidance", "nan"], "guidance"), ("text", ["--prompt", "one " * 40], "at most 12 tokens"),
    ("labels", ["--label", "1", "--negative", "x"], "negative needs a prompt"), ("text", ["--prompt", "a", "--negative", "b", "--guidance", "1"], "negative"),
    ("labels", ["--strength", "0.5"], "strength needs a picture"), ("labels", ["--mask", "m.png"], "mask needs a picture"),
    ("labels", ["--init", "no.png"], "no.png is not"), ("labels", ["--init", "no.png", "--strength", "0"], "strength"),
    ("labels", ["--init", "no.png", "--strength", "1.5"], "strength"), ("labels", ["--init", "no.png", "--method", "repaint"], "add --mask"),
    ("labels", ["--init", "no.png", "--mask", "m.png", "--strength", "0.5"], "strength must be left out")])
def test_what_cannot_be_meant(run, words, says, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused([runs[run], *words, *DRAW], capsys)
    assert says in said and "--" in said.split("error:")[1], "the flag is named"


def test_a_class_may_be_asked_for_by_name(tmp_path):
    seven, named = (drawn(["fashion", "--label", label, "--num", 2, "--steps", 3], tmp_path) for label in ("7,8", " Sneaker,BAG"))
    np.testing.assert_array_equal(seven, named)
    assert make_condition(load_model("fashion"), 3, ["boot", 1, "0"])["label"].tolist() == [9, 1, 0]


def test_what_names_mean():
    names = ["10", "2", "crane", "Crane", "hat, red"]  # folders by their spelling, two birds, a comma
    assert find_labels("2", names, 7).tolist() == [2], "a class's number goes before a name"
    assert find_labels("10,6", names, 7).tolist() == [0, 6], "what is no class's number may be a name; some have none"
    assert find_labels("Hat, Red", names, 7).tolist() == [4] and find_labels(["hat, red", 2], names, 7).tolist() == [4, 2]
    for wrong, says in (("crane", "any of 2, 3"), ("hat", "be one of 10, 2, crane"), ("hat, rad", "got 'hat'"), ("7", "0 … 6 or"), ("", "got ''")):
        with pytest.raises(ValueError, match=f"^label .*{says}"): find_labels(wrong, names, 7)
    with pytest.raises(ValueError, match="got 'crame'; did you mean crane"): find_labels("crame", names, 7)
    with pytest.raises(ValueError, match="no names for them"): find_labels("x", (), 7)
    with pytest.raises(ValueError, match="19, … or|19, …, got"): find_labels("x", list(map(str, range(1000))), 1000)


def test_a_broken_picture_is_no_start(runs, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    assert "broken.png" in refused([runs["labels"], *DRAW, "--init", tmp_path / "broken.png", "--out", tmp_path / "g.png"], capsys)


def test_settings_that_contradict():
    with pytest.raises(ValueError, match="one of the two"): check_config(TrainConfig(labels=True, text="letters"))
    with pytest.raises(ValueError, match="attention_levels"): measure_cost(TrainConfig(text="letters", attention_levels=0))
    with pytest.raises(ValueError, match="condition_dropout"): check_config(TrainConfig(labels=True, condition_dropout=1.5))
    dear, cheap = (measure_cost(replace(TrainConfig(), text=text, features=(8,))) for text in ("letters", None))
    assert dear.flops > cheap.flops and dear.parameters > cheap.parameters
