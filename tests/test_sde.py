"""Laws of the SDE and of churn: f and g, the three classical processes, Euler–Maruyama, the corrector, Algorithm 2 of Karras et al."""
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.exact import GaussianMixture
from flaxdiff.samplers import DDIMSampler, EDMSampler, EulerMaruyamaSampler, HeunSampler, PredictorCorrectorSampler, SamplerState
from flaxdiff.sde import SubVPNoiseScheduler, VENoiseScheduler, VPNoiseScheduler, diffusion_squared, drift, score_from_eps, score_from_x0
from laws import plan_table, ALL_SCHEDULES, BOTH, EACH_KIND, MIXTURE, PREDICTORS, SCHEDULES, WAVE, Wave, ZERO_SNR, ends_pure, exact_sampler, is_discrete, over, sample_each, wave_sampler, x64

CLASSICAL = {"VP": VPNoiseScheduler(), "sub-VP": SubVPNoiseScheduler(), "VE": VENoiseScheduler()}
OTHERS = {"VP-T1000": VPNoiseScheduler(1000, 0.2, 12), "VP-constant": VPNoiseScheduler(1, 5, 5), "sub-VP-T1000": SubVPNoiseScheduler(1000), "VE-T10": VENoiseScheduler(10, 0.02, 300)}
EDM, LINEAR, COSINE = SCHEDULES["EDMNoiseScheduler"], SCHEDULES["LinearNoiseSchedule"], SCHEDULES["CosineContinuousNoiseScheduler"]
PURE = ZERO_SNR["CosineNoiseSchedule-zero-snr"]
V, KARRAS = PREDICTORS["VPredictor"], PREDICTORS["KarrasEDMPredictor"]
SHAPE = (2, 2, 2, 1)
x_of = lambda shape=SHAPE, seed=0, scale=1.0: scale * np.random.default_rng(seed).normal(size=shape)


denoise = jax.jit(MIXTURE.denoise)


def rates(schedule, t): return float(schedule.alpha(float(t))), float(schedule.sigma(float(t)))


def noises(seed, n, shape, each=1):
    "The draws of a sampler that splits its key `each` times a step, as the library does."
    key, out = jax.random.PRNGKey(seed), []
    for _ in range(n * each):
        key, z = jax.random.split(key)
        out.append(np.asarray(jax.random.normal(z, shape, jnp.float64)))
    return out


# f and g

@over((*EACH_KIND, *CLASSICAL), schedule={**ALL_SCHEDULES, **CLASSICAL, **OTHERS})
def test_f_and_g_are_the_derivatives(schedule, x64):
    "Against central differences of log α and of σ²; inside the intervals where the schedule is discrete."
    T = schedule.max_timesteps
    t = np.array([0.13, 0.37, 0.62, 0.88]) * T
    if is_discrete(schedule): t = np.floor(t) + 0.5
    h = 1e-6 * T
    slope = lambda f: (np.asarray(f(t + h)) - np.asarray(f(t - h))) / (2 * h)
    f = slope(lambda t: jnp.log(schedule.alpha(t)))
    g2 = slope(lambda t: schedule.sigma(t) ** 2) - 2 * f * np.asarray(schedule.sigma(t)) ** 2
    np.testing.assert_allclose(drift(schedule, t), f, rtol=1e-6, atol=1e-9 / T)
    np.testing.assert_allclose(diffusion_squared(schedule, t), g2, rtol=1e-5)
    one = drift(schedule, float(t[1])), diffusion_squared(schedule, float(t[1]))
    np.testing.assert_allclose(one, (f[1], g2[1]), rtol=1e-5, atol=1e-9 / T)
    assert np.shape(one[0]) == np.shape(one[1]) == ()


