// The interactive figures: each `<div class="play" data-play="NAME">` of a page becomes a live one when it comes into
// view, and its still picture goes. Numbers come from experiments.mjs, colours from styles.css. Without scripts the
// picture stays. `window.flaxdiffPlay` lists what was drawn.
import * as run from "./experiments.mjs";

// ---------------------------------------------------------------- drawing

const f = (v) => v.toFixed(1);  // a tenth of a pixel is enough

// A chart of 320 × `height` units, as SVG text; `x` and `y` turn data into places
class Chart {
  constructor({ title, xlim, ylim, xticks = [], yticks = [], xlabel = "", ylabel = "", height = 250, width = 320, log = false }) {
    const [left, right, top, bottom] = [ylabel || yticks.length ? 44 : 10, 10, title ? 22 : 8, xlabel || xticks.length ? 36 : 10];
    const along = (v) => (log ? Math.log10(v) : v);
    const [x0, x1, y0, y1] = [...xlim, ...ylim].map(along);
    this.x = (v) => left + (along(v) - x0) / (x1 - x0) * (width - left - right);
    this.y = (v) => height - bottom - (along(v) - y0) / (y1 - y0) * (height - top - bottom);
    this.parts = [];
    for (const [v, text = String(v)] of xticks.map((t) => [t].flat())) this.text(this.x(v), height - bottom + 14, text, "middle");
    for (const [v, text = String(v)] of yticks.map((t) => [t].flat())) this.text(left - 5, this.y(v) + 4, text, "end");
    if (xlabel) this.text((left + width - right) / 2, height - 5, xlabel, "middle");
    if (ylabel) this.parts.push(`<text transform="translate(11 ${f((top + height - bottom) / 2)}) rotate(-90)" text-anchor="middle">${ylabel}</text>`);
    if (title) this.text(width / 2, 13, title, "middle", "play-title");
    this.parts.push(`<rect class="play-frame" x="${left}" y="${top}" width="${width - left - right}" height="${height - top - bottom}"/>`);
    this.box = { left, top, width: width - left - right, height: height - top - bottom };
    this.size = [width, height];
  }
  text(x, y, text, anchor = "start", css = "") { this.parts.push(`<text x="${f(x)}" y="${f(y)}" text-anchor="${anchor}" class="${css}">${text}</text>`); }
  line(points, css) { this.parts.push(`<polyline class="${css}" points="${points.map(([x, y]) => `${f(this.x(x))},${f(this.y(y))}`).join(" ")}"/>`); }
  dots(points, css, r = 3) { this.parts.push(...points.map(([x, y]) => `<circle class="${css}" cx="${f(this.x(x))}" cy="${f(this.y(y))}" r="${r}"/>`)); }
  ring([x, y], radius, css) { this.parts.push(`<circle class="${css}" cx="${f(this.x(x))}" cy="${f(this.y(y))}" r="${f(this.x(radius) - this.x(0))}"/>`); }
  bars(edges, heights, css) {
    heights.forEach((h, i) => this.parts.push(`<rect class="${css}" x="${f(this.x(edges[i]))}" y="${f(this.y(h))}" width="${f(this.x(edges[i + 1]) - this.x(edges[i]))}" height="${f(this.y(0) - this.y(h))}"/>`));
  }
  svg(says) {  // what lies outside the frame is cut
    const { left, top, width, height } = this.box;
    const texts = this.parts.filter((p) => p.startsWith("<text"));
    const shapes = this.parts.filter((p) => !p.startsWith("<text"));
    const clip = `clip${Chart.count = (Chart.count ?? 0) + 1}`;
    return `<svg class="${this.size[0] > 400 ? "play-wide" : ""}" viewBox="0 0 ${this.size.join(" ")}" role="img" aria-label="${says}"><clipPath id="${clip}"><rect x="${left}" y="${top}" width="${width}" height="${height}"/></clipPath>`
      + `<g clip-path="url(#${clip})">${shapes.join("")}</g>${texts.join("")}</svg>`;
  }
}

const legend = (entries) => `<p class="play-legend">${entries.map(([css, text]) => `<span><svg viewBox="0 0 24 8" aria-hidden="true"><line class="${css}" x1="1" y1="4" x2="23" y2="4"/></svg> ${text}</span>`).join(" ")}</p>`;
const shrunk = (path, sigmas) => path.map((p, i) => p.map((v) => v / Math.hypot(1, sigmas[i] ?? 0)));  // at much noise x is large
const range = (name, label, min, max, step, value, show = String) => ({ name, label, min, max, step, value, show });
const choice = (name, label, options, value) => ({ name, label, options, value });

