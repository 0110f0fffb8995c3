// Opens every page of the served site in Chromium and prints, as JSON, what a reader would see. Called by test_site.py:
//   node tests/site.mjs '{"base": "http://127.0.0.1:PORT/", "pages": ["index.html"], "modules": DIR, "chromium": PATH, "shots": DIR or null}'
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { extname, join } from "node:path";

const { base, pages, modules, chromium: executablePath, shots, words, numbers } = JSON.parse(process.argv[2]);
const { chromium } = createRequire(join(modules, "node_modules", "/"))("playwright-core");
const TYPES = { ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript", ".woff2": "font/woff2", ".woff": "font/woff", ".ttf": "font/ttf" };
const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

// Nothing outside this machine is asked for: KaTeX comes from the package, whatever host the page names, and the rest is refused.
async function answer(route) {
  const url = route.request().url();
  if (url.startsWith(base) || url.startsWith("data:")) return route.continue();
  const katex = url.match(/\/katex(?:@[^/]*)?\/(?:[\d.]+\/)?(?:dist\/)?((?:fonts\/|contrib\/)?katex[^?]*|(?:fonts|contrib)\/[^?]*)/i);
  if (!katex) return route.abort();
  try {
    const file = join(modules, "node_modules", "katex", "dist", katex[1]);
    return await route.fulfill({ body: readFileSync(file), contentType: TYPES[extname(file)] ?? "application/octet-stream", headers: { "access-control-allow-origin": "*" } });
  } catch { return route.abort(); }
}

// Runs in the page: the least contrast of text against its ground (WCAG 2), for a few kinds of text.
function contrasts() {
  const parse = (c) => { const v = (c.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number); return c.startsWith("color(srgb") ? [...v.slice(0, 3).map((x) => 255 * x), v[3]] : v; };
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)).reduce((s, x, i) => s + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {  // every half-transparent layer, down to the first solid one
    const layers = [];
    for (let n = e; n; n = n.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(n).backgroundColor);
      if (a > 0) layers.push([r, g, b, a]);
      if (a === 1) break;
    }
    return layers.reverse().reduce((under, [r, g, b, a]) => [r, g, b].map((x, i) => a * x + (1 - a) * under[i]), [255, 255, 255]);
  };
  const kinds = { prose: "main p", heading: "main h1, main h2, main h3", code: "pre.sourceCode, pre code", mathematics: "main .katex", link: "main p a", sidebar: "#quarto-sidebar a, .sidebar-navigation a", table: "main td", contents: "#TOC a", navbar: ".navbar a" };
  const out = {};
  for (const [kind, selector] of Object.entries(kinds)) {
    const ratios = [...document.querySelectorAll(selector)].filter((e) => e.innerText?.trim() && e.getClientRects().length).map((e) => {
      const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    });
    if (ratios.length) out[kind] = Math.min(...ratios);
  }
  return out;
}

// Runs in the page. Every fold is opened first: what is folded must be right too.
function look() {
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  const main = document.querySelector("main") ?? document.body;
  const prose = main.cloneNode(true);
  prose.querySelectorAll("pre, code, script, style, .katex, .katex-error, svg").forEach((e) => e.remove());
  prose.style.cssText = "position: absolute; left: -9999px; width: 800px";
  document.body.append(prose);  // innerText is what is seen only of what is laid out
  const text = prose.innerText;
  prose.remove();
  const seen = (e) => e.getClientRects().length > 0;
  const ids = new Set([...document.querySelectorAll("[id]")].map((e) => e.id));
  return {
    title: document.title,
    heading: main.querySelector("h1")?.innerText ?? "",
    text,
    ids: [...ids],
    equations: main.querySelectorAll(".katex-display").length,
    inline: main.querySelectorAll(".katex").length - main.querySelectorAll(".katex-display .katex").length,
    mathErrors: [...main.querySelectorAll(".katex-error")].map((e) => e.textContent + (e.title ? ` (${e.title})` : "")),
    images: [...main.querySelectorAll("img")].map((e) => ({ src: e.src.slice(0, 120), width: e.naturalWidth, shown: seen(e) })),
    code: [...main.querySelectorAll("pre code.sourceCode, pre.sourceCode code, div.sourceCode pre")].filter(seen).map((e) => e.innerText),
    outputs: main.querySelectorAll(".cell-output").length,
    stderr: main.querySelectorAll(".cell-output-stderr, .cell-output-error").length,
    sidebar: [...document.querySelectorAll("#quarto-sidebar a[href], .sidebar-navigation a[href]")].map((e) => e.getAttribute("href")),
    links: [...document.querySelectorAll("a[href]")].map((e) => e.href),
    plays: main.querySelectorAll(".play[data-play]").length,
    noAlt: [...main.querySelectorAll("img")].filter((e) => !e.getAttribute("alt")?.trim()).length,
    icon: document.querySelector('link[rel~="icon"]')?.href ?? "",
    shared: document.querySelector('meta[property="og:image"]')?.content ?? "",
  };
}

