"""The site and the README, both made from the notebooks.

    python nbs/_docs.py build     every notebook, processed by nbdev, then rendered into _docs
    python nbs/_docs.py readme    index.ipynb into README.md, its figures into nbs/images

Quarto renders the site where it is installed; elsewhere smalldocs does, from the same `_quarto.yml`. nbdev's own
commands are not used: where Quarto is missing they try to install it.
"""
import argparse, base64, json, os, re, shutil, subprocess, sys, traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, PROC, DOCS = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
IMAGE_TYPES = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif"}
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+:?)[ \t]*(.*)\n?", re.M)
LINK = re.compile(r"\]\((?!\w+:|#|/)([^)#\s]+)\.ipynb(#[^)\s]*)?\)")


class DocsError(Exception):
    "The build cannot go on; the message says why."


def page_name(
    stem,  # a notebook's name without its ending, such as `07_ddim`
):
    "The name of its page, as nbdev numbers none: `07_ddim` is `ddim.html`."
    return re.sub(r"^\d+[a-z0-9]*_", "", stem.lower()) + ".html"


def site_url():
    "Where the site lives, from `settings.ini`."
    from nbdev.config import get_config
    cfg = get_config(path=ROOT)
    return f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/") + "/"


# ---------------------------------------------------------------- the site

def process():
    "Every notebook, from nothing, into `_proc`: hidden cells gone, signatures and tables of parameters shown."
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import main as convert
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    for f in [NBS / "_quarto.yml", *NBS.glob("*.css")]: shutil.copy2(f, PROC)
    if (NBS / "images").is_dir(): shutil.copytree(NBS / "images", PROC / "images")
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        jobs = {f.name: pool.submit(convert, (f, PROC / f.name, FilterDefaults)) for f in sorted(NBS.glob("[!_.]*.ipynb"))}
    faults = {name: fault for name, job in jobs.items() if (fault := job.exception())}
    for name, fault in faults.items(): print(f"---- {name}", *traceback.format_exception(fault), sep="\n", file=sys.stderr)
    if faults: raise DocsError(f"nbdev could not process {', '.join(faults)}; the reasons are printed above")


def relink(
    quarto,  # True where Quarto renders, which reads `output-file`; smalldocs does not
):
    "Point nbdev's links to this very site at the notebooks, so that they hold wherever it is served."
    pages = {page_name(f.stem): f.name for f in PROC.glob("*.ipynb")}
    absolute = re.compile(re.escape(site_url()) + r"([\w.-]+\.html)")
    fence, link = re.compile(r"^```.*?^```", re.M | re.S), re.compile(r"\[(`[^`\n]+`)\]\([^)\s]+\)")
    local = lambda s: absolute.sub(lambda m: pages.get(m[1], m[1]), s)
    signature = lambda s: fence.sub(lambda m: link.sub(r"\1", m[0]), s)  # nbdev links names inside code too
    for f in PROC.glob("*.ipynb"):
        nb = json.loads(f.read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] == "markdown": cell["source"] = local("".join(cell["source"]))
            if cell["cell_type"] == "raw" and not quarto:
                cell["source"] = re.sub(r"^output-file:.*\n", "", "".join(cell["source"]), flags=re.M)
            for out in cell.get("outputs", []):
                data = out.get("data", {})
                if "text/markdown" in data: data["text/markdown"] = local(signature("".join(data["text/markdown"])))
        f.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")


def rename_pages(
    site,  # the folder that smalldocs wrote
):
    "Give smalldocs' pages the names that Quarto gives them, in every link too."
    names = {f.stem + ".html": page_name(f.stem) for f in PROC.glob("*.ipynb")}
    pattern = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, names)) + r")(?![\w-])")
    for f in [f for f in site.rglob("*") if f.suffix in (".html", ".json", ".xml", ".txt") and "site_libs" not in f.parts]:
        text = f.read_text(encoding="utf-8")
        f.write_text(pattern.sub(lambda m: names[m[1]], text), encoding="utf-8")
        if f.name in names: f.rename(f.with_name(names[f.name]))


