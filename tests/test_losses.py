"""Laws of `flaxdiff.losses`: each published weight in every predictor's terms, finite at every level, the bound of a Gaussian, the loss by level."""
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest

from flaxdiff.exact import ExactModel, Gaussian
from flaxdiff.likelihood import variational_bound
from flaxdiff.losses import (LearnedUncertainty, diffusion_loss, edm_weight, elbo_weight, level_edges, log_snr_range, loss_by_level,
                             min_snr_weight, p2_weight, plain_weight, plot_loss_by_level, soft_min_snr_weight, uncertain_loss, uniform_log_snr)
from flaxdiff.predictors import EpsilonPredictor, KarrasEDMPredictor, VPredictor, X0Predictor
from flaxdiff.samplers import EulerSampler
from flaxdiff.schedulers import NoiseScheduler
from laws import ALL_SCHEDULES, EACH_KIND, PREDICTORS, SCHEDULES, decodable, ends_pure, over, x64

matplotlib.use("Agg")
LAMBDAS = np.linspace(-20, 20, 81)
SNR = np.exp(LAMBDAS)
EDM = SCHEDULES["EDMNoiseScheduler"]
WEIGHTS = {"edm": edm_weight(0.5), "p2": p2_weight(), "p2-strong": p2_weight(2.5, 0.3), "p2-weak": p2_weight(0.5), "p2-0": p2_weight(0),
           "min-snr": min_snr_weight(), "soft-min-snr": soft_min_snr_weight(), "elbo": elbo_weight(EDM)}


def vp(lam, dtype=np.float64): return tuple(jnp.asarray(np.sqrt(1 / (1 + np.exp(sign * lam))), dtype) for sign in (-1, 1))
def ve(lam, dtype=np.float64): return jnp.ones(lam.shape, dtype), jnp.asarray(np.exp(-lam / 2), dtype)


# the weight on x₀'s error as published, and its limits at SNR 0 and ∞: None where it grows for ever
PUBLISHED = {"edm": (lambda r: r + 4, 4, None), "p2": (lambda r: r / (1 + r), 0, 1), "p2-strong": (lambda r: r / (0.3 + r) ** 2.5, 0, 0),
             "p2-weak": (lambda r: r / (1 + r) ** 0.5, 0, None), "p2-0": (lambda r: r, 0, None), "min-snr": (lambda r: np.minimum(r, 5), 0, 5),
             "soft-min-snr": (lambda r: 5 * r / (r + 5), 0, 5), "elbo": (lambda r: r * np.diff(log_snr_range(EDM))[0] / 2, 0, None)}


@over(weight={name: name for name in WEIGHTS})
def test_weights_are_those_published(weight, x64):
    "A function of SNR alone, on VP and VE levels alike, with the right limits."
    formula, at_noise, at_data = PUBLISHED[weight]
    for rates in (vp, ve): np.testing.assert_allclose(WEIGHTS[weight](*rates(LAMBDAS)), formula(SNR), rtol=1e-6 if weight == "elbo" else 1e-12)
    far = WEIGHTS[weight](*vp(np.array([-60.0, 60.0])))
    np.testing.assert_allclose(far[0], at_noise, atol=1e-10)
    if at_data is not None: np.testing.assert_allclose(far[1], at_data, atol=1e-10)
    else: assert far[1] > 1e10


@over(EACH_KIND, schedule=ALL_SCHEDULES)
def test_finite_in_float32_at_every_level(schedule):
    "Weights and their slopes, from σ = 0.002 to α = 0."
    t = jnp.asarray(np.linspace(schedule.min_time, schedule.max_timesteps, 101), jnp.float32)
    own = elbo_weight(schedule)
    for weight in (*WEIGHTS.values(), own):
        value, slopes = jax.jit(lambda a, s: (weight(a, s), jax.grad(lambda *r: weight(*r).sum(), (0, 1))(a, s)))(schedule.alpha(t), schedule.sigma(t))
        assert value.dtype == jnp.float32 and value.shape == t.shape and np.all(np.isfinite(value)) and np.all(value >= 0)
        assert np.all(np.isfinite(slopes))


