"""Nothing lost: runs that are killed, told to stop, filled to the last byte or damaged on disk end with the bits of a run that was left alone."""
import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxdiff.checkpoints import CheckpointError, OtherNetwork, finish_checkpoints, load_checkpoint, open_checkpoints, put_aside, save_checkpoint
from flaxdiff.trainer import TrainingDiverged
from flaxdiff.training import load_run, train_main, train_run
from test_commands import FLAGS, TINY
from test_trainer import fit, make, pictures, same_bits, stream


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder of a run that nothing happened to."
    out = tmp_path_factory.mktemp("whole") / "run"
    train_run(TINY, out, progress=False)
    return out


def bits(out):
    "What two runs are compared by: every loss, and the fingerprints."
    summary = json.loads((out / "summary.json").read_text())
    return (out / "losses.csv").read_text(), summary["params_sha256"], summary["ema_sha256"], summary["loss"], summary["steps"]


def kept(folder): return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
def halves(folder): return list(folder.glob("*.orbax-checkpoint-tmp*"))
def files_of(folder): return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
def flip(path, place, bit=4): path.write_bytes((data := path.read_bytes())[:place] + bytes([data[place] ^ bit]) + data[place + 1:])
def cut(path): os.truncate(path, path.stat().st_size // 2)


# ---------------------------------------------------------------- real processes

class Process:
    "flaxdiff-train as a process of its own, forked from one that has imported it already."
    def __init__(self, out, *words):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["flaxdiff.training", "sklearn.datasets"])
        self.out, self.log = out, out.with_suffix(".log")
        self.process = context.Process(target=command, args=(self.log, [*FLAGS, "--out", str(out), *words]))
        self.process.start()

    def signal(self, number): os.kill(self.process.pid, number)
    def alive(self): return self.process.exitcode is None
    def wait(self): self.process.join(300); return self.process.exitcode
    def kill(self): self.signal(signal.SIGKILL); return self.wait()

    def until(self, happened):
        "Wait for something to be true while the process lives."
        while self.alive() and not happened(): time.sleep(0.0005)
        return self.alive()

    def kill_in_a_write(self):
        "kill -9 while half of a checkpoint lies there; whether that succeeded before the run was over."
        folder = self.out / "checkpoints"
        while self.until(lambda: halves(folder)):
            self.signal(signal.SIGSTOP)  # hold still, and look again
            if halves(folder): return self.kill() == -signal.SIGKILL
            self.signal(signal.SIGCONT)
        return False


def command(log, words):
    "What the process does: its output goes to a file."
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    train_main(words)


def test_killed_while_it_writes(whole, tmp_path):
    "kill -9 while half a checkpoint lies there, then --resume: the same losses and the same fingerprints; the half hinders nothing."
    out = tmp_path / "run"
    for attempt in range(5):
        shutil.rmtree(out, ignore_errors=True)
        if Process(out).kill_in_a_write(): break
    assert halves(out / "checkpoints")
    last = Process(out, "--resume")
    assert last.wait() == 0, last.log.read_text()
    assert bits(out) == bits(whole) and not halves(out / "checkpoints") and kept(out / "checkpoints") == kept(whole / "checkpoints")
    assert "Traceback" not in last.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_again_and_again_at_random(whole, tmp_path, seed):
    "At moments drawn at random from its first on, some in the middle of a write, until it is left alone."
    rng, out, kills = np.random.default_rng(seed), tmp_path / "run", 0
    for _ in range(6):
        process, end = Process(out, "--resume"), time.monotonic() + rng.uniform(0, 8)
        if not process.until(lambda: time.monotonic() > end): break
        kills += process.kill_in_a_write() if rng.random() < 0.4 else process.kill() == -signal.SIGKILL
    process = Process(out, "--resume")
    assert process.wait() == 0, process.log.read_text()
    assert kills and bits(out) == bits(whole)


