"""Laws of every noise schedule."""
import inspect
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from flaxdiff import schedulers
from flaxdiff.schedulers import (CosineContinuousNoiseScheduler, CosineGeneralNoiseScheduler, CosineNoiseSchedule,
                                 DiscreteNoiseScheduler, EDMNoiseScheduler, ExpNoiseSchedule, FlowNoiseScheduler, KarrasVENoiseScheduler,
                                 LinearNoiseSchedule, NoiseScheduler, SubVPNoiseScheduler)
from laws import ALL_SCHEDULES, SCALED, SCHEDULE_CLASSES, SCHEDULES, ZERO_SNR, ends_pure, is_discrete, over, x64

DISCRETE = {name: s for name, s in ALL_SCHEDULES.items() if is_discrete(s)}
KARRAS = {name: s for name, s in ALL_SCHEDULES.items() if isinstance(s, KarrasVENoiseScheduler)}
BOUNDED = {name: s for name, s in ALL_SCHEDULES.items() if name not in KARRAS}


class Straight(NoiseScheduler):
    "A user's schedule, rectified flow: α = 1 - t, σ = t, and nothing else is written."
    def alpha(self, t): return 1 - self.as_times(t)
    def sigma(self, t): return self.as_times(t)
    def get_timesteps(self, sigmas): return 1 - 1 / (1 + self.as_ratios(sigmas))


EVERY = {**ALL_SCHEDULES, "a user's": Straight()}


def times(schedule, n=401, first=None, last=None):
    "n times, among them both ends."
    first = schedule.min_time if first is None else first
    return np.linspace(first, schedule.max_timesteps if last is None else last, n)


# The process

@over(schedule=EVERY)
def test_snr_falls_everywhere(schedule, x64):
    log_snr = np.asarray(schedule.log_snr(times(schedule, 20001, first=0)))
    assert np.all(log_snr[1:] < log_snr[:-1])


@over(schedule=EVERY)
def test_log_snr_is_that_of_the_rates(schedule, x64):
    t = times(schedule)[:-1]
    alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    np.testing.assert_allclose(schedule.log_snr(t), np.log(alpha ** 2 / sigma ** 2), rtol=1e-12, atol=1e-12)


@over(schedule=ALL_SCHEDULES)
def test_variance_preserving_or_exploding(schedule, x64):
    alpha, sigma = (np.asarray(f(times(schedule))) for f in (schedule.alpha, schedule.sigma))
    if schedule.variance_exploding: assert np.all(alpha == 1)
    elif isinstance(schedule, FlowNoiseScheduler): np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-14)  # nor is this
    elif isinstance(schedule, SubVPNoiseScheduler): np.testing.assert_allclose(alpha ** 2 + sigma, 1, rtol=1e-14)  # it is neither: σ = 1 - α²
    else: np.testing.assert_allclose(alpha ** 2 + sigma ** 2, 1, rtol=1e-14)


@over(schedule=ALL_SCHEDULES)
def test_float32_endpoints_are_finite(schedule):
    T = schedule.max_timesteps
    for t in (0, schedule.min_time, T / 2, T):
        assert np.isfinite(schedule.alpha(t)) and np.isfinite(schedule.sigma(t))
        assert np.isfinite(schedule.network_time(t))
    assert schedule.alpha(0).dtype == jnp.float32
    assert schedule.sigma(schedule.min_time) > 0
    inner = T * (1 - 1e-4) if ends_pure(schedule) else T
    for t in (schedule.min_time, inner): assert np.isfinite(schedule.log_snr(t))
    x0, xt = jnp.full((2, 3), 0.5), jnp.full((2, 3), -0.4)
    for t, s in ((T, schedule.min_time), (T, 0), (schedule.min_time or T / 9, 0), (T, T / 2)):
        variance, mean = schedule.get_posterior_variance(t, s), schedule.get_posterior_mean(x0, xt, t, s)
        assert np.isfinite(variance) and variance >= 0 and np.all(np.isfinite(mean)), (t, s)


