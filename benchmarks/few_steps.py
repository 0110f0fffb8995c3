"""Few steps: `FewStepSampler` against the solvers of k-diffusion, diffusers and smalldiffusion, by the exact ODE solution, in 64 dimensions.

    python benchmarks/few_steps.py [--problems gaussian-1 mixture-1 digits …] [--budgets 8 10 20 40 80] [--starts 64 128] [--grids karras] [--quick]

From σ = 80 to 0.002 and on to x̂₀; the error is the root mean square, over 256 starts no fit has seen, of what is off from the ODE's own end at
σ = 0. That is known for a Gaussian, and for a mixture found by Runge and Kutta's order 4 in log σ, thousands of calls in float64. All take the
same number of network calls, or one less where theirs come in pairs; the best of all peers counts. tests/peers.py says what to install.
"""
import argparse
import functools
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from sklearn.datasets import load_digits

warnings.simplefilter("ignore")
import diffusers
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import peers  # noqa: E402
from flaxdiff.exact import ExactModel, Gaussian, GaussianMixture
from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.samplers.few_steps import FewStepSampler
from flaxdiff.samplers.grids import exponential_grid, karras_grid
from flaxdiff.schedulers import EDMNoiseScheduler

jax.config.update("jax_enable_x64", True)
torch.set_num_threads(1)
K, SMALL = peers.load_k_diffusion(), peers.load_smalldiffusion()
SCHEDULE, PREDICTOR, D = EDMNoiseScheduler(), KarrasEDMPredictor(), 64
GRIDS = dict(karras=karras_grid, exponential=exponential_grid)


# Problems

def gaussian(seed, decades):
    "Variances that fall from 1 in equal ratios over so many decades, turned at random, around a random mean."
    r = np.random.default_rng(seed)
    basis = np.linalg.qr(r.normal(size=(D, D)))[0]
    return Gaussian(0.3 * r.normal(size=D), basis * np.geomspace(1, 10.0 ** -decades, D) @ basis.T)


def mixture(seed):
    "8 to 20 round Gaussians of different widths and weights."
    r = np.random.default_rng(seed)
    k = r.integers(8, 21)
    return GaussianMixture(0.5 * r.normal(size=(k, D)), 0.2 * np.exp(0.4 * r.normal(size=k)), r.dirichlet(np.full(k, 3.0)))


def digits():
    "The first 200 of scikit-learn's digits, each with a width of 0.1."
    return GaussianMixture(load_digits().data[:200] / 8 - 1, 0.1)


PROBLEMS = {**{f"gaussian-{s}": functools.partial(gaussian, 1000 + s, decades) for s, decades in ((1, 2), (2, 3), (3, 4))},
            **{f"mixture-{s}": functools.partial(mixture, 2000 + s) for s in (1, 2, 3)}, "digits": digits}


def starts(seed, n): return 80 * np.random.default_rng(seed).normal(size=(n, D))


