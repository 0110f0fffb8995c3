// Opens every page of the served site in Chromium and prints, as JSON, what a reader would see. Called by test_site.py:
//   node tests/site.mjs '{"base": "http://127.0.0.1:PORT/", "pages": ["index.html"], "modules": DIR, "chromium": PATH, "shots": DIR or null}'
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { extname, join } from "node:path";

const { base, pages, modules, chromium: executablePath, shots } = JSON.parse(process.argv[2]);
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
for (const page of pages) {
  const seen = { console: [], failed: [], contrast: {} };
  for (const scheme of ["light", "dark"]) {
    const tab = await browser.newPage({ colorScheme: scheme, viewport: { width: 1280, height: 900 } });
    await tab.route("**/*", answer);
    tab.on("pageerror", (e) => seen.console.push(String(e)));
    tab.on("response", (r) => { if (r.status() >= 400) seen.failed.push(`${r.status()} ${r.url()}`); });
    await tab.goto(base + page, { waitUntil: "load" });
    await tab.waitForTimeout(300);  // deferred scripts set the mathematics
    seen.contrast[scheme] = await tab.evaluate(contrasts);
    if (scheme === "light") {
      Object.assign(seen, await tab.evaluate(look));
      seen.tooWide = await tab.evaluate(tooWide);
      await tab.setViewportSize({ width: 390, height: 800 });
      seen.tooWideOnPhone = await tab.evaluate(tooWide);
      await tab.setViewportSize({ width: 1280, height: 900 });
    }
    if (shots) await tab.screenshot({ path: join(shots, `${page.replace(".html", "")}-${scheme}.png`), fullPage: true });
    await tab.close();
  }
  report[page] = seen;
}
await browser.close();
console.log(JSON.stringify(report));
