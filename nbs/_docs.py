"""The site and the README, both made from the notebooks.

    python nbs/_docs.py build     every notebook, processed by nbdev, then rendered into _docs
    python nbs/_docs.py readme    index.ipynb into README.md, its figures into nbs/images
    python nbs/_docs.py stills    a picture of each interactive figure, by Chromium, into its cell as an attachment

Quarto renders the site where it is installed; elsewhere smalldocs does, from the same `_quarto.yml`. nbdev's own
commands are not used: where Quarto is missing they try to install it.
"""
import argparse, ast, base64, functools, html, json, os, re, shutil, struct, subprocess, sys, tempfile, threading, traceback
from concurrent.futures import ProcessPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nbs"))
from _book import ends_solution  # noqa: E402
NBS, PROC, DOCS = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
IMAGE_TYPES = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif"}
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+:?)[ \t]*(.*)\n?", re.M)
FIGURE = re.compile(r'<div class="play" data-play="(\w+)">')
LINK = re.compile(r"\]\((?!\w+:|#|/)([^)#\s]+)\.ipynb(#[^)\s]*)?\)")


class DocsError(Exception):
    "The build cannot go on; the message says why."


def page_name(
    stem,  # a notebook's name without its ending, such as `10_ddim`
):
    "The name of its page, as nbdev numbers none: `10_ddim` is `ddim.html`."
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


def imports_alone(
    source,  # of a code cell
):
    "Whether it holds imports, and nothing else."
    try: return all(isinstance(line, (ast.Import, ast.ImportFrom)) for line in ast.parse(source).body)
    except SyntaxError: return False  # a magic command


def fold_solutions(
    cells,  # of a notebook, with their sources as strings
):
    "The cells, the code that follows a closed `Solution` moved into it, and the source of exports folded."
    cells, folded = list(cells), []
    while cells:
        cell = cells.pop(0)
        folded.append(cell)
        if cell["cell_type"] == "code":
            cell["source"] = cell["source"].replace("#| code-fold: show", "#| code-fold: true", 1)
            if imports_alone(cell["source"]): cell["source"] = cell["source"].replace("Exported source", "Imports", 1)
        if cell["cell_type"] != "markdown" or not ends_solution(cell["source"]): continue
        if not cells or cells[0]["cell_type"] != "code": continue
        cell["source"] = cell["source"].rstrip().removesuffix("</details>").rstrip()
        while cells and cells[0]["cell_type"] == "code": folded.append(cells.pop(0))
        folded.append({"cell_type": "markdown", "id": f"end-{cell.get('id', len(folded))}", "metadata": {}, "source": "</details>"})
    return folded


def fold():
    "`fold_solutions` of every notebook in `_proc`."
    for f in PROC.glob("*.ipynb"):
        nb = json.loads(f.read_text(encoding="utf-8"))
        for cell in nb["cells"]: cell["source"] = "".join(cell["source"])
        nb["cells"] = fold_solutions(nb["cells"])
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
    fold()
    command = [quarto, "render", "."] if quarto else [sys.executable, "-m", "smalldocs.cli", "render", "."]
    done = subprocess.run(command, cwd=PROC, text=True, stderr=subprocess.PIPE, errors="replace")
    # smalldocs says which of Quarto's options it does not know; those are meant for Quarto
    said = [line for line in done.stderr.splitlines() if not re.match(r"warning: \S+ is ignored", line)]
    if said: print("\n".join(said), file=sys.stderr)
    if done.returncode: raise DocsError(f"{Path(command[0]).name} failed with code {done.returncode}: {' '.join(command)} in {PROC}")
    if not quarto: rename_pages(PROC / DOCS.name)
    return PROC / DOCS.name, [line for line in said if re.match(r"\W*warning", line, re.I)]


# What no renderer does, done to its pages

SIDEBAR = """<script>
const shelf = document.querySelector("#quarto-sidebar"), here = shelf?.querySelector(".active");
if (here) shelf.scrollTop += here.getBoundingClientRect().top - shelf.getBoundingClientRect().top - shelf.clientHeight / 3;
</script>"""


def image_width(
    src,  # of an <img>: a data URI, or a path
    site,  # the folder of the pages
):
    "A PNG's width in pixels; None for what is no PNG of this site."
    try: head = base64.b64decode(src.split(",", 1)[1][:64]) if src.startswith("data:image/png") else (site / src).read_bytes()[:24]
    except (OSError, ValueError): return None
    return struct.unpack(">I", head[16:20])[0] if head[1:4] == b"PNG" else None


