"""The commands: what a run leaves, that it can be repeated and resumed to the bit, and what wrong flags say."""
import csv
import dataclasses
import json
import shutil
import struct

import numpy as np
import pytest

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
    assert float(rows[0]["loss"]) == pytest.approx(losses[:4, 1].mean()) and all(float(r["images_per_second"]) > 0 and int(r["skipped"]) == 0 for r in rows)
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["00000010.png", "00000020.png"]
    assert summary["skipped"] == 0 and summary["images_per_second"] > 0
    state = load_run(out).state
    assert (fingerprint(state.params), fingerprint(state.ema_params)) == (summary["params_sha256"], summary["ema_sha256"])


def test_the_command_repeats_the_function_to_the_bit(finished, tmp_path, capsys):
    train_main([*FLAGS, "--out", str(tmp_path / "again")])
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
    timeless = lambda folder: [row.rsplit(",", 1)[0] for row in (folder / "metrics.csv").read_text().splitlines()]
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
