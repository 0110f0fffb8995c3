"""Laws of `flaxdiff.likelihood`: densities against those that can be written down, the bound above them, the constants of bits."""
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff import likelihood
from flaxdiff.denoiser import Denoiser
from flaxdiff.exact import ExactModel, FiniteDataset, Gaussian, GaussianMixture
from flaxdiff.likelihood import VariationalBound, bits_per_dim, dequantise, divergence, log_likelihood, to_noise, variational_bound
from flaxdiff.samplers import EulerSampler, RK4Sampler, lambda_grid
from flaxdiff.samplers.frames import DataFrame
from flaxdiff.schedulers import KarrasVENoiseScheduler
from laws import MIXTURE, PREDICTORS, SCHEDULES, ZERO_SNR, Wave, over, x64
from test_samplers import equations

GAUSSIAN = Gaussian([0.3, -0.2, 0.1], [[0.2, 0.1, 0], [0.1, 0.3, 0.05], [0, 0.05, 0.1]])
EDM, LINEAR, COSINE = SCHEDULES["EDMNoiseScheduler"], SCHEDULES["LinearNoiseSchedule"], SCHEDULES["CosineContinuousNoiseScheduler"]
SOME = {"EDM": EDM, "linear": LINEAR, "cosine": COSINE, "cosine-zero-snr": ZERO_SNR["CosineNoiseSchedule-zero-snr"]}
V = PREDICTORS["VPredictor"]


def make(data, schedule, predictor=V): return EulerSampler(ExactModel(data, schedule, predictor), {}, schedule, predictor)
def low(schedule): return schedule.alpha(float(schedule.min_time)), schedule.sigma(float(schedule.min_time))


def noisy(data, schedule, n=8):
    "Samples at the smallest noise level."
    x, (alpha, sigma) = data.sample(jax.random.PRNGKey(0), n), low(schedule)
    return alpha * x + sigma * jax.random.normal(jax.random.PRNGKey(1), x.shape)


def test_divergence_is_the_trace(x64):
    f = lambda y: jnp.stack([jnp.sin(y[:, 0] * y[:, 1]), y[:, 0] ** 2 * y[:, 2], jnp.exp(y[:, 2])], -1)
    y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    J = jax.vmap(jax.jacfwd(lambda y: f(y[None])[0]))(y)
    value, trace = divergence(f, y)
    np.testing.assert_allclose(value, f(y), rtol=1e-15)
    np.testing.assert_allclose(trace, jnp.trace(J, axis1=1, axis2=2), rtol=1e-13)
    one = divergence(f, y, jax.random.rademacher(jax.random.PRNGKey(0), (20000, 4, 3), float))[1]
    off = jnp.sqrt(jnp.sum((J + J.swapaxes(1, 2)) ** 2, (1, 2)) / 2)  # an upper bound of one probe's deviation
    assert np.all(np.abs(one - trace) < 4 * off / np.sqrt(20000))


@over(schedule=SOME)
def test_density_of_a_gaussian_and_a_mixture(schedule, x64):
    for data in (GAUSSIAN, MIXTURE):
        x = noisy(data, schedule)
        got = log_likelihood(make(data, schedule), x, 257, data.log_prob)
        np.testing.assert_allclose(got, data.log_prob(x, *low(schedule)), atol=1e-6)


def test_without_a_prior_of_its_own_it_is_the_samplers(x64):
    "Exact where α(T) = 0; elsewhere as far off as the noise it starts from is."
    for schedule, tolerance in ((SOME["cosine-zero-snr"], 1e-6), (EDM, 3e-3)):
        x = noisy(MIXTURE, schedule)
        np.testing.assert_allclose(log_likelihood(make(MIXTURE, schedule), x, 129), MIXTURE.log_prob(x, *low(schedule)), atol=tolerance)
    x = noisy(GAUSSIAN, EDM)
    x_T, change = to_noise(make(GAUSSIAN, EDM), x, 33)
    by_hand = change - jnp.sum(x_T ** 2, 1) / (2 * 80 ** 2) - 1.5 * np.log(2 * np.pi * 80 ** 2)
    np.testing.assert_allclose(log_likelihood(make(GAUSSIAN, EDM), x, 33), by_hand, rtol=1e-12)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize("frame", ["sigma", "angle", "lambda"])
