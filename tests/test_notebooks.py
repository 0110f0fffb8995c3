"""Every chapter runs from top to bottom, today, on a machine that has only what its install cell brings: on Colab there is nothing else."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
LEAN = ROOT / ".venv" / "lean"  # the environments: `python`, with the package alone, and a folder for each set of extras
COLAB_HAS = ("ipykernel", "matplotlib-inline")  # what runs a notebook at all
WITH_NETWORKS = ("import optax", "train_run", "train_main", "load_model")  # what a chapter says that computes for longer than it compiles


def newest_python():
    "Colab's Python 3.12 where this machine has it, else the one that runs the tests."
    for name in ("python3.12", sys.executable):
        said = subprocess.run([name, "-c", "import sys, ensurepip; print(sys.version_info >= (3, 11))"], capture_output=True, text=True) if shutil.which(name) else None
        if said and said.stdout.strip() == "True": return name
    raise RuntimeError("no Python with ensurepip was found")


def pip(*words): subprocess.run([LEAN / "python" / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words], check=True)


def lean_python():
    "A Python with the package as its users install it, and no more."
    done = LEAN / "installed"
    with FileLock(f"{LEAN}.lock"):
        if done.exists() and done.stat().st_mtime > (ROOT / "settings.ini").stat().st_mtime: return LEAN / "python" / "bin" / "python"
        shutil.rmtree(LEAN, ignore_errors=True)
        subprocess.run([newest_python(), "-m", "venv", LEAN / "python"], check=True)
        pip("-e", ROOT, *COLAB_HAS)
        done.touch()
    return LEAN / "python" / "bin" / "python"


def asked_for(notebook):
    "(extras of the package, other packages) that its install cell names."
    cells = nbformat.read(NBS / notebook, 4).cells
    install = next(c.source for c in cells if c.cell_type == "code" and "pip install" in c.source and "google.colab" in c.source)
    package, others = re.search(r'"flaxdiff(?:\[([\w,]+)\])? @ [^"]+"(.*)', install).groups()
    return (package or "").split(",") if package else [], others.split()


def brought(notebook):
    "The folder of what a chapter's install cell brings beside the package itself; None where that is all."
    extras, others = asked_for(notebook)
    others = [word for word in others if "==" not in word]  # the pinned ones are the package's own
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
    if any(word in text for word in WITH_NETWORKS): env.pop("XLA_FLAGS", None)  # else compiled without optimising, as all tests are
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
