"""The commands: what a run leaves, that it can be repeated and resumed to the bit, and what wrong flags say."""
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from flaxdiff.cli import cost as costing
from flaxdiff.cli import record
from flaxdiff.cli import sample as sampling
from flaxdiff.cli import train as training
from flaxdiff.cli.export import export_main, make_card, train_command
from flaxdiff.cli.sample import (ALIASES, GRIDS, OPTIONS, SAMPLERS, choose_options, default_grid, find_sampler, flag_of, open_model, sample_parser,
                                 sampler_of)
from flaxdiff.cli.cost import check_fits, describe_cost, in_words, measure_cost
from flaxdiff.cli.record import RunRecord
from flaxdiff.cli.settings import (MAY_CHANGE, RECIPES, WITH_NEW_OPTIMIZER, change_config, check_config, kind_of,
                                   make_config, merge_settings)
from flaxdiff.cli.train import (SCHEDULES, TOPICS, build_trainer, held_out, learning_rate, local_path, make_trainer, open_data, read_settings,
                                restore_run, run_folder, save_grid)
from flaxdiff.predictors import X0Predictor
from flaxdiff.pretrained import PretrainedModel, SizedNetwork, load_model
from flaxdiff.trainer.parallel import program_flops
from flaxdiff.training import TrainConfig, fingerprint, load_run, read_config, sample_main, train_main, train_parser, train_run

TINY = TrainConfig(steps=20, batch_size=16, features=(8,), attention_levels=1, heads=2, emb_features=16, checkpoint_every=5, report_every=4, sample_every=10)
FLAGS = "--steps 20 --batch-size 16 --features 8 --heads 2 --emb-features 16 --checkpoint-every 5 --report-every 4 --sample-every 10 --quiet".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished tiny run: (folder, summary)."
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train_run(TINY, out, progress=False)


def error_of(command, words, capsys):
    "(exit status, what stderr says at the end) of a command that must fail."
    with pytest.raises(SystemExit) as e: command([str(w) for w in words])
    said = capsys.readouterr().err.strip()
    return e.value.code, said[said.rindex("error:"):]


def test_a_run_leaves_its_whole_record(finished):
    out, summary = finished
    assert {"checkpoints", "config.json", "levels.png", "losses.csv", "metrics.csv", "samples", "samples.png", "summary.json", "tensorboard"} == {p.name for p in out.iterdir()}
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 20 and summary["devices"] >= 1 and summary["seconds"] > 0
    losses = np.loadtxt(out / "losses.csv", delimiter=",", skiprows=1)
    assert losses[:, 0].tolist() == list(range(1, 21))
    assert summary["loss"] == pytest.approx(losses[-2:, 1].mean(), rel=1e-12)
    assert read_config(out / "config.json") == TINY
    with open(out / "metrics.csv") as f: rows = list(csv.DictReader(f))
    assert [int(r["step"]) for r in rows] == [4, 5, 9, 10, 14, 15, 19, 20], "every 4 steps, and before each checkpoint"
    rate = learning_rate(TINY)
    assert [float(r["learning_rate"]) for r in rows] == pytest.approx([float(rate(int(r["step"]) - 1)) for r in rows])
    assert float(rows[0]["loss"]) == pytest.approx(losses[:4, 1].mean()) and all(float(r["images_per_second"]) > 0 and int(r["skipped"]) == 0 for r in rows)
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["00000010.png", "00000020.png"]
    assert summary["skipped"] == 0 and summary["images_per_second"] > 0
    state = load_run(out).state
    assert (fingerprint(state.params), fingerprint(state.ema_params)) == (summary["params_sha256"], summary["ema_sha256"])


def test_the_command_repeats_the_function_to_the_bit(finished, tmp_path, capsys, monkeypatch):
    "And draws 64 pictures twice, after updates 10 and 20: the last ones are samples.png as well."
    drawn, draw_images = [], record.draw_images
    monkeypatch.setattr(record, "draw_images", lambda *args: drawn.append(args) or draw_images(*args))
    train_main([*FLAGS, "--out", str(tmp_path / "again")])
    assert len(drawn) == 2
    assert "20 steps" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["params_sha256"] == finished[1]["params_sha256"] and again["loss"] == finished[1]["loss"]


def test_resumed_is_never_stopped(finished, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(finished[0], out)  # as a run killed after its update 10 would lie there
    for name in ("summary.json", "samples.png", "losses.csv"): (out / name).unlink()
    (out / "metrics.csv").open("a").write("24,half a ro")
    for step in (15, 20): shutil.rmtree(out / "checkpoints" / str(step))
    summary = train_run(TINY, out, resume=True, progress=False)
    timeless = lambda summary: {k: v for k, v in summary.items() if k not in ("seconds", "images_per_second")}
    assert timeless(summary) == timeless(finished[1])
    timeless = lambda folder: [[row[name] for name in ("step", "loss", "gradient", "skipped")] for row in csv.DictReader((folder / "metrics.csv").open())]
    assert timeless(out) == timeless(finished[0])
    assert (out / "losses.csv").read_text() == (finished[0] / "losses.csv").read_text()


def test_resume_changes_nothing_in_a_finished_run_and_starts_afresh_without_one(finished, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob("*")}
    train_main(["--out", str(finished[0]), "--resume", "--quiet"])
    assert before == {p: p.stat().st_mtime_ns for p in finished[0].rglob("*")}
    assert train_run(TINY, tmp_path / "new", resume=True, progress=False)["params_sha256"] == finished[1]["params_sha256"]


def test_sampling_writes_picture_and_array(finished, tmp_path):
    words = [str(finished[0]), "--num", "5", "--steps", "4", "--seed", "3", "--out", str(tmp_path / "grid.png"), "--save"]
    sample_main([*words, str(tmp_path / "a.npy")])
    sample_main([*words, str(tmp_path / "b.npy"), "--sampler", "euler"])
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert a.shape == b.shape == (5, 8, 8, 1) and np.abs(a).max() <= 1 and not np.array_equal(a, b)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"grid.png", "a.npy", "b.npy"}  # nothing half-written is left


@pytest.mark.slow
def test_a_configuration_file(finished, tmp_path, capsys):
    "Another run's config.json, or TOML; flags go before it, and unknown names are refused."
    train_main(["--config", str(finished[0] / "config.json"), "--out", str(tmp_path / "same"), "--quiet"])
    assert json.loads((tmp_path / "same" / "summary.json").read_text())["params_sha256"] == finished[1]["params_sha256"]
    (tmp_path / "c.toml").write_text('steps = 3\nfeatures = [8]\nema_profiles = [0.05]\nloss = "min-snr"\nattention_levels = 0\nbatch_size = 8\nclip = 1.0\n')
    train_main(["--config", str(tmp_path / "c.toml"), "--steps", "4", "--out", str(tmp_path / "toml"), "--quiet"])
    config = read_config(tmp_path / "toml" / "config.json")
    assert (config.steps, config.features, config.ema_profiles, config.loss, config.clip) == (4, (8,), (0.05,), "min-snr", 1.0)
    assert (tmp_path / "toml" / "checkpoints" / "ema").is_dir()
    for text, named in (("stepz = 3", "stepz"), ("steps = ", "config"), ('loss = "snr"', "loss"), ('wandb = "x"', "pip install wandb")):
        (tmp_path / "bad.toml").write_text(text)
        assert named in error_of(train_main, ["--config", tmp_path / "bad.toml", "--out", tmp_path / "bad"], capsys)[1]
    assert "config" in error_of(train_main, ["--config", tmp_path / "none.toml", "--out", tmp_path / "bad"], capsys)[1]


