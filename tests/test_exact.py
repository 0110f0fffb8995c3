"""Laws of the data whose denoiser is known: Bayes, Tweedie and the ODE must all say the same."""
import gc
import weakref

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


def refused(match, call, *args, **kwargs):
    with pytest.raises(ValueError, match=match): call(*args, **kwargs)


@pytest.mark.parametrize("bad", [np.nan, np.inf, "a"])
def test_numbers_that_are_none_are_refused(bad):
    "Each argument of each kind of data, by its own name."
    refused("^mean ", Gaussian, [0.0, bad], [1.0, 1.0])
    refused("^cov ", Gaussian, [0.0, 0.0], [1.0, bad])
    refused("^cov ", Gaussian, [0.0, 0.0], [[1.0, bad], [bad, 1.0]])
    refused("^means ", GaussianMixture, [0.0, bad], 1.0)
    refused("^stds ", GaussianMixture, [0.0, 1.0], [bad, 1.0])
    refused("^weights ", GaussianMixture, [0.0, 1.0], 1.0, [bad, 1.0])
    refused("^points ", FiniteDataset, [[0.0, bad]])


def test_data_of_no_shape_are_refused():
    refused("^cov must be symmetric", Gaussian, [0, 0], [[1, 5], [0, 1]])
    refused("^mean must have shape", Gaussian, [[0.0, 1.0]], [1.0])
    refused("^means must have shape", GaussianMixture, 0.0, 1.0)
    refused("^means must have shape", GaussianMixture, [[]], 1.0)
    refused("^stds must be", GaussianMixture, [0.0, 1.0], [1.0, 1.0, 1.0])
    refused("^points must", FiniteDataset, 3.0)
    rounded = np.float32(COV) @ np.float32(np.eye(3)) * (1 + 1e-7 * np.triu(np.ones((3, 3))))
    assert np.allclose(Gaussian([0, 0, 0], rounded).variances, GAUSSIAN.variances), "what rounding leaves is symmetric enough"


@over(which=DATA)
@pytest.mark.parametrize("method", ["denoise", "log_prob"])
def test_levels_and_points_that_do_not_fit_are_refused(which, method):
    data, D = which
    call, x = getattr(data, method), jnp.ones((4, D))
    refused("^x must be floating point", call, jnp.ones((4, D), int), 1.0, 0.5)
    if D > 1: refused("^x must have shape", call, jnp.ones((4, D + 1)), 1.0, 0.5)
    for name, levels in (("alpha", [(np.nan, 0.5), ("a", 0.5), (np.ones(3), 0.5), (np.array([1, 1, np.inf, 1]), 0.5)]),
                         ("sigma", [(1.0, np.nan), (1.0, np.inf), (1.0, -0.5), (1.0, np.ones(3)), (0.0, 0.0), (1.0, np.full(4, np.nan))])):
        for level in levels: refused(f"^{name} must", call, x, *level)
    assert np.all(np.isfinite(call(x, np.ones(4), np.ones((4, 1))))), "one number for each image, however it is shaped"
    np.testing.assert_allclose(call(x, np.ones(4), np.full(4, 0.5)), call(x, 1.0, 0.5), rtol=1e-6)
    jax.jit(call)(x, np.nan, np.nan)  # traced values cannot be looked at
    refused("^alpha must", jax.jit(call), x, np.ones(3), 0.5)


def test_no_noise_where_the_data_have_no_width_is_refused():
    flat, x = Gaussian([0.0, 0.0], [1.0, 0.0]), jnp.ones((1, 2))
    for data in (flat, POINTS, GaussianMixture([[0.0, 0.0], [1.0, 1.0]], [0.0, 1.0])):
        for call in (data.denoise, data.log_prob):
            for sigma in (0.0, 1e-30): refused("^sigma must leave x_t a width", call, x, 1.0, sigma)  # its square is 0 in float32
    refused("^sigma must leave", FiniteDataset([0.0, 1.0]).ode_solution, x, (1.0, 0.0), (1.0, 1.0))
    refused("^sigma must leave", flat.ode_solution, x, (1.0, 0.0), (1.0, 1.0))
    for data in (WIDE, Gaussian([0.0, 0.0], [1.0, 1.0])):
        assert np.all(np.isfinite(data.denoise(x, 1.0, 0.0))) and np.isfinite(data.log_prob(x)).all()


def test_tails_of_points_without_noise_are_counts():
    "P(X ≤ x) of three equal points at, between and beyond them; the path ends on a point."
    low, high = FiniteDataset([0.0, 1.0, 2.0]).log_tails(jnp.array([-1.0, 0.0, 0.5, 2.0]))
    np.testing.assert_allclose(np.exp(low), [0, 1 / 3, 1 / 3, 1], atol=1e-6)
    np.testing.assert_allclose(np.exp(high), [1, 2 / 3, 2 / 3, 0], atol=1e-6)
    end = FiniteDataset([-1.0, 1.0]).ode_solution(jnp.array([-3.0, -0.1, 0.2, 4.0]), (1.0, 3.0), (1.0, 0.0))
    np.testing.assert_allclose(end, [-1, -1, 1, 1], atol=1e-5)


