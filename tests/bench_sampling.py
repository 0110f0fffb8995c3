"""What the framework costs: sampling with a trivial network, ours against a hand-written `lax.scan` of the same formula.

    python tests/bench_sampling.py [--repeats 15] [--device cpu]

Prints µs a step (the slope between 100 and 1,000 steps, medians over interleaved repetitions), their ratio, and the time of our first call.
"""
import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.samplers import EulerSampler, HeunSampler
from flaxdiff.schedulers import EDMNoiseScheduler

SHAPE, FEW, MANY = (16, 32, 32, 3), 100, 1000
SCHEDULE, PREDICTOR = EDMNoiseScheduler(), KarrasEDMPredictor()


class Trivial:
    "One multiplication and one addition an entry."
    def apply(self, params, x, temb): return params * x + temb.reshape(-1, 1, 1, 1)


MODEL, PARAMS = Trivial(), jnp.float32(0.3)


def by_hand(heun):
    "The same formulas in one scan, with σ and all that depends on it alone computed before."
    s = PREDICTOR.sigma_data

    def denoise(params, x, sigma, c_in, c_skip, c_out, c_noise):
        F = MODEL.apply(params, c_in * x, jnp.broadcast_to(c_noise, x.shape[:1]))
        return c_skip * x + c_out * F

    def run(params, x, sigmas):
        n = jnp.sqrt(sigmas ** 2 + s ** 2)
        table = jnp.stack([sigmas, 1 / n, s ** 2 / n ** 2, sigmas * s / n, jnp.log(sigmas) / 4], 1)
        def step(x, rows):
            now, then = rows
            d, h = (x - denoise(params, x, *now)) / now[0], then[0] - now[0]
            guess = x + h * d
            if heun: guess = x + h / 2 * (d + (guess - denoise(params, guess, *then)) / then[0])
            return guess, None
        x, _ = jax.lax.scan(step, x, (table[:-1], table[1:]))
        return denoise(params, x, *table[-1])
    return jax.jit(run)


def seconds(call):
    start = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - start


def compare(name, cls, repeats):
    x = 80 * jax.random.normal(jax.random.PRNGKey(0), SHAPE)
    key, hand = jax.random.PRNGKey(1), by_hand(cls is HeunSampler)
    sampler = cls(MODEL, PARAMS, SCHEDULE, PREDICTOR)
    calls = {}
    for n in (FEW, MANY):
        times = sampler.make_steps(n)
        sigmas = jnp.asarray(SCHEDULE.sigma(times), jnp.float32)
        calls["ours", n] = lambda times=times: sampler.sample(x, times, rng=key)
        calls["hand", n] = lambda sigmas=sigmas: hand(PARAMS, x, sigmas)
    first = seconds(calls["ours", FEW])
    ends = {k: np.asarray(f()) for k, f in calls.items()}
    for n in (FEW, MANY): np.testing.assert_allclose(ends["ours", n], ends["hand", n], rtol=1e-3, atol=1e-4)  # the same formula
    taken = {k: [] for k in calls}
    for _ in range(repeats):
        for k, f in calls.items(): taken[k].append(seconds(f))
    slopes = {who: [1e6 * (b - a) / (MANY - FEW) for a, b in zip(taken[who, FEW], taken[who, MANY])] for who in ("ours", "hand")}
    ours, hand_us = (statistics.median(slopes[who]) for who in ("ours", "hand"))
    print(f"{name:6s} ours {ours:8.1f} µs/step   by hand {hand_us:8.1f} µs/step   ratio {ours / hand_us:5.2f}   first call {first:5.2f} s")
    return ours / hand_us


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with jax.default_device(jax.devices(arguments.device)[0]):
        print(f"{jax.devices(arguments.device)[0].device_kind}, jax {jax.__version__}, batch {SHAPE}")
        for name, cls in (("Euler", EulerSampler), ("Heun", HeunSampler)): compare(name, cls, arguments.repeats)
