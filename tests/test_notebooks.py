"""Every chapter runs from top to bottom, today, on a machine that has only what its install cell brings: on Colab there is nothing else."""
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
from conftest import known_flags
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
LEAN = ROOT / ".venv" / "lean"  # the environments: `python`, with the package alone, and a folder for each set of extras
COLAB_HAS = ("ipykernel", "matplotlib-inline")  # what runs a notebook at all
WITH_NETWORKS = ("import optax", "train_run", "train_main", "load_model")  # what a chapter says that computes for longer than it compiles


def colab_python():
    "Colab's Python 3.12 where this machine has it, on the path or by pyenv; else the one that runs the tests."
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for python in ("python3.12", *map(str, pyenv.glob("3.12.*/bin/python"))):
        asked = [python, "-c", "import sys, ensurepip; print(sys.version_info[:2])"]
        if shutil.which(python) and subprocess.run(asked, capture_output=True, text=True).stdout.strip() == "(3, 12)": return python
    return sys.executable


def pip(*words): subprocess.run([LEAN / "python" / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words], check=True)


def asked_for(notebook):
    "(extras of the package, other packages, packages of one version) that its install cell names."
    cells = nbformat.read(NBS / notebook, 4).cells
    install = next(c.source for c in cells if c.cell_type == "code" and "pip install" in c.source and "google.colab" in c.source)
    extras, others = re.search(r'"flaxdiff(?:\[([\w,]+)\])? @ [^"]+"(.*)', install).groups()
    pinned = [word for word in others.split() if "==" in word]
    return extras.split(",") if extras else [], [word for word in others.split() if word not in pinned], pinned


def lean_python():
    "A Python with the package as its users install it, and no more."
    done = LEAN / "installed"
    with FileLock(f"{LEAN}.lock"):
        if done.exists() and done.stat().st_mtime > (ROOT / "settings.ini").stat().st_mtime: return LEAN / "python" / "bin" / "python"
        shutil.rmtree(LEAN, ignore_errors=True)
        subprocess.run([colab_python(), "-m", "venv", LEAN / "python"], check=True)
        pip("-e", ROOT, *COLAB_HAS, *asked_for("index.ipynb")[2])  # the pins, which all chapters share
        done.touch()
    return LEAN / "python" / "bin" / "python"


@cache
def lean_flags(): return known_flags(str(lean_python()))


def brought(notebook):
    "The folder of what a chapter's install cell brings beside the package itself; None where that is all."
    extras, others, pinned = asked_for(notebook)
    assert {*asked_for("index.ipynb")[2]} <= {*pinned}  # a chapter for TPUs also names the JAX of its chip, which is not to be had here
    if not extras and not others: return None
    folder = LEAN / "-".join([*extras, *others])
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            settings = (ROOT / "settings.ini").read_text()
            words = [word for extra in extras for word in re.search(rf"^{extra}_requirements = (.*)$", settings, re.M)[1].split()]
            alone = [word for word in words if word.startswith("gt-")]  # the weights of a model; it asks for PyTorch, and needs none
            pip("--target", folder, *(word for word in words if word not in alone), *others)
            if alone: pip("--target", folder, "--no-deps", *alone)
    return folder


def kernel(folder, python):
    "A folder of Jupyter's with one kernel, `lean`."
    spec = folder / "kernels" / "lean"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "lean", "language": "python"}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(p.name for p in NBS.glob("[!_.]*.ipynb") if '"cell_type": "code"' in p.read_text(encoding="utf-8")))
def test_runs_from_top_to_bottom(notebook, tmp_path):
    for source in [NBS / notebook, NBS / "images"]:
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / source.name)
    python, extras = lean_python(), brought(notebook)
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--ExecutePreprocessor.kernel_name=lean", "--output", "executed.ipynb", str(tmp_path / notebook)]
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "JUPYTER_PATH": str(kernel(tmp_path / "jupyter", python)), "PYTHONPATH": str(extras or "")}
    text = (NBS / notebook).read_text(encoding="utf-8")
    if any(word in text for word in WITH_NETWORKS): env.pop("XLA_FLAGS", None)
    else: env["XLA_FLAGS"] = lean_flags()  # compiled without optimising, as all tests are
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