def test_float32_is_accurate():
    for name, (formula, *_) in PUBLISHED.items():
        for rates in (vp, ve):  # finite and right from e^-20 to e^20
            value = WEIGHTS[name](*rates(LAMBDAS, np.float32))
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(value, formula(SNR), rtol=2e-5)


DERIVED = {  # (weight, predictor): what stands before the plain loss
    ("min-snr", "ε"): lambda r: np.minimum(r, 5) / r, ("min-snr", "x₀"): lambda r: np.minimum(r, 5), ("min-snr", "v"): lambda r: np.minimum(r, 5) / (r + 1),
    ("min-snr", "EDM"): lambda r: np.minimum(r, 5) / (r + 4), ("p2", "ε"): lambda r: 1 / (1 + r), ("p2-strong", "ε"): lambda r: 1 / (0.3 + r) ** 2.5,
    ("p2", "v"): lambda r: r / (1 + r) ** 2, ("soft-min-snr", "ε"): lambda r: 5 / (r + 5), ("soft-min-snr", "v"): lambda r: 5 * r / ((r + 5) * (r + 1)),
    ("edm", "EDM"): lambda r: 1 + 0 * r, ("edm", "ε"): lambda r: (r + 4) / r, ("p2-0", "ε"): lambda r: 1 + 0 * r}
SHORT = {"ε": EpsilonPredictor(), "x₀": X0Predictor(), "v": VPredictor(), "EDM": KarrasEDMPredictor(0.5)}


@over(case={f"{w} on {p}": (w, p) for w, p in DERIVED})
def test_derived_forms_and_the_scale_of_the_gradient(case, x64):
    "A plain loss of 4 becomes 4 × the factor, and so does the gradient of a plain loss."
    lam = LAMBDAS[10:-10]
    r, (weight, predictor) = np.exp(lam), case
    F, target = jnp.full((len(lam), 2, 3), 2.0), jnp.zeros((len(lam), 2, 3))
    for rates in (vp, ve):
        factor = diffusion_loss(F, target, *rates(lam), SHORT[predictor], WEIGHTS[weight]) / 4
        np.testing.assert_allclose(factor, DERIVED[case](r), rtol=1e-9)
        slope = jax.grad(lambda F: diffusion_loss(F, target, *rates(lam), SHORT[predictor], WEIGHTS[weight]).sum())(F)
        np.testing.assert_allclose(slope[:, 0, 0], 2 * 2 / 6 * DERIVED[case](r), rtol=1e-9)


@over(schedule={name: ALL_SCHEDULES[name] for name in EACH_KIND}, predictor=PREDICTORS)
def test_loss_is_finite_at_both_ends(schedule, predictor):
    if not decodable(predictor, schedule): pytest.skip("refused there")
    t = jnp.asarray([schedule.min_time, schedule.max_timesteps], jnp.float32)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    F, target = jnp.ones((2, 4)), jnp.zeros((2, 4))
    for weight in WEIGHTS.values():
        loss, slope = jax.value_and_grad(lambda F: diffusion_loss(F, target, alpha, sigma, predictor, weight).sum())(F)
        assert np.isfinite(loss) and np.all(np.isfinite(slope))