def finish_page(
    text,  # a page
    site,  # the folder of the pages
):
    "The page with tables that scroll by themselves, pictures that tell their width, contents for phones, and scripts."
    def picture(m):
        src = re.search(r'\bsrc="([^"]*)"', m[0])
        width = image_width(html.unescape(src[1]), site) if src and not re.search(r"--width|\bstyle=", m[0]) else None
        return m[0] if width is None else f'<img style="--width: {width}px"{m[0][4:]}'
    text = re.sub(r"<img\b[^>]*>", picture, text)
    text = re.sub(r"<table\b.*?</table>", lambda m: f'<div class="table-scroll" tabindex="0" role="region" aria-label="Table">{m[0]}</div>', text, flags=re.S)
    contents = re.search(r'<nav id="TOC".*?</nav>', text, re.S)
    if lists := contents and re.search(r"<ul.*</ul>", contents[0], re.S):
        plain = re.sub(r'\s(?:id|class|data-[\w-]+)="[^"]*"', "", lists[0])
        fold = f'<details class="toc-phone"><summary>On this page</summary>{plain}</details>'
        text = re.sub(r"(<main\b[^>]*>(?:\s*<header\b.*?</header>)?)", lambda m: m[0] + fold, text, count=1, flags=re.S)
    scripts = SIDEBAR + ('<script type="module" src="figures/play.mjs"></script>' if FIGURE.search(text) else "")
    return text.replace("</body>", scripts + "</body>")


def add_search_words(
    site,  # the folder of the pages
):
    "Into the index of the search box: what people type, from `nbs/search.json`, {page: [words]}."
    index = site / "search.json"
    if not index.exists(): return
    entries = json.loads(index.read_text(encoding="utf-8"))
    titles = {entry["href"].split("#")[0]: entry["title"] for entry in entries}
    words = json.loads((NBS / "search.json").read_text(encoding="utf-8"))
    for page, names in words.items():
        if page.split("#")[0] not in titles: raise DocsError(f"nbs/search.json names {page}, which is no page")
        for n, name in enumerate(names):
            entries.append({"objectID": f"{page}?word={n}", "href": page, "title": name, "section": titles[page.split("#")[0]], "text": name})
    index.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def build():
    "Build the site into `_docs`; a warning, such as a broken link, makes the build fail after it has been written."
    if not (NBS / "index.ipynb").exists(): raise DocsError("nbs/index.ipynb is missing: the site has no first page")
    if not shutil.which("quarto"):
        try: import smalldocs  # noqa: F401
        except ImportError: raise DocsError("neither Quarto nor smalldocs is installed: pip install smalldocs, or see quarto.org") from None
    process()
    site, warnings = render()
    shutil.copytree(NBS / "figures", site / "figures", dirs_exist_ok=True)
    for page in site.glob("*.html"): page.write_text(finish_page(page.read_text(encoding="utf-8"), site), encoding="utf-8")
    add_search_words(site)
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


# ---------------------------------------------------------------- still pictures of the interactive figures

class Quiet(SimpleHTTPRequestHandler):
    "A server that does not log."
    def log_message(self, *args): pass


def still(
    name,  # of an interactive figure
    base,  # where nbs/ is served
    folder,  # for the browser's own files
):
    "Its picture, as Chromium draws it on a page of its own: PNG, 256 colours."
    from PIL import Image, ImageChops
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None: raise DocsError("Chromium is not installed: it draws the pictures")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=720,1100", f"--user-data-dir={folder}/chromium",
               "--virtual-time-budget=8000", f"--screenshot={folder}/{name}.png", f"{base}/_still.html?{name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    path = Path(folder, f"{name}.png")
    if not path.exists(): raise DocsError(f"{' '.join(command)} drew nothing:\n{done.stderr[-2000:]}")
    image = Image.open(path).convert("RGB")
    white = Image.new("RGB", image.size, "white")
    low = ImageChops.difference(image, white).getbbox()[3]
    image.crop((0, 0, image.width, min(image.height, low + 12))).quantize(64).save(path, optimize=True)
    return path.read_bytes()


STILL = """<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="styles.css">
<style>:root { --bs-body-color: #212529; --bs-body-bg: #fff } body { margin: 12px; width: 696px; background: #fff; color: #212529 } .play { border: 0; margin: 0 }</style>
<script>const name = location.search.slice(1); document.write(`<div class="play" data-play="${name}"></div>`)</script>
<script type="module" src="figures/play.mjs"></script>"""


def stills():
    "Every interactive figure, drawn and attached to its cell."
    import nbformat
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder, "nbs")
        served.mkdir()
        shutil.copytree(NBS / "figures", served / "figures")
        shutil.copy2(NBS / "styles.css", served)
        (served / "_still.html").write_text(STILL, encoding="utf-8")
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in sorted(NBS.glob("[!_.]*.ipynb")):
            if not FIGURE.search(path.read_text(encoding="utf-8").replace('\\"', '"')): continue
            nb = nbformat.read(path, as_version=4)
            for cell in nb.cells:
                found = FIGURE.search(cell.source) if cell.cell_type == "markdown" else None
                if not found: continue
                data = still(found[1], f"http://127.0.0.1:{server.server_port}", folder)
                cell["attachments"] = {f"{found[1]}.png": {"image/png": base64.b64encode(data).decode()}}
                print(f"{path.name}: {found[1]}, {len(data):,} bytes")
            nbformat.write(nb, path)
        server.shutdown()


def main():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "readme", "stills"])
    command = parser.parse_args().command
    os.chdir(ROOT)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # document this very tree
    sys.path.insert(0, str(ROOT))
    try: {"build": build, "readme": make_readme, "stills": stills}[command]()
    except DocsError as e: sys.exit(f"nbs/_docs.py {command}: {e}")


if __name__ == "__main__":
    main()