def exact_end(data, x, n):
    "(Where the ODE carries x, from σ = 80 to 0; how it was found, and what x̂₀ of the exact x at σ = 0.002 is off: who jumps from there has that much left)."
    if isinstance(data, Gaussian):
        near, end = (np.asarray(data.ode_solution(x, (1.0, 80.0), (1.0, s))) for s in (0.002, 0.0))
        return end, f"exact, {rms(data.denoise(near, 1.0, 0.002) - end):.0e} left"
    def slope(x, l): return x - data.denoise(x, 1.0, jnp.exp(l))  # dx/d log σ
    @functools.partial(jax.jit, static_argnames="n")
    def walk(x, n, start=80.0, end=1e-4):
        levels = jnp.linspace(jnp.log(start), jnp.log(end), n + 1)
        def step(x, l):
            h = levels[1] - levels[0]
            k1 = slope(x, l)
            k2 = slope(x + h / 2 * k1, l + h / 2)
            k3 = slope(x + h / 2 * k2, l + h / 2)
            return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, l + h)), None
        return jax.lax.scan(step, x, levels[:-1])[0]
    half, whole = (np.asarray(data.denoise(walk(x, k), 1.0, 1e-4)) for k in (n // 2, n))
    left = rms(data.denoise(walk(x, n, 80.0, 0.002), 1.0, 0.002) - whole)
    return whole, f"{4 * n} calls, {rms(half - whole):.0e} from what {2 * n} give, {left:.0e} left"


def rms(e): return float(np.sqrt(np.mean(np.square(e))))


# Peers: name -> (calls a level, run)

def by_k_diffusion(name, **options):
    sample = getattr(K, f"sample_{name}")
    return lambda denoiser, x, sigmas: sample(denoiser, torch.tensor(x), torch.tensor(np.append(sigmas, 0)), disable=True, **options).numpy()


def by_diffusers(cls, full=False, **options):
    "To σ = 0 as the scheduler does it; `full`: at full order down to the last σ, and x̂₀ from there."
    def run(denoiser, x, sigmas):
        scheduler = getattr(diffusers, cls)(**options, **(dict(lower_order_final=False) if full else {}))
        if not full: return peers.run_diffusers(scheduler, denoiser, x, np.append(sigmas, 0))
        return denoiser(peers.as_torch(peers.run_diffusers(scheduler, denoiser, x, sigmas)), sigmas[-1]).numpy()
    return run


def by_smalldiffusion(denoiser, x, sigmas): return peers.run_smalldiffusion(SMALL, denoiser, x, np.append(sigmas, 0), gam=2.0)


NONE, VP = lambda *ignored: 0, dict(prediction_type="sample")
PEERS = {
    **{f"k-diffusion {name}": (calls, by_k_diffusion(name, **options)) for name, calls, options in (
        ("euler", 1, {}), ("heun", 2, {}), ("dpm_2", 2, {}), ("lms", 1, {}), ("dpmpp_2m", 1, {}), ("dpmpp_2s_ancestral", 2, dict(eta=0)),
        ("dpmpp_3m_sde", 1, dict(eta=0, noise_sampler=NONE)))},
    **{f"diffusers UniPC-{p}": (1, by_diffusers("UniPCMultistepScheduler", solver_order=p, **VP)) for p in (2, 3)},
    **{f"diffusers UniPC-{p} full": (1, by_diffusers("UniPCMultistepScheduler", True, solver_order=p, **VP)) for p in (2, 3)},
    "diffusers DEIS-3 full": (1, by_diffusers("DEISMultistepScheduler", True, solver_order=3, **VP)),
    **{f"diffusers DPMSolver++{p}M": (1, by_diffusers("DPMSolverMultistepScheduler", solver_order=p, **VP)) for p in (2, 3)},
    "diffusers EDMEuler": (1, by_diffusers("EDMEulerScheduler")),
    **{f"diffusers EDM-DPM++{p}M": (1, by_diffusers("EDMDPMSolverMultistepScheduler", solver_order=p)) for p in (2, 3)},
    "smalldiffusion γ=2": (1, by_smalldiffusion),
}


def best_peer(data, x, end, budget, grids):
    "(error, median error of a start, name, calls) of the peer that ends nearest."
    denoiser, found = peers.Denoiser(lambda x, sigma: data.denoise(x, 1.0, sigma)), []
    for grid in grids:
        for name, (pairs, run) in PEERS.items():
            n, denoiser.calls = (budget + pairs - 1) // pairs, 0
            e = run(denoiser, x, np.asarray(SCHEDULE.sigma(GRIDS[grid](SCHEDULE, 1.0, 0.0, n)))) - end
            found.append((rms(e) if np.all(np.isfinite(e)) else np.inf, median(e), name + (f", {grid}" if len(grids) > 1 else ""), denoiser.calls))
            assert denoiser.calls <= budget, found[-1]
    return min(found)


def median(e): return float(np.median(np.sqrt(np.mean(np.square(e), 1))))


# Ours

class Counted:
    "The network, counting how often it runs."
    def __init__(self, model): self.model, self.calls = model, 0
    def _called(self): self.calls += 1
    def apply(self, *args):
        jax.debug.callback(self._called)
        return self.model.apply(*args)


def ours(data, train, x, end, budget, iterations):
    "(error, median error of a start, calls, seconds of the fit)."
    model, began = ExactModel(data, SCHEDULE, PREDICTOR), time.perf_counter()
    fitted = FewStepSampler(model, {}, SCHEDULE, PREDICTOR).fit(train, budget, iterations=iterations, progress=False)
    seconds, model = time.perf_counter() - began, Counted(model)
    e = np.asarray(FewStepSampler(model, {}, SCHEDULE, PREDICTOR, steps=fitted.steps, corrections=fitted.corrections).sample(x, fitted.steps, rng=0)) - end
    jax.effects_barrier()
    return rms(e), median(e), model.calls, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--budgets", nargs="+", type=int, default=[8, 10, 20, 40, 80], help="network calls")
    parser.add_argument("--starts", nargs="+", type=int, default=[64, 128], help="of a fit")
    parser.add_argument("--grids", nargs="+", default=["karras"], choices=GRIDS, help="of the peers")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    args = parser.parse_args()
    if args.quick: args.problems, args.budgets, args.starts = args.problems[:1] + ["mixture-1"], args.budgets[:1], [16]
    test, fine, iterations = (32, 100, 2) if args.quick else (256, 1000, 40)
    x, ratios = starts(7, test), []
    print("| problem | calls | best peer | its error | starts of the fit | ours | ratio | ratio of medians | calls, peer and ours | fit, s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    references = {}
    for problem in args.problems:
        data = PROBLEMS[problem]()
        end, references[problem] = exact_end(data, x, fine)
        for budget in args.budgets:
            error, middle, name, calls = best_peer(data, x, end, budget, args.grids)
            for n in args.starts:
                e, m, c, seconds = ours(data, starts(8, n), x, end, budget, iterations)
                ratios.append((error / e, problem, budget, n))
                print(f"| {problem} | {budget} | {name} | {error:.2e} | {n} | {e:.2e} | {error / e:.2f} | {middle / m:.2f} | {calls}, {c} | {seconds:.0f} |", flush=True)
    print("\nReferences:", "; ".join(f"{p}: {how}" for p, how in references.items()))
    for n in args.starts:
        mine = sorted(r for r in ratios if r[-1] == n)
        print(f"Fitted on {n} starts: smallest ratio {mine[0][0]:.2f} ({mine[0][1]}, {mine[0][2]} calls), median {mine[len(mine) // 2][0]:.2f}, "
              f"{sum(r[0] > 1 for r in mine)} of {len(mine)} above 1.")


if __name__ == "__main__": main()
