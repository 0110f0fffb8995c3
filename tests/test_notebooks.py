"""Every chapter runs from top to bottom, on this machine, today."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
WITH_NETWORKS = ("import optax", "train_run", "train_main", "load_model")  # what a chapter says that computes for longer than it compiles


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(p.name for p in NBS.glob("[!_.]*.ipynb") if '"cell_type": "code"' in p.read_text(encoding="utf-8")))
def test_runs_from_top_to_bottom(notebook, tmp_path):
    for source in [NBS / notebook, NBS / "images"]:
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / source.name)
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "executed.ipynb", str(tmp_path / notebook)]
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    text = (NBS / notebook).read_text(encoding="utf-8")
    if any(word in text for word in WITH_NETWORKS): env.pop("XLA_FLAGS", None)  # else compiled without optimising, as all tests are
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