def render():
    "Render `_proc` with Quarto, or with smalldocs; returns the folder."
    quarto = shutil.which("quarto")
    relink(quarto)
    command = [quarto, "render", "."] if quarto else [sys.executable, "-m", "smalldocs.cli", "render", "."]
    done = subprocess.run(command, cwd=PROC, text=True, stderr=subprocess.PIPE, errors="replace")
    # smalldocs says which of Quarto's options it does not know; those are meant for Quarto
    said = [line for line in done.stderr.splitlines() if not re.match(r"warning: \S+ is ignored", line)]
    if said: print("\n".join(said), file=sys.stderr)
    if done.returncode: raise DocsError(f"{Path(command[0]).name} failed with code {done.returncode}: {' '.join(command)} in {PROC}")
    if not quarto: rename_pages(PROC / DOCS.name)
    return PROC / DOCS.name, [line for line in said if re.match(r"\W*warning", line, re.I)]


def build():
    "Build the site into `_docs`; a warning, such as a broken link, makes the build fail after it has been written."
    if not (NBS / "index.ipynb").exists(): raise DocsError("nbs/index.ipynb is missing: the site has no first page")
    if not shutil.which("quarto"):
        try: import smalldocs  # noqa: F401
        except ImportError: raise DocsError("neither Quarto nor smalldocs is installed: pip install smalldocs, or see quarto.org") from None
    process()
    site, warnings = render()
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(site, DOCS)
    print(f"{len(list(DOCS.glob('*.html')))} pages in {DOCS}")
    if warnings: raise DocsError(f"the site is in {DOCS}, with {len(warnings)} warning(s), printed above")


# ---------------------------------------------------------------- the README

def readme_cells(
    nb,  # the notebook of the first page
):
    "Its cells as GitHub shall see them, and the pictures among their outputs as {name: bytes}."
    cells, pictures = [], {}
    for cell in nb.cells:
        directives = dict(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else {}
        if directives.keys() & {"hide", "default_exp", "export", "exporti"} or directives.get("include:") == "false": continue
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](images/", "](nbs/images/")
            cell.source = LINK.sub(lambda m: f"]({site_url()}{page_name(m[1])}{m[2] or ''})", cell.source)
        else:
            alt = directives.get("fig-alt:", "").strip("\"'")
            cell.source = DIRECTIVE.sub("", cell.source).strip()
            hidden = {"echo:": "source", "output:": "output"}
            cell.metadata = {"tags": [f"no-{what}" for key, what in hidden.items() if directives.get(key) == "false"]}
            for out in cell.get("outputs", []):
                kind = next((k for k in IMAGE_TYPES if k in out.get("data", {})), None)
                if kind is None: continue
                name = f"index_{len(pictures) + 1}.{IMAGE_TYPES[kind]}"
                pictures[name] = base64.b64decode("".join(out["data"][kind]))
                out["data"] = {"text/markdown": f"![{alt}](nbs/images/{name})"}
        cells.append(cell)
    return cells, pictures


def make_readme(
    write=True,  # False only returns what would be written
):
    "README.md from index.ipynb, as (text, {file name: bytes of a picture in nbs/images}); the same for the same notebook."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    source = NBS / "index.ipynb"
    if not source.exists(): raise DocsError("nbs/index.ipynb is missing: there is nothing to make README.md from")
    nb = nbformat.read(source, as_version=4)
    nb.cells, pictures = readme_cells(nb)
    nb.metadata["language_info"] = {"name": "python"}
    tags = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"no-source"}, "remove_all_outputs_tags": {"no-output"}})
    text = MarkdownExporter(config=tags).from_notebook_node(nb)[0]
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"
    text = "<!-- Made from nbs/index.ipynb by `python nbs/_docs.py readme`. -->\n\n" + text
    if write:
        (ROOT / "README.md").write_text(text, encoding="utf-8")
        for old in (NBS / "images").glob("index_*"): old.unlink()
        for name, data in pictures.items():
            (NBS / "images").mkdir(exist_ok=True)
            (NBS / "images" / name).write_bytes(data)
    return text, pictures


def main():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "readme"])
    command = parser.parse_args().command
    os.chdir(ROOT)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # document this very tree
    sys.path.insert(0, str(ROOT))
    try: build() if command == "build" else make_readme()
    except DocsError as e: sys.exit(f"nbs/_docs.py {command}: {e}")


if __name__ == "__main__":
    main()
