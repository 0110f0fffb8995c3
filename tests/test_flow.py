"""Flow matching beyond the laws that every schedule and predictor is under: exact numbers, the shift, the densities of training."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flaxdiff import samplers, trainer
from flaxdiff.cli.settings import CHOICES, check_config, make_config
from flaxdiff.cli.train import make_process
from flaxdiff.exact import Gaussian
from flaxdiff.losses import plain_weight
from flaxdiff.predictors import EpsilonPredictor, FlowPredictor, VPredictor
from flaxdiff.samplers import EulerSampler, HeunSampler, trailing_grid
from flaxdiff.schedulers import CosineContinuousNoiseScheduler, EDMNoiseScheduler, FlowNoiseScheduler
from flaxdiff.schedulers.flow import resolution_shift
from flaxdiff.sde import diffusion_squared, drift
from laws import MIXTURE, SAMPLER_CLASSES, WAVE, Wave, exact_sampler, over, wave_sampler, x64

FLOW, ROW, HALF = FlowNoiseScheduler(), FlowPredictor(), Gaussian([0.0], [0.25])
SHIFTS = (1.0, 3.0, 1.7, 0.3, 1 / 3, 57.1)


# The process

@pytest.mark.parametrize("k", SHIFTS)
def test_both_ends_are_exact(k):
    "Not to rounding: α(T) = 0 is what makes samplers leave pure noise as they must."
    for T in (1, 0.3, 1000):
        schedule = FlowNoiseScheduler(T, shift=k)
        assert schedule.alpha(0) == schedule.sigma(T) == 1 and schedule.alpha(T) == schedule.sigma(0) == 0
        assert schedule.get_timesteps(0.0) == 0 and schedule.get_timesteps(np.inf) == np.float32(T) and schedule.log_snr(T) == -np.inf
        assert schedule.min_time == 1e-3 * T and schedule.sigma(schedule.min_time) > 0


def test_the_line(x64):
    t = np.linspace(0, 1, 101)
    np.testing.assert_allclose(FLOW.alpha(t), 1 - t, rtol=0, atol=1e-16)
    np.testing.assert_allclose(FLOW.sigma(t), t, rtol=1e-15)
    inner = t[1:-1]
    np.testing.assert_allclose(drift(FLOW, inner), -1 / (1 - inner), rtol=1e-12)
    np.testing.assert_allclose(diffusion_squared(FLOW, inner), 2 * inner / (1 - inner), rtol=1e-12)
    tiny = np.geomspace(1e-30, 1e30, 13)
    np.testing.assert_allclose(FLOW.get_timesteps(tiny)[:7], tiny[:7] / (1 + tiny[:7]), rtol=1e-14)


@pytest.mark.parametrize("k", SHIFTS)
def test_shift(k, x64):
    "t → k t/(1 + (k-1) t) (Esser et al. 2024, eq. 23): σ/α times k; and the network is told the noise."
    t = np.linspace(0, 1, 101)
    for T in (1, 1000.0):
        schedule = FlowNoiseScheduler(T, shift=k)
        moved = k * t / (1 + (k - 1) * t)
        np.testing.assert_allclose(schedule.sigma(t * T), moved, rtol=1e-13)
        np.testing.assert_allclose(schedule.alpha(t * T), FLOW.alpha(moved), rtol=1e-11, atol=1e-15)
        np.testing.assert_allclose(schedule.network_time(t * T), 1000 * moved, rtol=1e-13)
        np.testing.assert_allclose(schedule.log_snr(t[1:-1] * T), FLOW.log_snr(t[1:-1]) - 2 * np.log(k), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(FLOW.network_time(np.array([0.0, 0.25, 1.0])), [0, 250, 1000])


def test_resolution_shift():
    assert resolution_shift(1024 ** 2, 256 ** 2) == 4 and resolution_shift(64, 64.0) == 1 and resolution_shift(16, 64) == 0.5
    for bad in (0, -1, np.nan, np.inf, "4", True, None):
        with pytest.raises(ValueError, match="^pixels must"): resolution_shift(bad, 4)
        with pytest.raises(ValueError, match="base_pixels must"): resolution_shift(4, bad)


# The density of training

def kolmogorov(sample, cdf): return stats.kstest(np.asarray(sample, np.float64), cdf).statistic * np.sqrt(len(sample))


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.6), (1.0, 2.0)])
def test_logit_normal(mean, std):
    "log(t/(T-t)) is normal, whatever T and the shift are; then ln(σ/α) is, log k further up."
    for T, k in ((1, 1.0), (1000, 3.0)):
        schedule = FlowNoiseScheduler(T, k, density="logit_normal", mean=mean, std=std)
        t = np.asarray(schedule.sample_timesteps(jax.random.PRNGKey(0), 20_000), np.float64)
        assert kolmogorov(np.log(t / (T - t)), stats.norm(mean, std).cdf) < 1.95
        assert kolmogorov(-np.asarray(schedule.log_snr(t)) / 2, stats.norm(mean + np.log(k), std).cdf) < 1.95


def test_logit_normal_is_edms_density(x64):
    key = jax.random.PRNGKey(1)
    flow, edm = FlowNoiseScheduler(density="logit_normal", mean=-1.2, std=1.2), EDMNoiseScheduler()
    np.testing.assert_allclose(np.exp(-flow.log_snr(flow.sample_timesteps(key, 1000)) / 2), edm.sigma(edm.sample_timesteps(key, 1000)), rtol=1e-9)


def test_uniform_times_are_never_without_noise():
    t = FLOW.sample_timesteps(jax.random.PRNGKey(0), 2 ** 20)
    assert t.min() > 0 and t.max() <= 1


def test_what_a_uniform_density_would_ignore_is_refused():
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match=f"{name} is for density='logit_normal'"): FlowNoiseScheduler(**{name: 0.5})
    for bad in ("normal", "", 0, ["uniform"]):
        with pytest.raises(ValueError, match="density must be one of uniform, logit_normal"): FlowNoiseScheduler(density=bad)


# The row

def test_the_row(x64):
    "F = ε - x₀; x̂₀ = x_t - t F, ε̂ = x_t + (1-t) F; its squared error is x₀'s over t²."
    x0, eps = np.random.default_rng(0).normal(size=(2, 5, 3))
    t = np.linspace(0.05, 1, 5)[:, None]
    xt, F = (1 - t) * x0 + t * eps, eps - x0
    np.testing.assert_allclose(ROW.get_target(x0, eps, 1 - t, t), F, rtol=1e-15)
    np.testing.assert_allclose(ROW.decode(xt, F + 0.1, 1 - t, t), (xt - t * (F + 0.1), xt + (1 - t) * (F + 0.1)), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(plain_weight(ROW)(1 - t, t), 1 / t ** 2, rtol=1e-13)
    assert np.all(ROW.get_input_scale(1 - t, t) == 1) and np.all(ROW.determinant(1 - t, t) == 1)


def test_uniform_flow_matching_is_v_on_the_cosine(x64):
    "det²/α² times the density of log(σ/α) is e^ℓ for both, but for π/2 (Kingma & Gao 2023)."
    slope = jax.vmap(jax.grad(lambda t: -FLOW.log_snr(t) / 2))
    t = np.linspace(0.01, 0.99, 50)
    u = t / (1 - t)
    np.testing.assert_allclose((ROW.determinant(1 - t, t) / (1 - t)) ** 2 / slope(t), u, rtol=1e-11)
    theta = np.arctan(u)
    alpha, sigma = np.cos(theta), np.sin(theta)
    np.testing.assert_allclose((VPredictor().determinant(alpha, sigma) / alpha) ** 2 * (2 / np.pi) * sigma * alpha, 2 / np.pi * u, rtol=1e-12)


def test_epsilon_is_refused():
    for build in (lambda: EulerSampler(WAVE, WAVE.params, FLOW), lambda: trainer.DiffusionTrainer(WAVE, None, FLOW, model_output_transform=EpsilonPredictor())):
        with pytest.raises(ValueError, match="model_output_transform.*EpsilonPredictor"): build()


# Sampling

@pytest.mark.parametrize("N, due", [(4, 0.34054), (8, 0.41478), (16, 0.45568)])
def test_euler_on_a_gaussian(N, due, x64):
    "N uniform steps from t = 1 to 0 on data N(0, ¼)."
    sampler = exact_sampler(EulerSampler, FLOW, ROW, HALF)
    by_grid = sampler.make_steps(N, grid=trailing_grid)
    np.testing.assert_allclose(by_grid, np.linspace(1, 0, N + 1)[:-1], rtol=1e-15)
    std = float(sampler.sample(jnp.ones((1, 1)), by_grid, rng=0)[0, 0])
    t = 1 - np.arange(N) / N
    np.testing.assert_allclose(std, np.prod(1 - (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t ** 2) / N), rtol=1e-13)
    assert abs(std - due) < 5e-6


def test_euler_is_the_straight_step(x64):
    "x + (s - t) F, whatever F is; from pure noise too."
    sampler = wave_sampler(EulerSampler, FLOW, ROW)
    x = np.random.default_rng(0).normal(size=(3, 4))
    for t, s in ((1.0, 0.3), (0.6, 0.5)):
        want = x + (s - t) * WAVE.apply(Wave.params, x, jnp.full(3, 1000 * t))
        np.testing.assert_allclose(sampler.sample(x, [t, s], rng=0, denoise_final=False), want, rtol=1e-12)


def test_only_the_levels_count(x64):
    "Euler on the line and on the cosine, through the same σ/α, from the same noise."
    t, cosine = np.linspace(0.99, 0.01, 9), CosineContinuousNoiseScheduler()
    times, eps = np.asarray(cosine.get_timesteps(t / (1 - t))), np.random.default_rng(0).normal(size=(20, 1))
    ends = [exact_sampler(EulerSampler, schedule, ROW).sample(eps * schedule.sigma(steps[0]), steps, rng=0) for schedule, steps in ((FLOW, t), (cosine, times))]
    np.testing.assert_allclose(*ends, rtol=1e-11, atol=1e-12)


def test_heun_converges_along_the_line(x64):
    "Order 2 from pure noise to the data, the first and last step of order 1 among them: on the mixture's exact map."
    sampler, x = exact_sampler(HeunSampler, FLOW, ROW), np.linspace(-2, 2, 9)[:, None]
    truth = np.asarray(MIXTURE.ode_solution(x, (0.0, 1.0), (1.0, 0.0)))
    errors = [np.abs(np.asarray(sampler.sample(x, sampler.make_steps(N, grid=trailing_grid), rng=0)) - truth).max() for N in (64, 128)]
    assert errors[0] / errors[1] > 3 and errors[1] < 1e-3, errors


@over(cls=SAMPLER_CLASSES)
def test_every_solver_walks_the_line(cls):
    "From pure noise, on a bent clock, to finite ends."
    x = jax.random.normal(jax.random.PRNGKey(0), (2, 2, 1))
    sampler = wave_sampler(cls, FlowNoiseScheduler(shift=3.0), ROW)
    assert np.all(np.isfinite(sampler.sample(x, sampler.make_steps(7), rng=0)))


# The command

def test_the_command_knows_both():
    schedule, predictor = make_process(make_config({"schedule": "flow", "predictor": "flow"}))
    assert type(schedule) is FlowNoiseScheduler and type(predictor) is FlowPredictor
    for predictor in set(CHOICES["predictor"]) - {"epsilon"}: check_config(make_config({"schedule": "flow", "predictor": predictor}))
