// The mathematics of the interactive figures, step by step as in the chapters. A point is an array of D numbers.
// tests/test_figures.py holds every function to the library's numbers.

// ---------------------------------------------------------------- processes: x_t = α(t) x₀ + σ(t) ε on 0 ≤ t ≤ T

export const PROCESSES = {
  turning: { T: 1, alpha: (t) => Math.cos(Math.PI / 2 * t), sigma: (t) => Math.sin(Math.PI / 2 * t), timeOf: (u) => 2 / Math.PI * Math.atan(u) },
  growing: { T: 20, alpha: () => 1, sigma: (t) => t, timeOf: (u) => u },
  straight: { T: 1, alpha: (t) => 1 - t, sigma: (t) => t, timeOf: (u) => u / (1 + u) },
};

export const addNoise = (process, x0, eps, t) => x0.map((x, d) => process.alpha(t) * x + process.sigma(t) * eps[d]);

// log(α²/σ²) = 2λ
export const logSnr = (process, t) => 2 * (Math.log(process.alpha(t)) - Math.log(process.sigma(t)));

// Karras' ramp (2022, eq. 5): n levels from `high` down to `low`, equally spaced in σ^(1/ρ)
export function ramp(n, low = 0.002, high = 80, rho = 7) {
  const [first, last] = [high ** (1 / rho), low ** (1 / rho)];
  return Array.from({ length: n }, (_, i) => (n === 1 ? high : (first + i / (n - 1) * (last - first)) ** rho));
}

// ---------------------------------------------------------------- the exact denoiser of a Gaussian mixture

// log w_k N(x; α μ_k, α² s_k² + σ²) of each component, up to one constant
function logJoint({ means, stds, weights }, x, alpha, sigma) {
  return means.map((mu, k) => {
    const v = (alpha * stds[k]) ** 2 + sigma ** 2;
    const distance = mu.reduce((sum, m, d) => sum + (x[d] - alpha * m) ** 2, 0);
    return Math.log(weights[k]) - distance / (2 * v) - mu.length / 2 * Math.log(v);
  });
}

// E[x₀ | x_t] = Σ_k r_k (σ² μ_k + α s_k² x)/(α² s_k² + σ²), r_k the share of component k in making x
export function denoise(mixture, x, alpha, sigma) {
  const logs = logJoint(mixture, x, alpha, sigma);
  const most = Math.max(...logs);
  const likely = logs.map((l) => Math.exp(l - most));
  const total = likely.reduce((a, b) => a + b);
  return x.map((x_d, d) => mixture.means.reduce((sum, mu, k) => {
    const s2 = mixture.stds[k] ** 2;
    return sum + likely[k] / total * (sigma ** 2 * mu[d] + alpha * s2 * x_d) / (alpha ** 2 * s2 + sigma ** 2);
  }, 0));
}

// The mixture of component k alone: what the denoiser of class k knows
export const only = ({ means, stds }, k) => ({ means: [means[k]], stds: [stds[k]], weights: [1] });

// Classifier-free guidance (Ho & Salimans 2022): D_∅ + w (D_c - D_∅)
export const guide = (D, Dc, w) => (x, sigma) => {
  const [free, asked] = [D(x, sigma), Dc(x, sigma)];
  return free.map((f, d) => f + w * (asked[d] - f));
};

// ---------------------------------------------------------------- solvers, α ≡ 1: D(x, σ) is the denoiser
// Each returns all places on the way, the last of them at σ = 0.

const slope = (D, x, sigma) => { const x0 = D(x, sigma); return x.map((v, d) => (v - x0[d]) / sigma); };  // dx/dσ = ε̂
const move = (x, h, slope) => x.map((v, d) => v + h * slope[d]);
const mean = (a, b) => a.map((v, d) => (v + b[d]) / 2);

// DDIM at η = 0: a straight line in σ; one call a level
export function euler(D, x, sigmas) {
  const path = [x];
  sigmas.forEach((sigma, i) => path.push(x = move(x, (sigmas[i + 1] ?? 0) - sigma, slope(D, x, sigma))));
  return path;
}

// One step from σ to s by the mean of both ends' slopes
function heunStep(D, x, sigma, s) {
  const k1 = slope(D, x, sigma);
  const ahead = move(x, s - sigma, k1);
  return s > 0 ? move(x, s - sigma, mean(k1, slope(D, ahead, s))) : ahead;
}