// ---------------------------------------------------------------- the figures: controls, and a picture for their values

const FIGURES = {
  noise: {
    controls: [range("share", "time t/T", 0.01, 0.99, 0.01, 0.3, (v) => v.toFixed(2)),
      choice("process", "process", { turning: "turning: α = cos, σ = sin", growing: "growing: α = 1", straight: "straight: α = 1 − t" }, "turning")],
    changed(name, values, before) {  // another process: the time there at which σ/α is the same
      if (name !== "process") return;
      const [old, now] = [run.PROCESSES[before.process], run.PROCESSES[values.process]];
      const t = before.share * old.T;
      values.share = Math.min(0.99, Math.max(0.0005, now.timeOf(old.sigma(t) / old.alpha(t)) / now.T));
    },
    draw(view, { share, process: name }) {
      const process = run.PROCESSES[name];
      const { alpha, sigma, logSnr, pixels } = run.noise(name, share * process.T);
      const chart = new Chart({ xlim: [0, 1], ylim: [0, 1.05], xticks: [0, 0.5, 1], yticks: [0, 0.5, 1], xlabel: "t/T", title: "share in the picture" });
      const shares = Array.from({ length: 101 }, (_, i) => i / 100);
      const part = (rate, u) => process[rate](u * process.T) / Math.hypot(process.alpha(u * process.T), process.sigma(u * process.T));
      chart.line(shares.map((u) => [u, part("alpha", u)]), "data thick");
      chart.line(shares.map((u) => [u, part("sigma", u)]), "noise thick");
      chart.line([[share, 0], [share, 1.05]], "exact thin");
      chart.dots([[share, part("alpha", share)]], "data", 5);
      chart.dots([[share, part("sigma", share)]], "noise", 5);
      const snr = Math.exp(logSnr);
      const words = `α = ${alpha.toFixed(3)}, σ = ${sigma.toFixed(3)}, SNR = α²/σ² = ${snr < 0.001 ? snr.toExponential(1) : snr.toPrecision(3)}, log SNR = ${logSnr.toFixed(2)}`;
      view.innerHTML = `<canvas width="${run.SIDE}" height="${run.SIDE}" role="img" aria-label="A boot under noise: ${words}"></canvas>${chart.svg("the shares of data and noise against time")}`
        + legend([["data thick", "picture, α/√(α²+σ²)"], ["noise thick", "noise, σ/√(α²+σ²)"]]);
      const canvas = view.querySelector("canvas").getContext("2d");
      const image = canvas.createImageData(run.SIDE, run.SIDE);
      pixels.forEach((v, i) => image.data.set([0, 1, 2, 3].map((c) => (c === 3 ? 255 : 127.5 + 85 * v)), 4 * i));
      canvas.putImageData(image, 0, 0);
      return words + ".";
    },
  },

  race: {
    controls: [range("calls", "network calls", 5, 41, 2, 21)],
    curves: null,
    draw(view, { calls }) {
      const budgets = Array.from({ length: 19 }, (_, i) => 5 + 2 * i);
      const css = { Euler: "noise", Heun: "ode", "DPM++ 2M": "model" };
      const results = Object.keys(run.SOLVERS).map((name) => [name, run.race(name, calls)]);
      this.curves ??= Object.fromEntries(results.map(([name]) => [name, budgets.map((n) => [n, run.race(name, n).error])]));
      const charts = results.map(([name, { sigmas, paths, finish, error }]) => {
        const chart = new Chart({ xlim: [-2, 2], ylim: [-1.75, 2], title: `${name}: ${sigmas.length} levels, error ${error.toFixed(3)}`, height: 310 });
        run.CLASSES.means.forEach((mu) => chart.ring(mu, 2 * run.CLASSES.stds[0], "exact thin"));
        paths.forEach((path) => chart.line(shrunk(path, sigmas), `${css[name]} thin`));
        chart.dots(finish, "exact hollow", 4);
        chart.dots(paths.map((p) => p.at(-1)), css[name], 2.5);
        return chart.svg(`paths of ${name} with ${calls} network calls`);
      });
      const errors = new Chart({ xlim: [4.6, 45], ylim: [0.005, 5], log: true, xticks: [5, 10, 20, 40], yticks: [0.01, 0.1, 1], xlabel: "network calls", title: "error at the end", height: 310 });
      for (const [name, curve] of Object.entries(this.curves)) {
        errors.line(curve, `${css[name]} thick`);
        errors.dots(curve.filter(([n]) => n === calls), css[name], 5);
      }
      view.innerHTML = charts.join("") + errors.svg("errors of the three solvers against network calls") + legend([...Object.entries(css).map(([name, c]) => [`${c} thick`, name]), ["exact thin", "○ where the ODE leads"]]);
      const [best] = results.reduce((a, b) => (a[1].error < b[1].error ? a : b));
      return `With ${calls} network calls: ${results.map(([name, r]) => `${name} ${r.error.toFixed(3)}`).join(", ")}. The smallest error is that of ${best}.`;
    },
  },

  guidance: {
    controls: [range("w", "guidance w", 0, 8, 0.5, 4, (v) => v.toFixed(1))],
    curve: null,
    draw(view, { w }) {
      this.curve ??= Array.from({ length: 17 }, (_, i) => [i / 2, run.guidance(i / 2).spread]);
      const { sigmas, paths, middle, spread } = run.guidance(w);
      const own = this.curve[2][1];  // at w = 1
      const plane = new Chart({ xlim: [-2.4, 2.4], ylim: [-1.7, 3], title: `w = ${w.toFixed(1)}`, height: 324 });
      run.TRIO.means.forEach((mu, k) => plane.ring(mu, 2 * run.TRIO.stds[k], k ? "noise thin" : "exact thin"));
      paths.slice(0, 24).forEach((path) => plane.line(shrunk(path, sigmas), "ode thin"));
      plane.dots(paths.map((p) => p.at(-1)), "data", 2.5);
      const lost = new Chart({ xlim: [0, 8], ylim: [0, 1.3], xticks: [0, 1, 2, 4, 8], yticks: [0, [0.5, "50 %"], [1, "100 %"]], xlabel: "guidance w", title: "spread kept (100 % at w = 1)", height: 324 });
      lost.line(this.curve.map(([v, s]) => [v, s / own]), "data thick");
      lost.dots([[w, spread / own]], "data", 5);
      view.innerHTML = plane.svg(`ends of 80 paths at guidance ${w}`) + lost.svg("spread of the samples against guidance")
        + legend([["exact thin", "the class asked for"], ["noise thin", "the other two"], ["ode thin", "paths"], ["data thick", "samples"]]);
      const moved = Math.hypot(middle[0] - run.TRIO.means[0][0], middle[1] - run.TRIO.means[0][1]);
      return `At w = ${w.toFixed(1)} the samples have ${Math.round(100 * spread / own)} % of the spread that they have at w = 1, and their mean lies ${moved.toFixed(2)} from that of the class.`;
    },
  },

  churn: {
    controls: [range("S", "S_churn", 0, 26, 1, 0), choice("network", "network", { flawed: "flawed above σ = 0.8", perfect: "perfect" }, "flawed")],
    draw(view, { S, network }) {
      const { sigmas, paths, right } = run.churn(S, network);
      const css = S ? "sde" : "ode";
      const steps = sigmas.length;
      const marks = [10, 1, 0.1].map((s) => [sigmas.findIndex((v) => v <= s), `σ = ${s}`]);
      const walk = new Chart({ xlim: [0, steps], ylim: [-2.6, 2.6], xticks: [[3, "80"], ...marks], yticks: [-2, 0, 2], title: "twelve paths, x/√(1+σ²)" });
      paths.slice(0, 12).forEach((path) => walk.line(shrunk(path, sigmas).map(([v], i) => [i, v]), `${css} thin`));
      const edges = Array.from({ length: 31 }, (_, i) => -1.2 + 0.08 * i);
      const counts = edges.slice(1).map((to, i) => paths.filter((p) => p.at(-1)[0] >= edges[i] && p.at(-1)[0] < to).length / paths.length / 0.08);
      const ends = new Chart({ xlim: [-1.2, 1.2], ylim: [0, 2.4], xticks: [-0.6, 0, 0.6], title: "where 400 samples end" });
      ends.bars(edges, counts, css);
      const { means, stds, weights } = run.HEAPS;
      const density = (x) => means.reduce((sum, [mu], k) => sum + weights[k] * Math.exp(-(((x - mu) / stds[k]) ** 2) / 2) / stds[k] / Math.sqrt(2 * Math.PI), 0);
      ends.line(Array.from({ length: 121 }, (_, i) => -1.2 + 0.02 * i).map((x) => [x, density(x)]), "exact thick");
      view.innerHTML = walk.svg("paths from noise to the two heaps") + ends.svg(`histogram of the ends, ${Math.round(100 * right)} % on the right`)
        + legend([[`${css} thick`, S ? "Heun with churn" : "Heun, no churn"], ["exact thick", "density of the data"]]);
      return `${(100 * right).toFixed(1)} % of the 400 samples end in the right heap; 50 % is due, with an error of chance of 2.5.`;
    },
  },

  flowmap: {
    controls: [range("N", "network calls", 1, 8, 1, 2), range("x", "start x at t = 1", -2, 2, 0.05, 0.25, (v) => v.toFixed(2))],
    faint: null,
    draw(view, { N, x }) {
      this.faint ??= [-1.8, -1.1, -0.5, -0.1, 0.1, 0.6, 1.2, 1.8].map((v) => run.flowmap(1, v));
      const { times, path, tangent, chord } = run.flowmap(N, x);
      const chart = new Chart({ xlim: [-0.02, 1.02], ylim: [-2.1, 2.1], xticks: [[0, "0 (data)"], 0.25, 0.5, 0.75, [1, "1 (noise)"]], yticks: [-2, -1, 0, 1, 2], xlabel: "t", width: 520, height: 300 });
      const places = (walk) => walk.map(([v], i) => [1 - i / N, v]);
      for (const other of this.faint) chart.line(times.map((t, i) => [t, other.path[i][0]]), "ode faint");
      chart.line(times.map((t, i) => [t, path[i][0]]), "ode thick");
      chart.line(places(tangent), "noise thick dashed");
      chart.dots(places(tangent), "noise", 4);
      chart.line(places(chord), "model thick");
      chart.dots(places(chord), "model", 4);
      view.innerHTML = chart.svg(`an ODE path, and ${N} jumps along tangents and along chords`)
        + legend([["ode thick", "the ODE's path"], ["noise thick dashed", "tangents: Euler"], ["model thick", "chords: flow map"]]);
      const end = (walk) => walk.at(-1)[0].toFixed(3);
      return `${N} call${N > 1 ? "s" : ""} from x = ${x.toFixed(2)}: the tangents end at ${end(tangent)}, the chords at ${end(chord)}, the path at ${end(path)}.`;
    },
  },
};

