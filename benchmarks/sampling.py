"""What the framework costs: sampling with a trivial network, ours against a hand-written `lax.scan` of the same formula.

    python benchmarks/sampling.py [--repeats 15] [--device cpu] [--only NAME …]

Prints µs a step (the slope between 100 and 1,000 steps, medians over interleaved repetitions), their ratio, and the time of our first call
with 10 levels and with 1,000. By hand, all that depends on the levels alone is a table that was made before.
"""
import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import samplers as S
from flaxdiff.predictors import KarrasEDMPredictor, VPredictor
from flaxdiff.schedulers import EDMNoiseScheduler, LinearNoiseSchedule

SHAPE, FEW, MANY = (16, 32, 32, 3), 100, 1000
KINDS = {"EDM": (EDMNoiseScheduler(), KarrasEDMPredictor()), "linear": (LinearNoiseSchedule(), VPredictor())}
PARAMS = jnp.float32(0.3)


class Trivial:
    "Two multiplications and one addition an entry."
    def apply(self, params, x, temb): return params * x + 1e-3 * temb.reshape(-1, 1, 1, 1)


def levels(schedule, predictor, times):
    "A row for each time: α, σ, the input's scale, temb, and p, q of x̂₀ = p x + q F."
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    p, q = (predictor.decode(x, 1 - x, alpha, sigma)[0] for x in (jnp.ones_like(times), jnp.zeros_like(times)))
    return np.stack([alpha, sigma, predictor.get_input_scale(alpha, sigma) * np.ones_like(times), schedule.network_time(times), p, q], 1).astype(np.float32)


def ask(params, x, row):
    "(x̂₀, ε̂) at the level of this row."
    alpha, sigma, scale, temb, p, q = row
    x0 = p * x + q * Trivial().apply(params, scale * x, jnp.broadcast_to(temb, x.shape[:1]))
    return x0, (x - alpha * x0) / sigma


# A hand-written solver: (what is carried beside x, the step); the step gets the rows now and then, and a row of what `table` makes.

def noise(key, x):
    key, new = jax.random.split(key)
    return key, jax.random.normal(new, x.shape, x.dtype)


def euler(params, x, kept, now, then, row):
    x0, eps = ask(params, x, now)
    return then[0] * x0 + then[1] * eps, kept


def midpoint(params, x, kept, now, then, row):
    slope = lambda x, at: ask(params, x, at)[1]
    h = then[1] - now[1]
    return x + h * slope(x + h / 2 * slope(x, now), row), kept


def heun(params, x, kept, now, then, row):
    slope = lambda x, at: ask(params, x, at)[1]
    h, d = then[1] - now[1], slope(x, now)
    return x + h / 2 * (d + slope(x + h * d, then)), kept


def rk4(params, x, kept, now, then, row):
    slope = lambda x, at: ask(params, x, at)[1]
    h, a = then[1] - now[1], slope(x, now)
    b = slope(x + h / 2 * a, row)
    c = slope(x + h / 2 * b, row)
    return x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c, then)), kept


def churned(params, x, key, now, then, row):
    raised, add = row
    key, z = noise(key, x)
    return heun(params, x + add * z, key, raised, then, None)


def drawn(params, x, key, now, then, row):
    a, b, c = row
    x0, eps = ask(params, x, now)
    key, z = noise(key, x)
    return a * x0 + b * eps + c * z, key


def corrected(params, x, key, now, then, row):
    x, key = drawn(params, x, key, now, then, row[0])
    key, z = noise(key, x)
    eps = ask(params, x, then)[1]
    square = lambda v: jnp.sum(v * v, (1, 2, 3), keepdims=True)
    size = jnp.minimum(row[1] * square(z) / square(eps), 1 + (then[0] / then[1]) ** 2)
    return x + then[1] * (jnp.sqrt(2 * size) * z - size * eps), key


def linear(which):
    "x_s = a x + Σ W_j f_j of the newest predictions, `which` being 0 for x̂₀ and 1 for ε̂."
    def step(params, x, past, now, then, row):
        a, W = row
        past = jnp.concatenate([ask(params, x, now)[which][None], past[:-1]])
        return a * x + sum(w * f for w, f in zip(W, past)), past
    return step


def started(params, x, past, now, then, row):
    "The same on ε̂ in EDM's frame, but Heun's step first."
    n, a, W = row
    eps = ask(params, x, now)[1]
    past, h = jnp.concatenate([eps[None], past[:-1]]), then[1] - now[1]
    return jax.lax.cond(n == 0, lambda: x + h / 2 * (eps + ask(params, x + h * eps, then)[1]), lambda: x + sum(w * f for w, f in zip(W, past))), past


