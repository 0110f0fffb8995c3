"""Laws of the repository: notebooks and modules in step, outputs kept, everything public documented.

A law about a notebook is a function of a `Chapter` that yields a sentence for each fault. Each is run on every notebook,
and on a small sound one and a broken copy of it, so that a law that cannot fail is itself a failure.
"""
import ast, copy, dataclasses, importlib, importlib.util, inspect, io, json, os, re, shutil, subprocess, sys, textwrap, tokenize
from configparser import ConfigParser
from functools import cached_property
from pathlib import Path

import pytest
import yaml
from fastcore.docments import docments
from IPython.core.inputtransformer2 import TransformerManager
from pyflakes.checker import Checker
from pyflakes.messages import UndefinedName

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[!_.]*.ipynb"))
MODULES = sorted(p for p in (ROOT / "flaxdiff").rglob("*.py") if not p.name.startswith("_"))
MAX_BYTES, MAX_LINES, MAX_CLASS, SHORTEST_ALT = 1_200_000, 45, 130, 40  # a class stands whole in one cell, however many methods it has
SITE = "https://colab.research.google.com/github/flaxdiff/flaxdiff/blob/main/nbs/"


def load_script(name="_docs"):
    "A program of nbs/ as a module of its own: by default the one that makes the README and the site."
    spec = importlib.util.spec_from_file_location(f"flaxdiff{name}", ROOT / "nbs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def version():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["version"]


# ---------------------------------------------------------------- a chapter

class Chapter:
    "A notebook: its name, the text of the file, and its cells with the source as one string."
    def __init__(self, name, text, folder=ROOT / "nbs"): self.name, self.text, self.folder = name, text, folder

    @cached_property
    def cells(self):
        cells = json.loads(self.text)["cells"]
        for cell in cells: cell["source"] = "".join(cell["source"])
        return cells

    @property
    def code(self): return [cell for cell in self.cells if cell["cell_type"] == "code"]

    @property
    def prose(self): return [cell for cell in self.cells if cell["cell_type"] == "markdown"]

    @property
    def exports(self): return [name for cell in self.code for name in re.findall(r"^#\|\s*default_exp\s+(\S+)", cell["source"], re.M)]


def directives(source): return dict(re.findall(r"^#\|\s*([\w-]+:?)[ \t]*(.*)$", source, re.M))


def tree(source):
    "A code cell's statements, without the lines that are IPython's own."
    if source.lstrip().startswith("%%"): return []
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)).body


def first_lines(source): return " ".join(source.split())[:60]


def prose_of(source):
    "Markdown without its code, where `](` and the like are no links."
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", source, flags=re.M | re.S))


def shows(source):
    "Whether a cell puts something below itself whenever it is run."
    body = tree(source)
    def speaks(statement):
        if isinstance(statement, (ast.For, ast.With)): return any(map(speaks, statement.body))
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)): return False
        call = ast.unparse(statement.value.func)
        return call in ("print", "display", "plt.show", "plotImages")
    if any(map(speaks, body)): return True
    if not body or not isinstance(body[-1], ast.Expr) or source.rstrip().endswith(";"): return False
    return not isinstance(body[-1].value, (ast.Call, ast.Constant))


# ---------------------------------------------------------------- laws of a notebook

def cells_have_ids(chapter):
    ids = [cell.get("id") for cell in chapter.cells]
    for n, (i, cell) in enumerate(zip(ids, chapter.cells)):
        if not i: yield f"cell {n} has no id: {first_lines(cell['source'])}"
        elif ids.index(i) < n: yield f"cells {ids.index(i)} and {n} share the id {i}"


def outputs_are_kept(chapter):
    for cell in chapter.code:
        if directives(cell["source"]).get("eval:") == "false" or cell["outputs"] or not shows(cell["source"]): continue
        yield f"a cell prints or shows something, but has no output: {first_lines(cell['source'])}"


