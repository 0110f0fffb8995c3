"""Checkpoints that serve people: never called damaged without cause, loadable without anything else, any of them by name, one writer at a time; and a loop that saves before it ends."""
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from flaxdiff.trainer import checkpoints as room
from flaxdiff.trainer.checkpoints import (CheckpointError, FolderInUse, FolderLock, OtherNetwork, by_path, check_folder, checksum, fingerprint,
                                          finish_checkpoints, kind_of, load_average, load_checkpoint, open_checkpoints, put_aside, save_checkpoint)
from flaxdiff.trainer.loop import (DivergenceGuard, PreemptionFlag, RunCheckpoints, TrainingDiverged, TrainingRecord, next_batch,
                                   run_loop)
from test_trainer import fit, make, pictures, same_bits, stream


class State(flax.struct.PyTreeNode):
    "The fields of a `TrainState` that matter here."
    step: object
    params: object
    ema_params: object
    profiles: object
    opt_state: object


def state_of(optimizer=None, width=7, profiles=1, seed=0, step=0):
    "A state of random numbers, its optimizer's memory after one update."
    rng = np.random.default_rng(seed)
    def network(): return {"params": {"Dense_0": {"kernel": jnp.asarray(rng.standard_normal((5, width)), jnp.float32), "bias": jnp.asarray(rng.standard_normal(width), jnp.bfloat16)}}}
    params, optimizer = network(), optimizer or optax.adam(1e-3)
    _, memory = optimizer.update(params, optimizer.init(params), params)
    return State(jnp.int32(step), params, network(), tuple(network() for _ in range(profiles)), memory)


def write(folder, *states, losses=None, **keys):
    "The checkpoints of these states, their numbers being their steps."
    manager = open_checkpoints(folder, max_to_keep=9)
    for state in states: save_checkpoint(manager, int(state.step), state, {"losses": [0.5]}, (losses or {}).get(int(state.step), 1.0))
    finish_checkpoints(manager)
    manager.close()
    return folder


def write_as_before(folder, state, step):
    "A checkpoint of two items, as version 0.3 wrote it."
    manager = open_checkpoints(folder)
    host = jax.tree.map(np.asarray, jax.device_get(state))
    record = {"losses": [0.25], "loss": 0.25, "kinds": by_path(host, lambda x: f"{x.dtype}{list(np.shape(x))}"), "checksums": by_path(host, checksum)}
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(host), extra=ocp.args.JsonSave(room._seal(record))), metrics={"loss": 0.25}, force=True)
    finish_checkpoints(manager)
    manager.close()
    return folder


