"""Laws of the data whose denoiser is known: Bayes, Tweedie and the ODE must all say the same."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from flaxdiff.exact import ExactModel, FiniteDataset, Gaussian, GaussianMixture
from laws import MIXTURE, PREDICTORS, SCHEDULES, over, x64

PAIRS = [(1.0, 0.3), (0.8, 0.6), (0.1, 0.995), (1.0, 20.0)]
COV = np.array([[1.0, 0.6, 0.0], [0.6, 0.5, 0.1], [0.0, 0.1, 0.2]])
GAUSSIAN = Gaussian([0.3, -0.2, 1.0], COV)
WIDE = GaussianMixture([[0.5, -1.0], [-0.3, 0.2], [1.0, 1.0]], [0.2, 0.4, 0.1], [0.2, 0.5, 0.3])
POINTS = FiniteDataset([[0.0, 1.0], [1.0, 0.5], [-1.0, -1.0], [0.2, 0.1]])
DATA = {"gaussian": (GAUSSIAN, 3), "mixture": (WIDE, 2), "points": (POINTS, 2), "line": (MIXTURE, 1)}


def noisy(data, D, alpha, sigma, n=7):
    rng = np.random.default_rng(0)
    return alpha * np.asarray(data.sample(jax.random.PRNGKey(0), n), np.float64).reshape(n, D) + sigma * rng.normal(size=(n, D))


@pytest.mark.parametrize("alpha, sigma", PAIRS[1:3])
@over(which=DATA)
def test_denoiser_is_tweedies(which, alpha, sigma, x64):
    "E[x₀ | x] = (x + σ² ∇ log p(x)) / α."
    data, D = which
    x = noisy(data, D, alpha, sigma)
    score = jax.jit(jax.vmap(jax.grad(lambda v: data.log_prob(v[None], alpha, sigma)[0])))(x)
    np.testing.assert_allclose(data.denoise(jnp.asarray(x), alpha, sigma), (x + sigma ** 2 * score) / alpha, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha, sigma", PAIRS)
def test_denoiser_is_the_mean_over_everything(alpha, sigma, x64):
    "Bayes, summed over the examples, or over a fine grid of x₀."
    x = noisy(POINTS, 2, alpha, sigma)
    log_w = -((x[:, None] - alpha * POINTS.means) ** 2).sum(-1) / (2 * sigma ** 2)
    w = np.exp(log_w - log_w.max(1, keepdims=True))
    np.testing.assert_allclose(POINTS.denoise(jnp.asarray(x), alpha, sigma), w @ POINTS.means / w.sum(1, keepdims=True), rtol=1e-9, atol=1e-12)
    x, x0 = noisy(MIXTURE, 1, alpha, sigma), np.linspace(-4, 4, 80001)
    prior = sum(w * stats.norm(m, s).pdf(x0) for w, m, s in zip(MIXTURE.weights, MIXTURE.means[:, 0], MIXTURE.stds))
    w = prior * np.exp(-(x - alpha * x0) ** 2 / (2 * sigma ** 2))
    np.testing.assert_allclose(MIXTURE.denoise(jnp.asarray(x), alpha, sigma)[:, 0], (w @ x0) / w.sum(1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alpha, sigma", PAIRS)
def test_densities(alpha, sigma, x64):
    x = noisy(GAUSSIAN, 3, alpha, sigma)
    want = stats.multivariate_normal(alpha * GAUSSIAN.mean, alpha ** 2 * COV + sigma ** 2 * np.eye(3)).logpdf(x)
    np.testing.assert_allclose(GAUSSIAN.log_prob(jnp.asarray(x), alpha, sigma), want, rtol=1e-10)
    x = noisy(WIDE, 2, alpha, sigma)
    want = np.log(sum(w * stats.multivariate_normal(alpha * m, (alpha ** 2 * s ** 2 + sigma ** 2) * np.eye(2)).pdf(x)
                      for w, m, s in zip(WIDE.weights, WIDE.means, WIDE.stds)))
    np.testing.assert_allclose(WIDE.log_prob(jnp.asarray(x), alpha, sigma), want, rtol=1e-10)
    x = noisy(MIXTURE, 1, alpha, sigma)
    low, high = MIXTURE.log_tails(jnp.asarray(x), alpha, sigma)
    want = sum(w * stats.norm(alpha * m, np.hypot(alpha * s, sigma)).cdf(x) for w, m, s in zip(MIXTURE.weights, MIXTURE.means[:, 0], MIXTURE.stds))
    np.testing.assert_allclose(np.exp(low), want, rtol=1e-10)
    np.testing.assert_allclose(np.exp(low) + np.exp(high), 1, rtol=1e-12)


@over(which={"gaussian": (Gaussian([0.4], [0.3]), 1), "line": (MIXTURE, 1)})
def test_ode_solution_solves_the_ode(which, x64):
    "dy/du = ε̂ in y = x/α, u = σ/α, by SciPy; forwards, backwards, and through a change of α."
    data, _ = which
    def slope(u, y): return (y - np.asarray(data.denoise(jnp.asarray(y)[:, None], 1.0, u))[:, 0]) / u
    x, (a0, s0), (a1, s1) = np.array([-1.5, -0.2, 0.1, 0.9]), (0.2, 0.98), (0.95, 0.3122499)
    solved = integrate.solve_ivp(slope, (s0 / a0, s1 / a1), x / a0, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1] * a1
    exact = data.ode_solution(jnp.asarray(x)[:, None], (a0, s0), (a1, s1))
    np.testing.assert_allclose(exact[:, 0], solved, rtol=1e-8)
    np.testing.assert_allclose(data.ode_solution(exact, (a1, s1), (a0, s0))[:, 0], x, rtol=1e-10)


def test_ode_solution_of_a_full_covariance(x64):
    x, start, end = noisy(GAUSSIAN, 3, 0.3, 0.9), (0.3, 0.9), (0.9, 0.4)
    def slope(u, y): return ((y.reshape(7, 3) - np.asarray(GAUSSIAN.denoise(jnp.asarray(y.reshape(7, 3)), 1.0, u))) / u).ravel()
    solved = integrate.solve_ivp(slope, (3.0, 4 / 9), x.ravel() / 0.3, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1].reshape(7, 3) * 0.9
    np.testing.assert_allclose(GAUSSIAN.ode_solution(jnp.asarray(x), start, end), solved, rtol=1e-8, atol=1e-9)


def test_ode_solution_keeps_both_tails(x64):
    x = jnp.array([-30.0, -8.0, 8.0, 30.0])
    back = MIXTURE.ode_solution(MIXTURE.ode_solution(x, (1.0, 5.0), (1.0, 0.1)), (1.0, 0.1), (1.0, 5.0))
    np.testing.assert_allclose(back, x, rtol=1e-9)


@over(which=DATA)
def test_samples_have_the_moments(which):
    data, D = which
    n = 100_000
    x = np.asarray(data.sample(jax.random.PRNGKey(1), n), np.float64)
    assert x.shape == (n, D)
    if isinstance(data, Gaussian): mean, cov = data.mean, COV
    else:
        mean = data.weights @ data.means
        cov = np.einsum("k,ki,kj->ij", data.weights, data.means - mean, data.means - mean) + np.eye(D) * (data.weights @ data.stds ** 2)
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.sqrt(cov.max() / n))
    np.testing.assert_allclose(np.cov(x.T).reshape(D, D), cov, atol=5 * 2 * cov.max() / np.sqrt(n))


def test_one_point_is_always_the_answer(x64):
    x = np.random.default_rng(0).normal(size=(5, 2))
    for data in (FiniteDataset([[0.3, -0.4]]), Gaussian([0.3, -0.4], [0.0, 0.0])):
        for alpha, sigma in PAIRS:
            np.testing.assert_allclose(data.denoise(jnp.asarray(x), alpha, sigma), np.broadcast_to([0.3, -0.4], (5, 2)), rtol=1e-14)


def test_a_line_of_pixels_is_independent_pixels(x64):
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 1))
    whole = MIXTURE.denoise(jnp.asarray(x), np.array([1.0, 0.5, 0.9]), np.array([0.1, 0.5, 2.0]))
    for i, (a, s) in enumerate(((1.0, 0.1), (0.5, 0.5), (0.9, 2.0))):
        np.testing.assert_allclose(whole[i].reshape(-1, 1), MIXTURE.denoise(jnp.asarray(x[i].reshape(-1, 1)), a, s), rtol=1e-13)


def test_float32_survives_the_ends():
    for data, D in DATA.values():
        for alpha, sigma in ((1.0, 1e-4), (1.0, 1000.0), (5e-5, 1.0)):
            x = jnp.asarray(noisy(data, D, alpha, sigma), jnp.float32)
            x0 = data.denoise(x, alpha, sigma)
            assert x0.dtype == jnp.float32 and np.all(np.isfinite(x0)) and np.abs(x0).max() < 10


@over(schedule=SCHEDULES, predictor=PREDICTORS)
def test_exact_model_answers_the_mean_of_the_targets(schedule, predictor, x64):
    model = ExactModel(WIDE, schedule, predictor, image_shape=(1, 2, 1))
    t = np.linspace(schedule.min_time, schedule.max_timesteps, 7)[1:-1]
    alpha, sigma = (np.asarray(v) for v in schedule.get_rates(t))
    x = np.random.default_rng(0).normal(size=(5, 1, 2, 1)) * np.hypot(alpha, sigma)
    F = model.apply(None, x * predictor.get_input_scale(alpha, sigma), schedule.network_time(t))
    want = np.stack([WIDE.denoise(jnp.asarray(x[i].reshape(1, 2)), alpha[i, 0, 0, 0], sigma[i, 0, 0, 0]) for i in range(5)]).reshape(x.shape)
    tolerance = 1e-10 * (1 + np.max(sigma / alpha) + np.max(alpha / sigma))
    np.testing.assert_allclose(predictor.decode(x, F, alpha, sigma)[0], want, atol=tolerance)
    assert model.image_shape == (1, 2, 1) and F.shape == x.shape and F.dtype == jnp.float64


def test_bad_arguments_are_refused():
    for build, name in ((lambda: Gaussian([0.0, 1.0], np.eye(3)), "cov"), (lambda: Gaussian([0.0], [-1.0]), "cov"),
                        (lambda: GaussianMixture([0.0], -1.0), "stds"), (lambda: GaussianMixture([0.0, 1.0], 1.0, [0.5, 0.6]), "weights"),
                        (lambda: GaussianMixture([0.0, 1.0], 1.0, [0.0, 1.0]), "weights"),
                        (lambda: WIDE.ode_solution(jnp.ones((2, 2)), (1, 1), (1, 0.5)), "dimension")):
        with pytest.raises(ValueError, match=name): build()