def test_the_papers_formulas(x64):
    "Song et al. 2021b: f = -β/2; g² = β, β (1 - exp(-2∫β)), dσ²/dt."
    t = np.linspace(1e-5, 1, 200)
    for T in (1, 1000):
        beta, B = (0.1 + 19.9 * t) / T, 0.1 * t + 19.9 * t ** 2 / 2
        vp, sub, ve = VPNoiseScheduler(T), SubVPNoiseScheduler(T), VENoiseScheduler(T)
        for s in (vp, sub): np.testing.assert_allclose(drift(s, t * T), -beta / 2, rtol=1e-14, atol=0)
        np.testing.assert_allclose(diffusion_squared(vp, t * T), beta, rtol=1e-13)
        np.testing.assert_allclose(diffusion_squared(sub, t * T), -beta * np.expm1(-2 * B), rtol=1e-9)
        np.testing.assert_allclose(diffusion_squared(ve, t * T), 1e-4 * 5000 ** (2 * t) * 2 * np.log(5000) / T, rtol=1e-13)
        np.testing.assert_array_equal(drift(ve, t * T), 0)


def test_the_score(x64):
    t, x = jnp.array([0.1, 0.5, 0.9]), jnp.array([[0.7], [-0.3], [1.4]])
    for s in CLASSICAL.values():
        a, sig = s.get_rates(t, (-1, 1))
        want = jax.vmap(jax.grad(lambda x, a, sig: MIXTURE.log_prob(x[None], a, sig)[0]))(x, a[:, 0], sig[:, 0])
        x0 = MIXTURE.denoise(x, a, sig)
        np.testing.assert_allclose(score_from_x0(s, x, x0, t), want, rtol=1e-9)
        np.testing.assert_allclose(score_from_eps(s, (x - a * x0) / sig, t), want, rtol=1e-9)


# The three processes

@over(schedule={**CLASSICAL, **OTHERS})
def test_the_classical_schedules_are_schedules(schedule):
    T, low = schedule.max_timesteps, schedule.min_time
    t = low + (T - low) * np.linspace(0, 1, 1001)
    for on, tol in ((False, 1e-4), (True, 1e-11)):
        with jax.enable_x64(on):
            alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
            assert np.all(alpha > 0) and np.all(sigma > 0) and np.all(np.diff(sigma / alpha) > 0) and alpha.dtype == (np.float64 if on else np.float32)
            np.testing.assert_allclose(schedule.get_timesteps(sigma / alpha), t, rtol=tol, atol=2e-7 * T)
            assert np.isfinite(float(schedule.sigma(-0.9e-5 * T))) and np.isfinite(float(schedule.sigma((1 + 0.9e-5) * T)))
            grad = jax.vmap(jax.grad(schedule.sigma))(jnp.asarray(t))
            assert np.all(np.isfinite(grad)) and np.all(grad[:-1] > 0)
    if not schedule.variance_exploding:
        name = type(schedule).__name__
        np.testing.assert_allclose(sigma, 1 - alpha ** 2 if name.startswith("Sub") else np.sqrt(1 - alpha ** 2), rtol=1e-6)
    with pytest.raises(ValueError, match="t must"): schedule.alpha(1.1 * T)


@pytest.mark.parametrize("bad", [lambda: VPNoiseScheduler(beta_min=0), lambda: VPNoiseScheduler(beta_max=0.05), lambda: VENoiseScheduler(sigma_min=0),
                                 lambda: VENoiseScheduler(sigma_min=9, sigma_max=8), lambda: SubVPNoiseScheduler(beta_max=np.inf), lambda: VENoiseScheduler(sigma_max=np.nan)])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="^(beta|sigma)_(min|max) must"): bad()


# Euler–Maruyama

@over(schedule={"VP": CLASSICAL["VP"], "linear": LINEAR, "EDM": EDM})
def test_the_step_is_equation_2(schedule, x64):
    "y_s = y_t - (u_t² - u_s²) ε̂/u_t + √(u_t² - u_s²) z, two steps in float64."
    sampler = exact_sampler(EulerMaruyamaSampler, schedule, V)
    with_u = [float(schedule.get_timesteps(u)) for u in (2.0, 1.1, 0.7)]
    a, s = rates(schedule, with_u[0])
    x = want = np.hypot(a, s) * x_of()
    for t, r, z in zip(with_u, with_u[1:], noises(4, 2, SHAPE)):
        (a, s), (b, q) = rates(schedule, t), rates(schedule, r)
        eps = (want - a * np.asarray(denoise(want, a, s))) / s
        u, v = s / a, q / b
        want = b * (want / a - (u ** 2 - v ** 2) * eps / u + np.sqrt(u ** 2 - v ** 2) * z)
    np.testing.assert_allclose(sampler.sample(x, with_u, 4, denoise_final=False), want, rtol=1e-9, atol=1e-10)