def test_order(method, order, frame, x64):
    "Pieces of 16 steps, each compiled once, on a range without the steep ends."
    sampler, x = make(MIXTURE, COSINE), jnp.linspace(-1.2, 1.2, 5)[:, None]
    rates = [(COSINE.alpha(t), COSINE.sigma(t)) for t in (0.12, 0.9)]
    def error(n):
        now, log_p, times = x, MIXTURE.log_prob(x, *rates[0]), np.linspace(0.12, 0.9, n + 1)
        for i in range(0, n, 16):
            now, change = to_noise(sampler, now, times[i:i + 17][::-1], method=method, frame=frame)
            log_p = log_p - change
        return jnp.abs(log_p - MIXTURE.log_prob(now, *rates[1])).max()
    assert abs(np.log2(error(128) / error(256)) - order) < 0.15


def test_predictors_and_solvers_agree(x64):
    x = noisy(MIXTURE, EDM)
    want = log_likelihood(make(MIXTURE, EDM), x, 17)
    for predictor in PREDICTORS.values():
        np.testing.assert_allclose(log_likelihood(make(MIXTURE, EDM, predictor), x, 17), want, rtol=1e-8)
    solver = RK4Sampler(ExactModel(MIXTURE, EDM, V), {}, EDM, V, frame="angle")  # its frame is its own affair
    np.testing.assert_allclose(log_likelihood(solver, x, 17), want, rtol=1e-12)


def test_a_denoiser_alone_will_do(x64):
    "A `Denoiser`, a function that carries its schedule, and a sampler of a function that does not."
    x = noisy(MIXTURE, EDM)
    sampler = make(MIXTURE, EDM)
    denoiser = Denoiser(ExactModel(MIXTURE, EDM, V), {}, EDM, V)
    def function(x, t, conditioning=()): return denoiser(x, t, conditioning)
    def carries(x, t, conditioning=()): return denoiser(x, t, conditioning)
    carries.noise_schedule = EDM
    for f in (lambda d: log_likelihood(d, x, 17), lambda d: variational_bound(d, x, 17, rng=0).total):
        for other in (denoiser, carries, EulerSampler(function, noise_schedule=EDM)):
            np.testing.assert_allclose(f(other), f(sampler), rtol=1e-12)


class Million:
    "A network of a million parameters, in an array of a shape that nothing else has."
    shape = (1009, 1013)
    def apply(self, params, x, temb): return jnp.tanh(x * jnp.sum(params["w"][0]))


def test_no_parameters_stay_alive():
    "Three networks are priced and let go: nothing in the process holds on to their weights."
    def alive(): return sum(a.shape == Million.shape for a in jax.live_arrays())
    def price(denoiser):
        x = jnp.ones((2, 2))
        return log_likelihood(denoiser, x, 5).sum() + variational_bound(denoiser, x, 5, rng=0).total.sum()
    for seed in range(3):
        params = {"w": jax.random.normal(jax.random.PRNGKey(seed), Million.shape)}
        sampler, denoiser = EulerSampler(Million(), params, EDM, V), Denoiser(Million(), params, EDM, V)
        assert np.isfinite(price(sampler) + price(denoiser)) and alive() == 1
        del sampler, denoiser, params
        gc.collect()
        assert alive() == 0


def test_rng_is_the_name_of_the_key():
    x = jnp.ones((2, 3))
    sampler = make(GAUSSIAN, EDM)
    for f in (lambda **k: to_noise(sampler, x, 5, probes=1, gaussian=True, **k)[1], lambda **k: variational_bound(sampler, x, 5, **k).total):
        np.testing.assert_array_equal(f(rng=3), f(key=3))
        assert np.any(f(rng=3) != f(rng=4))
        with pytest.raises(ValueError, match="rng"): f(rng=3, key=3)


def test_pixels_add_up_and_neighbours_do_not_matter(x64):
    "A mixture in 1 dimension takes every pixel for itself."
    x = noisy(MIXTURE, COSINE, 12).reshape(3, 2, 2, 1)
    sampler = make(MIXTURE, COSINE)
    each = log_likelihood(sampler, x.reshape(12, 1, 1, 1), 9)
    together = log_likelihood(sampler, x, 9)
    np.testing.assert_allclose(together, each.reshape(3, 4).sum(1), rtol=1e-10)
    np.testing.assert_allclose(log_likelihood(sampler, x[:2], 9), together[:2], rtol=1e-10)
    few, many = (log_likelihood(sampler, v, 9, probes=3, key=5, gaussian=True) for v in (x[:2], x))
    np.testing.assert_allclose(few, many[:2], rtol=1e-10)


