"""The commands: what a run leaves, that it can be repeated and resumed to the bit, and what wrong flags say."""
import dataclasses
import json
import shutil

import numpy as np
import pytest

from flaxdiff.training import TrainConfig, fingerprint, load_run, read_config, sample_main, train_main, train_parser, train_run

TINY = TrainConfig(steps=20, batch_size=16, features=(8,), attention_levels=1, heads=2, emb_features=16, checkpoint_every=5)
FLAGS = "--steps 20 --batch-size 16 --features 8 --heads 2 --emb-features 16 --checkpoint-every 5 --quiet".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished tiny run: (folder, summary)."
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train_run(TINY, out, progress=False)


def error_of(command, words, capsys):
    "(exit status, the line on stderr) of a command that must fail."
    with pytest.raises(SystemExit) as e: command([str(w) for w in words])
    return e.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_leaves_its_whole_record(finished):
    out, summary = finished
    assert {"checkpoints", "config.json", "losses.csv", "samples.png", "summary.json"} == {p.name for p in out.iterdir()}
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 20 and summary["devices"] >= 1 and summary["seconds"] > 0
    losses = np.loadtxt(out / "losses.csv", delimiter=",", skiprows=1)
    assert losses[:, 0].tolist() == list(range(1, 21))
    assert summary["loss"] == pytest.approx(losses[-2:, 1].mean(), rel=1e-12)
    assert read_config(out / "config.json") == TINY
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
    for step in (15, 20): shutil.rmtree(out / "checkpoints" / str(step))
    summary = train_run(TINY, out, resume=True, progress=False)
    assert {k: v for k, v in summary.items() if k != "seconds"} == {k: v for k, v in finished[1].items() if k != "seconds"}
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