def variance_by_plan(schedule, N, v=0.25):
    "Variance of y = x/α at the last level for N(0, v) data, from the sampler's own coefficients; the start is exact."
    u = np.geomspace(8, 0.3, N)
    times = jnp.asarray(schedule.get_timesteps(u))
    sampler = EulerMaruyamaSampler(WAVE, {}, schedule, V)
    V_now, W = u[0] ** 2 + v, u ** 2 + v
    for (alpha, kept, fresh), ut, Wt in zip(zip(*map(np.asarray, jax.jit(lambda times: plan_table(sampler, times))(times))), u, W):
        slope = v / Wt + kept / alpha * ut / Wt  # x̂₀ = v y/W, ε̂ = u y/W
        V_now = slope ** 2 * V_now + (fresh / alpha) ** 2
    return V_now, W[-1], u, W


@over(schedule={"sub-VP": CLASSICAL["sub-VP"], "EDM": EDM})
def test_weak_order_1_and_the_error_of_a_step(schedule, x64):
    errors = []
    for N in (65, 129):
        got, due, u, W = variance_by_plan(schedule, N)
        want = W[0]
        for a, b in zip(W[:-1], W[1:]): want = (b / a) ** 2 * want + a - b
        assert np.isclose(got, want, rtol=1e-10) and got > due
        errors.append(got - due)
    assert abs(np.log2(errors[0] / errors[1]) - 1) < 0.06


@over(schedule={"VP": CLASSICAL["VP"], "linear": LINEAR})
def test_mean_and_variance_of_samples(schedule):
    n, mean, v = 2 ** 16, 0.4, 0.09
    with jax.enable_x64(True): times = [float(schedule.get_timesteps(u)) for u in (3.0, 2.0, 1.2, 0.6)]
    a, s = rates(schedule, times[0])
    m, var = 1.0, 0.5 * (s / a) ** 2  # of y, off the marginal
    x = a * (m + np.sqrt(var) * jax.random.normal(jax.random.PRNGKey(1), (n, 1)))
    end = np.asarray(exact_sampler(EulerMaruyamaSampler, schedule, V, GaussianMixture([mean], v ** 0.5)).sample(x, times, 2, denoise_final=False), np.float64)
    W = [rates(schedule, t)[1] ** 2 / rates(schedule, t)[0] ** 2 + v for t in times]
    for p, q in zip(W[:-1], W[1:]): m, var = mean + q / p * (m - mean), (q / p) ** 2 * var + p - q
    y = end / rates(schedule, times[-1])[0]
    assert abs(y.mean() - m) < 5 * np.sqrt(var / n) and abs(y.var() / var - 1) < 5 * np.sqrt(2 / n)


# The corrector

def algorithm_5(schedule, x, times, z, r, M=1):
    "Predictor of equation 2, corrector of Song et al. 2021b (algorithm 5; α_i = 1 makes it algorithm 4), in NumPy, image by image."
    z = iter(z)
    for t, s in zip(times[:-1], times[1:]):
        (a, q), (b, p) = rates(schedule, t), rates(schedule, s)
        score = lambda x, a, q: (a * np.asarray(denoise(x, a, q)) - x) / q ** 2
        delta = b ** 2 * (q ** 2 / a ** 2 - p ** 2 / b ** 2)
        x = b / a * x + delta * a / b * score(x, a, q) + np.sqrt(delta) * next(z)
        alpha_i = (b / rates(schedule, max(s - schedule.max_timesteps / 1000, 0))[0]) ** 2
        for _ in range(M):
            g, w = score(x, b, p), next(z)
            size = [min(2 * alpha_i * (r * np.linalg.norm(w[i]) / np.linalg.norm(g[i])) ** 2, b ** 2 + p ** 2) for i in range(len(x))]
            size = np.reshape(size, (-1, 1, 1, 1))
            x = x + size * g + np.sqrt(2 * size) * w
    return x


