"""The site as a reader sees it: built, served on this machine, every page opened in Chromium.

Slow. It needs chromium, node and npm; `FLAXDIFF_SHOTS=folder` keeps a picture of every page, light and dark.
"""
import functools, json, os, re, shutil, subprocess, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote
from pathlib import Path

import pytest
from test_figures import check_numbers
from test_repo import NOTEBOOKS, ROOT, Chapter, directives, load_script, prose_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = load_script().page_name
BROKEN = """<p>$$x = \\tag{1}$$ and **bold**, [a link](there.html) and `code`</p><p>\\(\\frac{1}\\)</p><img src="missing.png">
<p><a href="no_such_page.html">gone</a> <a href="index.html#no-such-heading">gone too</a></p>
<div class="sourceCode"><pre class="sourceCode"><code class="sourceCode">#| export
x = 1</code></pre></div><p style="color: #eee; background: #fff">pale</p><div style="width: 3000px">wide</div>
<details open><summary>Solution</summary></details><div class="cell">x</div><p style="max-width: none">{LONG}</p><table style="width: 4000px"><td>1</td></table>
<div class="sourceCode"><pre style="overflow: auto; white-space: pre !important">{LONG}</pre></div><script>console.warn("LaTeX-incompatible input")</script><script>document.querySelectorAll("link[rel~=icon], meta[property='og:image'], .toc-phone").forEach((e) => e.remove())</script>
<span class="katex-html" style="position: relative"><span class="base">aaaa</span><span class="tag" style="position: absolute; left: 0">(1)</span></span>""".replace("{LONG}", "of the noise that is added " * 40)
WORDS = {"DPM++ 2M": "dpm_solver.html", "alpha_bar": "betas.html", "ancestral": "ddim.html", "min-SNR": "loss.html", "inpaint": "inpainting.html", "img2img": "editing.html",
         "EDMNoiseScheduler": "reference_schedulers.html", "take_next_step": "reference_samplers.html", "API": "reference.html"}
MAX_PAGE = 1_500_000  # bytes: a page, its pictures and its own scripts


