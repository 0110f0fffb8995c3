"""Laws of every sampler: orders, calls, keys, exact answers. A name new in `samplers.__all__` is enrolled by that; `ORDERS` and `CALLS` ask for its two numbers."""
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from flaxdiff.exact import ExactModel, FiniteDataset, GaussianMixture
from flaxdiff import samplers
from flaxdiff.samplers.ode import RungeKuttaSampler
from flaxdiff.samplers import (DDIMSampler, DiffusionSampler, EulerAncestralSampler, EulerSampler, HeunSampler, karras_grid,
                               lambda_grid, trailing_grid, uniform_grid)
from flaxdiff.schedulers import CosineGeneralNoiseScheduler, CosineNoiseSchedule, EDMNoiseScheduler, ExpNoiseSchedule, LinearNoiseSchedule
from laws import (ALL_SCHEDULES, EACH_KIND, GRIDS, MIXTURE, POINT, PREDICTORS, SAMPLER_CLASSES, SCALED, SCHEDULES, WAVE, ZERO_SNR, BFLOAT16, BOTH, Wave, decodable,
                  default_predictor, ends_pure, exact_sampler, has_memory, is_discrete, is_stochastic, over, sample_each, takes, walk, wave_sampler, x64)

# measured order of convergence, with the options that make a stochastic sampler deterministic; None: always stochastic, or adaptive.
# Other options than the defaults are measured in the tests of each family.
ORDERS = {"EulerSampler": 1, "DDIMSampler": 1, "EulerAncestralSampler": 1, "HeunSampler": 2, "MidpointSampler": 2, "RK4Sampler": 4,
          "EDMSampler": 2, "LMSSampler": 4, "MultiStepDPM": 3, "PLMSSampler": 2, "PNDMSampler": 2, "DPMSolverSampler": 2,
          "DPMSolverPlusPlusSampler": 2, "UniPCSampler": 3, "DEISSampler": 3, "FewStepSampler": 2, "FlowMapSampler": 1,
          "DDPMSampler": None, "EulerMaruyamaSampler": None, "PredictorCorrectorSampler": None, "AdaptiveSampler": None}
QUIET = {"EulerAncestralSampler": (("eta", 0.0),)}
# network calls for N levels, where that is a number
CALLS = {**{name: lambda N: N for name in ORDERS}, **{name: lambda N: 2 * N - 1 for name in ("HeunSampler", "MidpointSampler", "EDMSampler", "DPMSolverSampler", "PredictorCorrectorSampler")},
         "RK4Sampler": lambda N: 4 * N - 3, "MultiStepDPM": lambda N: N + min(N - 1, 1), "PLMSSampler": lambda N: N + min(N - 1, 1),
         "PNDMSampler": lambda N: N + 3 * min(N - 1, 3), "AdaptiveSampler": None}
STOCHASTIC = {"DDIM(.6)": (DDIMSampler, 0.6), "Ancestral(1)": (EulerAncestralSampler, 1.0)}

WITH_ZERO_SNR = {**SCHEDULES, **ZERO_SNR}
EDM, LINEAR, COSINE = SCHEDULES["EDMNoiseScheduler"], SCHEDULES["LinearNoiseSchedule"], SCHEDULES["CosineNoiseSchedule"]
TWO_SCHEDULES = {"EDM": EDM, "linear": LINEAR}
SHAPE, STRIDE = (2, 2, 2, 1), 16  # of most tests, so that they share what is compiled


def quiet(cls): return QUIET.get(cls.__name__, ())


def between(schedule, n, most=8.0, least=0.12, grid=karras_grid):
    "n + 1 times, from σ/α = `most` to `least`."
    with jax.enable_x64(True): start, end = (float(schedule.get_timesteps(u)) for u in (most, least))
    return grid(schedule, start, end, n + 1)


def rates(schedule, t):
    with jax.enable_x64(True): return float(schedule.alpha(float(t))), float(schedule.sigma(float(t)))


def test_every_sampler_has_its_numbers():
    assert set(SAMPLER_CLASSES) == set(ORDERS) == set(CALLS), "give the new sampler its order and its number of network calls above"


def graded(steps, order):
    "The first interval split, so that a method which starts at order 1 does so with a step small enough: h²/4, h³/8 for order 4, doubling up to h."
    h = 1 / (len(steps) - 1)
    widths = [h / 4 if order < 4 else h * h / 8]
    while sum(widths) < 1: widths.append(min(2 * widths[-1], 1 - sum(widths)))
    inner = steps[0] + (steps[1] - steps[0]) * np.cumsum(widths)[:-1]
    return np.concatenate([steps[:1], inner[inner > steps[1]], steps[1:]])


# Against exact answers

def last_error(sampler, x, steps, truth):
    end = sampler.sample(x, steps, rng=0, denoise_final=False) if has_memory(sampler) else walk(sampler, x, steps, stride=STRIDE)
    return np.sqrt(np.mean((np.asarray(end) - truth) ** 2))


@functools.lru_cache(maxsize=None)
def convergence_case(schedule):
    "(x at the first time, where the exact ODE carries it by the last)."
    start, end = (rates(schedule, t) for t in between(schedule, 1))
    x = np.hypot(*start) * np.linspace(-2.2, 2.2, 8).reshape(SHAPE)
    return x, np.asarray(exact_path(x, start, end))


exact_path = jax.jit(MIXTURE.ode_solution)


def check_order(cls, schedule, sizes, start=lambda steps: steps):
    "On a mixture, against its exact ODE solution, in float64; the last doubling counts."
    assert not is_stochastic(cls, quiet(cls))
    sampler = exact_sampler(cls, schedule, PREDICTORS["VPredictor"], options=quiet(cls))
    x, truth = convergence_case(schedule)
    errors = [last_error(sampler, x, start(between(schedule, n)), truth) for n in sizes]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert abs(orders[-1] - ORDERS[cls.__name__]) <= 0.15, f"errors {errors}, orders {orders}"