@pytest.mark.parametrize("schedule, M", [(LINEAR, 2), (CLASSICAL["VE"], 1), (CLASSICAL["VP"], 1)], ids=["linear-2", "VE-1", "VP-1"])
def test_the_corrector_is_songs(schedule, M, x64):
    times = [650.0, 420.0, 300.0] if schedule is LINEAR else [0.6, 0.45, 0.4]
    x = np.hypot(*rates(schedule, times[0])) * x_of((3, 4, 4, 1))
    sampler = exact_sampler(PredictorCorrectorSampler, schedule, V, options=(("corrector_steps", M), ("snr", 0.25)))
    want = algorithm_5(schedule, x, times, noises(9, 2, x.shape, 1 + M), 0.25, M)
    np.testing.assert_allclose(sampler.sample(x, times, 9, denoise_final=False), want, rtol=1e-8, atol=1e-9)
    if schedule is LINEAR:  # α_i is 1 - β_i
        assert np.isclose((LINEAR.alpha(300) / LINEAR.alpha(299)) ** 2, 1 - np.linspace(1e-4, 0.02, 1000)[299], rtol=1e-12)


def test_langevins_stationary_law():
    "Many steps at one level keep N(0, W) up to the factor 1/(1 - r²) of a finite step (a = 2 r² W/V), and bring anything else there."
    schedule, v, r, D = CLASSICAL["VP"], 0.25, 0.2, 400
    sampler = exact_sampler(PredictorCorrectorSampler, schedule, V, GaussianMixture([0.0], v ** 0.5), (("snr", r),))
    a, s = rates(schedule, 0.3)
    W = a ** 2 * v + s ** 2
    level, ratio = sampler.level(jnp.float32(0.3)), float(schedule.alpha(0.3) / schedule.alpha(0.299))
    state = lambda key: SamplerState(key, next_level=level, denoise=lambda x, level: (v * a / W * x, s / W * x))
    step = jax.jit(lambda x, key: sampler.correct(x, ratio, state(key))[0])
    x = 2 * np.sqrt(W) * jax.random.normal(jax.random.PRNGKey(0), (100, D))
    for k in range(150): x = step(x, jax.random.PRNGKey(k))
    alpha_i = (a / rates(schedule, 0.299)[0]) ** 2
    assert abs(float(x.var()) / W * (1 - alpha_i * r ** 2) - 1) < 5 * np.sqrt(2 / (100 * D)) + 4 / D


def test_an_image_is_corrected_by_itself():
    "Not by the mean length over the batch: a neighbour a thousand times larger changes nothing."
    sampler = wave_sampler(PredictorCorrectorSampler, LINEAR, V)
    x = jnp.asarray(x_of(), jnp.float32)
    steps = [900.0, 500.0, 100.0]
    alone, beside = sampler.sample(x, steps, 3), sampler.sample(x.at[1].multiply(1000), steps, 3)
    np.testing.assert_array_equal(alone[0], beside[0])


def test_no_corrector_is_euler_maruyama():
    x, steps = jnp.asarray(x_of(), jnp.float32), [1000.0, 300.0, 20.0]
    none = wave_sampler(PredictorCorrectorSampler, LINEAR, V, options=(("corrector_steps", 0),))
    np.testing.assert_array_equal(none.sample(x, steps, 1), wave_sampler(EulerMaruyamaSampler, LINEAR, V).sample(x, steps, 1))


class Zero:
    "A network that sees no noise: the score is 0."
    def apply(self, params, x, temb): return 0 * x


def test_a_score_of_zero_is_no_harm():
    out = PredictorCorrectorSampler(Zero(), {}, LINEAR, PREDICTORS["EpsilonPredictor"], corrector_steps=2).sample(jnp.ones(SHAPE), [900.0, 400.0, 10.0], 0, denoise_final=False)
    assert np.all(np.isfinite(out)) and np.abs(out).max() < 200