@over(which={"gaussian": Gaussian([0.4], [0.3]), "line": MIXTURE})
def test_paths_that_do_not_fit_are_refused(which):
    x, ok = jnp.ones((3, 1)), (1.0, 0.5)
    for bad in ((1.0, np.nan), (np.inf, 1.0), (1.0, -1.0), (1.0,), 1.0, (1.0, 0.5, 0.2), (np.ones(3), 1.0)):
        refused("start", which.ode_solution, x, bad, ok)
        refused("end", which.ode_solution, x, ok, bad)
    refused("^x must", which.ode_solution, jnp.ones((3, 1), int), ok, ok)
    traced = jax.jit(lambda alpha, sigma: which.ode_solution(x, (alpha, sigma), ok))(1.0, 2.0)
    np.testing.assert_allclose(traced, which.ode_solution(x, (1.0, 2.0), ok), rtol=1e-5)
    for n in (2.5, -1, "3", True): refused("^n must", which.sample, jax.random.PRNGKey(0), n)
    assert which.sample(jax.random.PRNGKey(0), np.int64(3)).shape == (3, 1) and which.sample(jax.random.PRNGKey(0), 0).shape == (0, 1)


def test_a_line_alone_has_tails():
    for n in (0, -1, 2.5): refused("^iterations must", MIXTURE.ode_solution, jnp.ones(3), (1.0, 1.0), (1.0, 0.5), n)
    refused("dimension", WIDE.log_tails, jnp.ones((2, 2)))
    for level in ((np.nan, 1.0), (1.0, -1.0), (np.ones(2), 1.0)): refused("log_tails", MIXTURE.log_tails, jnp.ones(2), *level)


def test_ode_solution_lets_go_of_its_data():
    "Nothing of a mixture stays alive after it: no object, no array more with each."
    def one(seed):
        data = GaussianMixture(np.random.default_rng(seed).normal(size=50), 0.1)
        data.ode_solution(jnp.ones(3), (1.0, 1.0), (1.0, 0.5)).block_until_ready()
        return weakref.ref(data)
    seen, counts = [], []
    for seed in range(3):
        seen.append(one(seed))
        gc.collect()
        counts.append(len(jax.live_arrays()))
    assert [ref() for ref in seen] == [None] * 3 and counts[0] == counts[1] == counts[2]


def test_exact_model_refuses_what_is_no_process_no_predictor_and_no_picture():
    schedule, predictor = SCHEDULES["EDMNoiseScheduler"], PREDICTORS["VPredictor"]
    for args, name in (((WIDE.denoise, schedule, predictor), "data"), ((GaussianMixture, schedule, predictor), "data"),
                       ((WIDE, predictor, predictor), "noise_schedule"), ((WIDE, type(schedule), predictor), "noise_schedule"), ((WIDE, 3, predictor), "noise_schedule"),
                       ((WIDE, schedule, schedule), "predictor"), ((WIDE, schedule, type(predictor)), "predictor"), ((WIDE, schedule, None), "predictor"),
                       ((WIDE, schedule, predictor, (1, 2.5, 1)), "image_shape"), ((WIDE, schedule, predictor, "ab"), "image_shape"), ((WIDE, schedule, predictor, (1, 0)), "image_shape")):
        refused(f"^{name} must", ExactModel, *args)
    model, temb = ExactModel(WIDE, schedule, predictor), schedule.network_time(np.full(3, 0.5, np.float32))
    refused("^x must be floating point", model.apply, None, np.ones((3, 2), np.uint8), temb)
    refused("^temb must", model.apply, None, np.ones((3, 2), np.float32), temb[:2])
    refused("^temb must be finite", model.apply, None, np.ones((3, 2), np.float32), temb.at[0].set(jnp.nan))
    refused("^x must have shape", model.apply, None, np.ones((2, 3), np.float32), temb[:2])


def test_exact_model_is_the_same_compiled(x64):
    schedule = SCHEDULES["CosineContinuousNoiseScheduler"]
    x, temb = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 2, 1))), schedule.network_time(jnp.array([0.2, 0.5, 0.9]))
    for data in (WIDE, POINTS, Gaussian([0.3, -0.2], [[1.0, 0.6], [0.6, 0.5]])):
        model = ExactModel(data, schedule, PREDICTORS["VPredictor"])
        once, compiled = model.apply(None, x, temb), jax.jit(lambda x, temb: model.apply(None, x, temb))(x, temb)
        assert once.dtype == compiled.dtype == jnp.float64
        np.testing.assert_allclose(once, compiled, rtol=1e-12, atol=1e-13)


# Labels: a component of the mixture, asked for by its number

LABELLED = {"mixture": (WIDE, 2), "points": (POINTS, 2), "line": (MIXTURE, 1)}