def names(folder): return sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith("."))
def flip(path, place): path.write_bytes((data := path.read_bytes())[:place] + bytes([data[place] ^ 4]) + data[place + 1:])
def spoil(folder):
    "Change a bit of what is largest in a checkpoint."
    largest = max((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    for place in range(0, largest.stat().st_size, 11): flip(largest, place)


# ---------------------------------------------------------------- never called damaged without cause

ADAM, CLIPPED = optax.adam(1e-3), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
OTHERS = {"adamw": (dict(optimizer=optax.adamw(1e-3)), r"opt_state/2 is nothing there, EmptyState here"),
          "sgd": (dict(optimizer=optax.sgd(0.1)), r"opt_state/0/count is int32\[\] there, nothing here.* and \d+ more"),
          "a clip": (dict(optimizer=CLIPPED), r"opt_state/0 is nothing there, EmptyState here"),
          "width": (dict(width=8), r"ema_params/params/Dense_0/bias is bfloat16\[7\] there, bfloat16\[8\] here"),
          "one average less": (dict(profiles=0), r"profiles is nothing there, tuple here.*profiles/0/params"),
          "one average more": (dict(profiles=2), r"profiles/1/params/Dense_0/bias is nothing there, bfloat16\[7\] here")}


@pytest.mark.parametrize("other", OTHERS)
def test_a_sound_checkpoint_is_never_called_damaged(other, tmp_path, caplog):
    "An older one that would fit is not taken in its stead, and nothing is renamed."
    options, named = OTHERS[other]
    here = state_of(**options)
    folder = write(tmp_path / "c", here.replace(step=jnp.int32(1)), state_of(ADAM, step=2))
    saver = RunCheckpoints(folder)
    with pytest.raises(OtherNetwork, match="another network or optimizer: .*" + named) as error: saver.restore(here)
    assert ("fresh_optimizer=True" in str(error.value)) == (other in ("adamw", "sgd", "a clip")) and not caplog.records
    with pytest.raises(ValueError, match="already holds"): saver.check_own()
    assert names(folder) == ["1", "2"]
    put_aside(saver.manager, 0)
    assert names(folder) == ["1", "2"], "sound ones are never renamed"


def test_by_the_trainer_too(tmp_path):
    fit(make(checkpoint_dir=tmp_path / "c", optimizer=optax.adam(1e-3)), stream(pictures()), 2)
    other = make(checkpoint_dir=tmp_path / "c", optimizer=optax.adamw(1e-3))
    other.initialize(pictures())
    with pytest.raises(OtherNetwork, match="another network or optimizer"): other.restore()
    assert names(tmp_path / "c") == ["2"]


def test_a_fresh_optimizer_takes_the_rest(tmp_path, caplog):
    "Parameters, averages, record and step; the optimizer's state is the one it was given; one line says so."
    old, new = state_of(ADAM, step=2, seed=1), state_of(optax.sgd(0.1, momentum=0.9), step=0, seed=2)
    saver = RunCheckpoints(write(tmp_path / "c", old))
    state, record = saver.restore(new, fresh_optimizer=True)
    same_bits(state.replace(opt_state=()), old.replace(opt_state=()))
    same_bits(state.opt_state, new.opt_state)
    assert record["losses"] == [0.5] and len(caplog.records) == 1 and "optimizer" in caplog.text and "afresh" in caplog.text
    with pytest.raises(OtherNetwork): saver.restore(state_of(optax.sgd(0.1), width=9), fresh_optimizer=True)
    with pytest.raises(ValueError, match="fresh_optimizer must be"): saver.restore(new, fresh_optimizer="no")


def test_trouble_with_reading_is_not_damage(tmp_path, monkeypatch):
    "Too little memory, or no permission: an error, and no other checkpoint in its stead."
    folder = write(tmp_path / "c", state_of(step=1), state_of(step=2))
    manager = open_checkpoints(folder)
    for trouble in (MemoryError("no room"), PermissionError("not yours"), ValueError("PERMISSION_DENIED: tensorstore")):
        def fail(*args, trouble=trouble, **kwargs): raise trouble
        with monkeypatch.context() as patch:
            patch.setattr(manager, "restore", fail)
            with pytest.raises(CheckpointError, match="checkpoint 2 in .* could not be read"): load_checkpoint(manager, state_of())
            put_aside(manager, 0)
    assert names(folder) == ["1", "2"]


@pytest.mark.parametrize("trouble", [TypeError("unexpected keyword"), RuntimeError("no such plugin"), ValueError("format version 9 is not known")])
def test_what_is_not_proven_is_no_damage(trouble, tmp_path, monkeypatch):
    "An error that no sum and no reader of the bytes has raised: said as it is, and nothing is passed over or renamed."
    folder = write(tmp_path / "c", state_of(step=1), state_of(step=2))
    manager = open_checkpoints(folder)
    def fail(*args, **kwargs): raise trouble
    monkeypatch.setattr(manager, "restore", fail)
    with pytest.raises(CheckpointError, match=f"checkpoint 2 in .* could not be read: {type(trouble).__name__}"): load_checkpoint(manager, state_of())
    put_aside(manager, 0)
    assert names(folder) == ["1", "2"]


def test_the_best_of_none_is_said(tmp_path):
    "Where no loss was measured, no checkpoint is the best."
    manager = open_checkpoints(tmp_path / "c")
    for n in (1, 2): save_checkpoint(manager, n, state_of(step=n), {}, loss=float("inf"))
    finish_checkpoints(manager)
    with pytest.raises(ValueError, match="step='best' needs a checkpoint whose loss was measured"): load_checkpoint(manager, state_of(), "best")


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_damaged(tmp_path, monkeypatch, caplog):
    "The run that writes there deletes old ones while others read."
    folder = write(tmp_path / "c", state_of(step=1), state_of(step=2))
    manager, restore = open_checkpoints(folder), ocp.CheckpointManager.restore
    def deleted_before(self, step, **kwargs):
        if step == 2: shutil.rmtree(folder / "2", ignore_errors=True)
        return restore(self, step, **kwargs)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", deleted_before)
    assert load_checkpoint(manager, state_of())[0] == 1 and not caplog.records


def test_keys_and_numbers_come_back_as_what_they_were(tmp_path):
    "A typed random key in an optimizer's memory, as `optax.add_noise` has it; an old kind of key is another state."
    keys = {"typed": jax.random.key(3), "several": jax.random.split(jax.random.key(4), 3), "rbg": jax.random.key(5, impl="rbg"), "raw": jax.random.PRNGKey(6)}
    state = state_of(step=1).replace(opt_state=keys)
    manager = open_checkpoints(write(tmp_path / "c", state))
    got = load_checkpoint(manager, state)[1]
    for name, key in keys.items():
        assert got.opt_state[name].dtype == key.dtype and got.opt_state[name].shape == key.shape
        same_bits(room.to_numpy(got.opt_state[name]), room.to_numpy(key))
    assert jax.random.uniform(got.opt_state["typed"]) == jax.random.uniform(keys["typed"])
    with pytest.raises(OtherNetwork, match="typed is key<fry>.* there, uint32"): load_checkpoint(manager, state.replace(opt_state={**keys, "typed": jax.random.PRNGKey(3)}))


def test_a_run_with_an_optimizer_that_draws(tmp_path):
    "`optax.add_noise` by `fit`: saved, and resumed with the same bits."
    noisy = lambda **options: make(optimizer=optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(1)), optax.sgd(0.1)), **options)
    whole, first, again = noisy(), noisy(checkpoint_dir=tmp_path / "c"), noisy(checkpoint_dir=tmp_path / "c")
    fit(whole, stream(pictures()), 5)
    fit(first, stream(pictures()), 3)
    again.initialize(pictures())
    assert again.restore() == 3
    fit(again, stream(pictures()), 2)
    same_bits((again.state.params, again.losses), (whole.state.params, whole.losses))