@pytest.mark.parametrize("options, name", [(dict(corrector_steps=-1), "corrector_steps"), (dict(corrector_steps=1.5), "corrector_steps"), (dict(corrector_steps=True), "corrector_steps"),
                                           (dict(snr=0), "snr"), (dict(snr=np.nan), "snr"), (dict(snr=np.inf), "snr")])
def test_bad_corrector_options(options, name):
    with pytest.raises(ValueError, match=name): PredictorCorrectorSampler(WAVE, {}, LINEAR, **options)


# Churn

def algorithm_2(denoise, x, sigmas, z, S_churn, S_tmin, S_tmax, S_noise):
    "Karras et al. 2022, algorithm 2, in NumPy; the noise of step i is z[i]."
    N = len(sigmas)
    for i, (t, s) in enumerate(zip(sigmas, [*sigmas[1:], 0.0])):
        gamma = min(S_churn / N, np.sqrt(2) - 1) if S_tmin <= t <= S_tmax else 0.0
        hat = t + gamma * t
        if gamma: x = x + np.sqrt(hat ** 2 - t ** 2) * S_noise * z[i]
        d = (x - denoise(x, hat)) / hat
        euler = x + (s - hat) * d
        x = euler if s == 0 else x + (s - hat) * (d / 2 + (euler - denoise(euler, s)) / s / 2)
    return x