def test_hutchinson_is_unbiased_and_averages_out(x64):
    x = jnp.repeat(noisy(GAUSSIAN, EDM, 1), 4096, 0)
    sampler = make(GAUSSIAN, EDM)
    exact = log_likelihood(sampler, x[:1], 9)[0]
    for gaussian in (False, True):
        one = np.asarray(log_likelihood(sampler, x, 9, probes=1, key=0, gaussian=gaussian)) - exact
        four = np.asarray(log_likelihood(sampler, x[:1024], 9, probes=4, key=1, gaussian=gaussian)) - exact
        assert abs(one.mean()) < 4 * one.std() / 64 and abs(four.std() / one.std() - 0.5) < 0.1
    # signs make no noise of the diagonal: pixels that do not mix are exact with one probe
    x = noisy(MIXTURE, LINEAR, 8).reshape(2, 2, 2, 1)
    np.testing.assert_allclose(log_likelihood(make(MIXTURE, LINEAR), x, 9, probes=1, key=3), log_likelihood(make(MIXTURE, LINEAR), x, 9), rtol=1e-12)


def test_up_and_down_again(x64):
    "The noise an image came from: sampling from it finds the image."
    x = noisy(MIXTURE, COSINE)
    x_T, _ = to_noise(make(MIXTURE, COSINE), x, 101)
    back = RK4Sampler(ExactModel(MIXTURE, COSINE, V), {}, COSINE, V)
    np.testing.assert_allclose(back.sample(x_T, back.make_steps(101), 0, denoise_final=False), x, atol=2e-6)


def test_one_scan_and_no_second_trace():
    model = Wave()
    sampler = EulerSampler(model, Wave.params, EDM, V)
    x = jnp.ones((2, 2, 2, 1))
    ask = lambda seed: (log_likelihood(sampler, x, 9, probes=2, key=seed, gaussian=True), variational_bound(sampler, x, 9, key=seed).total)
    first, traces = ask(0), model.traces
    second = ask(1)
    assert model.traces == traces > 0 and all(np.any(a != b) and a.dtype == jnp.float32 for a, b in zip(first, second))
    sampler.params = {"w": np.float32(-0.3)}
    assert np.any(ask(0)[0] != first[0]) and model.traces == traces
    for f in (lambda x: to_noise(sampler, x, 9), lambda x: variational_bound(sampler, x, 9, key=0)):
        assert len([e for e in equations(jax.make_jaxpr(f)(x)) if e.primitive.name == "scan" and e.params["length"] == 8]) == 1


def test_bits():
    "A model that knows nothing pays log₂ of the number of grey values."
    for values in (256, 17):
        step = 2 / (values - 1)
        nothing = np.full(3, -12 * np.log(values * step))  # the uniform density over all cells
        np.testing.assert_allclose(bits_per_dim(nothing, (2, 2, 3), step), np.log2(values), rtol=1e-12)
    assert bits_per_dim(0.0, (4, 4, 1)) == pytest.approx(np.log2(127.5))
    assert bits_per_dim(-np.log(2) * 16, (4, 4, 1), 1) == pytest.approx(1)
    with pytest.raises(ValueError, match="step"): bits_per_dim(0.0, (1,), 0)


def test_dequantised_values_stay_in_their_cell():
    images = jnp.round(jnp.linspace(0, 255, 40000)).reshape(100, 20, 20, 1) / 127.5 - 1
    noise = np.asarray(dequantise(images, 0) - images) * 127.5
    assert np.abs(noise).max() <= 0.5 + 1e-4 and abs(noise.mean()) < 4 * 12 ** -0.5 / 200 and abs(noise.var() * 12 - 1) < 0.03


@over(schedule={"EDM": EDM, "linear": LINEAR, "cosine-zero-snr": SOME["cosine-zero-snr"]})
def test_bound_by_hand(schedule, x64):
    "Gaussian data in 1 dimension: E|x₀ - x̂₀|² in closed form, each part of the bound."
    mean, v, n = 0.3, 0.25, 20000
    x0, times = jnp.full((n, 1), 0.9), make(MIXTURE, schedule).make_steps(40)
    a, s = (np.asarray(f(times)) for f in (schedule.alpha, schedule.sigma))
    d = a * v / (a ** 2 * v + s ** 2)
    terms = 0.5 * np.diff((a / s) ** 2) * ((1 - a * d) ** 2 * (0.9 - mean) ** 2 + s ** 2 * d ** 2)[:-1]
    std2 = s[0] ** 2 if schedule.variance_exploding else a[0] ** 2 + s[0] ** 2
    b = variational_bound(make(Gaussian([mean], [v]), schedule), x0, 40, key=0)
    assert isinstance(b, VariationalBound) and all(part.shape == (n,) for part in b)
    np.testing.assert_allclose(b.prior, 0.5 * ((a[0] ** 2 * 0.81 + s[0] ** 2) / std2 - 1 - np.log(s[0] ** 2 / std2)), atol=1e-12)
    np.testing.assert_allclose(b.reconstruction, 0.5 * (1 + np.log(2 * np.pi * (s[-1] / a[-1]) ** 2)), rtol=1e-9)
    assert abs(b.diffusion.mean() - terms.sum()) < 4 * b.diffusion.std() / np.sqrt(n)
    assert b.total.mean() > -Gaussian([mean], [v]).log_prob(x0[:1])[0]
    np.testing.assert_array_equal(b.total[:3], variational_bound(make(Gaussian([mean], [v]), schedule), x0[:3], 40, key=0).total)