def test_bad_options_are_refused():
    for make, name in ((lambda: edm_weight(0), "sigma_data"), (lambda: p2_weight(-1), "gamma"), (lambda: p2_weight(1, 0), "k"),
                       (lambda: min_snr_weight(0), "gamma"), (lambda: soft_min_snr_weight(-2), "gamma"),
                       (lambda: uncertain_loss(jnp.ones(3), jnp.ones((3, 1))), "u must have the shape of loss"),
                       (lambda: level_edges(EDM, 0), "bins"), (lambda: loss_by_level(jnp.ones(3), jnp.ones(2), np.arange(3.0)), "log_snr"),
                       (lambda: plot_loss_by_level(np.ones(3), np.ones(3), np.arange(3)), "edges"), (lambda: log_snr_range(EDM, 15.0), "lowest=15")):
        with pytest.raises(ValueError, match=name): make()

    class Clean(NoiseScheduler):
        def alpha(self, t): return 1 - jnp.asarray(t, float)
        def sigma(self, t): return jnp.asarray(t, float)
    with pytest.raises(ValueError, match="schedule must end at a finite log SNR"): elbo_weight(Clean())


@over(value={str(v): v for v in (np.nan, np.inf, -np.inf, "0.5", True, None)})
def test_what_is_no_number_is_refused(value):
    for make, name in ((edm_weight, "sigma_data"), (p2_weight, "gamma"), (lambda v: p2_weight(1.0, v), "k must"), (min_snr_weight, "gamma"),
                       (soft_min_snr_weight, "gamma"), (lambda v: log_snr_range(EDM, v), "lowest")):
        with pytest.raises(ValueError, match=name): make(value)


def test_a_weight_is_one_number_for_each_example():
    "Not a table (B, B), which would weigh each example by all."
    F, one = jnp.ones((3, 2)), jnp.ones(3)
    for shape in ((3, 3), (3, 1), (2,)):
        with pytest.raises(ValueError, match=r"loss_weight.*3 examples"): diffusion_loss(F, 0 * F, one, one, VPredictor(), lambda *_: jnp.ones(shape))
    np.testing.assert_allclose(diffusion_loss(F, 0 * F, one, one, X0Predictor(), lambda *_: 2.0), 2)


# ---------------------------------------------------------------- the bound

@over(EACH_KIND, schedule=ALL_SCHEDULES)
def test_log_snr_is_uniform(schedule):
    low, high = log_snr_range(schedule)
    assert -20 <= low < high
    t = uniform_log_snr(schedule)(jax.random.PRNGKey(0), 40_000)
    assert t.shape == (40_000,) and np.all((t >= schedule.min_time) & (t <= schedule.max_timesteps))
    share = np.sort((np.asarray(schedule.log_snr(t)) - low) / (high - low))
    assert np.abs(share - np.arange(40_000) / 40_000).max() < 0.01  # Kolmogorov–Smirnov: chance alone gives .007 once in 50
    one = jax.jit(jax.vmap(lambda key: uniform_log_snr(schedule)(key, 1)[0]))(jax.random.split(jax.random.PRNGKey(1), 3))  # as the trainer draws
    assert np.all(np.isfinite(schedule.log_snr(one))) and len(set(one.tolist())) == 3


@over(schedule={name: ALL_SCHEDULES[name] for name in (*EACH_KIND, "ExpNoiseSchedule-T10")})
def test_elbo_of_a_gaussian(schedule, x64):
    "E loss = ½ log(1 + v SNR) between the ends, a number of x₀; and the bound of `flaxdiff.likelihood`, which shares no code with it."
    v, n, predictor = np.array([0.4, 0.05]), 200_000, PREDICTORS["VPredictor" if ends_pure(schedule) else "X0Predictor"]
    data, keys = Gaussian([0.3, -0.1], v), jax.random.split(jax.random.PRNGKey(3), 3)
    t, x0, eps = uniform_log_snr(schedule)(keys[0], n), data.sample(keys[1], n), jax.random.normal(keys[2], (n, 2))
    alpha, sigma = schedule.get_rates(t, (-1, 1))
    network = ExactModel(data, schedule, predictor)
    F = network.apply({}, schedule.add_noise(x0, eps, t) * predictor.get_input_scale(alpha, sigma), schedule.network_time(t))
    loss = diffusion_loss(F, predictor.get_target(x0, eps, alpha, sigma), alpha[:, 0], sigma[:, 0], predictor, elbo_weight(schedule))
    low, high = log_snr_range(schedule)
    exact = np.mean(np.log1p(v * np.exp(high)) - np.log1p(v * np.exp(low))) / 2
    assert abs(loss.mean() - exact) < 4 * loss.std() / n ** 0.5
    times = schedule.get_timesteps(np.exp(-np.linspace(low, high, 129) / 2))
    bound = variational_bound(EulerSampler(network, {}, schedule, predictor), x0[:2000], times, key=0, continuous=True).diffusion / 2
    assert abs(bound.mean() - exact) < 4 * bound.std() / 2000 ** 0.5 + 2e-3 * exact


