"""The opening boxes, the page of notation and the bibliography, all written from the tables in `_book.toml` and `_works.toml`;
and in each chapter the code of its solutions, closed where a notebook is opened in JupyterLab or Colab.

    python nbs/_book.py           write them into the notebooks; a second time changes nothing
    python nbs/_book.py check     say what does not agree, and change nothing
"""
import json, re, sys, tomllib
from functools import cache
from pathlib import Path

NBS = Path(__file__).resolve().parent
sys.path.insert(0, str(NBS))
from _reference import look_up  # noqa: E402
MAP = ["data", "noise", "network", "solver", "picture"]
GREEK = set("""alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi pi rho varrho sigma varsigma tau phi
    varphi chi psi omega ell Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega""".split())
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[^\s]")
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)\$(?!\d)", re.S)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.S | re.M)
WORDS = {"\\text", "\\mathrm", "\\operatorname", "\\tag", "\\begin", "\\end", "\\rm", "\\mathbb", "\\mathcal"}


# ---------------------------------------------------------------- the tables

def load():
    "Both tables: the letters, the chapters, the works."
    book = tomllib.loads((NBS / "_book.toml").read_text(encoding="utf-8"))
    return {**book, **tomllib.loads((NBS / "_works.toml").read_text(encoding="utf-8"))}


@cache
def files():
    "Each notebook by its name without the number: {'ddim': '10_ddim.ipynb'}."
    return {re.sub(r"^\d+_", "", f.stem): f.name for f in sorted(NBS.glob("[0-9]*_*.ipynb"))}


def link(
    name,  # a chapter's name without its number
    book,  # the tables
):
    "A link to a chapter in the words that the table has for it."
    called = book["chapter"].get(name, {}).get("called", "the notation")
    return f"[{called}]({files()[name]})"


# ---------------------------------------------------------------- letters

def formulas(
    text,  # Markdown
):
    "The mathematics of a text, without its code."
    return [a or b for a, b in MATH.findall(CODE.sub("", text))]


@cache
def tokens(tex): return tuple(TOKEN.findall(tex))


def group_end(parts, i):
    "Where the group that begins at i ends: after a brace and all within, or after one token."
    if i < len(parts) and parts[i] in WORDS: return group_end(parts, i + 1)
    if i >= len(parts) or parts[i] != "{": return i + 1
    depth = 0
    for j in range(i, len(parts)):
        depth += (parts[j] == "{") - (parts[j] == "}")
        if not depth: return j + 1
    return len(parts)


def letters(
    tex,  # one formula
):
    r"Its letters: 'x', 'sigma', 'bar alpha', 'dw'. Neither what stands below a letter counts, nor words, nor a hat, nor a dot."
    parts, found, i = tokens(re.sub(r"\\mathrm\{d\}(\\bar)?\s*w", r"\\dw ", tex)), [], 0
    while i < len(parts):
        part, name = parts[i], parts[i].lstrip("\\")
        if part == "_" or part in WORDS: i = group_end(parts, i + 1)
        elif part in ("\\bar", "\\tilde"):
            inner = [p.lstrip("\\") for p in parts[i + 1:i + 4] if p.lstrip("\\") in GREEK or len(p) == 1 and p.isalpha()]
            found.append(f"{name} {inner[0]}" if inner else name)
            i = group_end(parts, i + 1)
        else:
            if part == "\\dw" or name in GREEK and part[0] == "\\" or len(part) == 1 and part.isascii() and part.isalpha(): found.append(name)
            i += 1
    return found


def base(tex): return (letters(tex) or [tex])[0]


def split(key): return [k.strip() for k in key.split(",")]


def contains(formula, piece):
    "Whether the tokens of a formula hold those of a piece, one after another."
    long, short = tokens(formula), tokens(piece)
    return any(long[i:i + len(short)] == short and long[i - 1:i] != ("_",) for i in range(len(long)))