# ---------------------------------------------------------------- three items

def test_the_average_lies_apart_and_nothing_lies_twice(tmp_path):
    folder = write(tmp_path / "c", big := state_of(width=40_000, step=3))
    assert {p.name for p in (folder / "3").iterdir() if p.is_dir()} == {"average", "state", "extra"}
    size = lambda path: sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert size(folder / "3" / "average") < 1.1 * bytes_of(big.ema_params) and size(folder / "3" / "state") < 1.05 * (bytes_of(big) - bytes_of(big.ema_params))
    same_bits(load_checkpoint(open_checkpoints(folder), state_of(width=40_000))[1], big)


def test_the_average_alone_needs_nothing_else(tmp_path):
    "In a process that imports the checkpoints' module only; the rest of the checkpoint need not even be there."
    folder = write(tmp_path / "c", state := state_of(step=3))
    shutil.rmtree(folder / "3" / "state")
    params, step = load_average(folder)
    same_bits(params, state.ema_params)
    assert step == 3 and isinstance(params["params"]["Dense_0"]["kernel"], np.ndarray) and params["params"]["Dense_0"]["bias"].dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match="damaged"): load_checkpoint(open_checkpoints(folder), state)


def test_names_with_slashes_and_dots(tmp_path):
    state = {"step": np.int32(1), "ema_params": {"mlp/~/linear_0": {"w": np.ones(3)}, "mlp": {"b.c": np.zeros(2), "it's": np.ones(1)}}, "opt_state": [np.ones(2), (np.zeros(1), {})]}
    manager = open_checkpoints(tmp_path / "c")
    save_checkpoint(manager, 1, state, {})
    finish_checkpoints(manager)
    same_bits(load_average(tmp_path / "c")[0], state["ema_params"])
    same_bits(load_checkpoint(manager, state)[1], state)


def test_the_average_is_checked(tmp_path, caplog):
    folder = write(tmp_path / "c", first := state_of(step=1, seed=1), state_of(step=2, seed=2))
    spoil(folder / "2" / "average")
    params, step = load_average(folder)
    same_bits(params, first.ema_params)
    assert step == 1 and len(caplog.records) == 1 and "checkpoint 2" in caplog.text and "damaged" in caplog.text
    with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* is damaged"): load_average(folder, 2)


def test_checkpoints_of_two_items_still_load(tmp_path):
    state = state_of(CLIPPED, step=4, seed=3)
    folder = write_as_before(tmp_path / "c", state, 4)
    step, got, record = load_checkpoint(open_checkpoints(folder), state_of(CLIPPED))
    same_bits(got, state)
    params, number = load_average(folder)
    same_bits(params, state.ema_params)
    assert step == number == 4 and record["losses"] == [0.25]
    with pytest.raises(OtherNetwork, match="opt_state/1/0/count"): load_checkpoint(open_checkpoints(folder), state_of(optax.sgd(0.1)))
    spoil(folder / "4" / "state")
    for load in (load_average, lambda folder: load_checkpoint(open_checkpoints(folder), state)):
        with pytest.raises(CheckpointError, match="damaged"): load(folder)