def test_bound_closes_and_forgets_the_schedule(x64):
    "With infinitely many levels it is -log p, and the same for two schedules with the same ends."
    x0 = jnp.asarray(GAUSSIAN.sample(jax.random.PRNGKey(3), 4000))
    truth = -GAUSSIAN.log_prob(x0)
    ends = np.exp(-np.asarray(LINEAR.log_snr(jnp.array([1.0, 1000.0]))) / 2)
    ramp = KarrasVENoiseScheduler(1, sigma_min=ends[0], sigma_max=ends[1])
    for schedule in (LINEAR, ramp):
        times = lambda_grid(schedule, schedule.max_timesteps, schedule.min_time, 48)
        b = variational_bound(make(GAUSSIAN, schedule), x0, times, key=0, continuous=True)
        gap = np.asarray(b.total - truth)
        assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap)) + 3e-3
        finite = np.asarray(variational_bound(make(GAUSSIAN, schedule), x0, times, key=0).total - truth)
        assert finite.mean() > 10 * finite.std() / np.sqrt(len(finite))


def test_bound_of_a_discrete_picture(x64):
    "A coin in one pixel costs log 2, whichever side is up; more draws, less noise."
    coin, grid = FiniteDataset([[-1.0], [1.0]]), lambda_grid(COSINE, 1.0, 0.05, 200)
    b = variational_bound(make(coin, COSINE), jnp.array([[-1.0], [1.0]] * 500), grid, key=0, step=2)
    assert np.log(2) < b.total.mean() < np.log(2) + 0.05
    assert np.all(np.asarray(b.reconstruction) > -1e-12)
    one, nine = (np.asarray(variational_bound(make(coin, COSINE), jnp.ones((800, 1)), grid[::10], key=0, draws=k).diffusion).std() for k in (1, 9))
    assert abs(nine / one - 1 / 3) < 0.08


def test_bad_requests_are_refused():
    sampler, x = make(MIXTURE, EDM), jnp.ones((2, 1))
    for f in (to_noise, log_likelihood, variational_bound):
        with pytest.raises(ValueError, match="sampler"): f(EDM, x)
        with pytest.raises(ValueError, match="x"): f(sampler, jnp.ones((2, 1), int))
        with pytest.raises(ValueError, match="diffusion_steps|steps"): f(sampler, x, 0)
        with pytest.raises(ValueError, match="steps"): f(sampler, x, [0.2, 0.7])
    for kwargs, name in ((dict(method="rk5"), "method"), (dict(frame="t"), "frame"), (dict(probes=0), "probes"), (dict(probes=1, key="a"), "rng"),
                         (dict(frame=DataFrame()), "frame"), (dict(gaussian="no"), "gaussian"), (dict(conditioning=3), "conditioning")):
        with pytest.raises(ValueError, match=name): to_noise(sampler, x, 3, **kwargs)
    with pytest.raises(ValueError, match="images"): dequantise(np.zeros((2, 2), np.uint8), 0)
    with pytest.raises(ValueError, match="step"): dequantise(jnp.zeros((2, 2)), 0, step=0)
    for kwargs, name in ((dict(draws=0), "draws"), (dict(continuous="no"), "continuous"), (dict(step=0.3), "step"), (dict(step=0), "step")):
        with pytest.raises(ValueError, match=name): variational_bound(sampler, x, 3, **kwargs)


def test_every_public_name_is_reached():
    parts = {"denoiser_and_schedule", "falling_times", "random_key", "runge_kutta_step", "probability_flow", "diffusion_loss", "prior_loss", "reconstruction_loss"}
    programs = {"flow_programs", "diffusion_programs"}
    assert set(likelihood.__all__) <= parts | programs | {"METHODS", "VariationalBound", "bits_per_dim", "dequantise", "divergence", "log_likelihood", "to_noise",
                                                          "variational_bound"}