// ---------------------------------------------------------------- from a still picture to a live figure

function controlHtml(id, c) {
  const name = `${id}-${c.name}`;
  if (c.options) return `<label for="${name}">${c.label}</label> <select id="${name}" name="${c.name}">${Object.entries(c.options).map(([v, text]) => `<option value="${v}">${text}</option>`).join("")}</select>`;
  return `<label for="${name}">${c.label}</label> <input type="range" id="${name}" name="${c.name}" min="${c.min}" max="${c.max}" step="${c.step}"> <output for="${name}"></output>`;
}

function start(box, n) {
  const figure = FIGURES[box.dataset.play];
  const id = `play${n}-${box.dataset.play}`;
  const values = Object.fromEntries(figure.controls.map((c) => [c.name, c.value]));
  box.innerHTML = `<form class="play-controls">${figure.controls.map((c) => `<span>${controlHtml(id, c)}</span>`).join("")}</form><div class="play-view"></div><p class="play-words" aria-live="polite"></p>`;
  const form = box.querySelector("form");
  const [view, words] = [box.querySelector(".play-view"), box.querySelector(".play-words")];
  const show = () => {
    for (const c of figure.controls) {
      const field = form.elements[c.name];
      if (String(field.value) !== String(values[c.name])) field.value = values[c.name];
      const output = field.parentElement.querySelector("output");
      if (output) output.textContent = c.show(values[c.name]);
    }
    words.textContent = figure.draw(view, values);
    window.flaxdiffPlay[box.dataset.play] = words.textContent;
  };
  let waiting = false;  // however fast the slider moves, one picture a frame
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    const before = { ...values };
    const { name, value } = event.target;
    values[name] = figure.controls.find((c) => c.name === name).options ? value : Number(value);
    figure.changed?.(name, values, before);
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; show(); });
  });
  show();
  box.classList.add("play-live");
}

window.flaxdiffPlay = {};
const boxes = [...document.querySelectorAll(".play[data-play]")].filter((box) => box.dataset.play in FIGURES);
const watcher = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    start(target, boxes.indexOf(target));
  }
}, { rootMargin: "200px" });
boxes.forEach((box) => watcher.observe(box));