// Heun (Karras et al. 2022, algorithm 1): two calls a level, one at the last
export function heun(D, x, sigmas) {
  const path = [x];
  sigmas.forEach((sigma, i) => path.push(x = heunStep(D, x, sigma, sigmas[i + 1] ?? 0)));
  return path;
}

// DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): λ = -log σ, one call a level, the last x̂₀ remembered
export function dpmpp2m(D, x, sigmas) {
  const path = [x];
  let before = null;  // { h, x0 } of the last step
  sigmas.forEach((sigma, i) => {
    const s = sigmas[i + 1] ?? 0;
    const x0 = D(x, sigma);
    if (s === 0) { path.push(x0); return; }
    const h = Math.log(sigma / s);
    const r = before ? h / (2 * before.h) : 0;
    const ahead = before ? x0.map((v, d) => v + r * (v - before.x0[d])) : x0;  // x̂₀ half-way, by a line through two
    path.push(x = x.map((v, d) => s / sigma * v - Math.expm1(-h) * ahead[d]));
    before = { h, x0 };
  });
  return path;
}

// Heun with churn (Karras et al. 2022, algorithm 2): noise up to (1 + γ) σ, then down; z(i) is the noise of step i
export function edm(D, x, sigmas, S_churn, z) {
  const gamma = Math.min(S_churn / sigmas.length, Math.SQRT2 - 1);
  const path = [x];
  sigmas.forEach((sigma, i) => {
    const last = i === sigmas.length - 1;  // the jump to σ = 0 is not churned
    const raised = last ? sigma : (1 + gamma) * sigma;
    if (raised > sigma) x = move(x, Math.sqrt(raised ** 2 - sigma ** 2), z(i));
    path.push(x = heunStep(D, x, raised, sigmas[i + 1] ?? 0));
  });
  return path;
}

// ---------------------------------------------------------------- the straight process: α = 1 - t, σ = t

// N jumps of one length from t = 1 to the data, where `pair` answers (X₀, E) for x, t and s: x_s = (1-s) X₀ + s E
export function walk(pair, x, N) {
  const path = [x];
  for (let i = N; i > 0; i--) {
    const [t, s] = [i / N, (i - 1) / N];
    const [X0, E] = pair(x, t, s);
    path.push(x = X0.map((v, d) => (1 - s) * v + s * E[d]));
  }
  return path;
}

// A denoiser answers the tangent: x̂₀ and ε̂, whatever s is
export const tangent = (mixture) => (x, t) => {
  const x0 = denoise(mixture, x, 1 - t, t);
  return [x0, x.map((v, d) => (v - (1 - t) * x0[d]) / t)];
};

// A flow map answers the chord: the pair that leads to where the ODE carries x (Cramer's rule)
export const chord = (mixture) => (x, t, s) => {
  const end = [carry(mixture, x[0], t, s)];
  const det = (1 - s) * t - (1 - t) * s;
  return [end.map((e, d) => (t * e - s * x[d]) / det), end.map((e, d) => ((1 - s) * x[d] - (1 - t) * e) / det)];
};

// Φ(z), by Taylor's series about 0 of Φ/φ: full accuracy for |z| < 6
function normalCdf(z) {
  let [sum, term] = [z, z];
  for (let k = 3; Math.abs(term) > 1e-17 * Math.abs(sum) && k < 400; k += 2) sum += term *= z * z / k;
  return 0.5 + sum * Math.exp(-z * z / 2) / Math.sqrt(2 * Math.PI);
}

const below = ({ means, stds, weights }, x, t) =>
  means.reduce((sum, [mu], k) => sum + weights[k] * normalCdf(Math.max(-8, Math.min(8, (x - (1 - t) * mu) / Math.hypot((1 - t) * stds[k], t)))), 0);

// Where the ODE carries x from t to s: paths on a line keep their order, so x keeps its quantile; by bisection
export function carry(mixture, x, t, s) {
  const share = below(mixture, x, t);
  let [a, b] = [-9, 9];
  for (let i = 0; i < 60; i++) {
    const m = (a + b) / 2;
    if (below(mixture, m, s) < share) a = m; else b = m;
  }
  return (a + b) / 2;
}

// ---------------------------------------------------------------- noise from a seed

// n standard normal numbers: the generator mulberry32, then Box and Muller's formula
export function normals(n, seed) {
  const uniform = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let v = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    v = (v + Math.imul(v ^ (v >>> 7), 61 | v)) ^ v;
    return ((v ^ (v >>> 14)) >>> 0) / 2 ** 32;
  };
  return Array.from({ length: n }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}