def outputs_are_clean(chapter):
    for cell in chapter.code:
        for out in cell["outputs"]:
            if out["output_type"] == "error": yield f"a cell ended in {out['ename']}: {first_lines(cell['source'])}"
            if out.get("name") == "stderr": yield f"a cell wrote to stderr: {first_lines(''.join(out['text']))}"


def size_is_bounded(chapter):
    if (size := len(chapter.text.encode())) > MAX_BYTES: yield f"{size:,} bytes, more than {MAX_BYTES:,}"


def cells_are_short(chapter):
    for cell in chapter.code:
        body = tree(cell["source"])
        most = MAX_CLASS if len(body) == 1 and isinstance(body[0], ast.ClassDef) else MAX_LINES
        if (n := len(cell["source"].splitlines())) > most: yield f"a code cell of {n} lines, more than {most}: {first_lines(cell['source'])}"


def opens_with_a_promise(chapter):
    first = chapter.cells[0]
    if first["cell_type"] != "markdown" or not re.fullmatch(r"# \S[^\n]*\n\n> \S[^\n]*\n?", first["source"]):
        yield f"the first cell is not a title, a blank line and a promise of one line: {first_lines(first['source'])}"


def exports_one_module(chapter):
    if len(chapter.exports) > 1: yield f"exports {len(chapter.exports)} modules: {', '.join(chapter.exports)}"
    for name in chapter.exports:
        if not (ROOT / "flaxdiff" / (name.replace(".", "/") + ".py")).exists(): yield f"exports {name}, but flaxdiff has no such module"
    for cell in chapter.code:
        told = directives(cell["source"])
        for word in ("export", "exports", "exporti"):
            if told.get(word): yield f"a cell exports to {told[word]}, not to the notebook's own module"
            if word in told and not chapter.exports: yield f"a cell says {word}, but the notebook has no default_exp"


def links_lead_somewhere(chapter):
    for cell in chapter.prose:
        for target, anchor in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", prose_of(cell["source"])):
            path = chapter.folder / target
            if not path.exists(): yield f"a link to {target}, which does not exist"
            elif anchor and path.suffix == ".ipynb" and anchor[1:] not in anchors(Chapter(path.stem, path.read_text(encoding="utf-8"))):
                yield f"a link to {target}{anchor}, which has no such heading"


def anchors(chapter):
    "The ids of a chapter's headings as Pandoc makes them, and of its exported names as nbdev does."
    found = set()
    for cell in chapter.prose:
        for title in re.findall(r"^#+\s+(.*?)\s*$", re.sub(r"^```.*?^```", "", cell["source"], flags=re.M | re.S), re.M):
            words = re.sub(r"[^\w\s.-]", "", title.lower())
            found.add(re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", words.strip())))
    for cell in chapter.code:
        if directives(cell["source"]).keys() & {"export", "exports"}:
            for s in tree(cell["source"]):
                if isinstance(s, (ast.ClassDef, ast.FunctionDef)): found.add(s.name.lower())
    return found


def opens_in_colab(chapter):
    if not chapter.code: return  # a page of the reference: there is nothing to run
    badges = re.findall(re.escape(SITE) + r"([^)\s]+)", "".join(cell["source"] for cell in chapter.prose))
    if badges[:1] != [f"{chapter.name}.ipynb"]: yield f"no badge that opens {chapter.name}.ipynb in Colab; found {badges[:1] or 'none'}"
    pins = re.findall(r"github\.com/flaxdiff/flaxdiff@v([\w.]+)", "".join(cell["source"] for cell in chapter.code))
    if pins != [version()]: yield f"the install cell does not ask for the release {version()}, but for {pins or 'none'}"


def imports_stand_alone(chapter):
    if not chapter.exports: return  # the site's build runs no cell of a notebook that exports nothing
    for cell in chapter.code:
        body = tree(cell["source"])
        if directives(cell["source"]).keys() & {"export", "exports", "exporti"}: continue
        if any(isinstance(n, (ast.Import, ast.ImportFrom)) for s in body for n in ast.walk(s)):
            if not all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in body):
                yield f"a cell mixes imports with other code, which the site's build would run: {first_lines(cell['source'])}"