// Runs in the page, before the folds are opened: what should be folded and is not.
function openFolds() {
  const isSolution = (d) => /^Solution/.test(d.querySelector("summary")?.textContent.trim() ?? "");
  return [...document.querySelectorAll("main details")].flatMap((d) => [
    ...(d.open ? [`open from the start: ${d.querySelector("summary")?.textContent}`] : []),
    ...(isSolution(d) && d.nextElementSibling?.matches(".cell") ? ["a solution's code stands open below it"] : [])]);
}

// Runs in the page: how it is set.
function typography() {
  const main = document.querySelector("main") ?? document.body;
  const seen = (e) => e.getClientRects().length > 0;
  const paragraph = [...main.querySelectorAll("p")].filter((p) => seen(p) && p.innerText.length > 200 && !p.querySelector(".math.display, .katex-display")).sort((a, b) => b.clientWidth - a.clientWidth)[0];
  const kinds = { prose: "main p", heading: "main h1", second: "main h2", code: "main pre" };
  const faces = Object.fromEntries(Object.entries(kinds).map(([kind, selector]) => {
    const e = document.querySelector(selector);
    return [kind, e ? [getComputedStyle(e).fontFamily, getComputedStyle(e).fontSize, getComputedStyle(e).fontWeight].join(" ") : ""];
  }));
  let letters = 0;
  if (paragraph) {
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = getComputedStyle(paragraph).font;
    const sample = "of the noise that is added to the picture, and what the network answers when it is asked for it";
    letters = paragraph.clientWidth / (pen.measureText(sample).width / sample.length);
  }
  const figure = main.querySelector(".cell-output-display img");
  const shelf = document.querySelector("#quarto-sidebar");
  const here = shelf?.querySelector(".active");
  const [a, b] = [shelf?.getBoundingClientRect(), here?.getBoundingClientRect()];
  const toc = document.querySelector(".toc-phone");
  return { faces, letters, dimmed: figure ? getComputedStyle(figure).filter !== "none" : null, shown: !here || !b.height || (b.top >= a.top && b.bottom <= a.bottom),
    contents: Boolean(document.querySelector("#TOC a")), phoneContents: Boolean(toc && seen(toc)) };
}

// Runs in the page: what is printed over, cut, or pushes the page sideways.
function spoiled() {
  const main = document.querySelector("main") ?? document.body;
  const seen = (e) => e.getClientRects().length > 0;
  const over = [...main.querySelectorAll(".katex-html > .tag")].filter((tag) => {
    const t = tag.getBoundingClientRect();
    return [...tag.parentElement.querySelectorAll(":scope > .base")].some((base) => { const r = base.getBoundingClientRect(); return r.right > t.left + 1 && r.left < t.right && r.bottom > t.top && r.top < t.bottom; });
  });
  return {
    overprinted: over.map((tag) => tag.textContent),
    cut: [...main.querySelectorAll("div.sourceCode pre")].filter((pre) => seen(pre) && pre.scrollWidth > pre.clientWidth + 1).map((pre) => pre.innerText.trim().slice(0, 50)),
    sideways: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    barrenTables: [...main.querySelectorAll("table")].filter((t) => seen(t) && t.getBoundingClientRect().width > (t.closest(".table-scroll, .cell-output-display, pre") ?? main).clientWidth + 1 && !t.closest(".table-scroll")).length,
  };
}

// Runs in the page: what is cut off or makes the page scroll sideways, as nothing around it scrolls.
function tooWide() {
  const main = document.querySelector("main") ?? document.body;
  const held = (e) => { for (let n = e; n && n !== main; n = n.parentElement) if (getComputedStyle(n).overflowX !== "visible" || n.matches(".katex-mathml")) return true; return false; };
  return [...main.querySelectorAll("*")].filter((e) => e.getBoundingClientRect().right > innerWidth + 2 && !held(e)).map((e) => `${e.tagName.toLowerCase()} ${(e.innerText ?? "").trim().slice(0, 40)}`).slice(0, 3);
}

const browser = await chromium.launch({ executablePath, args: FLAGS });
const report = {};