ORDERED = {name: cls for name, cls in SAMPLER_CLASSES.items() if ORDERS.get(name)}
REMEMBERING = {name: cls for name, cls in ORDERED.items() if cls.init_memory is not DiffusionSampler.init_memory and name != "DPMSolverSampler"}


@over(EACH_KIND, cls={name: cls for name, cls in ORDERED.items() if name not in REMEMBERING}, schedule=WITH_ZERO_SNR)
def test_order_of_convergence(cls, schedule, x64): check_order(cls, schedule, (64, 128, 256))


@over(("CosineContinuousNoiseScheduler", "CosineNoiseSchedule-zero-snr"), cls=REMEMBERING, schedule=WITH_ZERO_SNR)
def test_order_of_solvers_that_remember(cls, schedule, x64):
    "From a graded start; each length is a program of its own, so there are two."
    check_order(cls, schedule, (128, 256), lambda steps: graded(steps, ORDERS[cls.__name__]))


@over(("CosineContinuousNoiseScheduler",), cls=SAMPLER_CLASSES, schedule=WITH_ZERO_SNR)
def test_predictors_agree(cls, schedule, x64):
    "The network's output means one thing, whichever way it is said."
    known = [p for p in PREDICTORS.values() if decodable(p, schedule)]
    steps = between(schedule, STRIDE, 20, 0.12)
    alpha, sigma = rates(schedule, steps[0])
    x = alpha * 0.3 + sigma * np.random.default_rng(0).normal(size=SHAPE)
    ends = [np.asarray(exact_sampler(cls, schedule, p, options=quiet(cls)).sample(x, steps, rng=3, denoise_final=False)) for p in known]
    for end in ends[1:]: np.testing.assert_allclose(end, ends[0], rtol=1e-9, atol=1e-9)
    assert len(known) >= 3 and np.abs(ends[0]).max() < 3


@over(("EDMNoiseScheduler",), cls=SAMPLER_CLASSES, schedule=WITH_ZERO_SNR)
def test_one_point_takes_one_step(cls, schedule, x64):
    "ε̂ does not change along the path of a single example: in the σ/α frame any step is exact, and the last x̂₀ always is."
    options = quiet(cls) + ((("frame", "sigma"),) if issubclass(cls, (RungeKuttaSampler, samplers.MultiStepDPM)) else ())
    if is_stochastic(cls, options): pytest.skip("stochastic")
    sampler = exact_sampler(cls, schedule, PREDICTORS["VPredictor"], POINT, options)
    eps = np.random.default_rng(0).normal(size=SHAPE)
    steps = between(schedule, 1)
    (a0, s0), (a1, s1) = (rates(schedule, t) for t in steps)
    end = sampler.sample(a0 * 0.3 + s0 * eps, steps, rng=0, denoise_final=False)
    np.testing.assert_allclose(end, a1 * 0.3 + s1 * eps, rtol=1e-11, atol=1e-12)


@over(("EDM",), cls=SAMPLER_CLASSES, schedule=TWO_SCHEDULES)
def test_one_example_is_found(cls, schedule):
    "As `generate_images` in float32, with any number of levels, stochastic or not; also from a data set of one picture."
    image = np.linspace(-0.9, 0.9, 12).reshape(1, 2, 2, 3)
    predictor = PREDICTORS["KarrasEDMPredictor"]
    sampler = cls(ExactModel(FiniteDataset(image), schedule, predictor, (2, 2, 3)), {}, schedule, predictor)
    np.testing.assert_allclose(sampler.generate_images(2, 3, rng=1), np.repeat(image, 2, 0), atol=2e-5)


def affine(schedule, t, s, mean, variance):
    "(A, B) of the posterior mean of x₀ under N(mean, variance): E[x₀ | x_t] = A x_t + B."
    alpha, sigma = rates(schedule, t)
    gain = alpha * variance / (alpha ** 2 * variance + sigma ** 2)
    return gain, mean * (1 - gain * alpha)


