"""The book's letters, opening boxes, glossary and bibliography: each letter has one meaning, each box and list is what the tables say."""
import importlib.util, json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("flaxdiff_book", ROOT / "nbs" / "_book.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)
BOOK = tables.load()
FILES = tables.files()
NOTEBOOKS = {f: json.loads((ROOT / "nbs" / f).read_text(encoding="utf-8")) for f in FILES.values()}
APPENDIX = {"notation", "glossary", "bibliography"}
CHAPTERS = [name for name in BOOK["chapter"] if name not in BOOK["not_yet"]]


def cells(name): return NOTEBOOKS[FILES[name]]["cells"]


def words(name): return "\n".join("".join(c["source"]) for c in cells(name) if c["cell_type"] == "markdown")


def test_every_chapter_is_in_the_table():
    assert {*FILES} - APPENDIX == {*BOOK["chapter"]}, "each notebook needs a [chapter.NAME] in nbs/_book.toml, and each of those a notebook"


def test_the_table_points_at_what_there_is():
    letters = {s["tex"] for s in BOOK["symbol"]}
    for name, chapter in BOOK["chapter"].items():
        assert {*chapter["uses"]} <= letters, f"{name}: {({*chapter['uses']} - letters)} are not in the table of letters"
        assert {*chapter["needs"]} <= {*BOOK["chapter"]} - {name} and {*chapter["place"]} <= {*tables.MAP}
    for s in BOOK["symbol"]: assert s["chapter"] in BOOK["chapter"] and {*s.get("elsewhere", [])} <= {*BOOK["chapter"]}, s["tex"]
    bases = [tables.base(t) for s in BOOK["symbol"] for t in [s["tex"], *s.get("like", [])] if "_" not in t and "mathrm" not in t]
    assert len(bases) == len({*bases}), "a letter stands twice in the table"


def test_the_reading_order_has_no_circle():
    def above(name, path=()):
        assert name not in path, " needs ".join([*path, name])
        for other in BOOK["chapter"][name]["needs"]: above(other, (*path, name))
    for name in BOOK["chapter"]: above(name)


@pytest.mark.parametrize("name", CHAPTERS)
def test_each_letter_has_one_meaning(name):
    faults = list(tables.clashes(name, cells(name), BOOK))
    if faults: pytest.fail("\n".join(faults), pytrace=False)


def test_boxes_and_lists_are_what_the_tables_say():
    old = sorted({f for f, _, _ in tables.stale(BOOK, NOTEBOOKS)})
    assert not old, f"run python nbs/_book.py: {', '.join(old)}"


def test_a_box_written_twice_is_written_once():
    source = "[badge](x)\n\nYou will learn\n\n- this."
    once = tables.with_box(source, tables.box("ddim", BOOK))
    assert once == tables.with_box(once, tables.box("ddim", BOOK)) and once.count("**You need**") == 1 and "**You will learn**" in once


def test_what_stands_below_a_box_stays():
    below = "\n\nMore words, and **bold** ones."
    boxed = tables.with_box("[badge](x)\n\nYou will learn\n\n- this.", tables.box("ddim", BOOK)) + below
    assert tables.with_box(boxed, tables.box("ddpm", BOOK)).endswith(tables.box("ddpm", BOOK) + below)


@pytest.mark.parametrize("prose, fault", [
    (r"Let $x_0$ be data and $\varepsilon$ noise, $x_t = \alpha_t x_0 + \sigma_t\varepsilon$.", None),
    (r"Code has no letters: `$Q$`, and words none: $\mathrm{Qq}(x)$, $x_{\text{QQ}}$.", None),
    (r"A letter that nobody knows: $Q x$.", "Q has no meaning"),
    (r"The other epsilon: $x + \epsilon z$.", "epsilon has no meaning"),
    (r"A time that is squared: $\sigma^2 + s^2$.", "another s"),
    (r"$$x = \sqrt v\,\varepsilon \tag{1}$$", "another v"),
    (r"A velocity that is a variance: $x_0\sim N(\mu, v)$.", "another v"),
    (r"$\tfrac12\log(1 + v\,\mathrm{SNR})$", "another v")])
def test_a_clash_is_found(prose, fault):
    book = {**BOOK, "chapter": {"toy": {"here": {}}}}
    found = list(tables.clashes("toy", [{}, {}, {"cell_type": "markdown", "source": prose}], book))
    assert (not found) if fault is None else any(fault in f for f in found), found


def test_a_letter_of_the_whole_book_cannot_be_declared_anew():
    toy = [{}, {}, {"cell_type": "markdown", "source": "$v + k$"}]
    clash = lambda here: list(tables.clashes("toy", toy, {**BOOK, "chapter": {"toy": {"here": here}}}))
    assert any("whole book" in f for f in clash({"v": "a variance"})) and not clash({"k": "a slope"})
    assert any("not used" in f for f in clash({"q": "a query"}))


def test_the_letters_of_a_formula():
    find = tables.letters
    assert find(r"\hat x_0 = \tfrac{\bar\alpha_t}{2}\,\mathbf{u} + \mathrm{SNR}") == ["x", "bar alpha", "u"]
    assert find(r"\mathrm{d}x = f\,\mathrm{d}t + g\,\mathrm{d}w") == ["x", "f", "t", "g", "dw"]
    assert find(r"c_{\rm skip}^2 \operatorname{tr} J \tag{3}") == ["c", "J"]


@pytest.mark.parametrize("name", FILES)
def test_the_next_chapter_is_the_next_one(name):
    number, wrong = int(FILES[name][:2]), []
    for said, target in re.findall(r"\[([^\]\[]*)\]\((\d\d)_\w+\.ipynb[^)]*\)", words(name)):
        for pattern, apart in ((r"(the )?next chapter('s)?", 1), (r"(the )?((last|previous) chapter|chapter before)('s)?", -1)):
            if re.fullmatch(pattern, said, re.I) and int(target) - number != apart: wrong.append(f"[{said}] leads to {target}")
    assert not wrong, f"{FILES[name]}: {wrong}; name the chapter instead"


def test_the_index_names_every_page_by_its_title():
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    table = next(s for s in ("".join(c["source"]) for c in index) if "| | chapter | question |" in s).split("| | chapter | question |")[1]
    named = {file: title for title, file in re.findall(r"\[([^]]+)\]\((\d\d_\w+\.ipynb)\)", table)}
    assert named == {f: "".join(nb["cells"][0]["source"]).split("\n")[0].removeprefix("# ") for f, nb in NOTEBOOKS.items()}


def test_the_glossary_explains_and_leads_on():
    terms = re.findall(r"^- \*\*([^*]+)\*\*: (.+)$", words("glossary"), re.M)
    assert len(terms) >= 60 and len({t for t, _ in terms}) == len(terms)
    for part in [c for c in cells("glossary") if "".join(c["source"]).startswith("## ")]:
        names = [t.lower() for t in re.findall(r"^- \*\*([^*]+)\*\*", "".join(part["source"]), re.M)]
        assert names == sorted(names)
    for term, means in terms: assert re.search(r"\]\(\d+_\w+\.ipynb\)", means) and len(means) < 400, term


def test_every_work_is_cited_and_every_paper_is_listed():
    for work in BOOK["work"]:
        assert any(re.search(work["seen"], tables.references(cells(name)), re.I) for name in BOOK["chapter"]), f"nobody cites {work['cite']}"
    listed = {w.get("arxiv") for w in BOOK["work"]}
    for name in BOOK["chapter"]:
        missing = {*re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", words(name))} - listed
        assert not missing, f"{name} cites {missing}, which nbs/_works.toml lacks"


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_exercise_can_be_solved_and_its_check_is_executed(name):
    for number, (asks, solves) in tables.exercises(cells(name)).items():
        ask, solve = ("\n".join("".join(cell["source"]) for cell in part) for part in (asks, solves))
        assert f"def check_{number}(" in ask and "is not ..." in ask, f"exercise {number} has no cell for an answer, with its check"
        assert f"check_{number}(" in solve, f"the solution of exercise {number} does not pass through its check"


@pytest.mark.parametrize("name", CHAPTERS)
def test_solutions_are_closed_in_jupyter_too(name):
    assert not tables.close_solutions(json.loads(json.dumps(cells(name)))), "run python nbs/_book.py"


# What KaTeX and MathJax both know, as far as the book needs it: a word that is not here is a slip, such as \logu, or is to be added.
TEX = """alpha approx arctan arg bar begin beta big Big Bigl bigl Bigr bigr bmod boldsymbol boxed cdot cdots chi cos cosh Delta delta det dfrac dot dots downarrow ell end epsilon
    equiv eta exp frac gamma ge hat iff in infty int kappa lambda langle lceil ldots le left leftarrow lfloor ln log Longrightarrow longrightarrow lVert mapsto mathbb mathbf mathcal
    mathrm mathsf max mid min mu nabla ne neq odot omega operatorname partial Phi phi pi pm prod propto psi qquad quad rangle rceil rfloor rho Rightarrow right rm rVert Sigma sigma
    sim sin sinh sqrt sum tag tan tanh tau text tfrac theta Theta tilde times to top underbrace uparrow varepsilon varnothing varphi varrho varsigma xi zeta""".split()


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_word_of_an_equation_is_known(name):
    text = re.sub(r"```.*?```|`[^`]*`", "", words(name), flags=re.S)
    found = re.findall(r"\\([A-Za-z]+)", text.replace("\\\\", " "))  # two backslashes end a line
    assert set(found) <= set(TEX), sorted(set(found) - set(TEX))
    fractions = [m for m in re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", text, flags=re.S) if re.search("[½¼¾⅓⅔]", m)]
    assert not fractions, f"KaTeX has no such letters: {fractions}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_what_a_chapter_needs_stands_before_it(name):
    "Or in the appendix."
    later = [need for need in BOOK["chapter"][name]["needs"] if FILES[name] < FILES[need] < FILES["jax"]]
    assert not later, f"{name} needs {', '.join(later)}, which come after it"


@pytest.mark.parametrize("name", [name for name in CHAPTERS if FILES[name] >= "29" and BOOK["chapter"][name]["place"] and "solver" not in BOOK["chapter"][name]["place"]])
def test_the_colours_of_ode_and_sde_mean_nothing_else(name):
    "Orange and green are theirs through the whole book; lines without a role take Matplotlib's C0 … C5."
    code = "\n".join("".join(c["source"]) for c in cells(name) if c["cell_type"] == "code")
    assert not re.search(r"""["'](ode|sde)["']""", code)
