// What each interactive figure computes: its data, fixed noise, and the numbers behind its picture.
import * as d from "./diffusion.mjs";

export const { PROCESSES } = d;

const column = (values, scale = 1) => values.map((v) => [scale * v]);  // n numbers as n points on a line
const pairs = (values, scale = 1) => Array.from({ length: values.length / 2 }, (_, i) => [scale * values[2 * i], scale * values[2 * i + 1]]);
const thirds = [1 / 3, 1 / 3, 1 / 3];
const rms = (a, b) => Math.sqrt(a.reduce((sum, p, i) => sum + p.reduce((s, v, k) => s + (v - b[i][k]) ** 2, 0), 0) / a.length);

// ---------------------------------------------------------------- noise: one picture, one time

export const SIDE = 28;
const BOOT = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAgAQLQAAAAAAAAABAQAAAAAAAAAAAAAAAAEBAAAVOo53qqdmKwAAAAABAAAAAAAAAAAAAAEAAQALaHdZABGQoGQDDwcBAAAAAAAAAAAAAAAAAgEAIbaL/44AglcAChAQDgkAAAAAAAAAAAAAAQICABSZXGbszJMIAhQVExcbBAAAAAAAAAAAAQEAAAAedBoAGqwaAhoaGxUWFQAAAAAAAAAAAAAAAAAF4dL4bkedAgAACgsSDSE6AQAAAQAAAAABAwAAD4SWw5uTm4xyTiAKDAAvNAEAAAEBAAAAAQAAvKdZRW2Gg3uUtLesl496fwAAAAECAQAAAAARSmSqgXmljJiWcoaUiXt3hY8AAAEEAgIDAABVj7lRZqCaj5R6nIl7kYmAg3iuAgEAAAAAAABfckt7bZiWkIuTjoZ4hH6FgX+W3CAADD5KT2OFqm50hpKQkZeVlZaXg5aPj4Oiss4GAB13gZaXgXd2mY+OgomPl5ORk4WUkH6GuMSzABEAAA8/c5CdpaulqK65uL3Aw76sr7SlrtOnuy8RFRMDAAAEFSg9TF9gYVtWVlVLUE5GNCojCQE6EhsdIBkSDQAAAAAAAAAAAQEAAAQDAAIEBgYBKwAEEx0kJygmJSQgHx0dHRoZGRkXFhcZGRcWGAwAAAAAAgMNFRcXFhYVExQVGBgWFxkZGh4eGREAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==";  // one test photograph of Fashion-MNIST
export const picture = Array.from(atob(BOOT), (c) => c.charCodeAt(0) / 127.5 - 1);
export const pictureNoise = d.normals(SIDE * SIDE, 1);

export function noise(name, t) {
  const process = d.PROCESSES[name];
  const [alpha, sigma] = [process.alpha(t), process.sigma(t)];
  const pixels = d.addNoise(process, picture, pictureNoise, t).map((v) => v / Math.hypot(alpha, sigma));
  return { alpha, sigma, logSnr: d.logSnr(process, t), pixels };
}

// ---------------------------------------------------------------- race: three solvers, one budget of calls

export const CLASSES = { means: [[0, 1], [-0.9, -0.5], [0.9, -0.5]], stds: [0.12, 0.12, 0.12], weights: thirds };
const racers = pairs(d.normals(48, 2), 80);
const exactly = (x, sigma) => d.denoise(CLASSES, x, 1, sigma);
export const SOLVERS = {  // the solver, and how many levels it visits for so many calls
  Euler: [d.euler, (calls) => calls],
  Heun: [d.heun, (calls) => (calls + 1) / 2],
  "DPM++ 2M": [d.dpmpp2m, (calls) => calls],
};
let finish = null;  // where the ODE leads: Heun on 256 levels

export function race(name, calls) {
  finish ??= racers.map((x) => d.heun(exactly, x, d.ramp(256)).at(-1));
  const [solve, levels] = SOLVERS[name];
  const sigmas = d.ramp(levels(calls));
  const paths = racers.map((x) => solve(exactly, x, sigmas));
  return { sigmas, paths, finish, error: rms(paths.map((p) => p.at(-1)), finish) };
}

// ---------------------------------------------------------------- guidance: asked for the class on top

export const TRIO = { ...CLASSES, stds: [0.35, 0.35, 0.35] };  // those of the chapter
const asked = pairs(d.normals(160, 3), 80);

export function guidance(w) {
  const free = (x, sigma) => d.denoise(TRIO, x, 1, sigma);
  const top = (x, sigma) => d.denoise(d.only(TRIO, 0), x, 1, sigma);
  const sigmas = d.ramp(18);
  const paths = asked.map((x) => d.heun(d.guide(free, top, w), x, sigmas));
  const ends = paths.map((p) => p.at(-1));
  const middle = [0, 1].map((k) => ends.reduce((sum, p) => sum + p[k], 0) / ends.length);
  const spread = rms(ends, ends.map(() => middle)) / Math.SQRT2;  // a standard deviation along each axis
  return { sigmas, paths, middle, spread };
}

// ---------------------------------------------------------------- churn: a network that was wrong early

export const HEAPS = { means: [[-0.6], [0.6]], stds: [0.15, 0.15], weights: [0.5, 0.5] };
const lopsided = { ...HEAPS, weights: [0.1, 0.9] };
export const NETWORKS = {
  flawed: (x, sigma) => d.denoise(sigma > 0.8 ? lopsided : HEAPS, x, 1, sigma),
  perfect: (x, sigma) => d.denoise(HEAPS, x, 1, sigma),
};
const walkers = column(d.normals(400, 4), 80);
const LEVELS = 64;
export const churnNoise = Array.from({ length: LEVELS }, (_, i) => column(d.normals(walkers.length, 100 + i)));  // [step][walker]

export function churn(S_churn, network) {
  const sigmas = d.ramp(LEVELS);
  const paths = walkers.map((x, n) => d.edm(NETWORKS[network], x, sigmas, S_churn, (i) => churnNoise[i][n]));
  const right = paths.filter((p) => p.at(-1)[0] > 0).length / paths.length;
  return { sigmas, paths, right };
}

// ---------------------------------------------------------------- flow map: jumps along the chord, or along the tangent

export const UNEQUAL = { means: [[-1], [0.9]], stds: [0.2, 0.2], weights: [0.5, 0.5] };  // those of the chapter

export function flowmap(N, x) {
  const times = Array.from({ length: 61 }, (_, i) => 1 - i / 60);
  return {
    times,
    path: times.map((t) => [d.carry(UNEQUAL, x, 1, t)]),
    tangent: d.walk(d.tangent(UNEQUAL), [x], N),
    chord: d.walk(d.chord(UNEQUAL), [x], N),
  };
}