def renewed(params, x, carried, now, then, row):
    "The multistep SDE."
    past, key = carried
    a, b, W = row
    past = jnp.concatenate([ask(params, x, now)[0][None], past[:-1]])
    key, z = noise(key, x)
    return a * x + sum(w * f for w, f in zip(W, past)) + b * z, (past, key)


def inside(params, x, kept, now, then, row):
    "DPM-Solver-2."
    middle, w = row
    x0, eps = ask(params, x, now)
    there = ask(params, middle[0] * x0 + middle[1] * eps, middle)[1]
    return then[0] * x0 + then[1] * eps + w * (there - eps), kept


def unipc(params, x, carried, now, then, row):
    old, past = carried
    (a, W), (a_before, w_new, V), starts = row
    x0 = ask(params, x, now)[0]
    x = jnp.where(starts, x, a_before * old + w_new * x0 + sum(v * f for v, f in zip(V, past)))
    past = jnp.concatenate([x0[None], past[:-1]])
    return a * x + sum(w * f for w, f in zip(W, past)), (x, past)


# What each needs beside the levels' own rows

def ratios(sampler, times):
    "x's own factor where the weights of the past sum to the rest."
    alpha, sigma = sampler.noise_schedule.alpha(times), sampler.noise_schedule.sigma(times)
    noisy = not isinstance(sampler, (S.DPMSolverPlusPlusSampler, S.UniPCSampler))
    return (alpha[1:] / alpha[:-1]) if noisy else (sigma[1:] / sigma[:-1])


def plans(sampler, times, make):
    "`make(levels, i, last)` of every step."
    level_table, last = sampler.level(times), len(times) - 2
    return jax.vmap(lambda i: make(level_table, i, last))(jnp.arange(last + 1))


def weights(sampler, times, ages): return plans(sampler, times, lambda *where: sampler.weights(*where, ages))
def of_weights(sampler, times): return ratios(sampler, times), weights(sampler, times, range(sampler.order))
def of_start(sampler, times): return jnp.arange(len(times) - 1), *of_weights(sampler, times)
def of_euler_maruyama(sampler, times): return plans(sampler, times, lambda *where: S.EulerMaruyamaSampler.plan(sampler, *where))
def of_middle(sampler, times): return levels_of(sampler, sampler.noise_schedule.get_timesteps((lambda u: (u[1:] + u[:-1]) / 2)(sampler.noise_schedule.sigma(times))))
def levels_of(sampler, times): return levels(sampler.noise_schedule, sampler.model_output_transform, times)


def of_churn(sampler, times):
    plan = plans(sampler, times, sampler.plan)
    return levels_of(sampler, plan["higher"].time), plan["add"]


def of_ancestral(sampler, times):
    ns, t, s = sampler.noise_schedule, times[:-1], times[1:]
    gain = jnp.exp(ns.log_snr(t) - ns.log_snr(s))
    return ns.alpha(s), ns.sigma(s) * jnp.sqrt(gain), ns.sigma(s) * jnp.sqrt(1 - gain)


def of_corrector(sampler, times):
    ns, s = sampler.noise_schedule, times[1:]
    before = ns.alpha(jnp.maximum(s - ns.max_timesteps / 1000, 0))
    return of_euler_maruyama(sampler, times), 2 * (ns.alpha(s) / before) ** 2 * sampler.snr ** 2


def of_sde(sampler, times):
    kept = plans(sampler, times, sampler.plan)["kept"]
    return kept * ratios(sampler, times), sampler.noise_schedule.sigma(times[1:]) * jnp.sqrt(1 - kept ** 2), weights(sampler, times, range(sampler.order))


def of_look(sampler, times):
    (middle, _, _), (_, weight, _) = plans(sampler, times, sampler.plan)
    return levels_of(sampler, middle.time), weight


def of_unipc(sampler, times):
    shift = lambda v: jnp.concatenate([0 * v[:1], v[:-1]])
    V = shift(weights(sampler, times, range(-1, sampler.order)))
    return of_weights(sampler, times), (shift(ratios(sampler, times)), V[:, 0], V[:, 1:]), jnp.arange(len(times) - 1) == 0


nothing, key_first = lambda sampler, x, key: (), lambda sampler, x, key: key
def past_first(sampler, x, key): return jnp.zeros((sampler.order, *x.shape), x.dtype)
def none(sampler, times): return ()