def test_elbo_is_the_plain_loss_of_epsilon():
    alpha, sigma = vp(LAMBDAS, np.float32)
    ratio = elbo_weight(EDM)(alpha, sigma) / plain_weight(EpsilonPredictor())(alpha, sigma)
    np.testing.assert_allclose(ratio, np.diff(log_snr_range(EDM))[0] / 2, rtol=1e-5)
    assert ends_pure(ALL_SCHEDULES["CosineNoiseSchedule-zero-snr"]) and log_snr_range(ALL_SCHEDULES["CosineNoiseSchedule-zero-snr"])[0] == -20


# ---------------------------------------------------------------- learned uncertainty

def test_uncertainty_starts_at_nothing():
    for schedule in SCHEDULES.values():
        temb = schedule.network_time(schedule.sample_timesteps(jax.random.PRNGKey(0), 5))
        u, params = LearnedUncertainty().init_with_output(jax.random.PRNGKey(1), temb)
        assert u.shape == (5,) and u.dtype == jnp.float32 and np.all(u == 0)
        np.testing.assert_array_equal(uncertain_loss(jnp.arange(5.0), u), np.arange(5.0))
        assert LearnedUncertainty().apply(params, temb.astype(jnp.bfloat16)).dtype == jnp.float32
        assert all(np.any(g != 0) for g in jax.tree.leaves(jax.grad(lambda p: uncertain_loss(jnp.arange(5.0) ** 3, LearnedUncertainty().apply(p, temb)).sum())(params)))


def test_the_least_uncertain_loss():
    "For losses of mean m the least is 1 + log m, at e^u = m."
    losses = jnp.asarray([0.1, 0.4, 1.0, 2.5])
    at = lambda u: jnp.mean(uncertain_loss(losses, jnp.full(4, u)))
    u = float(jnp.log(losses.mean()))
    assert at(u) == pytest.approx(1 + u, rel=1e-6) and abs(jax.grad(at)(u)) < 1e-6
    assert all(at(u + d) > at(u) for d in (-0.5, -0.1, 0.1, 0.5))


@over(schedule={name: SCHEDULES[name] for name in ("LinearNoiseSchedule", "CosineContinuousNoiseScheduler", "EDMNoiseScheduler")})
def test_uncertainty_learns_the_mean_loss(schedule):
    "Noisy losses whose mean varies sevenfold, by Adam: e^u is the mean to some percent."
    def mean(lam): return 0.13 + 0.9 * jax.nn.sigmoid(lam - 3.5) + 0.44 * jax.nn.sigmoid(-lam - 1)
    teller, optimizer = LearnedUncertainty(), optax.adam(optax.cosine_decay_schedule(0.01, 1500))
    def learn(state, key):
        time_key, loss_key = jax.random.split(key)
        t = schedule.sample_timesteps(time_key, 64)
        loss = mean(schedule.log_snr(t)) * jax.random.gamma(loss_key, 20.0, (64,)) / 20
        grads = jax.grad(lambda p: uncertain_loss(loss, teller.apply(p, schedule.network_time(t))).mean())(state[0])
        updates, memory = optimizer.update(grads, state[1])
        return (optax.apply_updates(state[0], updates), memory), None
    params = teller.init(jax.random.PRNGKey(0), jnp.zeros(1))
    (params, _), _ = jax.lax.scan(learn, (params, optimizer.init(params)), jax.random.split(jax.random.PRNGKey(1), 1500))
    t = schedule.sample_timesteps(jax.random.PRNGKey(2), 4000)
    off = np.abs(teller.apply(params, schedule.network_time(t)) - jnp.log(mean(schedule.log_snr(t))))
    assert np.quantile(off, 0.99) < 0.1 and off.mean() < 0.04