def test_told_to_stop_it_saves_and_says_how_to_go_on(whole, tmp_path):
    "SIGTERM, to the real command: saved at that very update, status 0; resumed, the same bits."
    out = tmp_path / "run"
    words = [sys.executable, "-c", "from flaxdiff.training import train_main; train_main()", *FLAGS, "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "checkpoints" / "5").exists(): time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "--resume" in said and str(out) in said and not (out / "summary.json").exists()
    assert max(kept(out / "checkpoints")) >= 5 and not halves(out / "checkpoints")
    train_main([*FLAGS, "--out", str(out), "--resume"])
    assert bits(out) == bits(whole)


def test_sigterm_loses_no_update(tmp_path):
    "The checkpoint is of the update that was being made, wherever that was (the eighth batch is read for the seventh); the handler that was there before is there again."
    before = signal.getsignal(signal.SIGTERM)
    def data():
        for i in range(100):
            if i == 7: os.kill(os.getpid(), signal.SIGTERM)
            yield pictures(seed=i)
    trainer = make(checkpoint_dir=tmp_path / "c", checkpoint_every=5)
    fit(trainer, data(), 50)
    assert trainer.preempted and kept(tmp_path / "c") == [5, 7] and int(trainer.state.step) == 7 == len(trainer.losses)
    assert signal.getsignal(signal.SIGTERM) is before and not trainer.checkpoints.is_saving_in_progress()


# ---------------------------------------------------------------- damage

def damaged_copy(whole, tmp_path):
    "The finished run as it lay there before its summary was written, and its newest checkpoint."
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("summary.json", "samples.png", "losses.csv"): (out / name).unlink()
    return out, out / "checkpoints" / "20"


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(whole, tmp_path, caplog, capfd):
    out, newest = damaged_copy(whole, tmp_path)
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    for place in range(0, largest.stat().st_size, 501): flip(largest, place)
    cut(newest / "extra" / "metadata")
    cut(max((p for p in (out / "checkpoints" / "15" / "state" / "d").iterdir()), key=lambda p: p.stat().st_size))
    train_main([*FLAGS, "--out", str(out), "--resume"])
    assert bits(out) == bits(whole) and kept(out / "checkpoints") == kept(whole / "checkpoints")
    assert (out / "checkpoints" / "damaged-20" / "extra" / "metadata").exists() and (out / "checkpoints" / "damaged-15").exists()
    lines = [r.getMessage() for r in caplog.records if r.name == "flaxdiff" and r.levelno >= logging.WARNING]
    assert len(lines) == 2 and all("damaged and passed over" in line and "\n" not in line for line in lines) and "20" in lines[0] and "15" in lines[1]
    assert not [r for r in caplog.records if r.name == "absl" and r.levelno >= logging.WARNING] and "Traceback" not in capfd.readouterr().err


def small(n):
    rng = np.random.default_rng(n)
    return {"step": np.int32(n), "params": {"a": rng.standard_normal((30, 40)).astype(np.float32), "b": jnp.asarray(rng.standard_normal(5), jnp.bfloat16)}}


def write_small(folder, steps=(1, 2), losses=None):
    manager = open_checkpoints(folder)
    for n in steps: save_checkpoint(manager, n, small(n), {"n": n, "values": [0.1, float("nan")], "text": "σ"}, loss=(losses or {}).get(n, 1 / n))
    finish_checkpoints(manager)
    manager.close()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory): return write_small(tmp_path_factory.mktemp("two") / "c")


DAMAGES = {"cut": cut, "emptied": lambda p: os.truncate(p, 0), "deleted": Path.unlink, "swapped": lambda p: p.write_bytes(p.read_bytes()[::-1]),
           **{f"bit at {at:.0%}": (lambda p, at=at: flip(p, int(at * (p.stat().st_size - 1)))) for at in (0, 0.3, 0.5, 0.8, 1)}}


def read_after(folder, tmp_path, damage):
    "Which step is loaded after `damage` was done to the newest; it must be sound, whichever it is."
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    damage(copy)
    manager = open_checkpoints(copy)
    step, state, record = load_checkpoint(manager, small(0))
    put_aside(manager, step)
    same_bits(state, small(step))
    assert record["n"] == step and record["values"][0] == 0.1 and np.isnan(record["values"][1]) and record["text"] == "σ"
    assert kept(copy) == list(range(1, step + 1)) and (copy / "damaged-2").exists() == (step == 1)
    manager.close()
    return step


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_damaged_in_turn_is_noticed_or_does_not_matter(two, tmp_path, damage, caplog):
    "Orbax keeps some files that it does not read again; whatever is loaded is bit for bit what was saved, record and all."
    got = {file: read_after(two, tmp_path, lambda copy: DAMAGES[damage](copy / "2" / file)) for file in files_of(two / "2")}
    passed = [r.getMessage() for r in caplog.records if r.name == "flaxdiff"]
    assert len(passed) == list(got.values()).count(1) >= (1 if damage.startswith("bit") else 3)
    assert all(line.startswith("checkpoint 2 in ") and "damaged" in line for line in passed)
    assert got[Path("extra/metadata")] == 1
    assert not [r for r in caplog.records if r.name in ("absl", "asyncio") and r.levelno >= logging.WARNING], "one fault, one line"