def packages(folder, katex):
    "playwright-core, which drives the browser, and KaTeX as the pages ask for it; kept in pytest's cache."
    wanted = ["playwright-core@1", f"katex@{katex}"]
    stamp = folder / "wanted.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
        command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr}"
        stamp.write_text(json.dumps(wanted))
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="session")
def report(tmp_path_factory, pytestconfig):
    "What Chromium saw on each page, and on one that is broken on purpose."
    for tool, found in {"chromium": CHROMIUM, "node": shutil.which("node"), "npm": shutil.which("npm")}.items():
        if not found: pytest.skip(f"{tool} is not installed")
    root = tmp_path_factory.mktemp("site")
    for name in ("nbs", "flaxdiff"): shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml"): shutil.copy2(ROOT / name, root)
    done = subprocess.run([sys.executable, root / "nbs" / "_docs.py", "build"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = root / "_docs"
    text = (site / PAGE("02_forward")).read_text(encoding="utf-8")
    (site / "broken.html").write_text(re.sub(r'id="quarto-sidebar"|sidebar-navigation', "", text).replace("</main>", BROKEN + "</main>"), encoding="utf-8")
    asked = re.search(r"katex@([\d.]+)", "".join(f.read_text(encoding="utf-8") for f in site.glob("*.html")))
    modules = packages(Path(pytestconfig.cache.mkdir("site")), asked[1] if asked else "latest")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shots = os.environ.get("FLAXDIFF_SHOTS")
    if shots: Path(shots).mkdir(parents=True, exist_ok=True)
    job = {"base": f"http://127.0.0.1:{server.server_port}/", "pages": sorted(f.name for f in site.glob("*.html")), "modules": str(modules),
           "words": list(WORDS), "numbers": re.search(r"export (async function numbers.*?^})", (ROOT / "tests" / "figures.mjs").read_text(encoding="utf-8"), re.M | re.S)[1],
           "chromium": CHROMIUM, "shots": shots and str(Path(shots).resolve())}
    try: done = subprocess.run(["node", ROOT / "tests" / "site.mjs", json.dumps(job)], capture_output=True, text=True, timeout=1800)
    finally: server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    return {"base": job["base"], **json.loads(done.stdout)}


def shown_cells(chapter):
    "The cells of a notebook that its page shows."
    for cell in chapter.cells:
        told = directives(cell["source"]) if cell["cell_type"] == "code" else {}
        if not told.keys() & {"hide", "default_exp", "export", "exporti"} and told.get("include:") != "false": yield cell, told


def faults_of_any_page(page, base, pages):
    "What is wrong on a page, whatever it is about."
    for what, pattern in {"bold": r"\*\*", "link": r"\]\(", "directive": r"^#\|", "mathematics": r"\$|\\[a-zA-Z]+|\\[\[(]", "code": "`", "div": "^:::"}.items():
        if found := re.search(f".{{0,30}}(?:{pattern}).{{0,30}}", page["text"], re.M): yield f"raw Markdown is seen ({what}): {found[0]!r}"
    for error in page["mathErrors"]: yield f"KaTeX cannot set {error}"
    for image in page["images"]:
        if image["width"] == 0 and not image["src"].startswith("https://colab.research.google.com/"): yield f"an image is not loaded: {image['src']}"
    for block in page["code"]:
        if found := re.search(r"^\s*#\|.*|.*`\]\(.*", block, re.M): yield f"code shows {found[0]!r}"
    for message in page["console"]: yield f"the page's script fails: {message}"
    for message in page["failed"]: yield f"a request fails: {message}"
    if page["stderr"]: yield "an output is an error, or on stderr"
    listed = {link.split("/")[-1] for link in page["sidebar"]}
    if missing := {PAGE(p.stem) for p in NOTEBOOKS} - listed: yield f"the sidebar lacks {', '.join(sorted(missing))}"
    for link in sorted(set(page["links"])):
        if not link.startswith(base): continue
        name, _, anchor = unquote(link[len(base):]).partition("#")
        name = name.split("?")[0] or "index.html"
        if name not in pages: yield f"a link to {name}, which is no page"
        elif anchor and anchor not in pages[name]["ids"]: yield f"a link to {name}#{anchor}, which is not on that page"
    for scheme, kinds in page["contrast"].items():
        for kind, ratio in kinds.items():
            if ratio < 3: yield f"{kind} is hard to read in the {scheme} theme: a contrast of {ratio:.1f}"
    yield from faults_of_form(page)
    for where in ("tooWide", "tooWideOnPhone"):
        if page[where]: yield f"wider than the window ({where}): {'; '.join(page[where])}"


def faults_of_form(page):
    "What is set so that it cannot be read well."
    if page["noAlt"]: yield f"{page['noAlt']} images without alt"
    if not page["icon"]: yield "no favicon"
    if not page["shared"]: yield "no og:image"
    for fold in sorted(set(page["openFolds"])): yield f"not folded: {fold}"
    for message in sorted(set(page["warnings"])): yield f"a warning: {message[:160]}"
    if page["bytes"] > MAX_PAGE: yield f"{page['bytes']:,} bytes"
    if page["letters"] > 80: yield f"{page['letters']:.0f} characters a line"
    if page["faces"]["light"] != page["faces"]["dark"]: yield f"light and dark are two sites: {page['faces']}"
    if page["dimmed"]["dark"] is False: yield "figures glare in the dark"
    if not page["here"]: yield "the sidebar does not show the current page"
    if page["contents"] and not page["phoneContents"]: yield "no contents on a phone"
    if page["desktop"]["cut"]: yield f"code is cut at the right: {'; '.join(page['desktop']['cut'][:3])}"
    for where in ("desktop", "phone"):
        seen = page[where]
        if seen["overprinted"]: yield f"numbers are printed over equations ({where}): {' '.join(seen['overprinted'])}"
        if seen["sideways"]: yield f"the page scrolls sideways ({where}) by {seen['sideways']} pixels"
        if seen["barrenTables"]: yield f"{seen['barrenTables']} tables do not scroll ({where})"


def faults_of_chapter(page, chapter):
    "What a page lacks of its notebook."
    straight = str.maketrans("‘’“”", "\'\'\"\"")
    squeeze = lambda s: "".join(s.split()).translate(straight)
    title, promise = re.match(r"# (.*)\n\n> (.*)", chapter.cells[0]["source"]).groups()
    plain = lambda s: squeeze(re.sub(r"[`*]|\$[^$]*\$", "", s))
    if squeeze(page["heading"]) != plain(title): yield f"the heading is {page['heading']!r}, not {title!r}"
    if "`" not in promise and "$" not in promise and plain(promise) not in squeeze(page["text"]): yield f"the promise is not seen: {promise}"
    cells = list(shown_cells(chapter))
    prose = [prose_of(cell["source"]) for cell, _ in cells if cell["cell_type"] == "markdown"]
    equations = sum(s.count("$$") // 2 for s in prose)
    if page["equations"] != equations: yield f"{page['equations']} equations are set, of {equations}"
    if any(re.search(r"(?<!\$)\$[^$\n]+\$(?!\$)", s.replace("$$", "")) for s in prose) and not page["inline"]: yield "no mathematics is set inside the text"
    code, seen = [], [squeeze(block) for block in page["code"]]
    images = outputs = 0
    for cell, told in cells:
        if cell["cell_type"] != "code": continue
        if told.get("echo:") != "false": code.append(re.sub(r"^(#\||\s*%).*\n?", "", cell["source"], flags=re.M))
        if told.get("output:") == "false": continue
        outputs += len(cell["outputs"])
        images += sum(any(kind.startswith("image/") for kind in out.get("data", {})) for out in cell["outputs"])
    for source in filter(str.strip, code):
        if not any(squeeze(source) in block for block in seen): yield f"code is not shown: {source.strip().splitlines()[0]}"
    loaded = [image for image in page["images"] if image["width"] and image["shown"]]
    if len(loaded) < images: yield f"{len(loaded)} figures are seen, of {images}"
    if page["outputs"] < outputs: yield f"{page['outputs']} outputs are seen, of {outputs}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_page(path, report):
    name, pages = PAGE(path.stem), report["pages"]
    assert name in pages, f"no page {name}; there are {', '.join(pages)}"
    chapter = Chapter(path.stem, path.read_text(encoding="utf-8"))
    faults = [*faults_of_any_page(pages[name], report["base"], pages), *faults_of_chapter(pages[name], chapter)]
    if faults: pytest.fail("\n".join(faults), pytrace=False)


def test_every_page_is_a_chapter(report):
    assert set(report["pages"]) - {"broken.html"} == {PAGE(p.stem) for p in NOTEBOOKS}


def test_a_broken_page_is_seen(report):
    faults = "\n".join(faults_of_any_page(report["pages"]["broken.html"], report["base"], report["pages"]))
    for word in ("(bold)", "(link)", "(mathematics)", "(code)", "KaTeX cannot set", "missing.png", "code shows '#| export'", "a request fails: 404", "the sidebar lacks",
                 "images without alt", "no favicon", "no og:image", "open from the start", "stands open below", "LaTeX-incompatible", "characters a line", "no contents on a phone",
                 "code is cut", "numbers are printed over", "tables do not scroll", "no_such_page.html", "index.html#no-such-heading", "prose is hard to read", "wider than the window"):
        assert word in faults, f"{word} went unseen among\n{faults}"
    other = next(p for p in NOTEBOOKS if p.stem != "index")
    assert list(faults_of_chapter(report["pages"]["broken.html"], Chapter(other.stem, other.read_text(encoding="utf-8"))))


def test_search_finds_what_people_type(report):
    for word, page in WORDS.items():
        found = [href.split("#")[0].split("/")[-1] for href in report["searches"][word]]
        assert page in found[:3], f"{word!r} finds {found}"


def test_interactive_figures(report):
    seen = report["figures"]["pages"]
    assert len(seen) >= 5, f"figures on {sorted(seen)}"
    faults = [f"{page}: {fault}" for page, figure in seen.items() for fault in figure["faults"]]
    if faults: pytest.fail("\n".join(faults), pytrace=False)


def test_figures_compute_in_the_browser_what_the_library_does(report, monkeypatch):
    check_numbers(report["figures"]["numbers"], monkeypatch)