def test_tensorboard_can_read_the_metrics(finished):
    "The events are there, in its own format."
    from tensorboardX.proto.event_pb2 import Event
    data, values = b"".join(p.read_bytes() for p in (finished[0] / "tensorboard").iterdir()), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for value in (event := Event.FromString(data[12:12 + length])).summary.value: values.setdefault(value.tag, []).append(event.step)
        data = data[16 + length:]
    assert values["loss"] == [4, 5, 9, 10, 14, 15, 19, 20] and values["samples"] == [10, 20]


@pytest.mark.parametrize("extra", ["--loss elbo --dtype bfloat16 --remat --accumulate 2 --attention-levels 0", *(pytest.param(words, marks=pytest.mark.slow) for words in (
    "--uncertainty --augment 0.12 --flip --steps-per-dispatch 2 --decay constant --warmup 0", "--loss p2 --predictor v --schedule cosine --decay rsqrt",
    "--loss soft-min-snr --how shard_map", "--loss edm"))])
def test_every_part_is_reached_by_a_flag(extra, tmp_path):
    train_main([*FLAGS, "--steps", "4", *extra.split(), "--no-tensorboard", "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4 and np.isfinite(summary["loss"]) and not (tmp_path / "run" / "tensorboard").exists()
    assert load_run(tmp_path / "run").state.step == 4


@pytest.mark.parametrize("words, named", [
    (["--steps", "0"], "steps"), (["--batch-size", "-1"], "batch_size"), (["--learning-rate", "0"], "learning_rate"),
    (["--dataset", "no_such_data"], "no_such_data"), (["--features", "32,x"], "--features"), (["--image-size", "0"], "image_size"),
    (["--attention-levels", "9"], "attention_levels"), (["--schedule", "sigmoid"], "--schedule"), (["--ema-decay", "1.5"], "ema_decay"),
    (["--features", "30,64", "--heads", "7"], "heads")])
def test_wrong_flags_are_named_and_leave_no_run(words, named, tmp_path, capsys):
    status, line = error_of(train_main, ["--out", tmp_path / "run", *words], capsys)
    assert status == 2 and "error" in line and named in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_is_not_overwritten_nor_contradicted(finished, capsys):
    assert "--resume" in error_of(train_main, ["--out", finished[0]], capsys)[1]
    assert "seed=5" in error_of(train_main, ["--out", finished[0], "--resume", "--seed", 5], capsys)[1]


def test_sampling_names_what_is_missing(finished, tmp_path, capsys):
    assert "RUN" in error_of(sample_main, [tmp_path], capsys)[1]
    for flags, named in ((["--label", "3"], "label"), (["--prompt", "a seven"], "prompt"), (["--guidance", "2"], "guidance"), (["--num", "0"], "--num")):
        assert named in error_of(sample_main, [finished[0], *flags], capsys)[1]


def test_a_diverged_run_stops_and_is_no_result(tmp_path, capsys):
    status, line = error_of(train_main, [*FLAGS, "--learning-rate", "1e30", "--out", tmp_path / "run"], capsys)
    assert status == 1 and "not finite" in line and not (tmp_path / "run" / "summary.json").exists()


def test_every_field_is_a_flag_with_help():
    text = train_parser().format_help()
    for field in dataclasses.fields(TrainConfig): assert f"--{field.name.replace('_', '-')}" in text


def test_every_solver_has_a_name():
    "All that need no fit first."
    from flaxdiff.training import SAMPLERS
    from laws import SAMPLER_CLASSES
    assert set(SAMPLERS.values()) == set(SAMPLER_CLASSES.values()) - {SAMPLER_CLASSES["FewStepSampler"]}


# ---------------------------------------------------------------- the old places

OLD = """SCHEDULES PREDICTORS SAMPLERS LOSSES CHOICES KINDS make_network NetworkConfig LearningConfig TrainConfig check_config sampler_of
learning_rate make_optimizer make_trainer write_whole write_json RunRecord train_run load_run train_parser read_settings read_config
choose_config train_main sample_parser sample_main save_grid sample_run"""


def test_every_old_name_is_still_there():
    from flaxdiff import training
    assert set(OLD.split()) <= set(training.__all__) and all(hasattr(training, name) for name in training.__all__)


# ---------------------------------------------------------------- bad input

def refused(command, words, named, capsys):
    "A command that fails by one line, which names the flag, with status 2."
    with pytest.raises(SystemExit) as e: command([str(word) for word in words])
    said = capsys.readouterr().err
    assert e.value.code == 2 and len(said.splitlines()) == 1 and "error:" in said and named in said, said


@pytest.mark.parametrize("words, named", [
    (["--config", ""], "config"), (["--config", "."], "config"), (["--learning-rate", "inf"], "--learning-rate"),
    (["--learning-rate", "nan"], "--learning-rate"), (["--sigma-data", "inf"], "--sigma-data"), (["--sigma-data", "nan"], "--sigma-data"),
    (["--sigma-data", "0"], "--sigma-data"), (["--clip", "nan"], "--clip"), (["--ema-decay", "nan"], "--ema-decay"), (["--augment", "nan"], "--augment"),
    (["--ema-profiles", "nan"], "--ema-profiles"), (["--features", ","], "--features"), (["--features", "0"], "--features"), (["--seed", "-1"], "--seed"),
    (["--seed", "4294967296"], "--seed"), (["--max-damaged", "-5"], "--max-damaged"), (["--batch-size", "1000000000000"], "--batch-size"),
    (["--batch-size", "0"], "--batch-size"), (["--steps", "x"], "--steps"), (["--no-such-flag"], "--no-such-flag"), (["--schedule", "sigmoid"], "--schedule"),
    (["--dataset", "folder:"], "--dataset"), (["--dataset", "folder:~no-such-user-here/x"], "--dataset"), (["--data-dir", "", "--dataset", "flowers"], "--data-dir")])
def test_bad_settings_are_one_line_that_names_the_flag(words, named, tmp_path, capsys):
    refused(train_main, ["--out", tmp_path / "run", *words], named, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["", " ", "gs://bucket/run", "s3://bucket/run", "file:///tmp/run", "a file", "~no-such-user-here/run"])
def test_an_out_that_can_be_no_folder_is_refused_before_anything_is_written(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("mine")
    refused(train_main, [*FLAGS, "--out", out], "--out", capsys)
    with pytest.raises(ValueError, match="out must"): train_run(TINY, out)
    assert [p.name for p in tmp_path.iterdir()] == ["a file"] and (tmp_path / "a file").read_text() == "mine"


@pytest.mark.parametrize("text", ["null", "[]", "{}", "3", "{", ""])
def test_a_summary_that_is_none_is_named(text, tmp_path, capsys):
    (tmp_path / "summary.json").write_text(text)
    refused(train_main, [*FLAGS, "--out", tmp_path, "--resume"], "summary.json", capsys)


@pytest.mark.parametrize("text", ["null", "[1]", "steps"])
def test_settings_that_are_none_are_named(text, tmp_path, capsys):
    (tmp_path / "c.json").write_text(text)
    refused(train_main, ["--config", tmp_path / "c.json", "--out", tmp_path / "run"], "--config", capsys)


def test_home_is_expanded(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(finished[0])
    (tmp_path / "c.toml").write_text("steps = 3")
    sample_main("~/run --num 2 --steps 3 --out ~/grid.png --save ~/a.npy".split())
    assert (tmp_path / "grid.png").exists() and (tmp_path / "a.npy").exists()
    assert run_folder("~/new") == tmp_path / "new" and read_settings("~/c.toml") == {"steps": 3} and local_path("x", "a/~") .name == "~"


@pytest.mark.parametrize("words, named", [
    (["--num", "100000000000"], "GB"), (["--seed", "-1"], "--seed"), (["--seed", "4294967296"], "--seed"), (["--steps", "0"], "--steps"),
    (["--out", ""], "--out"), (["--out", "gs://b/a.png"], "--out"), (["--out", "a.gif"], ".jpg"), (["--out", "."], "--out"), (["--save", ""], "--save"),
    (["--save", "."], "--save"), (["--grid", "steps"], "--grid"), (["--sampler", "dpmpp_2s_ancestral"], "dpmpp_2s"), (["--sampler", ""], "--sampler"),
    (["--sampler", "ddim", "--eta", "nan"], "--eta"), (["--sampler", "ddim", "--eta", "2"], "--eta"), (["--sampler", "edm", "--s-churn", "inf"], "--s-churn"),
    (["--sampler", "unipc", "--order", "9"], "--order"), (["--sampler", "heun", "--eta", "1"], "--frame"), (["--eta", "1"], "--eta"), (["--sampler", "euler", "--order", "2"], "none"),
    (["--sampler", "unipc", "--no-multistep"], "--corrector"), (["--sampler", "dpm-solver++", "--eta", "0.5"], "--eta"),
    (["--checkpoint", "7"], "--checkpoint"), (["--checkpoint", "last"], "--checkpoint"), (["--checkpoint", "0"], "--checkpoint"), (["--checkpoint", "-5"], "--checkpoint"), (["--sampler", "dpmpp_2m", "--order", "3"], "--order"),
    (["--sampler", "dpm++ 2m karras", "--grid", "uniform"], "--grid")])
def test_bad_requests_are_one_line_that_names_the_flag(finished, words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(sample_main, [finished[0], *words], named, capsys)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- text and pictures

BARE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a machine whose text is ASCII


def bare(program, **env):
    env = {**os.environ, **BARE, **env}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=300)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_on_a_console_that_is_not_utf8(encoding):
    done = bare("""if True:
        from flaxdiff.cli.export import export_main
        from flaxdiff.cli.sample import sample_main
        from flaxdiff.cli.tpu import tpu_main
        from flaxdiff.cli.train import train_main
        for main in (train_main, sample_main, tpu_main, export_main):
            try: main(["--help"])
            except SystemExit as end: assert not end.code, main""", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and not done.stderr and done.stdout.count(b"usage: flaxdiff") == 4


def test_text_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "c.toml").write_text('dataset = "folder:Bücher"  # wie früher √', encoding="utf-8")
    (tmp_path / "c.json").write_text('{"wandb": "Größe"}', encoding="utf-8-sig")
    done = bare(f"""if True:
        import locale
        from flaxdiff.cli.train import read_settings, write_text
        assert locale.getpreferredencoding(False).lower().startswith("ansi")
        for name in ("toml", "json"): print(ascii(read_settings({str(tmp_path)!r} + "/c." + name)))
        write_text({str(tmp_path / "t.csv")!r}, "\\u221a")""")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == [ascii({"dataset": "folder:Bücher"}), ascii({"wandb": "Größe"})]
    assert (tmp_path / "t.csv").read_bytes() == "√".encode()


def test_all_greys_come_back(tmp_path):
    greys = np.arange(256, dtype=np.uint8)
    for name in ("a.png", "a.webp", "plain"):
        save_grid(tmp_path / name, (greys / 127.5 - 1).astype(np.float32).reshape(1, 16, 16, 1), pixels=16)
        back = np.asarray(PIL.Image.open(tmp_path / name))
        assert back.shape == (16, 16, 3) and np.array_equal(back[..., 0].ravel(), greys)


def test_the_name_says_what_kind_of_picture(tmp_path):
    images = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8, 1)
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("A.JPEG", "JPEG"), ("a.webp", "WEBP"), ("plain", "PNG")):
        save_grid(tmp_path / name, images)
        assert PIL.Image.open(tmp_path / name).format == kind
    with pytest.raises(ValueError, match=r"\.png.*a\.bmp"): save_grid(tmp_path / "a.bmp", images)


# ---------------------------------------------------------------- the rate, the schedules

@pytest.mark.parametrize("decay", ["cosine", "constant", "rsqrt"])
def test_without_a_warmup_the_first_update_has_the_full_rate(decay):
    config = dataclasses.replace(TINY, decay=decay, warmup=0)
    assert float(learning_rate(config)(0)) == pytest.approx(config.learning_rate)
    rates = [float(learning_rate(config)(k)) for k in range(20)]
    assert all(a >= b > 0 for a, b in zip(rates, rates[1:]))
    warm = [float(learning_rate(dataclasses.replace(config, warmup=4))(k)) / config.learning_rate for k in range(5)]
    assert warm == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_one_update_without_a_warmup_changes_something(tmp_path):
    config = dataclasses.replace(TINY, steps=1, warmup=0)
    before = fingerprint(build_trainer(config).state.params)
    assert train_run(config, tmp_path / "run", progress=False)["params_sha256"] != before


@pytest.mark.parametrize("schedule", ["vp", pytest.param("sub-vp", marks=pytest.mark.slow), pytest.param("ve", marks=pytest.mark.slow)])
def test_the_processes_of_the_sde_chapter_train_and_sample(schedule):
    trainer, data, _ = make_trainer(dataclasses.replace(TINY, schedule=schedule, predictor="epsilon"))
    trainer.fit(data, 2, progress=False)
    images = sampler_of(trainer, "dpm-solver++").generate_images(2, 5, rng=0, grid=GRIDS[default_grid("dpm-solver++", trainer.noise_schedule)])
    assert np.isfinite(trainer.losses).all() and np.isfinite(images).all()


def test_a_trainer_is_built_without_its_data():
    assert build_trainer(dataclasses.replace(TINY, dataset="folder:/no/such", image_size=8, channels=1)).model.image_shape == (8, 8, 1)


def test_topics_begin_at_fields():
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert [name for name in names if name in TOPICS] == list(TOPICS) and names[0] in TOPICS
    text = train_parser().format_help()
    assert all(f"\n{title}:" in text for title in TOPICS.values())


# ---------------------------------------------------------------- solvers by other names, their options and levels

@pytest.mark.parametrize("name, due", [
    ("heun", ("heun", {}, None)), ("dpm-solver++", ("dpm-solver++", {}, None)), ("k_euler", ("euler", {}, None)), ("euler_a", ("euler-ancestral", {}, None)),
    ("Euler a", ("euler-ancestral", {}, None)), ("dpmpp_2m", ("dpm-solver++", {"order": 2}, None)), ("DPM++ 2M Karras", ("dpm-solver++", {"order": 2}, "karras")),
    ("dpmpp_2s", ("dpm-solver++", {"order": 2, "multistep": False}, None)), ("dpmpp_3m_sde", ("dpm-solver++", {"order": 3, "stochastic": True}, None)),
    ("dpmpp_2m_sde", ("dpm-solver++", {"order": 2, "stochastic": True}, None)), ("dpmpp_sde", ("dpm-solver++", {"order": 2, "multistep": False, "stochastic": True}, None)),
    ("uni_pc", ("unipc", {}, None)), ("dpm_2", ("dpm-solver", {"order": 2}, None)), ("k_lms exponential", ("lms", {}, "lambda"))])
def test_common_names_are_understood(name, due): assert find_sampler(name) == due


VALUES = {int: 2, float: 0.5, bool: True}


def test_the_tables_say_what_the_solvers_take(finished):
    "Each solver takes what the table says, and refuses every other option."
    trainer = load_run(finished[0])
    for name, options in ALIASES.values(): sampler_of(trainer, name, **options)
    for option, row in OPTIONS.items():
        value = row.choices[0] if row.choices else VALUES[row.kind]
        for name in SAMPLERS:
            if option in ("eta", "s_noise") and name == "dpm-solver++": assert sampler_of(trainer, name, stochastic=True, **{option: value})  # of its SDE alone
            elif name in row.samplers: assert sampler_of(trainer, name, **{row.called.get(name, option): value})
            elif (option, name) not in (("order", "plms"), ("order", "pndm"), ("order", "multistep-dpm")):  # theirs is fixed
                if (option, name) == ("frame", "plms") or (option, name) == ("frame", "pndm"): continue
                with pytest.raises((TypeError, ValueError)): sampler_of(trainer, name, **{option: value})
    assert choose_options("edm", {"s_noise": 1.003}) == {"S_noise": 1.003} and choose_options("ddim", {"s_noise": 1.003}) == {"s_noise": 1.003}
    text = sample_parser().format_help()
    assert all(flag_of(option) in text for option in OPTIONS) and "conditional run" not in text


class Best:
    "The best denoiser of Gaussian pixels of standard deviation ¼, on a schedule whose times it is told."
    image_shape = (8, 8, 1)

    def __init__(self, schedule): self.schedule = schedule

    def apply(self, params, x, t):
        alpha, sigma = self.schedule.get_rates(self.schedule.from_network_time(t))
        return alpha / 16 / (alpha ** 2 / 16 + sigma ** 2) * x


@pytest.fixture
def exact_run(monkeypatch):
    "Sampling from any RUN is from the best denoiser, on the named schedule."
    def choose(name):
        schedule = SCHEDULES[name]()
        model = PretrainedModel(SizedNetwork(Best(schedule), (8, 8, 1)), {}, schedule, X0Predictor(), (8, 8, 1))
        monkeypatch.setattr(sampling, "open_model", lambda run, checkpoint: model)
    return choose


@pytest.mark.parametrize("schedule, sampler, furthest", [
    ("cosine", "plms", 0.1), ("cosine", "pndm", 0.1), ("cosine", "dpmpp_2m", 0.1), ("cosine", "unipc", 0.1), ("cosine", "heun", 0.1), ("cosine", "euler-maruyama", 1),
    ("linear", "unipc", 0.1), ("vp", "dpm-solver++", 0.1)])
def test_the_default_levels_suit_the_solver(schedule, sampler, furthest, exact_run, tmp_path, monkeypatch, capsys):
    "18 levels: the standard deviation of samples is near the right one; and the command says what it chose, in a line."
    monkeypatch.chdir(tmp_path)
    exact_run(schedule)
    sample_main(["RUN", "--sampler", sampler, "--num", "128", "--save", "a.npy"])
    assert abs(np.load("a.npy").std() / 0.25 - 1) < furthest
    said = capsys.readouterr()
    assert ("--grid uniform" in said.out) == (sampler != "heun") and len(said.out.splitlines()) == 1 + (sampler != "heun")
    assert ("--steps 100" in said.err) == (sampler == "euler-maruyama") and len(said.err.splitlines()) <= 1


def test_levels_that_were_asked_for_are_taken(exact_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exact_run("cosine")
    drawn = {}
    for grid in GRIDS:
        sample_main(f"RUN --sampler unipc --grid {grid} --num 2 --steps 9 --save {grid}.npy --out a.jpg".split())
        drawn[grid] = np.load(f"{grid}.npy")
        assert f"{grid} grid" in capsys.readouterr().out
    sample_main("RUN --sampler unipc --num 2 --steps 9 --save own.npy --out a.jpg".split())
    assert np.array_equal(np.load("own.npy"), drawn["lambda"])
    assert not any(np.array_equal(drawn[a], drawn[b]) for a in GRIDS for b in GRIDS if a < b)
    for words in ("--no-corrector", "--order 1"):
        sample_main(f"RUN --sampler unipc --num 2 --steps 9 --save other.npy --out a.jpg {words}".split())
        assert not np.array_equal(np.load("other.npy"), drawn["lambda"])


def test_enough_levels_bring_no_warning(exact_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exact_run("edm")
    sample_main("RUN --sampler euler-maruyama --steps 100 --num 2".split())
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- runs, exported folders, shipped models

def drawn(words, path):
    "The images that flaxdiff-sample saves."
    sample_main([str(word) for word in (*words, "--num", 3, "--steps", 4, "--out", path / "a.png", "--save", path / "a.npy")])
    return np.load(path / "a.npy")


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    "A finished run on a folder of pictures that is gone: its folder."
    base = tmp_path_factory.mktemp("moved")
    (base / "pictures").mkdir()
    for i in range(20): PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(base / "pictures" / f"{i}.png")
    config = dataclasses.replace(TINY, dataset=f"folder:{base / 'pictures'}", image_size=8, channels=1, steps=10)
    train_run(config, base / "run", progress=False)
    shutil.rmtree(base / "pictures")
    return base / "run"


def test_a_run_whose_pictures_are_gone_samples_and_is_exported(moved, tmp_path):
    images = drawn([moved], tmp_path)
    trainer = load_run(moved)
    assert np.array_equal(images, sampler_of(trainer, "dpm-solver++").generate_images(3, 4, rng=0))
    export_main([str(moved), str(tmp_path / "model")])
    assert np.array_equal(drawn([tmp_path / "model"], tmp_path), images)


def test_sampling_and_exporting_need_neither_data_nor_optimizer(finished, tmp_path, monkeypatch):
    def never(*args, **options): raise AssertionError("not needed")
    for name in ("open_data", "make_optimizer", "DiffusionTrainer"): monkeypatch.setattr(f"flaxdiff.cli.train.{name}", never)
    a = drawn([finished[0]], tmp_path)
    export_main([str(finished[0]), str(tmp_path / "model")])
    assert np.array_equal(drawn([tmp_path / "model"], tmp_path), a)


def test_any_checkpoint_can_be_drawn_from(finished, tmp_path):
    steps = sorted(int(path.name) for path in (finished[0] / "checkpoints").iterdir() if path.name.isdigit())
    images = {step: drawn([finished[0], "--checkpoint", step], tmp_path) for step in steps}
    assert len(steps) > 1 and not np.array_equal(images[steps[0]], images[steps[-1]])
    assert np.array_equal(drawn([finished[0]], tmp_path), images[steps[-1]])
    assert any(np.array_equal(drawn([finished[0], "--checkpoint", "best"], tmp_path), other) for other in images.values())
    export_main([str(finished[0]), str(tmp_path / "early"), "--checkpoint", str(steps[0])])
    assert np.array_equal(drawn([tmp_path / "early"], tmp_path), images[steps[0]])
    assert load_model(tmp_path / "early").card["updates"] == str(steps[0])


def test_a_shipped_model_is_drawn_from_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = drawn(["digits"], tmp_path)
    assert np.array_equal(images, load_model("digits").sampler().generate_images(3, 4, rng=0))


def test_what_can_be_drawn_from_is_said(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(sample_main, ["digit"], "RUN must be", capsys)
    refused(sample_main, ["digit"], "digits", capsys)
    refused(sample_main, [""], "RUN", capsys)
    refused(sample_main, ["digits", "--checkpoint", "best"], "--checkpoint", capsys)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    refused(sample_main, ["."], "hidden_size", capsys)
    (tmp_path / "config.json").write_text('{')
    refused(sample_main, ["."], "config.json", capsys)
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    for command, words in ((sample_main, ["run"]), (export_main, ["run", "model"])): refused(command, words, "checkpoint", capsys)
    assert not (tmp_path / "model").exists() and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("words, named", [
    (["RUN", "there"], "path must be a new folder"), (["RUN", ""], "PATH"), (["RUN", "gs://bucket/model"], "PATH"), (["there", "new"], "RUN"), (["digits", "new"], "RUN"), (["", "new"], "RUN"),
    (["RUN"], "PATH"), ([], "RUN"), (["RUN", "new", "--checkpoint", "7"], "--checkpoint"), (["RUN", "new", "--checkpoint", "last"], "--checkpoint"), (["RUN", "new", "--dtype", "int8"], "--dtype"),
    (["RUN", "new", "--card", "MIT"], "--card"), (["RUN", "new", "--card", "=MIT"], "--card"), (["RUN", "new", "--card", "licence="], "--card")])
def test_bad_exports_are_one_line_that_names_the_flag(words, named, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    refused(export_main, [finished[0] if word == "RUN" else word for word in words], named, capsys)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "there"]


def test_an_exported_card_says_how_it_was_made(finished, tmp_path, capsys):
    export_main([str(finished[0]), str(tmp_path / "model"), "--dtype", "float16", "--card", "device=a pocket calculator", "--card", "licence=MIT = fine"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    model = load_model(tmp_path / "model")
    assert {"command", "seed", "updates", "time", "data", "what"} < set(model.card) and model.card["device"] == "a pocket calculator" and model.card["licence"] == "MIT = fine"
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["halved"] == "float16" and model.image_shape == (8, 8, 1)
    again = vars(train_parser().parse_args(train_command(TINY).split()[1:]))
    assert again.pop("out") == "RUN" and TrainConfig(**again) == TINY


def test_a_command_says_every_setting_that_is_not_the_default():
    config = TrainConfig(dataset="folder:my pictures", flip=True, tensorboard=False, features=(8, 16), loss="elbo", clip=0.5, data_dir="/mine", ema_profiles=(0.1,), uncertainty=False)
    line = train_command(config)
    assert "--dataset 'folder:my pictures'" in line and "--flip" in line and "--features 8,16" in line and "--clip 0.5" in line and "--ema-profiles 0.1" in line
    assert "mine" not in line and "tensorboard" not in line and "uncertainty" not in line and "--steps" not in line


# ---------------------------------------------------------------- a teacher

TAUGHT = "--steps 8 --batch-size 8 --checkpoint-every 4 --report-every 4 --sample-every 8 --no-tensorboard --quiet".split()


@pytest.fixture(scope="module")
def taught(finished, tmp_path_factory):
    "A finished student of a copy of the finished run, which is gone."
    base = tmp_path_factory.mktemp("taught")
    shutil.copytree(finished[0], base / "teacher")
    train_main([*TAUGHT, "--distill", str(base / "teacher"), "--out", str(base / "run")])
    shutil.rmtree(base / "teacher")
    return base / "run"


def test_a_student_has_its_teachers_network_and_keeps_it(taught, tmp_path):
    config, model = read_config(taught / "config.json"), open_model(taught)
    assert (config.features, config.heads, config.emb_features, config.image_size) == (TINY.features, 2, 16, 8)
    assert model.is_flow_map and load_model(taught / "teacher").model.module == model.model.module.network
    for steps in (1, 2): sample_main([str(taught), "--steps", str(steps), "--num", "3", "--out", str(tmp_path / "a.png"), "--save", str(tmp_path / f"{steps}.npy")])
    one, two = (np.load(tmp_path / f"{steps}.npy") for steps in (1, 2))
    assert one.shape == (3, 8, 8, 1) and not np.array_equal(one, two)
    assert np.array_equal(one, model.sampler().generate_images(3, 1, rng=0))
    export_main([str(taught), str(tmp_path / "model")])
    again = load_model(tmp_path / "model")
    assert np.array_equal(one, again.sampler("flow-map").generate_images(3, 1, rng=0)) and "--distill" in again.card["command"]
    assert "flow-map" in (tmp_path / "model" / "README.md").read_text() and "features" not in again.card["command"]


def test_a_resumed_student_is_one_never_stopped(taught, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(taught, out)
    for name in ("summary.json", "samples.png", "losses.csv"): (out / name).unlink()
    shutil.rmtree(out / "checkpoints" / "8")
    train_main([*TAUGHT, "--resume", "--out", str(out)])
    assert sha(out) == sha(taught) and load_run(out).state.step == 8


@pytest.mark.parametrize("words, named", [
    ("--features 8", "features"), ("--schedule cosine", "schedule"), ("--predictor v", "predictor"), ("--labels", "labels"), ("--text letters", "text"), ("--loss p2", "loss"), ("--augment 0.1", "augment"),
    ("--network dit", "network"), ("--image-size 16", "image_size"), ("--sigma-data 0.3", "sigma_data"), ("--dropout 0.1", "dropout"), ("--distill nobody", "distill"), ("--distill-by magic", "--distill-by")])
def test_what_contradicts_a_teacher_is_named(words, named, tmp_path, capsys):
    status, line = error_of(train_main, ["--distill", "digits", *words.split(), "--out", tmp_path / "run"], capsys)
    assert status == 2 and named in line and not (tmp_path / "run").exists()


def test_a_teacher_with_labels_has_a_student_with_labels():
    from flaxdiff.cli.teacher import open_teacher, settings_of, with_teacher
    for name, due in (("fashion", {"labels": True, "classes": 10, "image_size": 28}), ("digits-text", {"labels": False, "text": load_model("digits-text").encoder})):
        settings = settings_of(open_teacher(name))
        assert due.items() <= settings.items()
    assert with_teacher({"distill": "fashion", "labels": True}, open_teacher("fashion"))["classes"] == 10


def test_a_student_costs_its_teachers_calls_too():
    from flaxdiff.cli.teacher import open_teacher, with_teacher
    teacher = open_teacher("digits")
    config = make_config(with_teacher({"distill": "digits"}, teacher))
    plain, student = measure_cost(dataclasses.replace(config, distill=None)), measure_cost(config, teacher)
    assert student.held == plain.parameters < student.parameters
    assert 1.9 < student.flops / plain.flops < 2.2, "a way forward and back, 3, and three ways forward more: 6 of 3"
    flow = measure_cost(dataclasses.replace(config, distill_by="mean-flow"), teacher)
    assert flow.flops > plain.flops and flow.waiting > 0


def test_a_distilled_model_is_refused_as_a_teacher_and_words_without_one(taught, tmp_path, capsys):
    assert "flow map already" in error_of(train_main, ["--distill", taught, "--out", tmp_path / "run"], capsys)[1]
    assert "--distill MODEL" in error_of(train_main, ["--distill-by", "shortcut", "--out", tmp_path / "run"], capsys)[1]


def test_flags_of_the_other_network_are_refused(tmp_path, capsys):
    for words, named in (("--network dit --features 8", "features"), ("--width 32", "width"), ("--network dit --res-blocks 2", "res_blocks")):
        assert named in error_of(train_main, [*words.split(), "--out", tmp_path / "run"], capsys)[1]


# ---------------------------------------------------------------- longer, and changed

def command(words, out, capsys=None):
    "(what flaxdiff-train says, the configuration that it leaves)."
    train_main([*map(str, words), "--out", str(out), "--quiet"])
    return capsys.readouterr().out if capsys else None, read_config(out / "config.json")


STEADY = [*FLAGS, "--decay", "constant", "--warmup", "2"]


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    "A finished run of 20 updates whose learning rate does not know its end."
    out = tmp_path_factory.mktemp("steady") / "run"
    train_main([*STEADY, "--out", str(out)])
    return out


def sha(out): return json.loads((out / "summary.json").read_text())["params_sha256"]


def test_a_finished_run_made_longer_is_the_long_run(steady, tmp_path, capsys):
    out = tmp_path / "longer"
    train_main([*STEADY, "--steps", "10", "--out", str(out)])
    capsys.readouterr()
    said, config = command(["--resume", "--steps", 20], out, capsys)
    assert "changed steps 10 → 20" in said and config.steps == 20
    assert sha(out) == sha(steady) and (out / "losses.csv").read_text() == (steady / "losses.csv").read_text()
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows][-1] == 20 and len({row["step"] for row in rows}) == len(rows)


def test_the_rise_is_not_stretched(finished, tmp_path):
    "A tenth of the run as it was begun, whatever it becomes."
    assert change_config(TINY, {"steps": 200}).warmup == 2 and change_config(TINY, {"steps": 200, "seed": 0}).steps == 200
    assert change_config(dataclasses.replace(TINY, warmup=5), {"steps": 200}).warmup == 5
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    _, config = command(["--resume", "--steps", 22], out)
    assert (config.steps, config.warmup) == (22, 2) and json.loads((out / "summary.json").read_text())["steps"] == 22


def test_what_may_change_is_changed_and_written_down(steady, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(steady, out)
    words = "--steps 24 --checkpoint-every 4 --max-to-keep 2 --report-every 2 --sample-every 4 --no-tensorboard --accumulate 2 --remat --max-skipped 5".split()
    _, config = command(["--resume", *words], out)
    assert (config.checkpoint_every, config.max_to_keep, config.report_every, config.sample_every, config.accumulate, config.remat, config.tensorboard) == (4, 2, 2, 4, 2, True, False)
    assert {"20", "24"} <= {path.name for path in (out / "checkpoints").iterdir()} and (out / "samples" / "00000024.png").exists()


OTHER = {int: 7, float: 0.25, bool: None, str: "other", tuple: (24,)}


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_one_table_says_what_may_change(field):
    "All else is refused, by name, with what came and what the run has."
    value = not field.default if field.type is bool else OTHER[kind_of(field.type)]
    given = {field.name: value}
    if field.name in MAY_CHANGE: assert getattr(change_config(TINY, given), field.name) == value
    else:
        with pytest.raises(ValueError) as e: change_config(TINY, given)
        assert str(e.value).startswith(f"{field.name}={value}") and f"{field.name}={getattr(TINY, field.name)}" in str(e.value)
        assert ("--new-optimizer" in str(e.value)) == (field.name in WITH_NEW_OPTIMIZER)
    if field.name in WITH_NEW_OPTIMIZER: assert getattr(change_config(TINY, given, 20), field.name) == value


def test_a_finished_run_is_left_alone_and_says_so(steady, capsys):
    before = {p: p.stat().st_mtime_ns for p in steady.rglob("*")}
    said, _ = command(["--resume", "--report-every", 3], steady, capsys)
    assert "finished" in said and "--steps" in said
    refused(train_main, ["--out", steady, "--resume", "--new-optimizer"], "--steps", capsys)
    said, _ = command(["--resume", "--steps", 10], steady, capsys)
    assert "finished" in said
    assert before == {p: p.stat().st_mtime_ns for p in steady.rglob("*")}


def test_a_fresh_optimizer_only_by_name(steady, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(steady, out)
    refused(train_main, ["--out", out, "--resume", "--steps", "24", "--learning-rate", "1e-4"], "--new-optimizer", capsys)
    refused(train_main, ["--out", tmp_path / "none", "--new-optimizer"], "--resume", capsys)
    words = ["--resume", "--steps", 24, "--new-optimizer", "--learning-rate", 1e-4, "--clip", 1]
    said, config = command(words, out, capsys)
    assert (config.optimizer_start, config.learning_rate, config.clip, config.warmup) == (20, 1e-4, 1, None)
    assert "learning_rate 0.002 → 0.0001" in said
    # Killed before its first checkpoint of its own, it goes on the same.
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "24")
    refused(train_main, ["--out", again, "--resume", "--steps", "10"], "--steps", capsys)
    command(["--resume"], again)
    assert sha(again) == sha(out)
    trainer, _, _, done = restore_run(config, out)
    assert done == 24 and trainer.steps_done == 24 and len(trainer.losses) == 24


def pictures(folder, n=20, size=8):
    "A folder of n small grey pictures."
    folder.mkdir(parents=True)
    greys = np.random.default_rng(0).integers(0, 256, (n, size, size), np.uint8)
    for i, grey in enumerate(greys): PIL.Image.fromarray(grey).save(folder / f"{i:03d}.png")
    return folder


def test_the_pictures_may_move(tmp_path, capsys):
    here, there, out = pictures(tmp_path / "here"), tmp_path / "there", tmp_path / "run"
    size = ["--image-size", 8, "--channels", 1, "--recipe", "digits"]
    command([*FLAGS, *size, "--steps", 4, "--dataset", f"folder:{here}"], out)
    here.rename(there)
    refused(train_main, ["--out", out, "--resume", "--steps", "6", "--dataset", "digits"], "--dataset", capsys)
    _, config = command(["--resume", "--steps", 6, "--dataset", f"folder:{there}"], out)
    assert config.dataset == f"folder:{there}" and json.loads((out / "summary.json").read_text())["steps"] == 6


def test_high_and_wide_pictures_with_captions(tmp_path, capsys):
    "Cut to a few shapes, read by a process, their captions encoded once; how they are read may change later, what is cut may not."
    folder, cache, out = pictures(tmp_path / "pictures", 24, 32), tmp_path / "cache", tmp_path / "run"
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        if i % 2: PIL.Image.open(path).crop((0, 0, 32, 14)).save(path)
        path.with_suffix(".txt").write_text(f"picture {i}")
    words = [*STEADY, "--image-size", 16, "--channels", 1, "--recipe", "digits", "--batch-size", 8, "--steps", 4, "--text", "letters,tokens=4",
             "--dataset", f"folder:{folder}", "--crop", "bucket", "--caption-cache", cache]
    command([*words, "--workers", 1], out)
    assert list(cache.rglob("*.npz"))
    told = json.loads((out / "summary.json").read_text())
    assert told["steps"] == 4 and np.isfinite(told["loss"])
    assert change_config(read_config(out / "config.json"), {"workers": 0, "caption_cache": None}).workers == 0
    refused(train_main, ["--out", out, "--resume", "--steps", "8", "--crop", "random"], "--crop", capsys)
    refused(train_main, ["--out", tmp_path / "no", "--dataset", "digits", "--crop", "bucket"], "--crop", capsys)
    refused(train_main, ["--out", tmp_path / "no", "--caption-cache", "here"], "--caption-cache", capsys)
    for bad, named in ((["--features", "8,8,8,8,8"], "--features"), (["--network", "dit", "--patch-size", 3], "--patch-size")):
        refused(train_main, ["--out", tmp_path / "no", "--dataset", f"folder:{folder}", "--crop", "bucket", *bad], named, capsys)


def arrays(path, n, seed=0):
    "An .npz file of n small grey pictures."
    np.savez(path, images=np.random.default_rng(seed).integers(0, 256, (n, 8, 8), np.uint8))
    return f"npz:{path}"


def test_other_data_are_held_out_and_a_measure_of_ones_own_is_logged(tmp_path, capsys):
    "From the command alone: its numbers stand in metrics.csv, and the held-out loss by level in the summary."
    measure, out = tmp_path / "measure.py", tmp_path / "run"
    measure.write_text("def ink(denoiser):\n    import jax.numpy as jnp\n    return {'ink': jnp.mean(denoiser(jnp.zeros((2, 8, 8, 1)), 0.5)[0])}\n")
    data, held = arrays(tmp_path / "a.npz", 40), arrays(tmp_path / "b.npz", 12, seed=1)
    words = [*STEADY, "--recipe", "digits", "--steps", 10, "--dataset", data]
    command([*words, "--validation-split", held, "--evaluate", f"{measure}:ink"], out)
    rows = [row for row in csv.DictReader((out / "metrics.csv").open()) if row["validation_loss"]]
    assert [row["step"] for row in rows] == ["5", "10"] and all(np.isfinite(float(row["ink"])) for row in rows), "as often as checkpoints are written"
    told = json.loads((out / "summary.json").read_text())
    levels = told["validation_levels"]
    assert told["validation_loss"] == float(rows[-1]["validation_loss"]) and all(row["from"] < row["to"] and row["loss"] >= 0 for row in levels)
    assert [row["from"] for row in levels] == sorted(row["from"] for row in levels) and min(row["loss"] for row in levels) <= told["validation_loss"] <= max(row["loss"] for row in levels)
    assert "validation_levels" not in rows[0] and (out / "levels.png").exists()
    for place, said in (("measure", "FILE.py:FUNCTION"), (f"{tmp_path}/none.py:ink", "cannot be read"), (f"{measure}:jot", "none called jot"), ("no_such_module:f", "cannot be read")):
        refused(train_main, ["--out", tmp_path / "no", *words, "--evaluate", place], "--evaluate", capsys)


def test_a_split_of_the_data_is_held_out(tmp_path, capsys):
    "Trained on one part of MNIST's files and measured on the other; never on both."
    folder, out = tmp_path / "idx", tmp_path / "run"
    folder.mkdir()
    for name, n in (("train", 30), ("t10k", 7)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 8, 8), np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + np.array(pixels.shape, ">u4").tobytes() + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + np.array([n], ">u4").tobytes() + bytes(i % 3 for i in range(n)))
    (folder / "label_names.txt").write_text("Schuh\na hat, red\nbag\n")
    words = [*STEADY, "--recipe", "digits", "--steps", 4, "--labels", "--dataset", f"idx:{folder}"]
    for extra, named in ((["--validation-split", "test"], "--split"), (["--validation-split", "test", "--split", "test"], "--split"), (["--validation-split", "elsewhere", "--split", "train"], "--split"),
                         (["--validation-split", "test", "--split", "train", "--validation", 0.1], "--validation"), (["--validation-split", ""], "--validation-split")):
        refused(train_main, ["--out", tmp_path / "no", *words, *extra], named, capsys)
    _, config = command([*words, "--split", "train", "--validation-split", "test"], out)
    assert open_data(config)[1] == 30 and len(held_out(config)["image"]) == 7
    with pytest.raises(ValueError, match="must have the labels of the data"): held_out(config, label_names=["shoe", "shirt"])
    assert "validation_loss" in json.loads((out / "summary.json").read_text())

    # The run has the names of its classes, and so has its model, unless it is told others.
    assert open_model(out).label_names == ("Schuh", "a hat, red", "bag")
    export_main([str(out), str(tmp_path / "named")])
    export_main([str(out), str(tmp_path / "renamed"), "--label-names", "shoe,hat"])
    assert [load_model(tmp_path / name).label_names for name in ("named", "renamed")] == [("Schuh", "a hat, red", "bag"), ("shoe", "hat")]
    refused(export_main, [out, tmp_path / "none", "--label-names", "a,b,c,d"], "--label-names", capsys)
    (out / "label_names.json").write_text("null")
    with pytest.raises(ValueError, match="label_names.json must hold a list of names"): open_model(out)


def test_what_lies_elsewhere_today_is_the_same(tmp_path):
    "The place of data or of an encoder may change, its kind may not."
    config = dataclasses.replace(TINY, text="clip:/here", validation_split="npz:/a", dataset="npz:/b")
    moved = {"text": "clip:/there", "validation_split": "npz:/c", "dataset": "npz:/d"}
    assert change_config(config, moved) == dataclasses.replace(config, **moved)
    for name, value in {"text": "letters", "validation_split": "folder:/a", "split": "train"}.items():
        with pytest.raises(ValueError, match=f"^{name}="): change_config(config, {name: value})


@pytest.mark.parametrize("recipe, millions", [("small28", 33), ("photos64", 33), ("photos128", 130)])
def test_a_transformer_has_the_size_of_its_recipe(recipe, millions):
    "DiT-S and DiT-B of Peebles & Xie (2023, table 1), with as many tokens as theirs; a flag goes before it."
    size = {"small28": 28, "photos64": 64, "photos128": 128}[recipe]
    config = make_config({"network": "dit", "dataset": "folder:x", "image_size": size})
    check_config(config)
    assert config.recipe == recipe and 0.9 < measure_cost(config).parameters / 1e6 / millions < 1.1 and (size // config.patch_size) ** 2 in (196, 256)
    assert make_config({"network": "dit", "dataset": "folder:x", "image_size": size, "width": 96}).width == 96


def test_rows_with_new_columns(finished, tmp_path):
    "An evaluation adds to a row: the table gets a column, and older rows nothing in it."
    history = [{"step": 1, "loss": 0.5, "gradient": None, "skipped": 0, "images_per_second": 9.0}]
    trainer = load_run(finished[0])
    trainer.record.history = history
    record = RunRecord(dataclasses.replace(TINY, tensorboard=False, sample_every=1000), tmp_path, trainer)
    history.append({**history[0], "step": 2, "validation_loss": 0.25})
    record(history[-1])
    history.append({**history[0], "step": 3})
    record(history[-1])
    record.close()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["validation_loss"], row["gradient"]) for row in rows] == [("1", "", ""), ("2", "0.25", ""), ("3", "", "")]


# ---------------------------------------------------------------- recipes, memory, time

@pytest.mark.parametrize("given, name", [
    ({}, "digits"), ({"dataset": "digits", "image_size": 8}, "digits"), ({"dataset": "folder:x", "image_size": 28}, "small28"),
    ({"dataset": "folder:x"}, "photos64"), ({"dataset": "oxford_flowers102", "image_size": 64}, "photos64"),
    ({"dataset": "folder:x", "image_size": 65}, "photos128"), ({"dataset": "folder:x", "recipe": "digits"}, "digits")])
def test_a_recipe_suits_the_data(given, name):
    config = make_config(given)
    assert config.recipe == name and all(getattr(config, field) == value for field, value in RECIPES[name].items())


def test_flags_go_before_a_recipe_and_are_written_down():
    config = make_config({"recipe": "photos64", "dataset": "folder:x", "steps": 7813, "augment": 0.0})
    assert (config.steps, config.augment, config.warmup, config.batch_size) == (7813, 0, 390, 256)
    assert make_config({"recipe": "photos64", "steps": 10 ** 7}).warmup == 39_062
    assert make_config(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="recipe must be one of digits, .*photo"): make_config({"recipe": "photo"})
    with pytest.raises(ValueError, match="optimizer_start"): make_config({"optimizer_start": 5})
    with pytest.raises(ValueError, match="recipe=digits contradicts"): merge_settings(dataclasses.asdict(config), {"recipe": "digits"})


@pytest.mark.parametrize("name, millions", [("digits", 0.56), ("small28", 2.5), ("photos64", 60), pytest.param("photos128", 420, marks=pytest.mark.slow)])
def test_recipes_are_of_the_published_size(name, millions):
    "About: the published networks have 61.8 and 422 million parameters."
    config = make_config({"recipe": name, "dataset": "digits" if name == "digits" else "folder:x", "image_size": {"small28": 28, "photos128": 128}.get(name)})
    check_config(config)
    assert 0.5 < measure_cost(config).parameters / 1e6 / millions < 1.5


def test_flops_are_counted_in_products_convolutions_and_loops():
    import jax
    import jax.numpy as jnp
    def count(f, *shapes): return program_flops(jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)).jaxpr)
    assert count(jnp.matmul, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
    def convolve(x, w): return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count(convolve, (2, 8, 8, 3), (3, 3, 3, 7)) == 2 * 2 * 8 * 8 * 7 * 3 * 3 * 3
    def loop(x, w): return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w), None), x, None, length=6)[0]
    assert count(loop, (4, 4), (4, 4)) == 6 * 2 * 4 ** 3


def test_a_hundred_photographs_at_the_defaults_say_at_once_what_would_fit(tmp_path, monkeypatch, capsys):
    pictures(tmp_path / "photos", 3, 64)
    for module in (training, costing): monkeypatch.setattr(module, "machine_memory", lambda: 24e9)
    words = ["--dataset", f"folder:{tmp_path / 'photos'}", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as e: train_main([str(word) for word in words])
    said = capsys.readouterr().err
    assert e.value.code == 2 and len(said.splitlines()) == 1 and "--batch-size" in said and "24 GB" in said and not (tmp_path / "run").exists()
    parts, fits = (int(re.search(rf"--{flag} (\d+)", said)[1]) for flag in ("accumulate", "batch-size"))
    config = make_config({"dataset": "folder:x"})
    cost = measure_cost(config)
    check_fits(cost, dataclasses.replace(config, accumulate=parts))
    check_fits(cost, dataclasses.replace(config, batch_size=fits))
    assert 256 % parts == 0
    for change in ({"accumulate": parts // 2}, {"batch_size": 2 * fits}):
        with pytest.raises(ValueError, match="24 GB"): check_fits(cost, dataclasses.replace(config, **change))
    monkeypatch.setattr(costing, "machine_memory", lambda: 1e9)
    with pytest.raises(ValueError, match="features.*smaller network"): check_fits(cost, config)


def test_a_run_says_how_long_it_will_take(tmp_path, capsys):
    "Elsewhere, as an estimate, before it begins; and here, once it is measured; and again where it goes on."
    train_main([*(word for word in FLAGS if word != "--quiet"), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out.splitlines()
    (before,), (after,) = ([line for line in said if line.startswith(start)] for start in ("20 updates", "here: "))
    assert all(word in before for word in ("an H100", "a TPU v4-8", "estimated")) and said.index(before) < said.index(after)
    assert "images/s" in after and "to go" in after


@pytest.mark.parametrize("seconds, words", [(0, "0 s"), (40, "40 s"), (119, "119 s"), (120, "2 min"), (12_600, "3.5 h"), (691_200, "8 days")])
def test_times_in_words(seconds, words): assert in_words(seconds) == words


# ---------------------------------------------------------------- signals, from the first moment to the last

def interrupt(monkeypatch, name):
    "SIGTERM comes whenever a function of the command is called."
    before = getattr(training, name)
    def call(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return before(*args, **kwargs)
    monkeypatch.setattr(training, name, call)


@pytest.mark.parametrize("name", ["read_settings", "settle", "open_data", "build_trainer"])
def test_a_signal_before_the_first_update_stops_without_a_loss(name, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, name)
        train_main(["--config", str(finished[0] / "config.json"), "--out", str(out), "--quiet"])
    assert "stopped as asked" in capsys.readouterr().out and not list(out.glob("checkpoints/[0-9]*")) and not (out / "summary.json").exists()
    train_main(["--config", str(finished[0] / "config.json"), "--out", str(out), "--quiet", "--resume"])
    assert sha(out) == finished[1]["params_sha256"]


@pytest.mark.parametrize("name", ["_summarise", "save_grid", "write_json"])
def test_a_signal_while_the_last_pictures_are_drawn_lets_them_be_drawn(name, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "summary.json").unlink()
    with monkeypatch.context() as patch:
        interrupt(patch, name)
        train_main(["--out", str(out), "--quiet", "--resume"])
    said = capsys.readouterr().out
    if name == "write_json": assert "stopped as asked" in said  # config.json's, before anything is trained
    else: assert "20 steps" in said and (out / "samples.png").exists() and sha(out) == finished[1]["params_sha256"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_exit_statuses_are_in_the_manual():
    text = " ".join(train_parser().format_help().split())
    assert "Exit status: 0 finished, or stopped by a signal and saved; 1 the run could not go on; 2 a flag is wrong" in text


def test_a_second_ctrl_c_is_one_line(monkeypatch, tmp_path, capsys):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(training, "settle", interrupted)
    status, line = error_of(train_main, ["--out", tmp_path / "run"], capsys)
    assert (status, line) == (130, "error: interrupted")


@pytest.mark.parametrize("given, needed", [({"classes": 12}, "--labels"), ({"condition_dropout": 0.2}, "--labels or --text"), ({"evaluate_every": 7}, "--validation")])
def test_settings_that_nothing_would_look_at_are_refused(given, needed):
    (name,) = given
    with pytest.raises(ValueError, match=f"^{name}=.* needs {needed}"): make_config(given)
    asked = {"--labels": {"labels": True}, "--labels or --text": {"text": "letters"}, "--validation": {"validation": 0.1}}[needed]
    assert getattr(make_config({**given, **asked}), name) == given[name]


def test_memory_is_said_before_a_run_begins():
    config = make_config({"dataset": "digits"})
    assert re.search(r"here: [\d.]+ GB on each device", describe_cost(measure_cost(config), config))