# ---------------------------------------------------------------- loss by level

@over(EACH_KIND, schedule=ALL_SCHEDULES)
def test_edges_span_the_levels_trained_on(schedule):
    edges = level_edges(schedule)
    assert edges.shape == (17,) and edges.dtype == np.float64 and np.all(np.diff(edges) > 0) and np.allclose(np.diff(edges), (edges[-1] - edges[0]) / 16)
    lam = np.asarray(schedule.log_snr(schedule.sample_timesteps(jax.random.PRNGKey(9), 20_000)))
    lam = np.maximum(lam, -20)  # where the edges stop
    assert np.mean((lam < edges[0]) | (lam > edges[-1])) < 0.006
    np.testing.assert_array_equal(edges, level_edges(schedule))


def test_edges_of_another_density():
    edges = level_edges(EDM, 8, uniform_log_snr(EDM))
    low, high = log_snr_range(EDM)
    assert edges.shape == (9,) and abs(edges[0] - low) < 0.1 and abs(edges[-1] - high) < 0.1
    one = level_edges(EDM, 4, lambda key, n: jnp.full(n, 0.5))
    assert np.all(np.diff(one) > 0) and one[0] < EDM.log_snr(0.5) < one[-1]


def test_sums_and_counts(x64):
    rng, edges = np.random.default_rng(0), np.array([-2.0, -1, 0.5, 3])
    loss, lam = rng.exponential(size=500), np.concatenate([rng.normal(0, 3, 497), [-np.inf, np.inf, 0.5]])
    sums, counts = jax.jit(loss_by_level)(jnp.asarray(loss), jnp.asarray(lam), edges)
    masks = [lam < -1, (lam >= -1) & (lam < 0.5), lam >= 0.5]  # the first and last take what lies outside
    np.testing.assert_allclose(sums, [loss[m].sum() for m in masks], rtol=1e-12)
    assert counts.tolist() == [m.sum() for m in masks] and jnp.issubdtype(counts.dtype, jnp.integer)
    parts = [loss_by_level(jnp.asarray(loss[i::5]), jnp.asarray(lam[i::5]), edges) for i in range(5)]
    np.testing.assert_allclose(sum(p[0] for p in parts), sums, rtol=1e-12)
    assert np.array_equal(sum(p[1] for p in parts), counts)
    loss[0] = np.nan  # spoils its own bin and no other
    spoiled, _ = loss_by_level(jnp.asarray(loss), jnp.asarray(lam), edges)
    assert np.isnan(spoiled).tolist() == [bool(m[0]) for m in masks]
    low, _ = loss_by_level(jnp.ones(1000, jnp.bfloat16), jnp.zeros(1000), edges)
    assert low.dtype == jnp.float32 and low[1] == 1000


def test_plot_draws_the_means_over_the_noise_level():
    sums, counts, edges = np.array([6.0, 0, 4]), np.array([3, 0, 8]), np.array([-4.0, -2, 0, 2])
    ax = plot_loss_by_level(sums, counts, edges, label="a")
    values, at, _ = ax.patches[0].get_data()
    np.testing.assert_allclose(at, np.exp([-1, 0, 1, 2]))
    np.testing.assert_array_equal(values, [0.5, np.nan, 2])
    assert ax.get_xscale() == "log" and "σ/α" in ax.get_xlabel() and ax.patches[0].get_label() == "a"
    assert plot_loss_by_level(jnp.asarray(sums), jnp.asarray(counts), edges, ax) is ax and len(ax.patches) == 2
    matplotlib.pyplot.close("all")
