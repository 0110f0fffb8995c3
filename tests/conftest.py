"""`pytest tests` runs what is fast; `pytest --slow tests` the rest too, and `-m slow` that rest alone."""
import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
# Many tests compile the same programs: the second finds them here, in this process or another.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most programs here run once, on a few numbers: to compile them without optimising takes a third of the time off.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def drop_programs():
    "Compiled programs and the traces they came from: without this a process grows to gigabytes, and Python's collector walks through them again and again."
    if "jax" in sys.modules: sys.modules["jax"].clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def a_clean_module():
    "Each file of tests begins with an empty house."
    yield
    drop_programs()


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


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if item.get_closest_marker("slow"): item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