def pictures_are_described(chapter):
    described = {}
    for cell in chapter.code:
        if not any(kind.startswith("image/") for out in cell["outputs"] for kind in out.get("data", {})): continue
        head, where = re.match(r"(?:#\|.*\n?)*", cell["source"])[0], first_lines(re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M))
        alt = yaml.safe_load(directives(head).get("fig-alt:", ""))
        if not isinstance(alt, str): yield f"a picture without `#| fig-alt: \"…\"` at the top of its cell: {where}"
        elif len(alt) < SHORTEST_ALT: yield f"a description of {len(alt)} characters, less than {SHORTEST_ALT}: {where}"
        elif alt in described: yield f"one description for two pictures: {described[alt]}; {where}"
        else: described[alt] = where
    for cell in chapter.prose:
        for target in re.findall(r"!\[\s*\]\(([^)\s]+)", prose_of(cell["source"])): yield f"a picture without a description: {target}"


def unknown_names(cells):
    "The names that code cells use and none of them defines or imports."
    code = "\n".join(TransformerManager().transform_cell(cell["source"]) for cell in cells)
    unknown = [m.message_args[0] for m in Checker(ast.parse(code), "cells").messages if isinstance(m, UndefinedName)]
    return sorted({*unknown} - {"get_ipython"})


def names_are_defined(chapter):
    for name in unknown_names(chapter.code): yield f"uses {name}, which no cell defines or imports"


def names_are_shown(chapter):
    told = [(cell, directives(cell["source"])) for cell in chapter.code]
    shown = [cell for cell, words in told if not words.keys() & {"hide", "export", "exporti"} and words.get("echo:") != "false"]
    for name in unknown_names(shown): yield f"the site shows {name} in use, but neither its definition nor its import"


def ends_in_prose(chapter):
    if chapter.cells[-1]["cell_type"] != "markdown": yield "the last cell is code; nbdev cannot process an exported cell with nothing after it"


LAWS = [cells_have_ids, outputs_are_kept, outputs_are_clean, size_is_bounded, cells_are_short, opens_with_a_promise, exports_one_module,
        links_lead_somewhere, opens_in_colab, imports_stand_alone, pictures_are_described, names_are_defined, names_are_shown, ends_in_prose]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, law):
    faults = list(law(Chapter(path.stem, path.read_text(encoding="utf-8"))))
    if faults: pytest.fail("\n".join(faults), pytrace=False)


DESCRIBED = "One black dot in the middle of a white square."
PICTURE = {"output_type": "execute_result", "data": {"image/png": "", "text/plain": ["1"]}, "metadata": {}, "execution_count": None}


def sound():
    "A small notebook that keeps every law."
    text = lambda i, s: {"cell_type": "markdown", "id": i, "metadata": {}, "source": s}
    code = lambda i, s, *outputs: {"cell_type": "code", "id": i, "metadata": {}, "source": s, "outputs": list(outputs), "execution_count": None}
    printed = {"output_type": "stream", "name": "stdout", "text": ["1\n"]}
    return [text("a", "# A title\n\n> A promise."),
            text("b", f"[![Open in Colab](https://x.y/badge.svg)]({SITE}sound.ipynb) and [here](sound.ipynb#an-end)"),
            code("c", f'#| hide\nif "google.colab" in str(get_ipython()):\n    %pip install -q "flaxdiff @ git+https://github.com/flaxdiff/flaxdiff@v{version()}"'),
            code("d", "#| default_exp utils"), code("e", "#| export\nimport os"), code("f", "x = 1\nprint(x)", printed), text("g", "## An end"),
            code("h", f'#| fig-alt: "{DESCRIBED}"\nx', PICTURE), text("i", "![a dot](sound.ipynb)")]


def put(n, **changes):
    def change(cells): cells[n].update(changes)
    return change