@over(schedule=ALL_SCHEDULES)
def test_float32_agrees_with_float64(schedule):
    t = times(schedule, first=schedule.min_time)[:-1]
    with jax.enable_x64(True): want = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    # times themselves are rounded: dlog(u)/dt · ulp(t), largest near the ends of the cosine schedules
    np.testing.assert_allclose(schedule.alpha(t.astype(np.float32)), want[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(schedule.sigma(t.astype(np.float32)), want[1], rtol=1e-5)


@over(schedule=EVERY)
def test_get_timesteps_is_the_inverse(schedule, x64):
    t = times(schedule)
    u = np.asarray(schedule.sigma(t)) / np.maximum(np.asarray(schedule.alpha(t)), 1e-300)
    np.testing.assert_allclose(schedule.get_timesteps(u), t, rtol=1e-9, atol=1e-9 * schedule.max_timesteps)


@over(schedule=EVERY)
def test_get_timesteps_is_the_inverse_in_float32(schedule):
    t = times(schedule, last=schedule.max_timesteps * (1 - 1e-3)).astype(np.float32)
    found = schedule.get_timesteps(schedule.sigma(t) / schedule.alpha(t))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, t, rtol=0, atol=3e-6 * schedule.max_timesteps)


@over(schedule=EVERY)
def test_get_timesteps_takes_whole_numbers(schedule):
    assert schedule.get_timesteps(1) == schedule.get_timesteps(1.0)
    np.testing.assert_array_equal(schedule.get_timesteps(np.array([1, 2])), schedule.get_timesteps(np.array([1.0, 2.0], np.float32)))


@over(schedule=ALL_SCHEDULES)
def test_network_time_and_back(schedule, x64):
    t = times(schedule)
    np.testing.assert_allclose(schedule.from_network_time(schedule.network_time(t)), t, rtol=1e-10, atol=1e-10 * schedule.max_timesteps)


def test_network_time_of_each_kind():
    "1000 t/T, t/T, ln σ / 4."
    for s in (LinearNoiseSchedule(), LinearNoiseSchedule(50)): assert s.network_time(s.max_timesteps) == 1000
    assert LinearNoiseSchedule().network_time(7.0) == 7
    for T in (1, 5.0): assert CosineContinuousNoiseScheduler(T).network_time(T / 4) == 0.25
    for s in (KarrasVENoiseScheduler(), EDMNoiseScheduler(3.0), CosineGeneralNoiseScheduler()):
        np.testing.assert_allclose(s.network_time(s.max_timesteps), np.log(80) / 4, rtol=1e-6)


# What follows from α and σ

@over(schedule=EVERY)
def test_add_noise_and_remove_it(schedule, x64):
    x0, eps = np.random.default_rng(0).normal(size=(2, 5, 3, 2, 1))
    t = times(schedule, 5, last=schedule.max_timesteps * 0.999)
    xt = schedule.add_noise(x0, eps, t)
    want = np.asarray(schedule.alpha(t)).reshape(5, 1, 1, 1) * x0 + np.asarray(schedule.sigma(t)).reshape(5, 1, 1, 1) * eps
    np.testing.assert_allclose(xt, want, rtol=1e-14)
    clean, blur = schedule.remove_all_noise(xt, eps, t), np.asarray(schedule.sigma(t) / schedule.alpha(t)).reshape(5, 1, 1, 1)
    assert np.all(np.abs(clean - x0) <= 1e-14 * (1 + blur))  # division by α magnifies rounding by σ/α
    alpha, sigma = schedule.get_rates(t)
    assert alpha.shape == sigma.shape == (5, 1, 1, 1)
    assert schedule.get_rates(t, shape=(-1, 1))[0].shape == (5, 1)
    np.testing.assert_array_equal(alpha.ravel(), schedule.alpha(t))
    np.testing.assert_array_equal(sigma.ravel(), schedule.sigma(t))


def bayes_by_numbers(schedule, x0, xt, t, s):
    "Mean and variance of p(x_s | x_t, x₀) ∝ p(x_s | x₀) p(x_t | x_s), summed on a fine grid; nothing of the library but α and σ."
    (at, st_), (as_, ss) = ((float(schedule.alpha(v)), float(schedule.sigma(v))) for v in (t, s))
    ratio, added = at / as_, st_ ** 2 - (at / as_) ** 2 * ss ** 2  # x_t = ratio x_s + √added ε
    xs = as_ * x0 + ss * np.linspace(-15, 15, 300001)
    log_p = -0.5 * ((xs - as_ * x0) / ss) ** 2 - 0.5 * (xt - ratio * xs) ** 2 / added
    p = np.exp(log_p - log_p.max())
    mean = (p * xs).sum() / p.sum()
    return mean, (p * (xs - mean) ** 2).sum() / p.sum()


@over(schedule=EVERY)
@pytest.mark.parametrize("late, early", [(1, 0.5), (0.9, 0.2), (0.5, 0.1), (0.61, 0.55), (0.3, 0.25)])
def test_posterior_is_bayes_rule_for_any_pair(schedule, late, early, x64):
    T = schedule.max_timesteps
    t, s, x0 = late * T, early * T, 0.7
    xt = float(schedule.alpha(t)) * x0 - 1.3 * float(schedule.sigma(t))
    mean, variance = bayes_by_numbers(schedule, x0, xt, t, s)
    got = schedule.get_posterior_mean(np.full((1, 1), x0), np.full((1, 1), xt), t, s)
    np.testing.assert_allclose(got, mean, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(schedule.get_posterior_variance(t, s), variance, rtol=1e-6)


@over(schedule=SCHEDULES)
def test_posterior_of_neighbours_is_ddpms(schedule, x64):
    "Ho et al. 2020, eq. 7, for the discrete ones: β̃ and the mean's two coefficients."
    if not is_discrete(schedule): pytest.skip("has no betas")
    ab = np.asarray(schedule.alpha(np.arange(1001.0))) ** 2
    t = np.array([2, 10, 500, 1000])
    beta = 1 - ab[t] / ab[t - 1]
    np.testing.assert_allclose(schedule.get_posterior_variance(t.astype(float), t - 1.0), beta * (1 - ab[t - 1]) / (1 - ab[t]), rtol=1e-9)
    x0, xt = np.random.default_rng(1).normal(size=(2, 4, 1))
    want = (np.sqrt(ab[t - 1]) * beta / (1 - ab[t]))[:, None] * x0 + (np.sqrt(1 - beta) * (1 - ab[t - 1]) / (1 - ab[t]))[:, None] * xt
    np.testing.assert_allclose(schedule.get_posterior_mean(x0, xt, t.astype(float), t - 1.0), want, rtol=1e-9)


@over(schedule=SCHEDULES)
def test_posterior_against_monte_carlo(schedule):
    "Draw x_s given x₀, then x_t given x_s; regress x_s on x_t: slope, intercept and residual are the posterior's."
    T, n = schedule.max_timesteps, 400_000
    t, s, x0 = 0.6 * T, 0.45 * T, 0.4
    at, sig_t, as_, sig_s = (float(f(v)) for v in (t, s) for f in (schedule.alpha, schedule.sigma))
    rng = np.random.default_rng(2)
    xs = as_ * x0 + sig_s * rng.normal(size=n)
    xt = at / as_ * xs + np.sqrt(sig_t ** 2 - (at / as_ * sig_s) ** 2) * rng.normal(size=n)
    slope, intercept = np.polyfit(xt - at * x0, xs, 1)
    mean = lambda x: float(schedule.get_posterior_mean(jnp.full((1, 1), x0), jnp.full((1, 1), x), t, s)[0, 0])
    residual = np.var(xs - slope * (xt - at * x0) - intercept)
    std = np.sqrt(residual)
    assert abs(mean(at * x0) - intercept) < 5 * std / np.sqrt(n)
    assert abs(mean(at * x0 + sig_t) - mean(at * x0) - slope * sig_t) < 5 * std / np.sqrt(n)
    np.testing.assert_allclose(schedule.get_posterior_variance(t, s), residual, rtol=5 * np.sqrt(2 / n))


@over(schedule=EVERY)
def test_posterior_refuses_s_after_t(schedule):
    T = schedule.max_timesteps
    with pytest.raises(ValueError, match="s="): schedule.get_posterior_variance(0.3 * T, 0.6 * T)
    with pytest.raises(ValueError, match="s="): schedule.get_posterior_mean(jnp.ones((1, 1)), jnp.ones((1, 1)), 0.3 * T, 0.6 * T)


@over(schedule=EVERY)
def test_everything_follows_the_dtype_of_t(schedule, x64):
    T = schedule.max_timesteps
    for dtype in (jnp.float32, jnp.float64):
        t, s = jnp.asarray([0.5 * T, 0.7 * T], dtype), jnp.asarray([0.2 * T, 0.3 * T], dtype)
        x = jnp.ones((2, 3), dtype)
        for value in (schedule.alpha(t), schedule.sigma(t), *schedule.get_rates(t), schedule.log_snr(t), schedule.network_time(t),
                      schedule.from_network_time(schedule.network_time(t)), schedule.get_timesteps(schedule.sigma(t)),
                      schedule.get_posterior_variance(t, s), schedule.get_posterior_mean(x, x, t, s), schedule.add_noise(x, x, t),
                      schedule.remove_all_noise(x, x, t)):
            assert value.dtype == dtype
        assert schedule.alpha(t).shape == schedule.sigma(t).shape == schedule.log_snr(t).shape == (2,)
        assert schedule.alpha(t[0]).shape == schedule.sigma(t[0]).shape == ()
        traced = jax.eval_shape(lambda t: (schedule.alpha(t), schedule.sigma(t), schedule.get_timesteps(schedule.sigma(t))), t)
        assert all(v.dtype == dtype for v in traced)


@over(schedule=ALL_SCHEDULES)
def test_whole_numbers_are_times_too(schedule):
    T = schedule.max_timesteps
    if T < 2: pytest.skip("no whole number between 0 and T")
    for t in (2, np.int64(2), np.array([1, 2])):
        np.testing.assert_array_equal(schedule.sigma(t), schedule.sigma(np.asarray(t, np.float32)))
        assert schedule.sigma(t).dtype == jnp.float32


# Times that are none

@over(schedule=BOUNDED)
def test_times_out_of_range_are_refused(schedule):
    T = schedule.max_timesteps
    for t in (-1e-3 * T, 1.001 * T, -1.0 * T, 2 * T, np.nan, np.inf, [0.5 * T, 2 * T]):
        for call in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.network_time, schedule.get_rates):
            with pytest.raises(ValueError, match="t must"): call(t)


@over(schedule=ALL_SCHEDULES)
def test_times_out_of_range_by_rounding_are_accepted(schedule):
    T = schedule.max_timesteps
    for t, near in ((-0.9e-5 * T, 0), (T * (1 + 0.9e-5), T)):
        for f in (schedule.alpha, schedule.sigma):
            assert np.isfinite(f(t)), f"{f.__name__}({t}) is {f(t)}"
            assert abs(f(t) - f(near)) <= 2e-3 * max(1, f(near))
        assert schedule.sigma(t) >= 0


@over(schedule=KARRAS)
def test_karras_goes_on_beyond_both_ends(schedule, x64):
    "Churn goes above σ_max; the bell of training goes below σ_min and above σ_max."
    T = schedule.max_timesteps
    t = np.array([-0.27, -0.1, 0, 1, 1.1, 1.5]) * T
    sigma = np.asarray(schedule.sigma(t))
    assert np.all(np.diff(sigma) > 0) and sigma[0] > 0 and sigma[1] < 0.002 < 80 < sigma[4]
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    np.testing.assert_allclose(sigma, (low + t / T * (high - low)) ** 7, rtol=1e-12)
    np.testing.assert_allclose(schedule.get_timesteps(sigma), t, rtol=1e-12, atol=1e-12 * T)
    np.testing.assert_allclose(schedule.sigma(schedule.get_timesteps(np.array([1e-5, 5e3]))), [1e-5, 5e3], rtol=1e-10)
    for bad in (-1.0 * T, np.nan, np.inf):
        with pytest.raises(ValueError, match="t must"): schedule.sigma(bad)


@over(cls={s.__name__: s for s in map(type, SCHEDULES.values())})
def test_bad_timesteps_are_refused(cls):
    for bad in (0, -1, np.nan, np.inf, True, "10"):
        with pytest.raises(ValueError, match="timesteps"): cls(bad)


def test_bad_arguments_are_refused():
    for build, name in ((lambda: LinearNoiseSchedule(10, beta_start=0), "beta_start"), (lambda: LinearNoiseSchedule(10, 0.02, 1e-4), "beta_start"),
                        (lambda: LinearNoiseSchedule(2.5), "timesteps"), (lambda: CosineNoiseSchedule(10, max_beta=1), "max_beta"),
                        (lambda: CosineNoiseSchedule(10, s=-1), "s must"), (lambda: KarrasVENoiseScheduler(1, 80, 0.002), "sigma_min"),
                        (lambda: KarrasVENoiseScheduler(rho=0), "rho"), (lambda: EDMNoiseScheduler(sigma_data=-1), "sigma_data"),
                        (lambda: EDMNoiseScheduler(P_std=0), "P_std"), (lambda: CosineGeneralNoiseScheduler(1, 80, 0.02), "sigma_min"),
                        (lambda: CosineGeneralNoiseScheduler(kappa=0), "kappa"), (lambda: DiscreteNoiseScheduler([0.1, 1.0]), "betas"),
                        (lambda: DiscreteNoiseScheduler([]), "betas"), (lambda: LinearNoiseSchedule(1, zero_terminal_snr=True), "timesteps")):
        with pytest.raises(ValueError, match=name): build()


# What comes in

BAD_NUMBERS = (np.nan, np.inf, -np.inf, -1.0, "1", True, None, [0.5])


def options(cls):
    "The arguments of a constructor with their defaults, those of all its bases too."
    signature = inspect.signature(cls.__init__)
    return {p.name: p.default for p in signature.parameters.values() if p.name != "self" and p.default is not p.empty}


@over(cls=SCHEDULE_CLASSES)
def test_every_number_of_a_constructor_is_one(cls):
    for name, default in options(cls).items():
        bad = ("no", "False", 1, 0, None, np.nan) if isinstance(default, bool) else BAD_NUMBERS
        for value in bad:
            if value == -1.0 and not isinstance(default, str) and default < 0: continue  # P_mean
            with pytest.raises(ValueError, match=name): cls(**{name: value})


@over(schedule=EVERY)
def test_ratios_that_are_none_are_refused(schedule):
    "σ/α is at least 0; 0 is one where σ(0) = 0, and infinity where α(T) = 0."
    for bad in (-1.0, np.nan, -np.inf, [1.0, -2.0], [[1.0], [np.nan]], "1", True):
        with pytest.raises(ValueError, match="sigmas must"): schedule.get_timesteps(bad)
    T = schedule.max_timesteps
    if ends_pure(schedule): assert schedule.get_timesteps(np.inf) == T
    else:
        with pytest.raises(ValueError, match="sigmas must be finite"): schedule.get_timesteps([1.0, np.inf])
    if schedule.sigma(0) == 0: assert schedule.get_timesteps(0.0) == 0
    else:
        with pytest.raises(ValueError, match="sigmas must be above 0"): schedule.get_timesteps(0.0)
    assert np.isfinite(jax.jit(schedule.get_timesteps)(1.0)) and np.allclose(jax.jit(lambda: schedule.get_timesteps(1.0))(), schedule.get_timesteps(1.0))
    jax.jit(schedule.get_timesteps)(-1.0)  # not known there


@over(schedule=BOUNDED)
def test_a_ratio_beyond_the_last_is_not_moved_to_the_end(schedule):
    if ends_pure(schedule): pytest.skip("has no last ratio")
    with pytest.raises(ValueError, match="t must"): schedule.alpha(schedule.get_timesteps(1e9))


@over(schedule=EVERY)
def test_largest_time(schedule):
    "How far σ may be asked: T, or without end."
    T, last = schedule.max_timesteps, schedule.largest_time
    assert last == (math.inf if isinstance(schedule, KarrasVENoiseScheduler) else T)
    if last == math.inf: assert schedule.sigma(3.0 * T) > schedule.sigma(T)
    else:
        with pytest.raises(ValueError, match="t must"): schedule.sigma(1.001 * T)
    for bad in ("0.5", True, None, [0.1, None]):
        with pytest.raises(ValueError, match="t must"): schedule.sigma(bad)


@over(schedule=EVERY)
def test_shapes_do_not_broadcast_by_accident(schedule):
    T, x, other = schedule.max_timesteps, np.zeros((4, 8, 8, 1), np.float32), np.zeros((4, 8, 8, 3), np.float32)
    t, s = 0.6 * T, 0.3 * T
    for a, b, name in ((x, other, "eps"), (other, x, "eps"), (x, x[:1], "eps"), (x, x[0], "eps"), (x, np.float32(0), "eps"), (x.astype(np.uint8), x, "x0"), (x, x.astype(int), "eps"), (np.float32(1), np.float32(1), "x0")):
        with pytest.raises(ValueError, match=name): schedule.add_noise(a, b, t)
        with pytest.raises(ValueError, match="x_t" if name == "x0" else name): schedule.remove_all_noise(a, b, t)
        with pytest.raises(ValueError, match="x_t" if name == "eps" else name): schedule.get_posterior_mean(a, b, t, s)
    for bad in (np.full(3, t), np.full((4, 1), t), np.full((2, 2), t), np.full((1,), t), np.full((4, 1, 1, 1), t)):
        with pytest.raises(ValueError, match="t must"): schedule.add_noise(x, x, bad)
        with pytest.raises(ValueError, match="t must"): schedule.remove_all_noise(x, x, bad)
        with pytest.raises(ValueError, match="t must"): schedule.get_posterior_mean(x, x, bad, s)
        with pytest.raises(ValueError, match="s must"): schedule.get_posterior_mean(x, x, np.full(4, t), bad / 2)
        if bad.ndim > 1:
            with pytest.raises(ValueError, match="t must"): schedule.get_rates(bad)
    with pytest.raises(ValueError, match="s must"): schedule.get_posterior_variance(np.full((3, 1), t), np.full(3, s))
    for shape in ((3,), (5, -1), "x", (-1, -1)):
        with pytest.raises(ValueError, match="shape must"): schedule.get_rates(np.full(4, t), shape)
    for f in (schedule.add_noise, schedule.remove_all_noise):
        with pytest.raises(ValueError, match="eps"): jax.jit(lambda a, b: f(a, b, t))(x, other)  # shapes are known inside jit too
        assert f(x, x, np.full(4, t)).shape == f(x, x, t).shape == x.shape


@over(schedule=EVERY)
def test_how_many_times(schedule):
    key = jax.random.PRNGKey(0)
    for bad in (-1, 0, 2.5, "3", True, None, (2,), np.nan):
        with pytest.raises(ValueError, match="n must"): schedule.sample_timesteps(key, bad)
    assert schedule.sample_timesteps(key, np.int64(2)).shape == (2,)


@over(schedule=EVERY)
def test_gradients_at_both_ends(schedule, x64):
    "Of α, σ and log SNR: the one-sided slope, infinite where it is, and never NaN."
    T, h = float(schedule.max_timesteps), 1e-10
    for t, inside in ((T, -h * T), (float(schedule.min_time), h * T)):
        for f in (schedule.alpha, schedule.sigma, schedule.log_snr):
            got, secant = float(jax.grad(f)(t)), float((f(t + inside) - f(t)) / inside)
            assert not np.isnan(got), (f.__name__, t)
            if np.isfinite(got) and np.isfinite(secant): np.testing.assert_allclose(got, secant, rtol=1e-3, atol=1e-5 / T)
    if ends_pure(schedule): assert jax.grad(schedule.log_snr)(T) == -np.inf and np.isfinite(jax.grad(schedule.sigma)(T)) and jax.grad(schedule.alpha)(T) < 0
    else: assert np.isfinite(jax.grad(schedule.log_snr)(T))
    for f in (schedule.alpha, schedule.sigma, schedule.log_snr):
        assert not np.isnan(jax.grad(f)(jnp.float32(T)))


def test_cut_betas_are_told():
    "Once for each construction; nothing at the defaults, nor where a limit was asked for."
    for N, cut in ((2, 1), (10, 5), (20, 1)):
        with pytest.warns(UserWarning, match=f"^{cut} of {N} betas.*timesteps=21") as seen: LinearNoiseSchedule(N)
        assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cls in SCHEDULE_CLASSES.values(): cls()
        LinearNoiseSchedule(21), CosineNoiseSchedule(10), CosineNoiseSchedule(1000, max_beta=0.5), LinearNoiseSchedule(2, 0.0001, 0.001)


# The discrete ones

def betas_of(name, N):
    "The betas of the papers, written once more."
    if name.startswith("Linear"):
        ends = (0.00085, 0.012) if name.endswith("scaled") else (1e-4, 0.02)
        b = np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, N) ** 2 if name.endswith("scaled") else np.linspace(*ends, N)
        return np.minimum(b * 1000 / N, 0.999)
    if name.startswith("Cosine"):
        f = lambda i: np.cos((i / N + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.array([min(1 - f(i + 1) / f(i), 0.999) for i in range(N)])
    if name.startswith("Exp"): return np.full(N, 1 - np.exp(-12 / N))
    raise AssertionError(f"{name} is new: write its betas here")


@over(schedule=DISCRETE)
def test_whole_steps_are_the_cumulative_product(schedule, request, x64):
    name, N = request.node.callspec.id, schedule.max_timesteps
    root = np.sqrt(np.cumprod(1 - betas_of(name, N)))
    if schedule.zero_terminal_snr: root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Lin et al. 2024, algorithm 1
    k = np.arange(N + 1.0)
    np.testing.assert_allclose(schedule.alpha(k)[1:], root, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(schedule.sigma(k)[1:], np.sqrt(1 - root ** 2), rtol=1e-9)
    assert schedule.alpha(0.0) == 1 and schedule.sigma(0.0) == 0 and schedule.min_time == 1
    np.testing.assert_allclose(schedule.get_timesteps(np.asarray(schedule.sigma(k[:-1]) / schedule.alpha(k[:-1]))), k[:-1], rtol=1e-10, atol=1e-10)


@over(schedule=DISCRETE)
def test_whole_steps_in_float32(schedule):
    k = np.arange(schedule.max_timesteps + 1)
    with jax.enable_x64(True): want = np.asarray(schedule.alpha(k)), np.asarray(schedule.sigma(k))
    np.testing.assert_allclose(schedule.alpha(k), want[0], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(schedule.sigma(k), want[1], rtol=3e-7)
    assert schedule.alpha(0) == 1 and schedule.sigma(0) == 0


@over(schedule=DISCRETE)
def test_log_alpha_bar_is_linear_between_whole_steps(schedule, x64):
    N = schedule.max_timesteps
    for k in (0, 1, N // 2, N - 2):
        a, b, c = (2 * np.log(float(schedule.alpha(k + f))) for f in (0, 0.25, 1))
        np.testing.assert_allclose(b, 0.75 * a + 0.25 * c, rtol=1e-10)


@over(schedule=ZERO_SNR)
def test_zero_terminal_snr(schedule, x64):
    "α(T) = 0, and α, not log ᾱ, is linear on the last interval; the inverse holds there too."
    N = schedule.max_timesteps
    assert schedule.alpha(float(N)) == 0 and schedule.sigma(float(N)) == 1 and schedule.log_snr(float(N)) == -np.inf
    f = np.linspace(0, 1, 11)
    np.testing.assert_allclose(schedule.alpha(N - 1 + f), (1 - f) * schedule.alpha(N - 1.0), rtol=1e-11, atol=1e-18)
    u = np.asarray(schedule.sigma(N - 1 + f[:-1]) / schedule.alpha(N - 1 + f[:-1]))
    np.testing.assert_allclose(schedule.get_timesteps(u), N - 1 + f[:-1], rtol=1e-12)
    assert schedule.get_timesteps(np.inf) == N
    slope = jax.grad(schedule.alpha)(N - 0.5)
    np.testing.assert_allclose(slope, -schedule.alpha(N - 1.0), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.*betas are cut")
@pytest.mark.parametrize("N", [1, 2, 10, 20, 100, 250, 4000])
def test_linear_betas_scale_and_clip(N, x64):
    schedule = LinearNoiseSchedule(N)
    ab = np.asarray(schedule.alpha(np.arange(N + 1.0))) ** 2
    betas = 1 - ab[1:] / ab[:-1]
    np.testing.assert_allclose(betas, np.minimum(np.linspace(1e-4, 0.02, N) * 1000 / N, 0.999), rtol=1e-8)
    assert schedule.max_timesteps == N and betas.max() <= 0.999 + 1e-12


def test_exponential_is_exponential(x64):
    for N in (1, 7, 1000):
        t = np.linspace(0, N, 57)
        np.testing.assert_allclose(ExpNoiseSchedule(N).alpha(t) ** 2, np.exp(-12 * t / N), rtol=1e-11)


def test_cosine_clips_its_last_beta(x64):
    a = np.asarray(CosineNoiseSchedule(1000, max_beta=0.5).alpha(np.arange(1001.0))) ** 2
    assert np.max(1 - a[1:] / a[:-1]) <= 0.5 + 1e-12


# The continuous ones

@pytest.mark.parametrize("ends", [(0.02, 80), (0.002, 80), (0.01, 348), (0.5, 3)])
@pytest.mark.parametrize("kappa", [1, 0.5])
@pytest.mark.parametrize("T", [1, 1000])
def test_cosine_general_hits_both_ends_in_float32(ends, kappa, T):
    schedule = CosineGeneralNoiseScheduler(T, *ends, kappa)
    ulp = np.spacing(np.float32(ends))
    got = np.array([schedule.sigma(0), schedule.sigma(T)])
    assert np.all(np.abs(got - np.float32(ends)) <= 2 * ulp), (got, ends)
    assert schedule.alpha(0) == schedule.alpha(T) == 1


def test_cosine_general_reaches_kappa_half_way_up_the_angle(x64):
    schedule = CosineGeneralNoiseScheduler(1, 0.02, 80, 0.7)
    t = np.linspace(0, 1, 11)
    theta = np.arctan(0.02 / 0.7) + t * (np.arctan(80 / 0.7) - np.arctan(0.02 / 0.7))
    np.testing.assert_allclose(schedule.sigma(t), 0.7 * np.tan(theta), rtol=1e-12)


def test_cosine_continuous_runs_from_20_to_minus_20():
    for T in (1, 1000, 0.3):
        schedule = CosineContinuousNoiseScheduler(T)
        assert abs(schedule.log_snr(0) - 20) < 1e-5 and abs(schedule.log_snr(T) + 20) < 1e-5
        with jax.enable_x64(True):
            assert abs(schedule.log_snr(0.0) - 20) < 1e-10 and abs(schedule.log_snr(float(T)) + 20) < 1e-10
            theta = np.arctan2(np.asarray(schedule.sigma(times(schedule))), np.asarray(schedule.alpha(times(schedule))))
            np.testing.assert_allclose(np.diff(theta), np.diff(theta).mean(), rtol=1e-9)


@over(schedule=KARRAS)
def test_karras_ramp(schedule):
    "Karras et al. 2022, eq. 5, and its ends in float32."
    T = schedule.max_timesteps
    np.testing.assert_allclose([schedule.sigma(0), schedule.sigma(T)], [0.002, 80], rtol=2e-6)
    with jax.enable_x64(True):
        i, n = np.arange(18), 18
        ramp = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        np.testing.assert_allclose(schedule.sigma(T * (1 - i / (n - 1))), ramp, rtol=1e-12)


# The density of training

def kolmogorov(sample, cdf): return stats.kstest(np.asarray(sample, np.float64), cdf).statistic * np.sqrt(len(sample))


@over(schedule=ALL_SCHEDULES)
def test_training_density(schedule):
    "Uniform on [0, T], on the whole steps 1 … N, or ln σ ~ N(-1.2, 1.2²) whatever T is."
    t = schedule.sample_timesteps(jax.random.PRNGKey(3), 20_000)
    assert t.shape == (20_000,) and t.dtype == jnp.float32
    T = schedule.max_timesteps
    if isinstance(schedule, EDMNoiseScheduler):
        distance = kolmogorov(jnp.log(schedule.sigma(t)), stats.norm(-1.2, 1.2).cdf)
    elif is_discrete(schedule):
        assert np.array_equal(np.unique(t), np.arange(1, T + 1))
        counts = np.bincount(np.asarray(t, int), minlength=T + 1)[1:]
        assert stats.chisquare(counts).pvalue > 1e-3
        return
    else:
        distance = kolmogorov(t / T, stats.uniform.cdf)
        assert t.min() >= 0 and t.max() <= T
    assert distance < 1.95  # one in a thousand


def test_edm_density_does_not_know_T():
    key = jax.random.PRNGKey(0)
    sigma = [np.asarray(EDMNoiseScheduler(T).sigma(EDMNoiseScheduler(T).sample_timesteps(key, 1000))) for T in (1, 1000, 0.1)]
    np.testing.assert_allclose(sigma[1], sigma[0], rtol=1e-4)
    np.testing.assert_allclose(sigma[2], sigma[0], rtol=1e-4)
    narrow = EDMNoiseScheduler(P_mean=0.4, P_std=0.1)
    assert kolmogorov(jnp.log(narrow.sigma(narrow.sample_timesteps(key, 5000))), stats.norm(0.4, 0.1).cdf) < 1.95


def test_edm_density_is_not_clipped_to_the_ramp():
    for T in (1, 1000):
        short = EDMNoiseScheduler(T, sigma_min=0.2, sigma_max=0.5)
        t = short.sample_timesteps(jax.random.PRNGKey(0), 20_000)
        assert t.min() < 0 and t.max() > T
        assert kolmogorov(jnp.log(short.sigma(t)), stats.norm(-1.2, 1.2).cdf) < 1.95


def test_a_time_is_not_seen_twice():
    for schedule in SCHEDULES.values():
        a, b = (schedule.sample_timesteps(jax.random.PRNGKey(k), 50) for k in (0, 1))
        assert np.any(a != b)
        np.testing.assert_array_equal(a, schedule.sample_timesteps(jax.random.PRNGKey(0), 50))


# Names

def test_aliases():
    for long, short in (("LinearNoiseSchedule", "LinearNoiseScheduler"), ("CosineNoiseSchedule", "CosineNoiseScheduler"),
                        ("ExpNoiseSchedule", "ExpNoiseScheduler")):
        assert getattr(schedulers, long) is getattr(schedulers, short)
    

def test_a_new_schedule_is_two_functions(x64):
    "α and σ, and everything else is there."
    assert len(inspect.getsource(Straight).splitlines()) - 1 <= 6
    schedule = Straight()
    mean, variance = bayes_by_numbers(schedule, 0.7, 0.2, 0.8, 0.3)
    np.testing.assert_allclose(schedule.get_posterior_mean(np.full((1, 1), 0.7), np.full((1, 1), 0.2), 0.8, 0.3), mean, rtol=1e-6)
    np.testing.assert_allclose(schedule.get_posterior_variance(0.8, 0.3), variance, rtol=1e-6)
    for name in ("alpha", "sigma", "get_timesteps"):
        with pytest.raises(NotImplementedError, match=name): getattr(NoiseScheduler(), name)(0.5)


# Any of them

unit = st.floats(0.02, 0.98)
any_schedule = st.one_of(
    st.builds(LinearNoiseSchedule, st.integers(2, 2000), st.floats(1e-5, 1e-3), st.floats(2e-3, 0.05), st.booleans(), st.booleans()),
    st.builds(CosineNoiseSchedule, st.integers(2, 2000), st.floats(0, 0.1), st.floats(0.5, 0.9999), st.booleans()),
    st.builds(ExpNoiseSchedule, st.integers(2, 2000), st.booleans()),
    st.builds(CosineContinuousNoiseScheduler, st.floats(1e-2, 1e4)),
    st.builds(CosineGeneralNoiseScheduler, st.floats(1e-2, 1e4), st.floats(1e-3, 0.1), st.floats(1, 500), st.floats(0.1, 10)),
    st.builds(KarrasVENoiseScheduler, st.floats(1e-2, 1e4), st.floats(1e-4, 0.1), st.floats(1, 500), st.floats(1, 12)),
    st.builds(FlowNoiseScheduler, st.floats(1e-2, 1e4), st.floats(0.1, 10)))


@pytest.mark.filterwarnings("ignore:.*betas are cut")
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(schedule=any_schedule, a=unit, b=unit, x0=st.floats(-1, 1), z=st.floats(-3, 3))
def test_any_schedule_any_pair_of_times(schedule, a, b, x0, z):
    with jax.enable_x64(True):
        T = schedule.max_timesteps
        t, s = max(a, b) * T, min(a, b) * T
        assert schedule.log_snr(t) <= schedule.log_snr(s)
        u = schedule.sigma(t) / schedule.alpha(t)
        np.testing.assert_allclose(schedule.get_timesteps(u), t, rtol=1e-8, atol=1e-8 * T)
        if schedule.log_snr(s) - schedule.log_snr(t) < 1e-3 or schedule.sigma(s) < 1e-6: return  # the sum on a grid loses its digits
        xt = float(schedule.alpha(t)) * x0 + z * float(schedule.sigma(t))
        mean, variance = bayes_by_numbers(schedule, x0, xt, t, s)
        np.testing.assert_allclose(schedule.get_posterior_mean(np.full((1, 1), x0), np.full((1, 1), xt), t, s), mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(schedule.get_posterior_variance(t, s), variance, rtol=1e-5)
        assert 0 <= schedule.get_posterior_variance(t, s) <= schedule.sigma(s) ** 2