@pytest.mark.slow
def test_any_one_bit_of_arrays_and_record(two, tmp_path):
    "Every 7th byte of every file."
    for file in files_of(two / "2"):
        size = (two / "2" / file).stat().st_size
        got = [read_after(two, tmp_path, lambda copy: flip(copy / "2" / file, place, 1 << place % 8)) for place in range(0, size, 7)]
        if file == Path("extra/metadata"): assert got.count(1) >= 0.95 * len(got), "but for blanks between its two numbers"


def test_orbax_alone_would_not_notice(two, tmp_path):
    "Why there are checksums of our own: a changed number, written by the same library, in a checkpoint that is whole in every other way."
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    other = small(2)
    other["params"]["a"][3, 4] = np.nextafter(other["params"]["a"][3, 4], np.float32(9))
    import orbax.checkpoint as ocp
    shutil.rmtree(folder / "2" / "state")
    with ocp.StandardCheckpointer() as plain: plain.save(folder / "2" / "state", other)
    with ocp.StandardCheckpointer() as plain: np.testing.assert_array_equal(plain.restore(folder / "2" / "state")["params"]["a"], other["params"]["a"])
    assert load_checkpoint(open_checkpoints(folder), small(0))[0] == 1


def test_all_damaged_is_an_error_and_nothing_is_deleted(two, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    for step in "12": cut(folder / step / "extra" / "metadata")
    before = files_of(folder)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .*c is damaged \(2, 1\).*another folder"): load_checkpoint(open_checkpoints(folder), small(0))
    assert files_of(folder) == before


@pytest.mark.parametrize("change, named", [
    (lambda s: s["params"].update(a=np.zeros((30, 41), np.float32)), r"params/a is float32\[30, 40\] there, float32\[30, 41\] here"), (lambda s: s["params"].update(c=np.zeros(2)), "params/c is nothing there"),
    (lambda s: s["params"].pop("b"), r"params/b is bfloat16\[5\] there, nothing here"), (lambda s: s["params"].update(a=np.zeros((30, 40), np.float16)), "float32.*there.*float16.*here")])
def test_another_network_is_said_and_left_alone(two, change, named, caplog):
    before, like = files_of(two), small(0)
    change(like)
    with pytest.raises(OtherNetwork, match=named): load_checkpoint(open_checkpoints(two), like)
    assert issubclass(OtherNetwork, ValueError) and files_of(two) == before and not caplog.records


def test_another_network_is_said_by_the_trainer(tmp_path):
    fit(make(checkpoint_dir=tmp_path / "c"), stream(pictures()), 2)
    for other, channels in ((dict(), 3), (dict(optimizer=optax.sgd(0.1)), 1)):
        trainer = make(checkpoint_dir=tmp_path / "c", **other)
        trainer.initialize(pictures(channels=channels))
        with pytest.raises(ValueError, match="checkpoint_dir=.* another network or optimizer"): trainer.restore()
    assert kept(tmp_path / "c") == [2]


# ---------------------------------------------------------------- a full disk

@contextlib.contextmanager
def file_system(folder, size):
    "A file system of so many KiB, in memory."
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)], capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode: pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip() if done else 'no mount here'}")
    try: yield folder
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)