STDERR = {"output_type": "stream", "name": "stderr", "text": ["Warning\n"]}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}
BREAKS = [(cells_have_ids, put(3, id="a")), (cells_have_ids, lambda cells: cells[3].pop("id")),
          (outputs_are_kept, put(5, outputs=[])), (outputs_are_kept, put(5, source="x", outputs=[])),
          (outputs_are_kept, put(5, source="for i in range(2):\n    print(i)", outputs=[])),
          (outputs_are_clean, put(5, outputs=[STDERR])), (outputs_are_clean, put(5, outputs=[ERROR])),
          (size_is_bounded, put(6, source="x" * MAX_BYTES)), (cells_are_short, put(5, source="x = 1\n" * (MAX_LINES + 1))),
          (cells_are_short, put(5, source="class A:\n" + "    x = 1\n" * MAX_CLASS)),
          (opens_with_a_promise, put(0, source="# A title\n\n> A promise.\n\nMore.")), (opens_with_a_promise, put(0, source="# A title")),
          (exports_one_module, put(5, source="#| default_exp data")), (exports_one_module, put(3, source="#| default_exp no.such")),
          (exports_one_module, put(4, source="#| export other\nimport os")), (exports_one_module, put(3, source="")),
          (links_lead_somewhere, put(6, source="[gone](no_such.ipynb)")), (links_lead_somewhere, put(6, source="[there](sound.ipynb#no-such)")),
          (opens_in_colab, put(1, source=f"[x]({SITE}other.ipynb)")), (opens_in_colab, put(2, source="%pip install flaxdiff")),
          (imports_stand_alone, put(5, source="import os\nx = 1")), (names_are_defined, put(5, source="print(x)")), (names_are_shown, put(5, source="print(os)")),
          (pictures_are_described, put(7, source="x")), (pictures_are_described, put(7, source='#| fig-alt: "A dot."\nx')),
          (pictures_are_described, put(7, source=f'x = 1\n#| fig-alt: "{DESCRIBED}"\nx')),
          (pictures_are_described, put(7, source=f'#| fig-alt: ["{DESCRIBED}"]\nx')),
          (pictures_are_described, lambda cells: cells.insert(8, {**cells[7], "id": "j"})), (pictures_are_described, put(8, source="![](sound.ipynb)")),
          (ends_in_prose, lambda cells: cells.pop())]


def as_chapter(cells, folder):
    text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    (folder / "sound.ipynb").write_text(text)
    return Chapter("sound", text, folder)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_can_hold_and_can_fail(law, tmp_path):
    assert not list(law(as_chapter(sound(), tmp_path)))
    breaks = [change for broken, change in BREAKS if broken is law]
    assert breaks
    for change in breaks:
        cells = copy.deepcopy(sound())
        change(cells)
        assert list(law(as_chapter(cells, tmp_path)))


# ---------------------------------------------------------------- notebooks and modules in step