def test_any_checkpoint_by_name(tmp_path):
    "A number, the best, the newest; damaged ones are passed over where none was named."
    states = {n: state_of(step=n, seed=n) for n in (2, 4, 6, 8)}
    folder = write(tmp_path / "c", *states.values(), losses={2: 3.0, 4: 1.0, 6: 2.0, 8: float("nan")})
    for step, due in ((None, 8), (6, 6), (np.int64(2), 2), ("best", 4)):
        saver = RunCheckpoints(folder, max_to_keep=9)
        same_bits(saver.restore(state_of(), step)[0], states[due])
        assert load_average(folder, step)[1] == due
    for wrong in (5, -1, "worst", True, 2.0, "4"):
        with pytest.raises(ValueError, match=r"step must be None, 'best' or a checkpoint in .*c \(2, 4, 6, 8\), got"): saver.restore(state_of(), wrong)
        with pytest.raises(ValueError, match="step must be"): load_average(folder, wrong)
    spoil(folder / "4" / "average"), spoil(folder / "4" / "state")
    assert load_average(folder, "best")[1] == 6
    with pytest.raises(CheckpointError, match="checkpoint 4 in .* is damaged"): saver.restore(state_of(), 4)


def test_an_earlier_checkpoint_overwrites_no_later_one(tmp_path):
    "To go on from it in the same folder is refused before anything is trained, and says what to do."
    folder = write(tmp_path / "c", *(state_of(step=n) for n in (2, 4, 6)))
    saver = RunCheckpoints(folder, max_to_keep=9)
    state, _ = saver.restore(state_of(), 2)
    for act in (saver.check_own, lambda: saver.save(state.replace(step=np.int32(3)), {}, 0.0)):
        with pytest.raises(ValueError, match=r"holds later checkpoints \(4, 6\) than step 2.*move them away, or copy 2"): act()
    assert names(folder) == ["2", "4", "6"]
    shutil.copytree(folder / "2", tmp_path / "other" / "2")
    other = RunCheckpoints(tmp_path / "other")
    assert other.restore(state_of())[0].step == 2 and other.save(state.replace(step=np.int32(3)), {}, 0.0)
    spoil(folder / "4"), spoil(folder / "6")
    saver.restore(state_of())
    saver.check_own(), saver.finish()
    assert names(folder) == ["2", "damaged-4", "damaged-6"]


# ---------------------------------------------------------------- names of folders, fingerprints

def test_folders_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for bad, words in (("", "''"), ("  ", "'  '"), (None, "None"), (5, "5"), (b"x", "b'x'"), (tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "file is a file"),
                       ("gs://bucket/run", "address gs://"), ("s3://a", "address"), ("~nobody-of-that-name/x", "nobody"), ("a\0b", "a")):
        for act in (open_checkpoints, RunCheckpoints, lambda folder: check_folder("checkpoint_dir", folder)):
            with pytest.raises(ValueError, match="checkpoint_dir must be") as error: act(bad)
            assert words in str(error.value)
        with pytest.raises(ValueError, match="folder must"): load_average(bad)
    assert RunCheckpoints("~/run").save(state_of(step=1), {}, 0.0) and names(tmp_path / "home" / "run") == ["1"] and not Path("~").exists()
    for nothing, words in ((tmp_path / "none", "there is no"), (tmp_path / "home", "has none yet")):
        with pytest.raises(ValueError, match=f"folder must hold checkpoints, .*{words}"): load_average(nothing)
    assert not (tmp_path / "none").exists() and names(tmp_path) == ["file", "home"]


def test_a_fingerprint_knows_names_shapes_and_dtypes():
    one = {"a": np.ones((2, 3), np.float32)}
    others = ({"a": np.ones((3, 2), np.float32)}, {"b": np.ones((2, 3), np.float32)}, {"a": np.ones((2, 3), np.float32).view(np.int32)}, {"a": {"a": np.ones((2, 3), np.float32)}},
              {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}, {"a": np.nextafter(np.ones((2, 3), np.float32), np.float32(2))})
    assert len({fingerprint(tree) for tree in (one, *others)}) == 7
    assert fingerprint({"a": jnp.ones((2, 3))}) == fingerprint(one) and fingerprint(jax.random.key(1)) != fingerprint(jax.random.key(2))
    assert fingerprint({"b": np.ones(1), "a": np.zeros(1)}) == fingerprint({"a": np.zeros(1), "b": np.ones(1)})


