"""Laws of `flaxdiff.speed`: where programs run, programs kept on disk, and the prepared run on a GPU, rehearsed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff import speed
from flaxdiff.speed import backend, by_backend, cache_programs

ROOT = Path(__file__).parents[1]


class Device:
    def __init__(self, platform): self.platform = platform


@pytest.mark.parametrize("platform, flash, due", [("cpu", False, "cpu"), ("tpu", False, "tpu"), ("gpu", True, "gpu"), ("gpu", False, "other gpu"), ("neuron", False, "neuron")])
def test_backend_is_where_programs_run(monkeypatch, platform, flash, due):
    monkeypatch.setattr(speed, "has_flash_attention", lambda: flash)
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: [Device(platform)])
    assert backend() == due and by_backend("a CPU's", "another") == ("a CPU's" if due == "cpu" else "another")
    with jax.default_device(jax.devices("cpu")[0]): assert backend() == "cpu", "the device that was asked for counts"


@pytest.mark.parametrize("capability, works, due", [("9.0", True, True), ("8.0", True, True), ("10.3", True, True), ("7.5", True, False), ("9.0", False, False), (None, True, False)])
def test_flash_attention_needs_ampere_and_cudnn(monkeypatch, capability, works, due):
    device = Device("gpu")
    if capability: device.compute_capability = capability  # AMD's have none

    def attend(q, k, v):
        if not works: raise RuntimeError("cuDNN is not detected.")
        return q
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [device])
    monkeypatch.setattr(speed, "cudnn_attention", attend)
    assert speed.has_flash_attention.__wrapped__() is due


def test_this_machine_has_no_gpu():
    if jax.default_backend() == "cpu": assert backend() == "cpu" and not speed.has_flash_attention()


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
counts = {}
def note(event, **_): counts[event.rsplit("/", 1)[-1]] = counts.get(event.rsplit("/", 1)[-1], 0) + 1
jax.monitoring.register_event_listener(note)
from flaxdiff.models import SimpleUNet
from flaxdiff.schedulers import EDMNoiseScheduler
from flaxdiff.predictors import KarrasPredictionTransform
from flaxdiff.speed import cache_programs
from flaxdiff.trainer import DiffusionTrainer
jnp.ones(3) + 1  # something is compiled before
lines = []
folder = cache_programs(*sys.argv[1:], least_seconds=0, report=lines.append)
counts.clear()
net = SimpleUNet(1, 8, (8,), (None,), 1, norm_groups=2)
trainer = DiffusionTrainer(net, optax.adam(1e-3), EDMNoiseScheduler(), rngs=0, model_output_transform=KarrasPredictionTransform())
loss = float(trainer.train_step(np.zeros((2, 8, 8, 1), np.float32)))
print(json.dumps([loss, counts, lines, folder]))
"""


def run(*args, **env):
    "What the program says, in a process of its own whose cache is decided by `env` alone."
    kept = {name: value for name, value in os.environ.items() if name not in ("FLAXDIFF_CACHE", "XDG_CACHE_HOME") and "CACHE" not in name}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, args)], env=kept | {name: str(value) for name, value in env.items()}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_second_process_compiles_nothing_anew(tmp_path):
    "By the count of JAX's own events: as many programs found on disk as were asked for."
    first, second = (run(XDG_CACHE_HOME=tmp_path) for _ in range(2))
    folder = tmp_path / "flaxdiff" / "programs"
    for loss, counts, lines, said, stderr in (first, second):
        assert loss == first[0] and said == str(folder) and lines == [f"compiled programs are kept in {folder}; FLAXDIFF_CACHE=off keeps none"]
    assert first[1].get("cache_misses", 0) >= 3 and list(folder.iterdir()) and folder.stat().st_mode & 0o077 == 0, "programs are code: nobody else may write there"
    assert second[1].get("cache_misses", 0) == 0 and second[1]["cache_hits"] == second[1]["compile_requests_use_cache"] >= 3
    assert "error" not in second[4].lower()


def test_where_programs_are_kept(tmp_path, monkeypatch):
    "A folder given, JAX's own, the user's cache folder; none where it is switched off or cannot be."
    own, given = tmp_path / "own", tmp_path / "given"
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}
    lines = []
    try:
        for name in ("FLAXDIFF_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        jax.config.update("jax_compilation_cache_dir", None)
        assert cache_programs(report=lines.append) == str(tmp_path / "home" / ".cache" / "flaxdiff" / "programs")
        jax.config.update("jax_compilation_cache_dir", str(own))
        assert cache_programs(report=lines.append) == str(own) and not (own / "flaxdiff").exists()
        assert cache_programs(given, report=lines.append) == str(given) and jax.config.jax_compilation_cache_dir == str(given)
        assert cache_programs("~/here", report=lines.append) == str(tmp_path / "home" / "here")
        (tmp_path / "file").write_text("")
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert cache_programs(report=lines.append) is None and jax.config.jax_compilation_cache_dir is None and "not kept" in lines[-1]
        for off in ("off", "0", "no", "False"):
            monkeypatch.setenv("FLAXDIFF_CACHE", off)
            assert cache_programs(given, report=lines.append) is None and jax.config.jax_compilation_cache_dir is None and f"FLAXDIFF_CACHE={off}" in lines[-1]
        monkeypatch.delenv("FLAXDIFF_CACHE")
        for bad in ("", tmp_path / "file"):
            with pytest.raises(ValueError, match="^folder must"): cache_programs(bad, report=lines.append)
        for bad in (-1, "soon", float("nan")):
            with pytest.raises(ValueError, match="^least_seconds must"): cache_programs(given, bad)
        assert all("\n" not in line for line in lines)
    finally:
        for name, value in before.items(): jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.mark.slow
def test_the_run_on_a_gpu_can_be_rehearsed():
    "Every part of `benchmarks/gpu.py` at toy size on the CPU, one line of JSON each."
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py", "--cpu"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    lines = {line["part"]: line for line in map(json.loads, done.stdout.splitlines())}
    ours = [part for part in lines if part.startswith("ours")]
    assert ours == ["ours, published", "ours, coarse", "ours, published, programs on disk"] and "attention" in lines
    for part in ours:
        assert lines[part]["images_s"] > 0 and lines[part]["model_tflops"] >= 0 and lines[part]["share_of_chip"] is None and lines[part]["sampled_images_s"] > 0
    assert lines["ours, published"]["parameters"] > lines["ours, coarse"]["parameters"]
    assert lines["attention"]["blocks, 64 tokens of 8"]["off"] < 0.05


def test_a_sampler_compiles_with_the_options_unless_it_is_part_of_a_program(monkeypatch):
    "An option that no XLA knows shows that it is handed on: to a program of the sampler's own, and to no larger one, whose options are its own."
    from flaxdiff.exact import ExactModel, Gaussian
    from flaxdiff.predictors import X0Predictor
    from flaxdiff.samplers import EulerSampler, common
    from flaxdiff.schedulers import EDMNoiseScheduler
    monkeypatch.setattr(common, "compiler_options", lambda: {"xla_no_such_option": True})
    schedule = EDMNoiseScheduler()
    sampler = EulerSampler(ExactModel(Gaussian([0.0], [1.0]), schedule, X0Predictor()), {}, schedule, X0Predictor())
    x, steps = jnp.ones((2, 1)), sampler.make_steps(3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"): sampler.sample(x, steps, 0)
    assert np.isfinite(jax.jit(lambda x: sampler.sample(x, steps, 0))(x)).all()