def out_of_step(root, work):
    "The files that clean and export would change, for a copy of the repository at `root`, worked on in `work`."
    for name in ("nbs", "flaxdiff"): shutil.copytree(root / name, work / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml", "README.md", "setup.py"): shutil.copy2(root / name, work)
    for f in (work / "flaxdiff").rglob("*.py"):
        if "AUTOGENERATED" in f.read_text(encoding="utf-8")[:400] or f.name == "_modidx.py": f.unlink()  # so that a module without a notebook shows
    scripts = Path(sys.executable).parent
    for command in ("nbdev_clean", "nbdev_export"):
        done = subprocess.run([scripts / command], cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    pattern = ["flaxdiff/**/*.py", "nbs/*.ipynb", "pyproject.toml"]
    names = sorted({f.relative_to(base).as_posix() for base in (root, work) for p in pattern for f in base.glob(p)})
    read = lambda f: f.read_text(encoding="utf-8") if f.exists() else None
    return [name for name in names if read(root / name) != read(work / name)]


def test_modules_in_step(tmp_path):
    assert not (names := out_of_step(ROOT, tmp_path)), f"out of step with the notebooks, or not clean: {', '.join(names)}; run `make prepare`"


def test_modules_out_of_step_are_seen(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir(), b.mkdir()
    out_of_step(ROOT, a)
    (a / "flaxdiff" / "utils.py").write_text((a / "flaxdiff" / "utils.py").read_text() + "x = 1\n")
    (a / "flaxdiff" / "orphan.py").write_text("# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/99_orphan.ipynb.\n")
    assert out_of_step(a, b) == ["flaxdiff/orphan.py", "flaxdiff/utils.py"]


def sidebar(text):
    "The notebooks that `_quarto.yml` lists."
    def pages(entries):
        for e in entries:
            if isinstance(e, str): yield e
            elif "contents" in e: yield from pages(e["contents"])
            else: yield e.get("href")
    return list(pages(yaml.safe_load(text)["website"]["sidebar"]["contents"]))


def test_sidebar_lists_every_notebook_once():
    assert sorted(sidebar((ROOT / "_quarto.yml").read_text(encoding="utf-8"))) == [p.name for p in NOTEBOOKS]


def test_pages_have_names_of_their_own():
    names = [load_script().page_name(p.stem) for p in NOTEBOOKS]
    assert len(names) == len(set(names)), "two notebooks differ by their number alone, and would be one page of the site"


# ---------------------------------------------------------------- the code as a place to live in

MOST_PATCHES, WIDEST = 4, 110


def wide_lines(text):
    "Lines wider than a page, but for what nbdev writes itself: the chapter's promise as the first line, and `__all__`."
    body = ast.parse(text).body
    generated = {1} | {n for s in body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "__all__" for n in range(s.lineno, s.end_lineno + 1)}
    return [n for n, line in enumerate(text.splitlines(), 1) if len(line) > WIDEST and n not in generated]


def test_no_line_is_wider_than_a_page():
    line = lambda n: "x = '" + "y" * (n - 6) + "'"
    assert wide_lines(f"1\n{line(WIDEST)}\n__all__ = [{line(200)[4:]}]") == [] and wide_lines(f"1\n{line(WIDEST + 1)}") == [2]
    wide = {f"{path.relative_to(ROOT)}:{n}" for path in (ROOT / "flaxdiff").rglob("*.py") if path.name != "_modidx.py"
            for n in wide_lines(path.read_text(encoding="utf-8"))}
    assert not wide, ", ".join(sorted(wide))


def test_modules_hold_no_description_of_a_picture():
    told = [str(path.relative_to(ROOT)) for path in MODULES if "#| fig-alt" in path.read_text(encoding="utf-8")]
    assert not told, f"{', '.join(told)}: show the picture in a cell of its own, which is not exported"


def test_classes_stand_in_one_piece():
    patches = [f"{path.relative_to(ROOT)}: {name}" for path in MODULES for name in re.findall(r"^@patch.*\ndef (\w+)", path.read_text(encoding="utf-8"), re.M)]
    assert len(patches) <= MOST_PATCHES, ", ".join(patches)


def test_the_type_checker_has_nothing_to_say():
    checker = Path(sys.executable).with_name("basedpyright")
    done = subprocess.run([checker, "--pythonpath", sys.executable, "--level", "error"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# ---------------------------------------------------------------- the documentation of every public name

def fields(cls):
    "The fields that a class names in its body, each with the comment on its line, or None."
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {t.start[0]: t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    return {s.target.id: comments.get(s.end_lineno, comments.get(s.lineno)) for s in ast.parse(source).body[0].body if isinstance(s, ast.AnnAssign)}


def undocumented_parameters(function, bases=()):
    "The parameters of a function without a comment, neither here nor in what it overrides."
    notes = [docments(f, returns=False) for f in (function, *bases)]
    for p in inspect.signature(function).parameters.values():
        if p.name in ("self", "cls") or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue
        if not any(note.get(p.name) for note in notes): yield p.name


def undocumented(obj, name):
    "What a public class or function lacks, a sentence each."
    generated = f"{getattr(obj, '__name__', '')}("
    if not obj.__doc__ or inspect.isclass(obj) and obj.__doc__.startswith(generated): yield f"{name} has no docstring"
    if not inspect.isclass(obj):
        for p in undocumented_parameters(inspect.unwrap(obj)): yield f"{name}: parameter {p} has no comment"
        return
    for field, comment in fields(obj).items():
        if not comment and not field.startswith("_"): yield f"{name}: field {field} has no comment"
    for attribute, value in vars(obj).items():
        if isinstance(value, property): function = value.fget
        elif isinstance(value, (classmethod, staticmethod)): function = value.__func__
        else: function = value
        if not inspect.isfunction(function) or not (function.__module__ or "").startswith("flaxdiff"): continue
        if attribute.startswith("_") and attribute not in ("__init__", "__call__"): continue
        function = inspect.unwrap(function)
        if attribute == "__init__" and dataclasses.is_dataclass(obj): continue
        bases = [inspect.unwrap(f) for base in obj.__mro__[1:] if inspect.isfunction(f := vars(base).get(attribute)) and f.__module__.startswith("flaxdiff")]
        if attribute != "__init__" and not any(f.__doc__ for f in (function, *bases)): yield f"{name}.{attribute} has no docstring"
        for p in undocumented_parameters(function, bases): yield f"{name}.{attribute}: parameter {p} has no comment"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts))
def test_public_names_are_documented(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    public = {name: getattr(module, name) for name in module.__all__}
    own = {name: o for name, o in public.items() if callable(o) and getattr(o, "__module__", None) == module.__name__ and getattr(o, "__name__", None) == name}
    faults = [fault for name, o in own.items() for fault in undocumented(o, name)]
    faults += [f"{name}: a backslash in the docstring" for name, o in own.items() if "\\" in (o.__doc__ or "")]
    if faults: pytest.fail("\n".join(faults), pytrace=False)


def test_undocumented_names_are_seen():
    class Base:
        "Documented."
        def f(self, a):  # a of the base
            "f."
    Base.f.__module__ = "flaxdiff.x"

    class Derived(Base):
        def f(self, a, b): return a
        def g(self): return 1

    @dataclasses.dataclass
    class Record:
        "A record."
        a: int  # documented
        b: int = 0

    for cls in (Derived, Record):
        for function in filter(inspect.isfunction, vars(cls).values()): function.__module__ = "flaxdiff.x"

    def good(x):  # a number
        "Good."

    def bad(x): return x

    assert not list(undocumented(Base, "Base")) and not list(undocumented(good, "good"))
    assert list(undocumented(bad, "bad")) == ["bad has no docstring", "bad: parameter x has no comment"]
    assert list(undocumented(Derived, "D")) == ["D has no docstring", "D.f: parameter b has no comment", "D.g has no docstring"]  # f has the base's
    assert list(undocumented(Record, "R")) == ["R: field b has no comment"]


# ---------------------------------------------------------------- the README

def test_readme_in_step():
    text, pictures = load_script().make_readme(write=False)
    stale = "README.md is not what nbs/index.ipynb says; run `python nbs/_docs.py readme`"
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, stale
    kept = {f.name: f.read_bytes() for f in (ROOT / "nbs" / "images").glob("index_*")}
    assert kept == pictures, stale
    assert load_script().make_readme(write=False) == (text, pictures), "the README differs from one run to the next"


def test_readme_is_for_github():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"^#\|", text, re.M), "a directive of nbdev's is left in README.md"
    assert not re.findall(r"\]\([^)]*\.ipynb[^)]*\)(?<!nbs/index\.ipynb\))", text), "a link to a notebook, which leads nowhere from README.md"
    assert not re.findall(r"!\[\s*\]\(", text), "a picture without a description in README.md"
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)\)", prose_of(text)): assert (ROOT / target).exists(), f"README.md: no {target}"


def python_blocks(text): return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.slow
def test_readme_code_runs(tmp_path):
    blocks = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks, "README.md shows no Python"
    (tmp_path / "readme.py").write_text("\n\n".join(blocks), encoding="utf-8")
    env = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
