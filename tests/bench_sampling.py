"""What the framework costs: sampling with a trivial network, ours against a hand-written `lax.scan` of the same formula.

    python tests/bench_sampling.py [--repeats 15] [--device cpu]

Prints µs a step (the slope between 100 and 1,000 steps, medians over interleaved repetitions), their ratio, and the time of our first call
with 10 levels and with 1,000.
"""
import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.samplers import DPMSolverPlusPlusSampler, EulerSampler, HeunSampler, LMSSampler
from flaxdiff.schedulers import EDMNoiseScheduler

SHAPE, FEW, MANY = (16, 32, 32, 3), 100, 1000
SCHEDULE, PREDICTOR = EDMNoiseScheduler(), KarrasEDMPredictor()


class Trivial:
    "One multiplication and one addition an entry."
    def apply(self, params, x, temb): return params * x + temb.reshape(-1, 1, 1, 1)


MODEL, PARAMS = Trivial(), jnp.float32(0.3)


def adams(sigmas, order=4):
    "∫ of each Lagrange polynomial through the last `order` σ, over each step, (N-1, order); by NumPy's polynomials."
    table = np.zeros((len(sigmas) - 1, order))
    for n, (a, b) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        nodes = sigmas[max(0, n - order + 1):n + 1][::-1]
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)
            whole = np.polynomial.Polynomial.fromroots(others - a).integ() if len(others) else np.polynomial.Polynomial([0, 1])
            table[n, j] = whole(b - a) / np.prod(node - others)
    return table


def by_hand(kind):
    "The same formulas in one scan, with σ and all that depends on it alone computed before."
    s = PREDICTOR.sigma_data

    def denoise(params, x, sigma, c_in, c_skip, c_out, c_noise):
        F = MODEL.apply(params, c_in * x, jnp.broadcast_to(c_noise, x.shape[:1]))
        return c_skip * x + c_out * F

    def levels(sigmas):
        n = np.sqrt(sigmas ** 2 + s ** 2)
        return np.stack([sigmas, 1 / n, s ** 2 / n ** 2, sigmas * s / n, np.log(sigmas) / 4], 1).astype(np.float32)

    def one_step(params, x, rows):
        now, then = rows
        slope = lambda x, row: (x - denoise(params, x, *row)) / row[0]
        d, h = slope(x, now), then[0] - now[0]
        return x + h * d if kind == "Euler" else x + h / 2 * (d + slope(x + h * d, then)), None

    def two_m(params, carry, rows):
        (x, old), (now, then, half) = carry, rows
        new = denoise(params, x, *now)
        ratio = then[0] / now[0]
        return (ratio * x + (1 - ratio) * (new + half * (new - old)), new), None

    def lms(params, carry, rows):
        (x, past), (now, w) = carry, rows
        past = jnp.concatenate([((x - denoise(params, x, *now)) / now[0])[None], past[:-1]])
        return (x + sum(w[k] * past[k] for k in range(4)), past), None

    @jax.jit
    def run(params, x, table, extra):
        pairs, step = (table[:-1], table[1:]), {"DPM++ 2M": two_m, "LMS-4": lms}.get(kind, one_step)
        first, rows = {"DPM++ 2M": ((x, 0 * x), (*pairs, extra)), "LMS-4": ((x, jnp.zeros((4, *x.shape))), (pairs[0], extra))}.get(kind, (x, pairs))
        end, _ = jax.lax.scan(lambda carry, rows: step(params, carry, rows), first, rows)
        return denoise(params, end if step is one_step else end[0], *table[-1])

    def prepare(sigmas):
        lam = -np.log(sigmas)
        half = np.append(0, np.diff(lam)[1:] / np.diff(lam)[:-1] / 2)
        return jnp.asarray(levels(sigmas)), jnp.asarray({"DPM++ 2M": half, "LMS-4": adams(sigmas)}.get(kind, 0), jnp.float32)
    return lambda sigmas: (lambda x, args=prepare(sigmas): run(PARAMS, x, *args))


def seconds(call):
    start = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - start


def compare(name, cls, repeats):
    x = 80 * jax.random.normal(jax.random.PRNGKey(0), SHAPE)
    key, hand = jax.random.PRNGKey(1), by_hand(name)
    new = lambda: cls(MODEL, PARAMS, SCHEDULE, PREDICTOR)
    sampler, firsts = new(), {n: seconds(lambda fresh=new(): fresh.sample(x, fresh.make_steps(n), rng=key)) for n in (10, MANY)}
    calls = {}
    for n in (FEW, MANY):
        times = sampler.make_steps(n)
        with jax.enable_x64(True): sigmas = np.asarray(SCHEDULE.sigma(times))
        calls["ours", n] = lambda times=times: sampler.sample(x, times, rng=key)
        calls["hand", n] = lambda run=hand(sigmas): run(x)
    ends = {k: np.asarray(f()) for k, f in calls.items()}
    for n in (FEW, MANY): np.testing.assert_allclose(ends["ours", n], ends["hand", n], rtol=1e-3, atol=1e-4)  # the same formula
    taken = {k: [] for k in calls}
    for _ in range(repeats):
        for k, f in calls.items(): taken[k].append(seconds(f))
    slopes = {who: [1e6 * (b - a) / (MANY - FEW) for a, b in zip(taken[who, FEW], taken[who, MANY])] for who in ("ours", "hand")}
    ours, hand_us = (statistics.median(slopes[who]) for who in ("ours", "hand"))
    print(f"{name:9s} ours {ours:8.1f} µs/step   by hand {hand_us:8.1f} µs/step   ratio {ours / hand_us:5.2f}   "
          f"first call {firsts[10]:5.2f} s with 10 levels, {firsts[MANY]:5.2f} s with {MANY:,}")
    return ours / hand_us


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with jax.default_device(jax.devices(arguments.device)[0]):
        print(f"{jax.devices(arguments.device)[0].device_kind}, jax {jax.__version__}, batch {SHAPE}")
        for name, cls in (("Euler", EulerSampler), ("Heun", HeunSampler), ("DPM++ 2M", DPMSolverPlusPlusSampler), ("LMS-4", LMSSampler)): compare(name, cls, arguments.repeats)