BOTH, EDM = ("EDM", "linear"), ("EDM",)
SOLVERS = {  # name: (class, options, step by hand, what it carries first, its table, schedules)
    "Euler": (S.EulerSampler, {}, euler, nothing, none, BOTH),
    "midpoint": (S.MidpointSampler, {}, midpoint, nothing, of_middle, EDM),
    "Heun": (S.HeunSampler, {}, heun, nothing, none, EDM),
    "RK4": (S.RK4Sampler, {}, rk4, nothing, of_middle, EDM),
    "churned": (S.EDMSampler, {"S_churn": 40.0}, churned, key_first, of_churn, EDM),
    "ancestral": (S.EulerAncestralSampler, {}, drawn, key_first, of_ancestral, BOTH),
    "E-Maruyama": (S.EulerMaruyamaSampler, {}, drawn, key_first, of_euler_maruyama, BOTH),
    "pred-corr": (S.PredictorCorrectorSampler, {}, corrected, key_first, of_corrector, BOTH),
    "LMS-4": (S.LMSSampler, {}, linear(1), past_first, of_weights, BOTH),
    "MultiStep": (S.MultiStepDPM, {}, started, past_first, of_start, EDM),
    "PLMS": (S.PLMSSampler, {}, started, past_first, of_start, EDM),
    "DPM-2": (S.DPMSolverSampler, {}, inside, nothing, of_look, BOTH),
    "2M": (S.DPMSolverPlusPlusSampler, {}, linear(0), past_first, of_weights, BOTH),
    "3M": (S.DPMSolverPlusPlusSampler, {"order": 3}, linear(0), past_first, of_weights, BOTH),
    "2M SDE": (S.DPMSolverPlusPlusSampler, {"stochastic": True}, renewed, lambda s, x, key: (past_first(s, x, key), key), of_sde, BOTH),
    "DEIS-3": (S.DEISSampler, {}, linear(1), past_first, of_weights, BOTH),
    "UniPC-2": (S.UniPCSampler, {}, unipc, lambda s, x, key: (x, past_first(s, x, key)), of_unipc, BOTH)}


def by_hand(sampler, step, first, table, times, key):
    "The whole loop as one function of x."
    with jax.enable_x64(True):
        times = jnp.asarray(times, jnp.float64)
        rows, tables = levels_of(sampler, times), table(sampler, times)
    rows, tables = jax.tree.map(lambda v: jnp.asarray(np.asarray(v), v.dtype if v.dtype == bool else jnp.float32), (rows, tables))

    @jax.jit
    def run(params, x, rows, tables):
        one = lambda carry, now: (step(params, *carry, *now), None)
        (x, _), _ = jax.lax.scan(one, (x, first(sampler, x, key)), (rows[:-1], rows[1:], tables))
        return ask(params, x, rows[-1])[0]
    return lambda x: run(PARAMS, x, rows, tables)


def seconds(call):
    start = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - start


def compare(name, kind, repeats):
    cls, options, step, first, table, _ = SOLVERS[name]
    schedule, predictor = KINDS[kind]
    new, key = lambda: cls(Trivial(), PARAMS, schedule, predictor, **options), jax.random.PRNGKey(1)
    x = jax.random.normal(jax.random.PRNGKey(0), SHAPE) * float(schedule.sigma(schedule.max_timesteps))
    sampler, firsts = new(), {n: seconds(lambda fresh=new(): fresh.sample(x, fresh.make_steps(n), rng=key)) for n in (10, MANY)}
    calls = {}
    for n in (FEW, MANY):
        times = sampler.make_steps(n)
        calls["ours", n] = lambda times=times: sampler.sample(x, times, rng=key)
        calls["hand", n] = lambda run=by_hand(sampler, step, first, table, times, key): run(x)
    ends = {k: np.asarray(f()) for k, f in calls.items()}
    for n in (FEW, MANY):  # the same formula, up to float32's rounding of a chaotic walk
        gap = np.sqrt(np.mean((ends["ours", n] - ends["hand", n]) ** 2)) / ends["hand", n].std()
        assert gap < 1e-3, f"{name}, {kind}: ours and by hand differ by {gap:.1e}"
    taken = {k: [] for k in calls}
    for _ in range(repeats):
        for k, f in calls.items(): taken[k].append(seconds(f))
    slopes = {who: [1e6 * (b - a) / (MANY - FEW) for a, b in zip(taken[who, FEW], taken[who, MANY])] for who in ("ours", "hand")}
    ours, hand = (statistics.median(slopes[who]) for who in ("ours", "hand"))
    print(f"{name:10s} {kind:6s} ours {ours:8.1f} µs/step   by hand {hand:8.1f} µs/step   ratio {ours / hand:5.2f}   "
          f"first call {firsts[10]:5.2f} s with 10 levels, {firsts[MANY]:5.2f} s with {MANY:,}", flush=True)
    return ours / hand


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", choices=list(SOLVERS), default=list(SOLVERS), metavar="NAME", help=", ".join(SOLVERS))
    arguments = parser.parse_args()
    with jax.default_device(jax.devices(arguments.device)[0]):
        print(f"{jax.devices(arguments.device)[0].device_kind}, jax {jax.__version__}, batch {SHAPE}")
        worst = max(compare(name, kind, arguments.repeats) for name in arguments.only for kind in SOLVERS[name][-1])
        print(f"largest ratio {worst:.2f}")
