"""The page of recipes: short cells of public names, which is what makes them recipes."""
import ast
import importlib
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = next((Path(__file__).resolve().parents[1] / "nbs").glob("*_recipes.ipynb"))
MOST_LINES = 15


def code_cells():
    "The source of each code cell that a reader sees and may copy."
    sources = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return [source for source in sources if not re.match(r"#\|\s*hide", source)]


def private_names(source):
    "What a cell imports from the library or asks of an object, and should not."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "flaxdiff":
            public = importlib.import_module(node.module).__all__
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name not in public)
        names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else [getattr(node, "attr", "")]
        yield from (name for name in names if re.search(r"(^|\.)_(?!_)", name))


def is_import(statement): return isinstance(statement, (ast.Import, ast.ImportFrom))


def long_recipe(source):
    "Whether a cell, other than that of the imports, has more lines than a recipe may."
    return not all(map(is_import, ast.parse(source).body)) and len(source.splitlines()) > MOST_LINES


def test_recipes_are_short():
    cells = code_cells()
    assert len(cells) > 20 and not [source.splitlines()[0] for source in cells if long_recipe(source)]


def test_recipes_use_public_names_alone():
    assert not [name for source in code_cells() for name in private_names(source)]


@pytest.mark.parametrize("source, names", [("from flaxdiff.pretrained import _called", ["flaxdiff.pretrained._called", "_called"]), ("x._y", ["_y"]),
                                           ("from flaxdiff.pretrained import np", ["flaxdiff.pretrained.np"]), ("from flaxdiff.pretrained import load_model\nx.y", [])])
def test_a_private_name_is_seen(source, names): assert list(private_names(source)) == names


def test_a_long_recipe_is_seen():
    assert long_recipe("x = 1\n" * (MOST_LINES + 1)) and not long_recipe("x = 1\n" * MOST_LINES) and not long_recipe("import os\n" * 30)