def clashes(
    name,  # a chapter's name without its number
    cells,  # its cells
    book,  # the tables
):
    "A sentence for each letter without a meaning, or with two."
    rows = {base(t): s for s in book["symbol"] for t in [s["tex"], *s.get("like", [])]}
    chapter = book["chapter"][name]
    own = [k for key in chapter["here"] for k in split(key)]
    math = [f for cell in cells[2:] if cell["cell_type"] == "markdown" for f in formulas("".join(cell["source"]))]
    used = {letter for f in math for letter in letters(f)}
    for letter in sorted(used - rows.keys() - {base(k) for k in own}):
        example = next(f for f in math if letter in letters(f))
        yield f"{letter} has no meaning, neither in the table nor in the chapter's own list: {' '.join(example.split())[:80]}"
    for k in own:
        row = rows.get(base(k))
        if base(k) not in used: yield f"{k} is declared, but not used"
        if row and not row.get("free") and "_" not in k and name not in row.get("elsewhere", []):
            yield f"{k} is declared for itself, but means {row['means']!r} in the whole book"
    for row in book["symbol"]:
        if name in row.get("elsewhere", []): continue
        for piece in row.get("never", []):
            for f in math:
                if contains(f, piece): yield f"{piece} looks like another {row['tex']} than the book's: {' '.join(f.split())[:80]}"


# ---------------------------------------------------------------- what is written

def listed(words):
    "'a', 'a and b', 'a, b and c'."
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def box(
    name,  # a chapter's name without its number
    book,  # the tables
):
    "What stands below 'You will learn' on a chapter's first screen."
    chapter = book["chapter"][name]
    needs = listed([link(n, book) for n in chapter["needs"]]) or "nothing before this page"
    letters_ = ", ".join(f"${s}$" for s in chapter["uses"])
    here = "; ".join(f"{listed([f'${k}$' for k in split(key)])}, {means}" for key, means in chapter["here"].items())
    symbols = " ".join(filter(None, [f"{letters_}, as in {link('notation', book)}." if letters_ else "", f"Here only: {here}." if here else ""]))
    place = " → ".join(f"**{p}**" if p in chapter["place"] else p for p in MAP) + ("" if chapter["place"] else " (this page serves them all)")
    parts = [f"**You need** {needs}.", f"**Symbols** {symbols or 'none but those of the code.'}", look_up(files()[name]), f"**On the map** {place}"]
    return "\n\n".join(filter(None, parts))


def with_box(
    source,  # the second cell of a chapter
    text,  # its box
):
    "The same cell with the box in place of an older one, or at its end; what stands below an older one stays."
    head, _, old = source.partition("**You need**")
    below = re.sub(r".*?\*\*On the map\*\*[^\n]*", "", old, count=1, flags=re.S)
    return re.sub(r"^You will learn$", "**You will learn**", head.rstrip(), flags=re.M) + "\n\n" + text + below


def notation(book):
    "The table of the book's letters, in its parts."
    lines = []
    for s in book["symbol"]:
        if "group" in s: lines += ["", f"## {s['group']}", "", "| | is | in code | from |", "|---|---|---|---|"]
        also = "".join(f", ${t}$" for t in s.get("like", []))
        shape = f" ({s['shape']})" if s.get("shape") else ""
        code = f"`{s['code']}`" if s["code"] else ""
        lines.append(f"| ${s['tex']}${also} | {s['means']}{shape} | {code} | {link(s['chapter'], book)} |")
    return "\n".join(lines).strip()


def own_letters(book):
    "The letters that chapters use in their own ways, with the chapters."
    found = {}
    for name, chapter in book["chapter"].items():
        for key, means in chapter["here"].items(): found.setdefault(key, {}).setdefault(means, []).append(link(name, book))
    order = lambda key: (base(key).split()[-1].lower(), key)
    rows = [f"| {listed([f'${k}$' for k in split(key)])} | " + "; ".join(f"{means} ({', '.join(where)})" for means, where in found[key].items()) + " |"
            for key in sorted(found, key=order)]
    return "\n".join(["## Letters of single chapters", "", "| | is |", "|---|---|", *rows])


def references(cells):
    "The text of a chapter's references, or nothing."
    text = "".join(cells[-1]["source"])
    return text[text.rfind("## References"):] if "## References" in text else ""