def free(folder): return shutil.disk_usage(folder).free // 1024
def size_of(folder): return sum(-(-p.stat().st_size // 4096) * 4 for p in folder.rglob("*") if p.is_file())  # KiB, in blocks


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_harms_no_checkpoint(whole, tmp_path, capfd):
    "Status 1 and one line that says folder, step and what to do; the last good checkpoint loads; after making room, the same bits."
    each = size_of(whole / "checkpoints" / "15")
    with file_system(tmp_path / "disk", 20 * each) as disk:
        filler, out = disk / "filler", disk / "run"
        def fill():
            while not (out / "checkpoints" / "5").exists(): time.sleep(0.001)
            filler.write_bytes(bytes(1024 * (free(disk) - each // 2)))  # room for a line or a picture, but for no checkpoint
        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        with pytest.raises(SystemExit) as stopped: train_main([*FLAGS, "--out", str(out)])
        thread.join()
        said = capfd.readouterr().err
        line = [line for line in said.splitlines() if line.startswith("flaxdiff-train: error:")]
        assert stopped.value.code == 1 and len(line) == 1 and not (out / "summary.json").exists()
        good = max(kept(out / "checkpoints"))
        assert f"checkpoint {good + 5} could not be written to {out}" in line[0] and "no space left" in line[0] and f"step {good}, is intact" in line[0]
        assert "absl" not in said and "Event loop" not in said and load_run(out).state.step == good
        filler.unlink()
        train_main([*FLAGS, "--out", str(out), "--resume"])
        assert bits(out) == bits(whole) and not halves(out / "checkpoints")


def test_a_full_disk_is_said_by_step(tmp_path):
    with file_system(tmp_path / "disk", 4000) as disk:
        trainer = make(checkpoint_dir=disk / "c", checkpoint_every=2)
        filler = disk / "filler"
        def data():
            for i in range(100):
                if i == 5: finish_checkpoints(trainer.checkpoints), filler.write_bytes(bytes(1024 * (free(disk) - 8)))
                yield pictures(seed=i)
        with pytest.raises(CheckpointError, match=rf"checkpoint 6 could not be written to {disk}/c .*step 4, is intact: make room, and resume"): fit(trainer, data(), 20)
        assert kept(disk / "c") == [2, 4]
        filler.unlink()
        again = make(checkpoint_dir=disk / "c")
        again.initialize(pictures())
        with pytest.warns(UserWarning, match="anew"): assert again.restore(data()) == 4


# ---------------------------------------------------------------- numbers that are not finite

class Marked(nn.Module):
    "A network that overflows, or whose gradient does, where the batch says so."
    @nn.compact
    def __call__(self, x, temb, mark):
        z, mark = self.param("z", nn.initializers.zeros, ()), mark.max()
        out = nn.Conv(x.shape[-1], (3, 3))(x)
        out = jnp.where(mark == 1, jnp.inf, out)
        return out + jax.lax.cond(mark == 2, lambda z: jnp.sqrt(jnp.abs(z)), lambda z: 0 * z, z)  # √ at 0: finite, its slope is not


def marked(marks):
    "Batches, each with its mark: 0 for a good one."
    for i, mark in enumerate(marks): yield {"image": pictures(seed=i), "mark": np.full((8, 1, 1), mark, np.float32)}


@pytest.mark.parametrize("mark", [1, 2])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(mark):
    marks = [0, 0, mark, 0, mark, mark, 0, 0]
    trainer, before = make(model=Marked(), ema_profiles=(0.1,)), None
    for n, batch in enumerate(marked(marks)):
        before = trainer.state
        loss = float(trainer.train_step(batch))
        assert np.isfinite(loss) == (marks[n] == 0)
        if marks[n]:
            for name in ("params", "ema_params", "profiles", "opt_state"): same_bits(getattr(trainer.state, name), getattr(before, name))
        assert int(trainer.state.step) == n + 1 and int(trainer.state.skipped) == np.count_nonzero(marks[:n + 1])
        assert int(trainer.state.in_a_row) == [0, 0, 1, 0, 1, 2, 0, 0][n]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trainer.state))
    assert not np.array_equal(*(jax.tree.leaves(s.params)[0] for s in (trainer.state, before))), "it goes on"


def test_skipped_updates_survive_a_stop(tmp_path):
    marks = [0, 1, 0, 0, 2, 1, 0, 0]
    whole, first, again = (make(model=Marked(), checkpoint_dir=d) for d in (None, tmp_path / "c", tmp_path / "c"))
    fit(whole, marked(marks), 8)
    fit(first, marked(marks), 6)
    again.initialize(next(marked(marks)))
    with pytest.warns(UserWarning, match="anew"): again.restore(rest := marked(marks))
    for _ in range(6): next(rest)
    fit(again, rest, 2)
    same_bits(again.state, whole.state)
    np.testing.assert_array_equal(again.losses, whole.losses)
    assert int(again.state.skipped) == 3 == np.isnan(again.losses).sum()


def test_too_many_in_a_row_stop_the_run_and_leave_the_last_checkpoint(tmp_path):
    trainer = make(model=Marked(), checkpoint_dir=tmp_path / "c", checkpoint_every=4, max_skipped=3)
    with pytest.raises(TrainingDiverged) as error: fit(trainer, marked([0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]), 12, report_every=1)
    said = str(error.value)
    assert "step 9" in said and "3 updates" in said and "Last checkpoint: step 8" in said and "Loss by noise level" in said and "σ/α" in said
    assert len(trainer.losses) == 9 and int(trainer.state.skipped) == 4
    good = make(model=Marked())
    fit(good, marked([0, 0, 1, 0, 0, 0]), 6)
    same_bits(trainer.state.params, good.state.params)
    finish_checkpoints(trainer.checkpoints)
    again = make(model=Marked(), checkpoint_dir=tmp_path / "c", max_skipped=3)
    again.initialize(next(marked([0])))
    with pytest.warns(UserWarning, match="anew"): assert again.restore(iter([])) == 8
    same_bits(again.state.params, good.state.params)


# ---------------------------------------------------------------- what lies there

def test_the_latest_and_the_best_are_kept_across_restarts(tmp_path):
    "Also where the best was written by another process, and where a loss is no number."
    losses = {1: float("nan"), 2: 0.5, 3: 4.0, 4: 3.0, 5: float("nan"), 6: 2.0, 7: 1.0}
    write_small(tmp_path / "nan", (1, 2, 3, 4, 5), {1: float("nan"), 2: 0.5, 3: 4.0, 4: 3.0, 5: 2.0})
    assert kept(tmp_path / "nan") == [2, 3, 4, 5]
    for steps in ((1, 2, 3), (4, 5), (6, 7)): write_small(tmp_path / "c", steps, losses)
    assert kept(tmp_path / "c") == [2, 5, 6, 7]
    write_small(tmp_path / "c", (8, 9), {8: 0.4, 9: float("inf")})
    assert kept(tmp_path / "c") == [7, 8, 9]


def test_a_reader_does_not_disturb_the_writer(tmp_path):
    "To open the folder, as flaxdiff-sample does, leaves alone what another process is writing; the next writer clears what a killed one left."
    folder = write_small(tmp_path / "c")
    half = folder / "7.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "part").write_text("half")
    reader = open_checkpoints(folder)
    assert load_checkpoint(reader, small(0))[0] == 2
    time.sleep(0.2)
    assert (half / "part").exists()
    write_small(folder, (3,))
    assert not halves(folder) and load_checkpoint(open_checkpoints(folder), small(0))[0] == 3


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    "The arrays may change as soon as `save_checkpoint` is back: what is written is what they were."
    manager, state = open_checkpoints(tmp_path / "c"), {"a": np.full((40, 1000, 100), 2, np.float32)}
    save_checkpoint(manager, 1, state, {})
    state["a"][:] = 1
    finish_checkpoints(manager)
    assert np.all(load_checkpoint(manager, state)[1]["a"] == 2)


def test_a_plain_iterator_is_resumed_with_a_warning(tmp_path):
    fit(make(checkpoint_dir=tmp_path / "c"), stream(pictures()), 3)
    trainer = make(checkpoint_dir=tmp_path / "c")
    trainer.initialize(pictures())
    with pytest.warns(UserWarning, match="step 3.*begin anew"): assert trainer.restore(stream(pictures())) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer.restore() == 3


class Bomb:
    "What a pickle can hold: a call."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (self.mark,)


def test_loading_executes_nothing(two, tmp_path):
    "No file is a pickle; and a pickle in the place of any file is never opened as one."
    mark = str(tmp_path / "exploded")
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert os.path.isdir(mark), "the bomb is real"
    os.rmdir(mark)
    seen, listening = [], [True]
    sys.addaudithook(lambda event, args: seen.append(args) if listening[0] and event == "pickle.find_class" else None)
    for protocol in (0, 2, 5):
        for file in files_of(two / "2"):
            assert not (two / "2" / file).read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"cposix", b"c__builtin__"))
            read_after(two, tmp_path, lambda copy: (copy / "2" / file).write_bytes(pickle.dumps(Bomb(mark), protocol)))
    listening[0] = False
    assert not os.path.exists(mark) and not seen
