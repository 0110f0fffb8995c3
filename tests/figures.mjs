// Numbers of the interactive figures, with what they were computed from; test_figures.py computes them again by flaxdiff.
//   node tests/figures.mjs     prints them; test_site.py runs `numbers` in the browser, on the site's own modules
export async function numbers(folder) {
  const d = await import(`${folder}/diffusion.mjs`);
  const e = await import(`${folder}/experiments.mjs`);
  const shares = [0.02, 0.3, 0.7, 0.98];
  const starts = (paths) => paths.map((p) => p[0]);
  return {
    noise: Object.keys(d.PROCESSES).map((name) => ({ name, T: d.PROCESSES[name].T, shares, picture: e.picture, eps: e.pictureNoise, seen: shares.map((u) => e.noise(name, u * d.PROCESSES[name].T)) })),
    race: Object.keys(e.SOLVERS).flatMap((name) => [5, 21].map((calls) => ({ name, calls, data: e.CLASSES, ...e.race(name, calls), starts: starts(e.race(name, calls).paths) }))),
    guidance: [0, 1, 4].map((w) => ({ w, data: e.TRIO, ...e.guidance(w), starts: starts(e.guidance(w).paths) })),
    churn: [["flawed", 0], ["flawed", 20]].map(([network, S]) => ({ network, S, z: e.churnNoise, ...e.churn(S, network), starts: starts(e.churn(S, network).paths) })),
    flowmap: [[1, 0.25], [3, -0.7]].map(([N, x]) => ({ N, x, data: e.UNEQUAL, ...e.flowmap(N, x) })),
  };
}

if (typeof process !== "undefined" && process.argv[1]?.endsWith("figures.mjs")) console.log(JSON.stringify(await numbers("../nbs/figures")));
