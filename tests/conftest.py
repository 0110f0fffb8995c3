"""`pytest tests` runs what is fast; `pytest --slow tests` the rest too, and `-m slow` that rest alone."""
import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
# Many tests compile the same programs: the second finds them here, in this process or another.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most programs here run once, on a few numbers. To compile ten sampling loops takes 23 s of CPU time by default, 9 s without optimising,
# and 4 s by XLA's older emitters, in one piece.
FLAGS = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
         "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")


def known_flags(python=sys.executable):
    "`FLAGS`, but for those that the XLA of this Python does not know: it ends a process that names such a flag."
    flags = FLAGS.split()
    while True:
        test = subprocess.run([python, "-c", "import jax; jax.devices()"], env={**os.environ, "XLA_FLAGS": " ".join(flags)}, capture_output=True, text=True)
        unknown = re.search(r"Unknown flags? in XLA_FLAGS: (.+)", test.stderr)
        known = [flag for flag in flags if unknown and flag not in unknown[1].split()]
        if not unknown or known == flags: return " ".join(flags)
        flags = known


if "XLA_FLAGS" not in os.environ: os.environ["XLA_FLAGS"] = known_flags()  # the workers have it from the process that starts them


def drop_programs():
    "Compiled programs and the traces they came from: without this a process grows to gigabytes, and Python's collector walks through them again and again."
    if "jax" in sys.modules: sys.modules["jax"].clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def a_clean_module():
    "Each file of tests begins with an empty house."
    yield
    drop_programs()


began = time.monotonic()


@pytest.fixture(autouse=True)
def time_is_left(request):
    "A slow test that would begin too late is skipped."
    limit = request.config.getoption("--minutes")
    if limit is None or not request.node.get_closest_marker("slow"): return
    if time.monotonic() - began > 60 * limit: pytest.skip(f"not begun: --minutes {limit:g} are over")


tests_run = 0


@pytest.fixture(autouse=True)
def room_for_programs():
    "Each compiled program maps some memory, and Linux allows a process 65,530 maps: past a quarter of them the programs are dropped, long before a segmentation fault."
    global tests_run
    yield
    tests_run += 1
    maps = Path("/proc/self/maps")
    if tests_run % 8 or not maps.exists(): return  # to count them takes up to 50 ms
    with maps.open("rb") as f:
        if sum(1 for _ in f) > 16_000: drop_programs()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow: minutes, a browser, whole chapters")
    parser.addoption("--minutes", type=float, metavar="M", help="begin no slow test after M minutes; those left out are skipped, and say so")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with --slow")


def pytest_collection_finish():
    "What the modules hold lives to the end: Python's collector need not walk through it each time."
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def commit():
    "A number that changes from commit to commit; 0 outside of a repository."
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return int(found.stdout.strip() or "0", 16)


def pytest_collection_modifyitems(config, items):
    "Whole chapters come last, and another one first with each commit: where time is short, it is not always the same that are left out."
    chapters = [item for item in items if item.path.name == "test_notebooks.py"]
    first = commit() % max(len(chapters), 1)
    items[:] = [item for item in items if item.path.name != "test_notebooks.py"] + chapters[first:] + chapters[:first]
    if config.getoption("--slow"): return
    for item in items:
        if item.get_closest_marker("slow"): item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