async function visit(page) {
  const seen = { console: [], warnings: [], failed: [], contrast: {}, bytes: 0, faces: {}, dimmed: {} };
  for (const scheme of ["light", "dark"]) {
    const tab = await browser.newPage({ colorScheme: scheme, viewport: { width: 1280, height: 900 } });
    await tab.route("**/*", answer);
    tab.on("pageerror", (e) => seen.console.push(String(e)));
    tab.on("console", (m) => { if (["warning", "error"].includes(m.type()) && !m.text().startsWith("Failed to load resource")) seen.warnings.push(m.text()); });
    tab.on("response", (r) => { if (r.status() >= 400) seen.failed.push(`${r.status()} ${r.url()}`); });
    if (scheme === "light") tab.on("response", (r) => { if (r.url().startsWith(base) && !/site_libs|search\.json/.test(r.url())) seen.bytes += Number(r.headers()["content-length"] ?? 0); });
    await tab.goto(base + page, { waitUntil: "load" });
    await tab.waitForTimeout(300);  // deferred scripts set the mathematics
    seen.contrast[scheme] = await tab.evaluate(contrasts);
    const set = await tab.evaluate(typography);
    seen.faces[scheme] = set.faces;
    seen.dimmed[scheme] = set.dimmed;
    if (scheme === "light") {
      Object.assign(seen, { letters: set.letters, here: set.shown, contents: set.contents, openFolds: await tab.evaluate(openFolds) }, await tab.evaluate(look));
      seen.desktop = await tab.evaluate(spoiled);
      seen.tooWide = await tab.evaluate(tooWide);
      await tab.setViewportSize({ width: 390, height: 800 });
      seen.tooWideOnPhone = await tab.evaluate(tooWide);
      seen.phone = await tab.evaluate(spoiled);
      seen.phoneContents = (await tab.evaluate(typography)).phoneContents;
      if (shots) await tab.screenshot({ path: join(shots, `${page.replace(".html", "")}-phone.png`), fullPage: true });
      await tab.setViewportSize({ width: 1280, height: 900 });
    }
    if (shots) await tab.screenshot({ path: join(shots, `${page.replace(".html", "")}-${scheme}.png`), fullPage: true });
    await tab.close();
  }
  report[page] = seen;
}

// Two pages at a time: most of a visit is waiting
const queue = [...pages];
await Promise.all([1, 2].map(async () => { while (queue.length) await visit(queue.shift()); }));

// The search box, as one types into it: the pages of the first results
const searches = {};
if (words?.length) {
  const tab = await browser.newPage({ viewport: { width: 1280, height: 900 } });
  await tab.route("**/*", answer);
  await tab.goto(base + "index.html", { waitUntil: "load" });
  const field = tab.locator(".smalldocs-search input, #quarto-search input").first();
  for (const word of words) {
    await field.fill(word);
    await tab.waitForTimeout(700);
    searches[word] = await tab.evaluate(() => [...document.querySelectorAll(".search-result, .aa-Item a")].slice(0, 5).map((e) => e.getAttribute("href")));
  }
  await tab.close();
}

// The interactive figures: nothing before they come into view, then alive, by keyboard too, with the numbers of the modules
const figures = { pages: {} };
for (const page of pages.filter((p) => report[p].plays)) {
  const seen = figures.pages[page] = { faults: [] };
  for (const [colorScheme, width] of [["light", 1280], ["dark", 390]]) {
    const tab = await browser.newPage({ colorScheme, viewport: { width, height: 800 }, hasTouch: width < 400 });
    await tab.route("**/*", answer);
    tab.on("pageerror", (e) => seen.faults.push(String(e)));
    tab.on("console", (m) => { if (m.type() === "error" && !m.text().startsWith("Failed to load resource")) seen.faults.push(m.text()); });
    await tab.goto(base + page, { waitUntil: "load" });
    await tab.waitForTimeout(300);
    const box = tab.locator(".play").first();
    if (await tab.locator(".play-live").count()) seen.faults.push("a figure works before it is seen");
    await box.scrollIntoViewIfNeeded();
    await tab.locator(".play-live").first().waitFor({ timeout: 5000 }).catch(() => seen.faults.push("a figure does not come alive"));
    const before = await box.locator(".play-words").innerText();
    const slider = box.locator('input[type="range"]').first();
    await slider.focus();
    for (let i = 0; i < 3; i++) await tab.keyboard.press("ArrowRight");
    await tab.waitForTimeout(500);
    seen.words = await box.locator(".play-words").innerText();
    if (before === seen.words) seen.faults.push("the arrow keys change nothing");
    seen.faults.push(...await box.evaluate((e) => [...e.querySelectorAll("input, select")].filter((f) => !f.labels.length).map((f) => `no label: ${f.name}`)));
    const wide = await box.evaluate((e) => Math.max(...[...e.querySelectorAll("*")].map((n) => n.getBoundingClientRect().right)) - innerWidth);
    if (wide > 1) seen.faults.push(`wider than the window by ${wide}`);
    if (shots) await box.screenshot({ path: join(shots, `play-${page.replace(".html", "")}-${colorScheme}.png`) });
    if (numbers && !figures.numbers) figures.numbers = await tab.evaluate(`(${numbers})(${JSON.stringify(base + "figures")})`);
    await tab.close();
  }
  const plain = await browser.newPage({ javaScriptEnabled: false, viewport: { width: 1280, height: 800 } });
  await plain.route("**/*", answer);
  await plain.goto(base + page, { waitUntil: "load" });
  if (!await plain.locator(".play img").first().isVisible()) seen.faults.push("without scripts there is no picture");
  await plain.close();
}
await browser.close();
console.log(JSON.stringify({ pages: report, searches, figures }));
