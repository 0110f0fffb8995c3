"""The gallery: its commands are ones, of models that ship; the recorded tables are whole; the run beside other libraries runs."""
import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flaxdiff.cli.sample import sample_parser
from flaxdiff.pretrained import SAMPLERS, shipped_models

ROOT = Path(__file__).resolve().parents[1]
GALLERY = json.loads(next((ROOT / "nbs").glob("*_gallery.ipynb")).read_text(encoding="utf-8"))
COMMANDS = [node.value for cell in GALLERY["cells"] if cell["cell_type"] == "code" and "flaxdiff-sample " in "".join(cell["source"]) and "%pip" not in "".join(cell["source"])
            for node in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(node, ast.Constant) and str(node.value).startswith("flaxdiff-sample ")]


def test_the_gallery_shows_what_it_promises():
    "DDPM's thousand steps, ten of Heun, two hundred of Euler ancestral with guidance 2 and 4, flow, one call."
    for due in ("digits-ddpm --sampler ddpm --steps 1000", "--sampler heun --steps 10", "euler-ancestral --steps 200 --guidance 2", "euler-ancestral --steps 200 --guidance 4", "digits-flow", "digits-map --steps 1"):
        assert any(due in command for command in COMMANDS), due
    shown = [cell for cell in GALLERY["cells"] if any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))]
    assert len(shown) == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_gallery_are_understood(command):
    words = shlex.split(command)
    args = sample_parser().parse_args(words[1:])
    assert words[1] in shipped_models() and args.out and (args.sampler is None or args.sampler in SAMPLERS)


def test_recorded_tables_are_whole():
    record = json.loads((ROOT / "nbs" / "images" / "side_by_side.json").read_text(encoding="utf-8"))
    assert record["machine"] and record["versions"]["jax"] and record["tables"]
    for table in record["tables"].values():
        assert all(len(row) == len(table["columns"]) for row in table["rows"]) and re.match(r"\d{4}-\d\d-\d\d$", table["date"])
        assert table["command"].startswith("python benchmarks/side_by_side.py --only ")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["overhead", "network", "errors", "digits", "fashion"])
def test_side_by_side_runs(part, tmp_path):
    "With whoever is installed; --quick."
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "side_by_side.py", "--quick", "--only", part, "--json", tmp_path / "x.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "flaxdiff (here)" in done.stdout or "is left out" in done.stdout