def works(book, chapters):
    "Every work that a chapter cites, once, by author, with the chapters that cite it."
    lines, texts = [], {name: references(cells) for name, cells in chapters.items()}
    for work in sorted(book["work"], key=lambda w: w["cite"].lower()):
        where = [link(name, book) for name, text in texts.items() if re.search(work["seen"], text, re.I)]
        url = work.get("url") or ("https://arxiv.org/abs/" + work["arxiv"] if "arxiv" in work else "https://doi.org/" + work["doi"].replace("(", "%28").replace(")", "%29") if "doi" in work else "")
        label = "arXiv:" + work["arxiv"] if "arxiv" in work else "doi:" + work["doi"] if "doi" in work else re.sub(r"https?://(www\.)?", "", url).split("/")[0]
        lines.append(f"- {work['cite']}." + (f" [{label}]({url})." if url else "") + f" Cited in {listed(where)}.")
    return "\n".join(lines)


def pages(book, notebooks):
    "What every notebook shall hold: {file: {number or id of a cell: text}}."
    chapters = {name: notebooks[f]["cells"] for name, f in files().items() if name in book["chapter"]}
    wanted = {files()[name]: {1: with_box("".join(cells[1]["source"]), box(name, book))} for name, cells in chapters.items()}
    if "notation" in files(): wanted[files()["notation"]] = {"symbols": notation(book), "own": own_letters(book)}
    if "bibliography" in files(): wanted[files()["bibliography"]] = {"works": works(book, chapters)}
    return wanted


# ---------------------------------------------------------------- exercises

CLOSED = {"cellView": "form", "jupyter": {"outputs_hidden": True, "source_hidden": True}}  # for Colab, and for JupyterLab


def ends_solution(
    source,  # of a Markdown cell
):
    "Whether it ends in a closed `Solution`: the code cells behind it are part of that."
    inside, end, after = source.rstrip().rpartition("</details>")
    return bool(end and not after.strip() and re.search(r"<details>\s*<summary>\s*Solution\b(?!.*<details>)", inside, re.S))


def exercises(
    cells,  # of a chapter
):
    "{number: [code cells that ask, code cells of the solution]}."
    found, number, solved = {}, None, False
    start = next((i for i, c in enumerate(cells) if re.search(r"^## Exercises$", "".join(c["source"]), re.M)), len(cells))
    for i, cell in enumerate(cells[start:]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and number: found[number][solved].append(cell)
        if cell["cell_type"] != "markdown": continue
        asked = re.findall(r"^\*\*(\d+)\.", source, re.M)
        found.update({n: [[], []] for n in asked})
        number, solved = (asked or [number])[-1], ends_solution(source)
        if i and re.search(r"^## ", source, re.M): break
    return found


def close_solutions(cells):
    "Mark the code of solutions as closed; whether anything was changed."
    open_ = [cell for _, solution in exercises(cells).values() for cell in solution if not CLOSED.items() <= cell["metadata"].items()]
    for cell in open_: cell["metadata"].update(CLOSED)
    return bool(open_)


# ---------------------------------------------------------------- the command

def stale(book, notebooks):
    "(file, cell, text) for each cell that does not hold what it shall."
    for f, cells in pages(book, notebooks).items():
        for key, text in cells.items():
            found = notebooks[f]["cells"][key] if isinstance(key, int) else next(c for c in notebooks[f]["cells"] if c["id"] == key)
            if "".join(found["source"]) != text: yield f, found, text


def main():
    "The command line."
    notebooks = {f: json.loads((NBS / f).read_text(encoding="utf-8")) for f in files().values()}
    changed = {}
    for f, cell, text in stale(load(), notebooks): cell["source"] = text.splitlines(keepends=True); changed[f] = notebooks[f]
    for f, nb in notebooks.items():
        if close_solutions(nb["cells"]): changed[f] = nb
    if "check" in sys.argv[1:]: sys.exit("\n".join(f"{f} is not what the tables say; run python nbs/_book.py" for f in changed) or None)
    for f, nb in changed.items(): (NBS / f).write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