@over(EACH_KIND, schedule=WITH_ZERO_SNR, kind=STOCHASTIC)
def test_stochastic_mean_and_variance(kind, schedule):
    "Gaussian data make every step linear: mean and variance after N steps follow by hand (Song et al. 2021a, eq. 12 and 16)."
    (cls, eta), mean, variance = kind, 0.4, 0.09
    predictor = PREDICTORS["VPredictor"]
    sampler = exact_sampler(cls, schedule, predictor, GaussianMixture([mean], variance ** 0.5), (("eta", eta),))
    steps = between(schedule, 5, 5.0, 0.15)
    alpha, sigma = rates(schedule, steps[0])
    m, v = alpha * 1.0, sigma ** 2 * 0.5  # begin off the marginal, to see the transient too
    n = 2 ** 17
    x = m + np.sqrt(v) * jax.random.normal(jax.random.PRNGKey(8), (2, n // 2, 1, 1))
    end = np.asarray(walk(sampler, x, steps, rng=5), np.float64)
    for t, s in zip(steps[:-1], steps[1:]):
        (at, st_), (as_, ss) = rates(schedule, t), rates(schedule, s)
        A, B = affine(schedule, t, s, mean, variance)
        ratio = (at / as_) ** 2
        fresh = eta ** 2 * (ss ** 2 / st_ ** 2) * (st_ ** 2 - ratio * ss ** 2)  # (σ_s²/σ_t²) σ²_{t|s}
        kept = np.sqrt(ss ** 2 - fresh)
        slope = as_ * A + kept * (1 - at * A) / st_
        m = slope * m + as_ * B - kept * at * B / st_
        v = slope ** 2 * v + fresh
    assert abs(end.mean() - m) < 5 * np.sqrt(v / n)
    assert abs(end.var() / v - 1) < 5 * np.sqrt(2 / n)


def in_turn(cls, schedule):
    "A predictor for this pair, so that all are met."
    known = [p for p in PREDICTORS.values() if decodable(p, schedule)]
    return known[(list(SAMPLER_CLASSES).index(cls.__name__) + list(map(id, WITH_ZERO_SNR.values())).index(id(schedule))) % len(known)]


@over(EACH_KIND, schedule=WITH_ZERO_SNR)
def test_ddim_is_euler_and_ancestral(schedule):
    "Bit for bit: Euler = DDIM(0) and DDIM(η) = Euler ancestral(η)."
    predictor = in_turn(EulerSampler, schedule)
    x, steps = jax.random.normal(jax.random.PRNGKey(0), SHAPE), uniform_grid(schedule, schedule.max_timesteps, schedule.min_time, 5)
    run = lambda cls, *options: np.asarray(walk(wave_sampler(cls, schedule, predictor, options=options), x, steps, rng=1))
    euler = run(EulerSampler)
    np.testing.assert_array_equal(euler, run(DDIMSampler))
    np.testing.assert_array_equal(euler, run(EulerAncestralSampler, ("eta", 0.0)))
    some, all_of_it = run(EulerAncestralSampler, ("eta", 0.6)), run(EulerAncestralSampler)  # η = 1 by default
    np.testing.assert_array_equal(some, run(DDIMSampler, ("eta", 0.6)))
    np.testing.assert_array_equal(all_of_it, run(DDIMSampler, ("eta", 1.0)))
    assert np.any(some != euler) and np.any(some != all_of_it) and np.all(np.isfinite(some + all_of_it))


def edm_algorithm_1(denoise, x, sigmas):
    "Karras et al. 2022, algorithm 1 (α = 1, σ(t) = t), in NumPy."
    sigmas = np.append(sigmas, 0)
    for t, s in zip(sigmas[:-1], sigmas[1:]):
        d = (x - denoise(x, t)) / t
        euler = x + (s - t) * d
        x = euler if s == 0 else x + (s - t) * (d / 2 + (euler - denoise(euler, s)) / s / 2)
    return x


@pytest.mark.parametrize("N", [3, 18])
def test_heun_is_edms_algorithm(N, x64):
    "On EDM's own grid, to the last digits."
    def denoise(x, sigma):
        w, m, v = MIXTURE.weights, MIXTURE.means[:, 0], MIXTURE.stds ** 2 + sigma ** 2
        log_p = np.log(w / np.sqrt(v)) - (x[..., None] - m) ** 2 / (2 * v)
        p = np.exp(log_p - log_p.max(-1, keepdims=True))
        means = (m * sigma ** 2 + MIXTURE.stds ** 2 * x[..., None]) / v
        return (p * means).sum(-1) / p.sum(-1)
    ramp = (80 ** (1 / 7) + np.arange(N) / (N - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x = 80 * np.random.default_rng(0).normal(size=(4, 3, 3, 1))
    sampler = exact_sampler(HeunSampler, EDM, PREDICTORS["KarrasEDMPredictor"])
    steps = sampler.make_steps(N)
    np.testing.assert_allclose(EDM.sigma(steps), ramp, rtol=1e-13)
    np.testing.assert_allclose(sampler.sample(x, steps), edm_algorithm_1(denoise, x, ramp), rtol=1e-10, atol=1e-12)


@over(("CosineNoiseSchedule-zero-snr",), cls=SAMPLER_CLASSES, schedule=ZERO_SNR)
@pytest.mark.parametrize("name", ["VPredictor", "X0Predictor"])
def test_from_pure_noise_the_first_step_is_ddims(cls, schedule, name):
    "Where α = 0, σ/α is infinite: x_s = α_s x̂₀ + σ_s ε̂ with ε̂ = x_T for every solver."
    predictor, T = PREDICTORS[name], schedule.max_timesteps
    sampler = wave_sampler(cls, schedule, predictor)
    x = jax.random.normal(jax.random.PRNGKey(0), SHAPE)
    s = 0.7 * T
    F = np.asarray(WAVE.apply(Wave.params, x, jnp.full(2, schedule.network_time(T))))
    alpha, sigma = rates(schedule, s)
    want = alpha * (-F if name == "VPredictor" else F) + sigma * np.asarray(x)
    np.testing.assert_allclose(sampler.sample(x, [T, s], rng=0, denoise_final=False), want, rtol=2e-5, atol=2e-6)


@over(cls=SAMPLER_CLASSES, schedule=ZERO_SNR)
def test_epsilon_is_refused_at_zero_snr(cls, schedule):
    with pytest.raises(ValueError, match="EpsilonPredictor"): cls(WAVE, Wave.params, schedule)
    with pytest.raises(ValueError, match="EpsilonPredictor"): cls(WAVE, Wave.params, schedule, PREDICTORS["EpsilonPredictor"])


# Finite everywhere

def start_noise(schedule):
    "The prior of `generate_images`."
    T = schedule.max_timesteps
    return jax.random.normal(jax.random.PRNGKey(0), SHAPE) * (float(schedule.sigma(T)) if schedule.variance_exploding else 1)


def check_finite(cls, schedule, options=()):
    "For N = 1 … 50 and every predictor, from the grid and prior of `generate_images`, with a float32 and a bfloat16 network."
    known = {name: p for name, p in PREDICTORS.items() if decodable(p, schedule)}
    lists = [wave_sampler(cls, schedule, default_predictor(schedule)).make_steps(n) for n in range(1, 51)]
    ends = np.asarray(sample_each(cls, schedule, known.values(), BOTH, start_noise(schedule), lists, options=options))
    finite = np.isfinite(ends).all((3, 4, 5))
    assert ends.dtype == np.float32 and finite.all(), [f"{list(known)[k]}, N={n + 1}, {('float32', 'bfloat16')[i]}" for k, n, i in np.argwhere(~finite)]


@over(("EDMNoiseScheduler", "CosineNoiseSchedule-zero-snr"), cls=SAMPLER_CLASSES, schedule=ALL_SCHEDULES)
def test_finite(cls, schedule): check_finite(cls, schedule)


PLUS, UNIPC = SAMPLER_CLASSES["DPMSolverPlusPlusSampler"], SAMPLER_CLASSES["UniPCSampler"]
VARIANTS = {"DPM-3": (SAMPLER_CLASSES["DPMSolverSampler"], {"order": 3}), "2S": (PLUS, {"multistep": False}), "3M": (PLUS, {"order": 3}),
            "SDE": (PLUS, {"multistep": False, "stochastic": True}), "2M-SDE": (PLUS, {"stochastic": True}), "3M-SDE": (PLUS, {"order": 3, "stochastic": True}),
            "UniPC-3": (UNIPC, {"order": 3}), "UniP-3": (UNIPC, {"order": 3, "corrector": False}), "DEIS-1": (SAMPLER_CLASSES["DEISSampler"], {"order": 1}),
            "churned": (SAMPLER_CLASSES["EDMSampler"], {"S_churn": 40.0, "S_noise": 1.007}), "LMS-2": (SAMPLER_CLASSES["LMSSampler"], {"order": 2}),
            "Heun in λ": (HeunSampler, {"frame": "lambda"}), "Heun in σ": (HeunSampler, {"frame": "sigma"}), "2-correctors": (SAMPLER_CLASSES["PredictorCorrectorSampler"], {"corrector_steps": 2})}


@pytest.mark.slow
@over(variant=VARIANTS, schedule=WITH_ZERO_SNR)
def test_finite_with_every_option(variant, schedule):
    cls, options = variant
    check_finite(cls, schedule, tuple(options.items()))


@pytest.mark.slow
@over(("EDM",), cls=SAMPLER_CLASSES, schedule=TWO_SCHEDULES)
def test_standing_still_is_sampling(cls, schedule):
    "The short cut of the two tests above: many lists of times in one program give what `sample` gives, with whichever predictor."
    x, choices = start_noise(schedule), [PREDICTORS["VPredictor"], PREDICTORS["KarrasEDMPredictor"]]
    lists = [wave_sampler(cls, schedule, choices[0]).make_steps(n) for n in (1, 2, 6)]
    for predictor, ends in zip(choices, sample_each(cls, schedule, choices, WAVE, x, lists)):
        for steps, end in zip(lists, ends):
            want = wave_sampler(cls, schedule, predictor).sample(x, steps, rng=jax.random.PRNGKey(0))
            np.testing.assert_allclose(end, want, rtol=1e-4, atol=2e-6 * np.abs(x).max())  # rounding at the first levels, σ = 80


@pytest.mark.slow
@over(("LinearNoiseSchedule",), cls=SAMPLER_CLASSES, schedule=WITH_ZERO_SNR)
def test_a_bfloat16_network_is_read_as_float32(cls, schedule):
    sampler = wave_sampler(cls, schedule, in_turn(cls, schedule), BFLOAT16)
    end = sampler.sample(start_noise(schedule), sampler.make_steps(18), rng=0)
    assert end.dtype == jnp.float32 and np.all(np.isfinite(end))


@over(("EDM",), cls=SAMPLER_CLASSES, schedule=TWO_SCHEDULES)
def test_walking_is_sampling(cls, schedule):
    "The short cut of these tests: steps taken one compilation at a time are those of the one scan."
    if has_memory(sampler := wave_sampler(cls, schedule, PREDICTORS["VPredictor"], options=quiet(cls))): pytest.skip("remembers")
    if is_stochastic(cls, quiet(cls)): pytest.skip("other steps, other keys")
    x, steps = jnp.ones(SHAPE), sampler.make_steps(5)
    np.testing.assert_allclose(walk(sampler, x, steps, denoise_final=True), sampler.sample(x, steps, rng=0), rtol=1e-4, atol=1e-5)


# One program

def inner(value):
    "The jaxprs inside an equation's parameter."
    if isinstance(value, jax.extend.core.ClosedJaxpr): yield value
    elif isinstance(value, jax.extend.core.Jaxpr): yield jax.extend.core.ClosedJaxpr(value, ())
    elif isinstance(value, (list, tuple)):
        for v in value: yield from inner(v)


def equations(closed):
    "All equations of a jaxpr, at any depth."
    for eqn in closed.jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in inner(value): yield from equations(sub)


class Heavy:
    "A network with a million parameters."
    params = {"w": np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32) / 30}

    def apply(self, params, x, temb): return jnp.tanh(x * jnp.mean(params["w"] @ params["w"]) + temb[:, None, None, None] / 4)


@over(cls=SAMPLER_CLASSES, schedule=TWO_SCHEDULES)
def test_one_scan_and_no_weights_baked_in(cls, schedule):
    sampler = cls(Heavy(), Heavy.params, schedule, PREDICTORS["VPredictor"])
    x, steps = jnp.ones((2, 4, 4, 1)), sampler.make_steps(9)
    jaxpr = jax.make_jaxpr(lambda x: sampler.sample(x, steps, rng=0))(x)
    scans = [e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == 15]  # 16 levels: 9 and their filling
    assert len(scans) == 1
    programs = [e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("jit", "pjit") and any(s in list(equations(e.params["jaxpr"])) for s in scans)]
    assert len(programs) == 1, "sampling is one compiled program"
    loops = [e for e in programs[0].params["jaxpr"].jaxpr.eqns if e.primitive.name in ("scan", "while")]
    assert loops == scans, "with one loop (inside it, a schedule may search its table by another)"
    assert any(v.aval.shape == (1000, 1000) for v in programs[0].params["jaxpr"].jaxpr.invars), "the weights are an input"
    baked = [c for e in (programs[0], *equations(programs[0].params["jaxpr"])) for v in e.params.values() for j in inner(v) for c in j.consts]
    assert max((np.size(c) for c in baked), default=0) < 10_000, "and no constant is (a table of betas is small)"



@over(cls=SAMPLER_CLASSES)
def test_new_weights_are_used_without_a_new_trace(cls):
    "A second call, another key, other images, other weights: traced once, and the weights are those of the call."
    model = Wave()
    sampler = cls(model, Wave.params, EDM, PREDICTORS["KarrasEDMPredictor"])
    ask = lambda **kw: np.asarray(sampler.generate_images(**{"num_images": 2, "diffusion_steps": 4, "image_size": 2, "channels": 1, "rng": 0, **kw}))
    first = ask()
    traces = model.traces
    assert traces == (2 if cls is samplers.AdaptiveSampler else 1), "once, wherever the walk asks; and once with a level for each image"
    np.testing.assert_array_equal(first, ask())
    ask(rng=1, start_step=900, end_step=3)
    ask(rng=None, grid=karras_grid)
    ask(num_images=len(np.ones(SHAPE)), image_size=None, channels=None, priors=np.ones(SHAPE, np.float32))
    sampler.params = {"w": np.float32(-0.3)}
    assert np.any(ask() != first)
    assert model.traces == traces


@over(("EDMNoiseScheduler", "CosineNoiseSchedule-zero-snr"), cls=SAMPLER_CLASSES, schedule=WITH_ZERO_SNR)
def test_network_calls(cls, schedule):
    "Counted while the compiled program runs."
    if CALLS[cls.__name__] is None: pytest.skip("adaptive")
    model = Wave(count_calls=True)
    sampler = cls(model, Wave.params, schedule, PREDICTORS["VPredictor"])
    for N in (1, 5):
        jax.effects_barrier()
        model.calls = 0
        sampler.generate_images(2, N, image_size=2, channels=1, rng=0).block_until_ready()
        jax.effects_barrier()
        calls = CALLS[cls.__name__]
        spared = calls(21) - calls(20) - 1 if ends_pure(schedule) and N > 1 else 0  # the step from pure noise is DDIM's: one call
        assert model.calls == calls(N) - spared, N


# Keys

@over(("EDM",), cls=SAMPLER_CLASSES, schedule=TWO_SCHEDULES)
def test_an_image_does_not_know_its_neighbours(cls, schedule):
    sampler = wave_sampler(cls, schedule, PREDICTORS["VPredictor"])
    few, many = (np.asarray(sampler.generate_images(n, 4, image_size=3, channels=3, rng=11)) for n in (3, 8))
    np.testing.assert_allclose(few, many[:3], rtol=0, atol=2e-6)
    assert np.abs(many[3] - many[0]).max() > 0.1


def test_stochastic_noise_does_not_know_its_neighbours():
    "The fresh noise of each step too: the pure draw is the same to the bit."
    key = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(jax.random.normal(key, (3, 4, 4, 3)), jax.random.normal(key, (8, 4, 4, 3))[:3])


@over(cls=SAMPLER_CLASSES)
def test_keys(cls):
    "A key, or a seed, says all; none says something new each time."
    sampler = wave_sampler(cls, EDM, PREDICTORS["KarrasEDMPredictor"])
    draw = lambda rng: np.asarray(sampler.generate_images(2, 4, image_size=2, channels=1, rng=rng))
    np.testing.assert_array_equal(draw(5), draw(5))
    np.testing.assert_array_equal(draw(5), draw(jax.random.PRNGKey(5)))
    assert np.any(draw(5) != draw(6)) and np.any(draw(None) != draw(None))


@over(kind=STOCHASTIC)
def test_fresh_noise_is_independent(kind):
    "Of step from step, of the prior, and of image from image."
    cls, eta = kind
    sampler = exact_sampler(cls, EDM, PREDICTORS["KarrasEDMPredictor"], POINT, (("eta", eta),))
    steps, n = between(EDM, 3, 5, 1), 20_000
    x = jax.random.normal(jax.random.PRNGKey(5), (2, n, 1, 1)) * 5
    levels = [np.asarray(sampler.sample(x, steps[:k], rng=5, denoise_final=False)).reshape(2, n) - 0.3 for k in (1, 2, 3, 4)]
    sigma = np.array([rates(EDM, t)[1] for t in steps])
    # x_s - x₀ = kept ε_t + fresh z: subtract what was kept, and look at z
    fresh = [eta * np.sqrt(float(EDM.get_posterior_variance(t, s))) for t, s in zip(steps[:-1], steps[1:])]
    z = [(levels[k + 1] - np.sqrt(sigma[k + 1] ** 2 - fresh[k] ** 2) * levels[k] / sigma[k]) / fresh[k] for k in range(3)]
    draws = np.concatenate([levels[0][:, None] / 5, np.stack(z, 1)], 1).reshape(8, n)
    assert np.abs(np.corrcoef(draws) - np.eye(8)).max() < 5 / np.sqrt(n)
    np.testing.assert_allclose(draws[[1, 2, 3, 5, 6, 7]].std(1), 1, atol=5 / np.sqrt(2 * n))


# generate_images

class Recorder:
    "A network that notes each temb it is told."
    def __init__(self): self.seen = []

    def apply(self, params, x, temb):
        jax.debug.callback(lambda t: self.seen.append(np.asarray(t)), temb, ordered=True)
        return 0 * x


@over(schedule=ALL_SCHEDULES)
def test_levels_run_from_start_step_to_the_smallest(schedule):
    model, T = Recorder(), schedule.max_timesteps
    sampler = EulerSampler(model, {}, schedule, default_predictor(schedule))
    for start, end in ((1000, 0), (640.5, 210.25)) if T != 10 else ((1000, 0), (905.0, 310.0)):
        model.seen.clear()
        sampler.generate_images(2, 4, start, end, image_size=2, channels=1, rng=0).block_until_ready()
        jax.effects_barrier()
        seen = np.stack(model.seen)
        assert seen.shape == (4, 2) and np.all(seen[:, 0] == seen[:, 1])
        first, last = start * T / 1000, max(end * T / 1000, schedule.min_time)
        np.testing.assert_allclose(seen[:, 0], schedule.network_time(np.linspace(first, last, 4).astype(np.float32)), rtol=1e-6, atol=5e-7)
        np.testing.assert_array_equal(sampler.make_steps(4, start, end)[[0, -1]], [first, last])


@over(schedule=SCHEDULES)
def test_prior(schedule):
    "Standard deviation σ where α ≡ 1, else √(α²+σ²), at the level of `start_step`; one level of a silent network shows it."
    class Silent:
        "Says x̂₀ = x_t/4 where all is scaled to stay within [-1, 1]."
        def apply(self, params, x, temb): return x * params
    for start in (1000, 400):
        t = start * schedule.max_timesteps / 1000
        alpha, sigma = rates(schedule, t)
        std = sigma if schedule.variance_exploding else np.hypot(alpha, sigma)
        sampler = EulerSampler(Silent(), np.float32(0.1 / std), schedule, PREDICTORS["X0Predictor"])
        x = np.asarray(sampler.generate_images(4, 1, start, image_size=32, channels=3, rng=0)) / 0.1
        assert abs(x.std() - 1) < 5 / np.sqrt(2 * x.size) and abs(x.mean()) < 5 / np.sqrt(x.size)


def test_priors_replace_the_noise():
    "x at `start_step`, already noised; with the `sample` of the same times."
    sampler = wave_sampler(HeunSampler, LINEAR, PREDICTORS["EpsilonPredictor"])
    priors = jax.random.normal(jax.random.PRNGKey(0), (3, 4, 4, 2))
    got = sampler.generate_images(3, 5, 700, 100, priors=priors, rng=0)
    want = sampler.sample(priors, np.linspace(700, 100, 5), rng=0)
    np.testing.assert_array_equal(got, jnp.clip(want, -1, 1))
    assert got.shape == (3, 4, 4, 2)
    for bad in (jnp.ones((4, 4)), jnp.ones(3)):
        with pytest.raises(ValueError, match="priors"): sampler.generate_images(3, 5, priors=bad)


def test_images_are_clipped_and_samples_are_not():
    class Loud:
        def apply(self, params, x, temb): return 3 * jnp.sign(x)
    sampler = EulerSampler(Loud(), {}, EDM, PREDICTORS["X0Predictor"])
    assert np.array_equal(np.unique(sampler.generate_images(4, 3, image_size=4, channels=1, rng=0)), [-1, 1])
    assert np.abs(sampler.sample(jnp.ones((1, 2, 2, 1)), sampler.make_steps(3))).max() == 3


def test_shapes():
    sampler = wave_sampler(EulerSampler, EDM, PREDICTORS["KarrasEDMPredictor"])
    for kwargs, shape in ((dict(image_size=4), (2, 4, 4, 3)), (dict(image_size=(3, 5), channels=2), (2, 3, 5, 2))):
        images = sampler.generate_images(2, 1, rng=0, **kwargs)
        assert images.shape == shape and images.dtype == jnp.float32
    shaped = EulerSampler(ExactModel(MIXTURE, EDM, PREDICTORS["VPredictor"], (6, 5, 1)), {}, EDM, PREDICTORS["VPredictor"])
    assert shaped.generate_images(2, 1, rng=0, channels=2).shape == (2, 6, 5, 2)
    assert shaped.generate_images(diffusion_steps=1).shape == (16, 6, 5, 1)


def test_float64_throughout(x64):
    sampler = exact_sampler(HeunSampler, LINEAR, PREDICTORS["VPredictor"])
    assert sampler.generate_images(1, 3, image_size=2, channels=1, rng=0).dtype == jnp.float64
    assert sampler.sample(jnp.ones((1, 2, 2, 1), jnp.float32), [900.0, 300.0]).dtype == jnp.float32


def test_bfloat16_samples_keep_their_times():
    "x in bfloat16 does not round the levels to bfloat16: neighbours stay apart."
    model = Recorder()
    sampler = EulerSampler(model, {}, LINEAR)
    end = sampler.sample(jnp.ones((1, 2, 2, 1), jnp.bfloat16), np.arange(1000.0, 980, -1))
    jax.effects_barrier()
    assert end.dtype == jnp.bfloat16 and len(np.unique(np.stack(model.seen).astype(np.float32))) == 20


@over(cls=SAMPLER_CLASSES)
def test_bad_requests_are_refused(cls):
    make = lambda schedule=EDM, **kw: cls(WAVE, Wave.params, schedule, PREDICTORS["KarrasEDMPredictor"], **kw)
    sampler, discrete = make(), make(LINEAR)
    ask = lambda s=sampler, **kw: s.generate_images(**{"num_images": 2, "diffusion_steps": 3, "image_size": 2, "channels": 1, "rng": 0, **kw})
    for kwargs, name in ((dict(diffusion_steps=0), "diffusion_steps"), (dict(diffusion_steps=-4), "diffusion_steps"), (dict(diffusion_steps=2.5), "diffusion_steps"),
                         (dict(num_images=0), "num_images"), (dict(image_size=None), "image_size"), (dict(image_size=0), "image_size"),
                         (dict(image_size=(2, 3, 4)), "image_size"), (dict(channels=0), "channels"), (dict(start_step=0), "start_step"),
                         (dict(start_step=1001), "start_step"), (dict(start_step=300, end_step=300), "start_step"), (dict(start_step=300, end_step=301), "start_step"),
                         (dict(end_step=-1), "end_step"), (dict(start_step=np.nan), "start_step")):
        with pytest.raises(ValueError, match=name): ask(**kwargs)
    with pytest.raises(ValueError, match="start_step"): ask(discrete, start_step=0.5)
    x = jnp.ones((2, 2, 2, 1))
    for s, steps in ((sampler, [0.2, 0.7]), (sampler, [0.7, 0.7]), (sampler, []), (sampler, 0.5), (sampler, [1.5, 0.5]), (sampler, [0.5, -0.5]),
                     (sampler, [np.nan, 0.5]), (discrete, [1000, 0]), (discrete, [1000.0, 0.5])):
        with pytest.raises(ValueError, match="steps"): s.sample(x, steps)
    for bad in (jnp.ones((2, 2), int), jnp.float32(1)):
        with pytest.raises(ValueError, match="x must"): sampler.sample(bad, [0.7, 0.2])
    with pytest.raises(ValueError, match="conditioning"): sampler.sample(x, [0.7, 0.2], conditioning=(jnp.ones((3, 4)),))
    with pytest.raises(ValueError, match="null_condition"): make(guidance_scale=2.0)
    with pytest.raises(ValueError, match="model must"): cls(lambda x: x, {}, EDM)
    with pytest.raises(ValueError, match="model_output_transform"): cls(WAVE, Wave.params, EDM, "epsilon")
    class Wrong:
        def apply(self, params, x, temb): return x[..., :1]
    with pytest.raises(ValueError, match="model must return"): cls(Wrong(), {}, EDM, PREDICTORS["VPredictor"]).generate_images(1, 2, image_size=2, channels=3)


def test_eta_and_frame_are_checked():
    for cls in (DDIMSampler, EulerAncestralSampler):
        for eta in (-0.1, 1.5, np.nan):
            with pytest.raises(ValueError, match="eta"): cls(WAVE, Wave.params, EDM, eta=eta)
    with pytest.raises(ValueError, match="frame"): HeunSampler(WAVE, Wave.params, EDM, frame="log")


def test_conditioning_reaches_the_network():
    class Told:
        def apply(self, params, x, temb, label): return 0 * x + label[:, None, None, None]
    sampler = HeunSampler(Told(), {}, EDM, PREDICTORS["X0Predictor"])
    images = sampler.generate_images(3, 4, image_size=2, channels=1, rng=0, conditioning=(jnp.array([-0.5, 0.0, 0.5]),))
    np.testing.assert_allclose(images[:, 0, 0, 0], [-0.5, 0.0, 0.5], atol=1e-6)


def test_the_hook_is_asked_for():
    with pytest.raises(NotImplementedError, match="take_next_step"):
        DiffusionSampler(WAVE, Wave.params, EDM, PREDICTORS["VPredictor"]).generate_images(1, 3, image_size=2, channels=1)


# Grids

@functools.lru_cache(maxsize=None)
def noise_of(schedule):
    "t -> (σ, σ/α), compiled once; t is padded to 1,000 with its last."
    f = jax.jit(lambda t: (schedule.sigma(t), schedule.sigma(t) / schedule.alpha(t)))
    return lambda t: [np.asarray(v)[:len(t)] for v in f(np.pad(t, (0, 1000 - len(t)), mode="edge"))]


def lowest(grid, start, end, n):
    "Where a grid ends: at `end`, but the trailing one leaves a whole step to 0."
    return max(start / n, end) if grid is trailing_grid else end


def check_grid(grid, schedule, n, asked=None):
    T, first = schedule.max_timesteps, schedule.max_timesteps
    if ends_pure(schedule) and grid in (karras_grid, lambda_grid):
        with pytest.raises(ValueError, match="α > 0"): grid(schedule, T, schedule.min_time, 5)
        first = 0.99 * T
    steps = np.asarray(grid(asked or schedule, first, schedule.min_time, n))
    assert steps.shape == (n,) and steps.dtype == np.float64 and steps[0] == first and (n == 1 or steps[-1] == lowest(grid, first, schedule.min_time, n))
    assert np.all(np.diff(steps) < 0)
    with jax.enable_x64(True): assert np.all(np.diff(noise_of(schedule)(steps)[0]) < 0)
    u = noise_of(schedule)(steps.astype(np.float32))[1]
    assert np.all(u[1:] < u[:-1]), f"equal neighbours in float32 at N = {n}"


@over(EACH_KIND, grid=GRIDS, schedule={**SCHEDULES, **ZERO_SNR, **SCALED})
def test_no_level_is_visited_twice(grid, schedule):
    "σ falls strictly, and in float32 σ/α does."
    for n in (1, 2, 50, 1000): check_grid(grid, schedule, n)


class OfOneShape:
    "A schedule that is always asked for 1,000 times at once, so that every N is one compilation."
    def __init__(self, schedule): self.schedule = schedule
    def __getattr__(self, name): return getattr(self.schedule, name)
    def get_timesteps(self, u): return self.schedule.get_timesteps(np.pad(u, (0, 1000 - len(u)), mode="edge"))[:len(u)]


@pytest.mark.slow
@over(grid=GRIDS, schedule={**SCHEDULES, **ZERO_SNR, **SCALED})
def test_no_level_is_visited_twice_whatever_n(grid, schedule):
    for n in range(1, 1001): check_grid(grid, schedule, n, OfOneShape(schedule))


@over(schedule=SCHEDULES)
def test_spacing_of_each_grid(schedule, x64):
    start, end = 0.95 * schedule.max_timesteps, max(schedule.min_time, 0.03 * schedule.max_timesteps)
    even = lambda v: np.testing.assert_allclose(np.diff(v), np.diff(v).mean(), rtol=1e-6)
    u = lambda t: np.asarray(schedule.sigma(t)) / np.asarray(schedule.alpha(t))
    even(uniform_grid(schedule, start, end, 40))
    even(u(karras_grid(schedule, start, end, 40)) ** (1 / 7))
    even(u(karras_grid(schedule, start, end, 40, rho=3)) ** (1 / 3))
    even(np.log(u(lambda_grid(schedule, start, end, 40))))


def test_on_the_karras_schedules_uniform_is_the_ramp(x64):
    for schedule in (EDM, SCHEDULES["KarrasVENoiseScheduler"]):
        np.testing.assert_allclose(uniform_grid(schedule, 1, 0, 30), karras_grid(schedule, 1, 0, 30), atol=1e-12)


def test_a_grid_can_be_a_function():
    sampler = wave_sampler(EulerSampler, EDM, PREDICTORS["VPredictor"])
    mine = lambda schedule, start, end, n: start + (end - start) * np.linspace(0, 1, n) ** 2
    np.testing.assert_allclose(sampler.make_steps(4, grid=mine), 1 - np.linspace(0, 1, 4) ** 2)
    with pytest.raises(ValueError, match="steps"): sampler.make_steps(4, grid=lambda schedule, start, end, n: [0.5] * n)


# Any walk

@functools.lru_cache(maxsize=None)
def one_program(cls, schedule, x64):
    "(x at the first time, up to 6 times filled up with the last) -> x at the last, one compilation for all; the data are one example."
    options = quiet(cls) + ((("frame", "sigma"),) if issubclass(cls, (RungeKuttaSampler, samplers.MultiStepDPM)) else ())
    sampler = exact_sampler(cls, schedule, PREDICTORS["VPredictor"], POINT, options)
    return jax.jit(lambda x, times, last: samplers.common.walk(sampler, sampler.denoiser, x, times, last, jax.random.PRNGKey(0), denoise_final=False))


def leads_home(cls, schedule, where, x64):
    "From a single example's path at times `where` (shares of T, in 1000ths) to its path at the last: the other times do not matter."
    with jax.enable_x64(x64):
        low, T = schedule.min_time, schedule.max_timesteps
        steps = low + (T - low) * np.array(sorted(where, reverse=True)) / 1000
        eps = np.linspace(-2, 2, 8).reshape(SHAPE)
        (a0, s0), (a1, s1) = (rates(schedule, t) for t in (steps[0], steps[-1]))
        end = one_program(cls, schedule, x64)(jnp.asarray(a0 * 0.3 + s0 * eps), jnp.asarray(np.pad(steps, (0, 6 - len(steps)), mode="edge")), len(steps) - 2)
        assert end.dtype == (np.float64 if x64 else np.float32)
        u0, u1 = s0 / a0, s1 / a1
        looked = 0 if x64 else 1.2e-7 * (1 + 2 * u0) * u0 / u1  # Heun looks at the last level: ε̂ there has the rounding of x over σ, times the step
        np.testing.assert_allclose(end, a1 * 0.3 + s1 * eps, atol=(1e-9 if x64 else 1e-5) * (1 + u0) + looked)


TIMES = st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(where=TIMES, name=st.sampled_from(["EDMNoiseScheduler", "CosineContinuousNoiseScheduler"]), solver=st.sampled_from(sorted(ORDERED)), x64=st.booleans())
def test_any_grid_leads_a_single_example_home(where, name, solver, x64):
    "Any decreasing times at all, any solver, one step or many, looking ahead or back, in float32 and float64."
    leads_home(SAMPLER_CLASSES[solver], SCHEDULES[name], where, x64)


RANDOM_SCHEDULES = st.one_of(
    st.builds(EDMNoiseScheduler, st.floats(0.1, 1000), sigma_max=st.floats(5, 200), rho=st.floats(1, 12)),
    st.builds(CosineNoiseSchedule, st.integers(2, 2000), s=st.floats(0.001, 0.1)),
    st.builds(LinearNoiseSchedule, st.integers(20, 2000), beta_end=st.floats(0.005, 0.03)),
    st.builds(CosineGeneralNoiseScheduler, st.floats(0.1, 1000), sigma_min=st.floats(0.001, 0.05), sigma_max=st.floats(1, 200)),
    st.builds(ExpNoiseSchedule, st.integers(20, 2000)))


@settings(max_examples=16, deadline=None, derandomize=True, database=None)
@given(where=TIMES, schedule=RANDOM_SCHEDULES, solver=st.sampled_from(sorted(ORDERED)))
def test_any_schedule_leads_a_single_example_home(where, schedule, solver):
    leads_home(SAMPLER_CLASSES[solver], schedule, where, True)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(n=st.sampled_from([1, 2, 7, 64]), start=st.floats(20, 1000), width=st.floats(0.05, 1), name=st.sampled_from(sorted(ALL_SCHEDULES)), grid=st.sampled_from(sorted(GRIDS)))
def test_any_request_gives_that_many_falling_times(n, start, width, name, grid):
    schedule = ALL_SCHEDULES[name]
    if schedule.max_timesteps == 10: start = max(start, 200)
    if ends_pure(schedule): start = min(start, 950)
    end = start * (1 - width)
    sampler = wave_sampler(EulerSampler, schedule, default_predictor(schedule))
    steps = sampler.make_steps(n, start, end, GRIDS[grid])
    T = schedule.max_timesteps
    assert len(steps) == n and steps[0] == start * T / 1000 and np.all(np.diff(steps) < 0)
    if n > 1: assert steps[-1] == lowest(GRIDS[grid], steps[0], max(end * T / 1000, schedule.min_time), n)