# ---------------------------------------------------------------- one writer

HOLDER = """
import sys, time
from flaxdiff.trainer.checkpoints import FolderLock
FolderLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(300)
"""


def test_two_processes_cannot_write_one_folder(tmp_path):
    "Who holds it is said; to read is free; a holder that is killed holds nothing."
    folder = write(tmp_path / "c", state_of(step=1))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        saver = RunCheckpoints(folder)
        state, _ = saver.restore(state_of())
        assert load_average(folder)[1] == 1
        for act in (saver.check_own, lambda: saver.save(state.replace(step=np.int32(2)), {}, 0.0)):
            with pytest.raises(FolderInUse, match=rf"checkpoint_dir=.*c is in use: process {holder.pid} on \S+, since .* writes there"): act()
        assert names(folder) == ["1"] and issubclass(FolderInUse, CheckpointError)
        fit_there = make(checkpoint_dir=tmp_path / "c")
        with pytest.raises(FolderInUse): fit(fit_there, stream(pictures()), 2)
    finally:
        holder.kill()
        holder.wait()
    assert saver.save(state.replace(step=np.int32(2)), {}, 0.0) and names(folder) == ["1", "2"]


def test_what_another_run_wrote_meanwhile_is_seen(tmp_path):
    "This one was restored before the other wrote, ended and let go."
    folder = write(tmp_path / "c", state_of(step=1))
    saver = RunCheckpoints(folder)
    saver.restore(state_of())
    write(folder, state_of(step=2))
    with pytest.raises(ValueError, match=r"later checkpoints \(2\)"): saver.check_own()
    with FolderLock(folder): pass


def is_free(folder):
    "Whether another process could write there now."
    tried = subprocess.run([sys.executable, "-c", "import sys\nfrom flaxdiff.trainer.checkpoints import FolderLock\nFolderLock(sys.argv[1]).acquire()", str(folder)], capture_output=True, text=True)
    assert tried.returncode == 0 or "FolderInUse" in tried.stderr, tried.stderr
    return tried.returncode == 0


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_lock_is_shared_within_a_process_and_not_by_its_children(tmp_path):
    "A command holds it around the run's own; a worker that outlives a killed run must not keep it."
    with FolderLock(tmp_path) as outer:
        with RunCheckpoints(tmp_path) as saver: assert saver.save(state_of(step=1), {}, 0.0)
        assert not is_free(tmp_path)
        outer.acquire()
        child = os.fork() if hasattr(os, "fork") else 0
        if child == 0 and hasattr(os, "fork"):
            time.sleep(60)
            os._exit(0)
    try: assert is_free(tmp_path)
    finally: os.kill(child, signal.SIGKILL), os.waitpid(child, 0)
    outer.release()


def test_the_folder_is_free_after_a_run_and_after_a_save(tmp_path):
    saver = RunCheckpoints(tmp_path / "c")
    saver.save(state_of(step=1), {}, 0.0)
    assert is_free(tmp_path / "c")
    with saver:
        saver.check_own(), saver.finish()  # as a fit within a command
        assert not is_free(tmp_path / "c")
    with pytest.raises(RuntimeError, match="first"), saver: raise RuntimeError("first")
    assert is_free(tmp_path / "c")


# ---------------------------------------------------------------- signals

CATCHABLE = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT]


@pytest.mark.parametrize("number", CATCHABLE)
def test_each_signal_finishes_the_step_saves_and_stops(number, tmp_path):
    before = [signal.getsignal(n) for n in CATCHABLE]
    def data():
        for i in range(100):
            if i == 7: os.kill(os.getpid(), number)
            yield pictures(seed=i)
    trainer = make(checkpoint_dir=tmp_path / "c")
    fit(trainer, data(), 50)
    assert trainer.preempted and names(tmp_path / "c") == ["7"] and len(trainer.losses) == 7, "the eighth batch was read ahead, for the update after"
    assert [signal.getsignal(n) for n in CATCHABLE] == before