@pytest.mark.parametrize("options", [(10.0, 0.05, 50.0, 1.003), (1e6, 0.05, np.inf, 1.0), (2.0, 0.05, 80.0, 0.9)], ids=["usual", "limit", "to the top"])
def test_churn_is_algorithm_2(options, x64):
    N, names = 18, ("S_churn", "S_tmin", "S_tmax", "S_noise")
    ramp = (80 ** (1 / 7) + np.arange(N) / (N - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sampler = exact_sampler(EDMSampler, EDM, KARRAS, options=tuple(zip(names, options)))
    x = x_of(scale=80)
    want = algorithm_2(jax.jit(lambda x, s: MIXTURE.denoise(x, 1.0, s)), x, ramp, noises(7, N - 1, SHAPE), *options)
    np.testing.assert_allclose(sampler.sample(x, sampler.make_steps(N), 7), want, rtol=1e-9, atol=1e-11)


@over(schedule={"EDM": EDM, "zero-snr": PURE})
def test_no_churn_is_heun_bit_for_bit(schedule):
    steps = wave_sampler(HeunSampler, schedule, V).make_steps(6)
    x = jnp.asarray(x_of(), jnp.float32)
    heun = wave_sampler(HeunSampler, schedule, V).sample(x, steps, 0)
    np.testing.assert_array_equal(wave_sampler(EDMSampler, schedule, V).sample(x, steps, 0), heun)
    nowhere = wave_sampler(EDMSampler, schedule, V, options=(("S_churn", 30.0), ("S_tmin", 1e9)))
    np.testing.assert_allclose(nowhere.sample(x, steps, 0), heun, rtol=1e-5, atol=1e-6)


def churn_of(plan): return plan["higher"].time, plan["keep"], plan["add"]


def test_the_plan_keeps_what_is_not_churned():
    "Exactly (t, 1, 0) outside [S_tmin, S_tmax], whose ends count as inside; û = (1 + γ) u within."
    for schedule, top in ((EDM, 3.0), (COSINE, 3.0)):
        sampler = EDMSampler(WAVE, {}, schedule, V, S_churn=5.0, S_tmin=0.3, S_tmax=top)
        times = jnp.asarray([schedule.max_timesteps, *(float(schedule.get_timesteps(u)) for u in (top, 1.0, 0.3, 0.1)), schedule.min_time])
        t_hat, keep, add = map(np.asarray, churn_of(plan_table(sampler, times)))
        out, inside = [0, 4], [1, 2, 3]
        np.testing.assert_array_equal(t_hat[out], times[jnp.array(out)])
        assert np.all(keep[out] == 1) and np.all(add[out] == 0) and np.all(add[inside] > 0)
        u = lambda t: np.asarray(schedule.sigma(t) / schedule.alpha(t))
        np.testing.assert_allclose(u(t_hat[inside]) / u(times[jnp.array(inside)]), 1 + np.sqrt(2) - 1, rtol=1e-4)


class Told:
    def __init__(self): self.seen = []
    def apply(self, params, x, temb):
        jax.debug.callback(lambda t: self.seen.append(float(t[0])), temb, ordered=True)
        return jnp.tanh(x)


def told(schedule, N, **options):
    model = Told()
    sampler = EDMSampler(model, {}, schedule, V, **options)
    sampler.sample(jnp.ones(SHAPE), sampler.make_steps(N), 0).block_until_ready(); jax.effects_barrier()
    return np.array(model.seen)


def test_the_network_is_told_the_level_it_gets():
    "σ̂ above σ_max on the Karras ramp; at most T where a schedule ends there; 2N - 1 calls."
    seen = told(EDM, 5, S_churn=1.0)
    ramp = np.asarray(EDM.sigma(np.linspace(1, 0, 5)))
    want = np.stack([1.2 * ramp[:-1], ramp[1:]], 1).ravel()
    np.testing.assert_allclose(np.exp(4 * seen), [*want, ramp[-1]], rtol=1e-4)
    for schedule in (COSINE, LINEAR, CLASSICAL["VE"]):
        seen = told(schedule, 5, S_churn=1.0)
        assert len(seen) == 9 and seen.max() == float(schedule.network_time(schedule.max_timesteps)) == seen[0] and seen[2] > seen[1]


def test_churn_on_vp_is_noise_in_y(x64):
    "x̂ = α̂ (x/α + S_noise √(û² - u²) z), told the time of û."
    sampler = EDMSampler(WAVE, Wave.params, LINEAR, V, S_churn=0.6, S_noise=1.1)
    times = jnp.array([700.0, 400.0, 100.0])
    (at, st_), x, z = rates(LINEAR, 700), x_of(), noises(2, 1, SHAPE)[0]
    levels = sampler.level(times)
    state = SamplerState(jax.random.PRNGKey(2), plan=sampler.plan(levels, 0, 1))
    x_hat, higher, _ = sampler.before_denoising(x, levels[0], state)
    ah, sh = rates(LINEAR, higher.time)
    assert np.isclose(sh / ah, 1.2 * st_ / at, rtol=1e-9)
    np.testing.assert_allclose(x_hat, ah * (x / at + 1.1 * np.sqrt(1.44 - 1) * st_ / at * z), rtol=1e-9)


def test_churn_keeps_the_variance_by_its_recursion():
    "N(0, v) on EDM's ramp, off the marginal at the start, with S_noise ≠ 1."
    n, v, N, S_noise = 2 ** 16, 0.25, 12, 1.05
    sigmas = np.asarray(EDM.sigma(np.linspace(1, 0, N)), np.float64)
    k, var = lambda s: s / (s ** 2 + v), 50.0 ** 2
    for t, s in zip(sigmas[:-1], sigmas[1:]):
        hat = t * (1 + 3 / N)
        A = 1 + (s - hat) / 2 * (k(hat) + k(s) * (1 + (s - hat) * k(hat)))
        var = A ** 2 * (var + S_noise ** 2 * (hat ** 2 - t ** 2))
    sampler = exact_sampler(EDMSampler, EDM, KARRAS, GaussianMixture([0.0], v ** 0.5), (("S_churn", 3.0), ("S_noise", S_noise)))
    end = sampler.sample(50 * jax.random.normal(jax.random.PRNGKey(0), (n, 1)), sampler.make_steps(N), 1, denoise_final=False)
    assert abs(float(end.var()) / var - 1) < 5 * np.sqrt(2 / n) + 1e-3


@pytest.mark.parametrize("options, name", [(dict(S_churn=-1), "S_churn"), (dict(S_churn=np.inf), "S_churn"), (dict(S_churn=np.nan), "S_churn"), (dict(S_tmin=-1), "S_tmin"),
                                           (dict(S_tmin=2, S_tmax=1), "S_tmax"), (dict(S_noise=-1), "S_noise"), (dict(S_noise=np.nan), "S_noise")])
def test_bad_churn_options(options, name):
    with pytest.raises(ValueError, match=name): EDMSampler(WAVE, {}, EDM, **options)


# All of them

NEW = {"EM": (EulerMaruyamaSampler, ()), "PC": (PredictorCorrectorSampler, ()), "churn": (EDMSampler, (("S_churn", 20.0),))}


@over(("VE", "sub-VP"), kind=NEW, schedule={**CLASSICAL, **SCHEDULES, "zero-snr": PURE})
def test_finite(kind, schedule):
    "On the processes that the general laws do not meet, and churned; N = 1 … 50, networks in float32 and bfloat16."
    cls, options = kind
    x = jnp.asarray(x_of(scale=float(schedule.sigma(schedule.max_timesteps))), jnp.float32)
    lists = [wave_sampler(cls, schedule, V, options=options).make_steps(n) for n in range(1, 51)]
    assert np.all(np.isfinite(sample_each(cls, schedule, [V], BOTH, x, lists, options=options)))


@over(kind=NEW)
def test_from_pure_noise_the_first_step_is_ddims_and_gradients_are_finite(kind):
    cls, options = kind
    x, T = jnp.asarray(x_of(), jnp.float32), PURE.max_timesteps
    sampler = wave_sampler(cls, PURE, V, options=options)
    ddim = wave_sampler(DDIMSampler, PURE, V).sample(x, [T, 0.7 * T], 0, denoise_final=False)
    np.testing.assert_allclose(sampler.sample(x, [T, 0.7 * T], 0, denoise_final=False), ddim, rtol=2e-5, atol=2e-6)
    times = jnp.linspace(0.9, 0.1, 4) * T
    total = lambda h: sum(jnp.sum(row) for row in jax.tree.leaves(plan_table(sampler, jnp.concatenate([jnp.array([T], jnp.float32), h]), 1)))
    assert np.all(np.isfinite(jax.jit(jax.grad(total))(times))) and np.isfinite(total(jnp.array([500.0, 3.0])))


@over(kind={**NEW, "PC2": (PredictorCorrectorSampler, (("corrector_steps", 2),))})
def test_calls(kind):
    cls, options = kind
    model, options = Told(), dict(options)
    M = options.get("corrector_steps", 1) if cls is PredictorCorrectorSampler else int(cls is EDMSampler)
    sampler = cls(model, {}, EDM, V, **options)
    for N in (1, 3):
        model.seen.clear()
        sampler.sample(jnp.ones(SHAPE), sampler.make_steps(N), 0).block_until_ready(); jax.effects_barrier()
        assert len(model.seen) == N + M * (N - 1)


def test_scores_do_not_broadcast_by_accident():
    schedule, x = CLASSICAL["VP"], np.zeros((4, 2, 2, 1))
    for bad in (lambda: score_from_eps(schedule, x, np.full(3, 0.5)), lambda: score_from_eps(schedule, x, np.full((2, 2), 0.5)), lambda: score_from_x0(schedule, x, x[:1], 0.5),
                lambda: score_from_x0(schedule, x, np.zeros((4, 2, 2, 3)), 0.5), lambda: score_from_eps(schedule, x.astype(int), 0.5)):
        with pytest.raises(ValueError, match="(t|x0|eps) must"): bad()


def test_the_old_address_has_every_name():
    "`flaxdiff.sde` hands on what two modules define."
    import flaxdiff.sde, flaxdiff.samplers.sde, flaxdiff.schedulers.sde
    for name in flaxdiff.sde.__all__:
        assert getattr(flaxdiff.sde, name) is getattr(flaxdiff.samplers.sde if name.endswith("Sampler") else flaxdiff.schedulers.sde, name)
    assert set(flaxdiff.sde.__all__) == {*flaxdiff.samplers.sde.__all__, *flaxdiff.schedulers.sde.__all__}


def test_either_module_may_come_first():
    "The face, the package and the modules, in any order."
    for line in ("import flaxdiff.sde", "from flaxdiff.samplers import EulerMaruyamaSampler; import flaxdiff.sde as s; assert s.EulerMaruyamaSampler is EulerMaruyamaSampler"):
        subprocess.run([sys.executable, "-c", line + "; import flaxdiff.samplers as p; assert all(hasattr(p, n) for n in p.__all__)"], check=True, timeout=120)
