"""`pytest tests` runs what is fast; `pytest --slow tests` the rest too, and `-m slow` that rest alone."""
import os

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow: minutes, a browser, whole chapters")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if item.get_closest_marker("slow"): item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