def test_a_second_interrupt_ends_at_once(tmp_path):
    "Even where the first is not heeded: data that hang."
    def data():
        yield pictures()
        yield pictures()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("too late")
    trainer = make(checkpoint_dir=tmp_path / "c")
    with pytest.raises(KeyboardInterrupt): fit(trainer, data(), 50)
    assert names(tmp_path / "c") == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_flag_for_a_command_and_its_fits(tmp_path):
    "What came before `fit` stops it before its first update; what comes within it stays for what follows."
    with PreemptionFlag() as outer:
        handler = signal.getsignal(signal.SIGTERM)
        with PreemptionFlag() as inner: os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.raised and inner.raised and signal.getsignal(signal.SIGTERM) == handler
        trainer = make(checkpoint_dir=tmp_path / "c")
        fit(trainer, stream(pictures()), 50)
        assert trainer.preempted and trainer.losses == [] and names(tmp_path / "c") == []
    assert PreemptionFlag().raised is False
    with PreemptionFlag() as outer:
        with PreemptionFlag() as inner: inner.raised = True
        assert inner.raised and not outer.raised, "a fit that is ended by its own watcher ends no command"
    for wrong in ("no", None, 1):
        with pytest.raises(ValueError, match="listen must be True or False"): PreemptionFlag(wrong)


def test_ignored_signals_stay_ignored():
    "Under nohup a lost terminal stops nothing."
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PreemptionFlag() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not flag.raised
    finally: signal.signal(signal.SIGHUP, before)


def test_other_threads_see_the_flag_and_catch_nothing():
    seen = []
    def work():
        with PreemptionFlag() as inner: seen.append(inner.raised)
    for outer in (PreemptionFlag(), PreemptionFlag(listen=False)):
        with outer:
            if outer.listen: os.kill(os.getpid(), signal.SIGUSR1)
            thread = threading.Thread(target=work)
            thread.start(), thread.join()
    assert seen == [True, False] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_listening_before_jax_has_started():
    "A command listens before it joins its hosts: that must not start JAX's devices."
    code = ("import os, signal\nfrom flaxdiff.trainer.loop import PreemptionFlag\nfrom jax._src import xla_bridge\n"
            "with PreemptionFlag() as flag:\n    os.kill(os.getpid(), signal.SIGTERM)\n    assert flag.raised\nassert not xla_bridge._backends\nprint('fine')")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "fine\n"


# ---------------------------------------------------------------- a loop that loses nothing

def failing(at, error):
    "Batches, and an error in the place of number `at`, from 0."
    for i in range(at): yield pictures(seed=i)
    raise error


@pytest.mark.parametrize("error", [OSError("the disk of the data is gone"), KeyboardInterrupt(), SystemExit(3), ValueError("no picture")], ids=lambda e: type(e).__name__)
def test_any_error_leaves_a_checkpoint_first(error, tmp_path, caplog):
    trainer = make(checkpoint_dir=tmp_path / "c")
    with pytest.raises(type(error)) as caught: fit(trainer, failing(50, error), 100)
    made = 50 if isinstance(error, Exception) else 49  # an error waits for its batch's turn; an order to stop does not, though one batch is read ahead
    assert caught.value is error and names(tmp_path / "c") == [str(made)] and len(trainer.losses) == made and not trainer.run_checkpoints.writing
    assert [type(error).__name__ in r.getMessage() for r in caplog.records] == [True]
    again = make(checkpoint_dir=tmp_path / "c")
    again.initialize(pictures())
    assert again.restore() == made and again.losses == trainer.losses
    same_bits(again.state, trainer.state)


def test_bad_batches_ended_data_and_watchers(tmp_path):
    "An error of a watcher, of a batch that cannot be trained on, and data that end: all leave the updates made."
    def upset(row): raise RuntimeError("the log is full")
    bad = itertools.chain((pictures(seed=i) for i in range(6)), stream(pictures(size=9)))
    for n, (data, options, error, due) in enumerate(((stream(pictures()), dict(on_report=upset, report_every=5), RuntimeError, "5"), (bad, {}, ValueError, "6"),
                                                    (iter([pictures()] * 4), {}, ValueError, "4"), (iter([]), {}, ValueError, None))):
        trainer = make(checkpoint_dir=tmp_path / str(n))
        with pytest.raises(error): fit(trainer, data, 50, **options)
        assert names(tmp_path / str(n)) == ([due] if due else [])