@over(which=LABELLED)
@pytest.mark.parametrize("alpha, sigma", PAIRS[1:3])
def test_a_label_is_a_component(which, alpha, sigma, x64):
    "Component k alone is the mixture of it alone; K is the whole; Bayes' rule ties both to the classifier."
    data, D = which
    x, K = jnp.asarray(noisy(data, D, alpha, sigma)), len(data.weights)
    posterior = data.class_log_prob(x, alpha, sigma)
    assert posterior.shape == (7, K)
    for k in range(K):
        alone = GaussianMixture(data.means[k:k + 1], data.stds[k:k + 1])
        np.testing.assert_allclose(data.denoise(x, alpha, sigma, k), alone.denoise(x, alpha, sigma), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(data.log_prob(x, alpha, sigma, label=k), alone.log_prob(x, alpha, sigma), rtol=1e-12, atol=1e-12)
        bayes = np.log(data.weights[k]) + alone.log_prob(x, alpha, sigma) - data.log_prob(x, alpha, sigma)
        np.testing.assert_allclose(posterior[:, k], bayes, rtol=1e-10, atol=1e-12)
    for method in (data.denoise, data.log_prob):
        np.testing.assert_allclose(method(x, alpha, sigma, label=K), method(x, alpha, sigma), rtol=1e-13, atol=1e-14)
        each = np.arange(7) % (K + 1)
        want = np.stack([method(x[i:i + 1], alpha, sigma, label=int(k))[0] for i, k in enumerate(each)])
        np.testing.assert_allclose(method(x, alpha, sigma, label=each), want, rtol=1e-12, atol=1e-14)


@over(which=LABELLED)
def test_samples_of_a_label_are_of_its_component(which):
    data, _ = which
    K, n = len(data.weights), 4000
    for k in range(K):
        x = np.asarray(data.sample(jax.random.PRNGKey(0), n, label=k), np.float64)
        np.testing.assert_allclose(x.mean(0), data.means[k], atol=1e-6 + 5 * data.stds[k] / np.sqrt(n))
        np.testing.assert_allclose(x.std(0), data.stds[k], atol=1e-6 + 5 * data.stds[k] / np.sqrt(n))
    np.testing.assert_array_equal(data.sample(jax.random.PRNGKey(0), n, np.full(n, K)), data.sample(jax.random.PRNGKey(0), n))


def test_the_labels_of_pictures_are_those_of_their_pixels(x64):
    "With D = 1 every pixel is a draw of its own, of the picture's component."
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)))
    whole = MIXTURE.denoise(x, 0.8, 0.6, label=np.array([2, 0, 3]))
    for i, k in enumerate((2, 0, 3)):
        np.testing.assert_allclose(whole[i].reshape(-1, 1), MIXTURE.denoise(x[i].reshape(-1, 1), 0.8, 0.6, label=k), rtol=1e-13)


@over(which=LABELLED)
def test_labels_of_nothing_are_refused(which):
    data, D = which
    x, K = jnp.ones((4, D)), len(data.weights)
    calls = (lambda k: data.denoise(x, 1.0, 0.5, k), lambda k: data.log_prob(x, 1.0, 0.5, k), lambda k: data.sample(jax.random.PRNGKey(0), 4, k),
             lambda k: ExactModel(data, SCHEDULES["EDMNoiseScheduler"], PREDICTORS["VPredictor"]).apply(None, x, jnp.zeros(4), k))
    for call in calls:
        for bad in (K + 1, -1, 1.0, np.zeros(3, int), np.full(4, K + 1), "0", np.zeros(4)): refused("^label must", call, bad)
    assert np.isnan(jax.jit(lambda k: data.denoise(x, 1.0, 0.5, k))(K + 1)).all(), "unseen inside jit: NaN, as a network answers"


def test_exact_model_takes_labels(x64):
    schedule, predictor = SCHEDULES["CosineContinuousNoiseScheduler"], PREDICTORS["VPredictor"]
    model = ExactModel(WIDE, schedule, predictor)
    x, t, label = jnp.asarray(noisy(WIDE, 2, 0.8, 0.6)), np.full(7, 0.4), np.array([0, 1, 2, 3, 0, 1, 2])
    alpha, sigma = (np.asarray(v)[:, None] for v in (schedule.alpha(t), schedule.sigma(t)))
    F = model.apply(None, x, schedule.network_time(t), label=label)
    np.testing.assert_allclose(predictor.decode(x, F, alpha, sigma)[0], WIDE.denoise(x, alpha, sigma, label), atol=1e-10)
    assert {k: int(v) for k, v in model.null_condition.items()} == {"label": 3}
    np.testing.assert_array_equal(model.apply(None, x, schedule.network_time(t), label=np.full(7, 3)), model.apply(None, x, schedule.network_time(t)))
    assert ExactModel(GAUSSIAN, schedule, predictor).null_condition == {}