def test_the_first_error_is_the_one_that_is_seen(tmp_path, caplog):
    "Whatever goes wrong while it is being saved."
    def save(): raise OSError("no space")
    take_steps, record = toy()
    with pytest.raises(KeyError, match="first"): run_loop(take_steps, failing(5, KeyError("first")), range(9), record, save=save)
    assert len(record.losses) == 5 and "no space" in caplog.text
    def watcher(row): raise RuntimeError("second")
    with pytest.raises(KeyError, match="first"): run_loop(take_steps, failing(5, KeyError("first")), range(9), record, [watcher])


def toy(**more):
    "(an update that does nothing, a record): what `run_loop` needs, without a network."
    def take_steps(batches):
        n = len(batches)
        return {"loss": np.ones(n), "gradient": np.ones(n), "running": np.ones(n, bool), "levels": np.ones((n, 2, 3)), **{name: np.full(n, value) for name, value in more.items()}}
    return take_steps, TrainingRecord(3)


def test_nothing_is_saved_of_a_state_that_is_gone(tmp_path, caplog):
    "An update that fails with the state's memory in its hands: no checkpoint, and no crash."
    saver, held = RunCheckpoints(tmp_path / "c"), {"state": state_of(step=3)}
    take_steps, record = toy()
    def broken(batches):
        if len(record.losses) < 3: return take_steps(batches)
        for x in jax.tree.leaves(held["state"]): x.delete()
        raise RuntimeError("RESOURCE_EXHAUSTED")
    with pytest.raises(RuntimeError, match="EXHAUSTED"), saver: run_loop(broken, stream(pictures()), range(9), record, save=lambda: saver.save(held["state"], {}, 0.0), report_every=1)
    assert names(tmp_path / "c") == [] and "nothing more could be saved" in caplog.text
    with pytest.raises(ValueError, match="the state is no more"): save_checkpoint(saver.manager, 1, held["state"], {})


def test_nothing_is_saved_of_a_run_that_diverged(tmp_path):
    take_steps, record = toy()
    def diverge(row): raise TrainingDiverged("not finite")
    with pytest.raises(TrainingDiverged): run_loop(take_steps, stream(0), range(9), record, [diverge], save=lambda: (tmp_path / "saved").touch())
    assert not (tmp_path / "saved").exists()


def test_an_error_before_the_first_update_saves_nothing(tmp_path):
    take_steps, record = toy()
    with pytest.raises(OSError): run_loop(take_steps, failing(0, OSError()), range(7, 9), record, save=lambda: (tmp_path / "saved").touch())
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------- what a row says

def test_a_row_tells_the_speed_the_rate_the_memory_and_the_time_left(monkeypatch):
    "Time left from the second look on: the first updates compile."
    take_steps, record = toy(learning_rate=0.25)
    def slow(batches): time.sleep(0.01); return take_steps(batches)
    with monkeypatch.context() as patch:
        patch.setattr("flaxdiff.trainer.loop.memory_in_use", lambda: 12345)
        run_loop(slow, stream(0), range(40), record, report_every=10)
    rows = record.history
    assert [row["step"] for row in rows] == [10, 20, 30, 40] and all(row["learning_rate"] == 0.25 and row["memory_in_use"] == 12345 for row in rows)
    assert rows[0]["seconds_left"] is None and 0.2 <= rows[1]["seconds_left"] and 0.1 <= rows[2]["seconds_left"] and rows[3]["seconds_left"] == 0
    assert json.loads(json.dumps(rows)) == rows
    take_steps, record = toy()
    run_loop(take_steps, stream(0), range(1), record)
    assert record.history[0]["learning_rate"] is None
    if jax.local_devices()[0].platform == "cpu": assert record.history[0]["memory_in_use"] is None


# ---------------------------------------------------------------- memory

def test_a_write_holds_no_second_state(tmp_path):
    "While the thread writes there is one buffer of the parameters on the device, and the next update works in it."
    def buffers(): return {x.unsafe_buffer_pointer() for x in jax.live_arrays() if x.shape == (1000, 1003)}
    manager, state = open_checkpoints(tmp_path / "c"), {"params": jnp.ones((1000, 1003)), "step": jnp.int32(1)}
    assert len(place := buffers()) == 1
    save_checkpoint(manager, 1, state, {})
    assert buffers() == place
    state = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert buffers() == place
    finish_checkpoints(manager)
    assert np.all(load_checkpoint(manager, state)[1]["params"] == 1)
