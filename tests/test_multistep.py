"""Laws of the multistep and exponential solvers: their weights, what equals what, their orders and calls, their SDE forms, zero terminal SNR."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from flaxdiff.exact import ExactModel, GaussianMixture
from flaxdiff.samplers import (DDIMSampler, DEISSampler, DPMSolverPlusPlusSampler, DPMSolverSampler, EulerSampler, LMSSampler, MultiStepDPM, PLMSSampler,
                               PNDMSampler, UniPCSampler, karras_grid)
from flaxdiff.samplers.multistep import MultistepSampler, step_weights
from laws import plan_table, MIXTURE, POINT, PREDICTORS, SCHEDULES, WAVE, ZERO_SNR, Wave, exact_sampler, x64

EDM, LINEAR, ZERO = SCHEDULES["EDMNoiseScheduler"], SCHEDULES["LinearNoiseSchedule"], ZERO_SNR["CosineNoiseSchedule-zero-snr"]
V = PREDICTORS["VPredictor"]
X = np.linspace(-2, 2, 6).reshape(6, 1)


def make(cls, schedule=EDM, data=MIXTURE, **options): return exact_sampler(cls, schedule, V, data, tuple(options.items()))
def run(cls, steps, x=X, schedule=EDM, data=MIXTURE, rng=0, **options):
    return np.asarray(make(cls, schedule, data, **options).sample(jnp.asarray(x), np.asarray(steps), rng, denoise_final=False))


@functools.lru_cache
def case(n, u0=8.0, u1=0.12, equal=False, graded=0):
    "(times, x at the first, where the exact ODE leads by the last)."
    at = lambda u: np.asarray(EDM.get_timesteps(np.asarray(u, float)))
    times = at(np.linspace(u0, u1, n + 1)) if equal else karras_grid(EDM, float(at(u0)), float(at(u1)), n + 1)
    if graded:
        parts = np.concatenate([[0], 0.5 ** np.arange(int(np.ceil((graded - 1) * np.log2(n))), -1, -1)])
        times = np.concatenate([times[0] + parts * (times[1] - times[0]), times[2:]])
    return times, u0 * X, np.asarray(MIXTURE.ode_solution(u0 * X, (1.0, u0), (1.0, u1)))


def order(cls, ns=(64, 128), u0=8.0, equal=False, graded=0, **options):
    errors = []
    for n in ns:
        times, x, truth = case(n, u0, equal=equal, graded=graded)
        errors.append(np.sqrt(np.mean((run(cls, times, x, **options) - truth) ** 2)))
    return np.log2(errors[0] / errors[1])


# Weights

def all_weights(z, ages, **how): return jnp.stack([step_weights(z, i, ages, **how) for i in range(len(z) - 1)])


@pytest.mark.parametrize("size, rate", [(1, 0), (1, -1), (2, -2), (1, 1)], ids=["1", "data", "sde", "noise"])
def test_weights_are_the_integrals(size, rate, x64):
    "Of the Lagrange polynomials through the levels known so far, the level ahead too; against adaptive quadrature."
    z = np.array([0.3, 0.9, 1.1, 2.4, 5.0, 5.2])
    for first in (0, 1):
        for ages in ((0, 1, 2, 3), (-1, 0, 1)):
            got = np.asarray(all_weights(jnp.asarray(z), ages, kernel=lambda ahead: size * jnp.exp(rate * ahead), first=first))
            for n in range(first, 5):
                known = [n - age for age in ages if n - age >= first]
                for j, age in enumerate(ages):
                    ell = lambda v: np.prod([(v - z[k]) / (z[n - age] - z[k]) for k in known if k != n - age])
                    want = quad(lambda v: size * np.exp(rate * (z[n + 1] - v)) * ell(v), z[n], z[n + 1], epsabs=1e-12)[0] if n - age in known else 0
                    np.testing.assert_allclose(got[n, j], want, rtol=1e-9, atol=1e-11)


def test_weights_of_equal_steps(x64):
    w = np.asarray(all_weights(jnp.arange(6.0), range(4)))
    np.testing.assert_allclose(w * [[1], [2], [12], [24], [24]], [[1, 0, 0, 0], [3, -1, 0, 0], [23, -16, 5, 0], [55, -59, 37, -9], [55, -59, 37, -9]], atol=1e-11)


def test_weights_have_finite_gradients_and_need_no_steps():
    for schedule, cls, o in ((ZERO, UniPCSampler, {"order": 3}), (ZERO, DPMSolverPlusPlusSampler, {"stochastic": True}), (LINEAR, DPMSolverSampler, {"order": 3})):
        sampler, T = cls(WAVE, Wave.params, schedule, V, **o), schedule.max_timesteps
        total = lambda t, first=0: sum(jnp.sum(v.astype(t.dtype)) for v in jax.tree.leaves(plan_table(sampler, t, first)))
        with_first = lambda rest: total(jnp.concatenate([jnp.array([T], rest.dtype), rest]), int(schedule is ZERO))  # from pure noise the step is DDIM's
        for f, times in ((with_first, jnp.linspace(0.9 * T, 1, 4)), (total, jnp.array([0.5 * T]))):
            value, slope = jax.jit(jax.value_and_grad(f))(times)
            assert np.isfinite(value) and np.all(np.isfinite(slope)), (cls, len(times))


# What equals what

STEPS = np.array([0.85, 0.8, 0.6, 0.45, 0.4, 0.2, 0.1])

def same(a, b): np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


def test_order_one_is_ddim(x64):
    ddim = run(EulerSampler, STEPS)
    for cls in (LMSSampler, DEISSampler, DPMSolverSampler, DPMSolverPlusPlusSampler): same(run(cls, STEPS, order=1), ddim)
    same(run(DPMSolverPlusPlusSampler, STEPS, order=1, multistep=False), ddim)
    same(run(UniPCSampler, STEPS, order=1, corrector=False), ddim)


def test_deis_in_rho_is_lms(x64):
    for p in (1, 2, 3, 4): same(run(DEISSampler, STEPS, order=p, variable="rho"), run(LMSSampler, STEPS, order=p))
    assert np.abs(run(DEISSampler, STEPS, order=3) - run(LMSSampler, STEPS, order=3)).max() > 1e-5


def test_unip_is_the_multistep_solver(x64):
    for p in (2, 3): same(run(UniPCSampler, STEPS, order=p, corrector=False), run(DPMSolverPlusPlusSampler, STEPS, order=p))


def test_one_point_is_exact_in_one_step(x64):
    s = float(EDM.sigma(0.1))
    for cls, o in ((LMSSampler, {}), (PLMSSampler, {}), (PNDMSampler, {}), (MultiStepDPM, {}), (DEISSampler, {}), (DPMSolverSampler, {"order": 3}),
                   (DPMSolverPlusPlusSampler, {"order": 3}), (DPMSolverPlusPlusSampler, {"order": 3, "multistep": False}), (UniPCSampler, {"order": 3})):
        np.testing.assert_allclose(run(cls, STEPS, 0.3 + float(EDM.sigma(STEPS[0])) * X, data=POINT, **o), 0.3 + s * X, atol=1e-12)


def published(p, sigmas, x, fix=2.0):
    "DPM-Solver++(pM) as in its code, with the second difference times `fix`."
    denoise = lambda x, s: np.asarray(MIXTURE.denoise(jnp.asarray(x), 1.0, s))
    lam, m = -np.log(sigmas), []
    for n, h in enumerate(np.diff(lam)):
        m, r = [denoise(x, sigmas[n]), *m], [(lam[n - k] - lam[n - k - 1]) / h for k in range(min(n, 2))]
        x = sigmas[n + 1] / sigmas[n] * x - np.expm1(-h) * m[0]
        if n == 1 or n and p == 2: x = x - np.expm1(-h) / (2 * r[0]) * (m[0] - m[1])
        elif n > 1 and p == 3:
            d0, d1 = (m[0] - m[1]) / r[0], (m[1] - m[2]) / r[1]
            x = x + (np.expm1(-h) / h + 1) * (d0 + r[0] / sum(r) * (d0 - d1)) - ((np.expm1(-h) + h) / h ** 2 - 0.5) * fix * (d0 - d1) / sum(r)
    return x


def test_multistep_is_the_published_one_but_for_a_factor(x64):
    sigmas = np.asarray(EDM.sigma(STEPS))
    for p in (2, 3): np.testing.assert_allclose(run(DPMSolverPlusPlusSampler, STEPS, order=p), published(p, sigmas, X), atol=1e-13)
    assert np.abs(run(DPMSolverPlusPlusSampler, STEPS, order=3) - published(3, sigmas, X, 1.0)).max() > 1e-4


# Orders and calls

@pytest.mark.parametrize("cls, due, options", [
    (LMSSampler, 2, {"order": 2, "graded": 3}), (PLMSSampler, 3, {"equal": True, "u0": 0.5, "ns": (128, 256)}), (PNDMSampler, 4, {"equal": True, "u0": 0.5}),
    (DPMSolverSampler, 3, {"order": 3}), (DPMSolverPlusPlusSampler, 3, {"order": 3, "graded": 3}), (DPMSolverPlusPlusSampler, 2, {"multistep": False}),
    (DPMSolverPlusPlusSampler, 3, {"order": 3, "multistep": False}), (UniPCSampler, 2, {"order": 1}), (UniPCSampler, 4, {"order": 3, "graded": 3}),
    (UniPCSampler, 3, {"order": 3, "corrector": False, "graded": 3})])
def test_order_with_options(cls, due, options, x64):
    assert abs(order(cls, **options) - due) < 0.15


def test_calls_with_options():
    for schedule, cls, calls, o in ((ZERO, MultiStepDPM, 7, {}), (ZERO, PNDMSampler, 15, {}), (EDM, DPMSolverSampler, 16, {"order": 3}),
                                    (EDM, DPMSolverPlusPlusSampler, 11, {"multistep": False, "stochastic": True}), (EDM, UniPCSampler, 6, {"order": 3})):
        model = Wave(count_calls=True)
        sampler = cls(model, Wave.params, schedule, V, **o)
        jax.block_until_ready(sampler.sample(jnp.ones((1, 2)), sampler.make_steps(6), 0)); jax.effects_barrier()
        assert model.calls == calls, cls


# The SDE

def test_sde_of_order_one_is_ddim_eta_one(x64):
    for multistep in (True, False):
        got = run(DPMSolverPlusPlusSampler, STEPS, rng=3, order=1, multistep=multistep, stochastic=True)
        np.testing.assert_allclose(got, run(DDIMSampler, STEPS, rng=3, eta=1.0), atol=1e-12)


def gaussian_variance(order, multistep, n, eta=1.0, v=0.25, u0=3.0, u1=0.1):
    "(variance after n steps on N(0, v), by recursion over (x, past x̂₀); the exact one; the times)."
    times = karras_grid(EDM, *(float(EDM.get_timesteps(u)) for u in (u0, u1)), n + 1)
    solver = make(DPMSolverPlusPlusSampler, order=order, multistep=multistep, stochastic=True, eta=eta)
    plan = jax.tree.map(np.asarray, jax.jit(lambda times: plan_table(solver, times))(times))
    sig, gain, p = np.asarray(EDM.sigma(times)), lambda s: v / (v + s * s), order if multistep else 1
    unit, cov = np.eye(p + 2), np.zeros((p, p))  # columns: x, the past x̂₀, two fresh draws
    cov[0, 0] = v + u0 ** 2
    for k in range(n):
        f = unit[0] * gain(sig[k])
        eps, g = (unit[0] - f) / sig[k], f
        if multistep:
            kept = plan["kept"][k]
            x = f + sig[k + 1] * (kept * eps + np.sqrt(1 - kept ** 2) * unit[p]) + sum(w * (unit[j + 1] - f) for j, w in enumerate(plan["weights"][k]))
        else:
            for i, (goal, weight, kept) in enumerate(plan):
                eps = kept[k] * eps + np.sqrt(1 - kept[k] ** 2) * unit[p + i]
                x = f + goal.sigma[k] * eps + weight[k] * (g - f)
                g = gain(goal.sigma[k]) * x
        rows = np.vstack([x, f, unit[1:p - 1]])[:p]
        cov = rows[:, :p] @ cov @ rows[:, :p].T + rows[:, p:] @ rows[:, p:].T
    return cov[0, 0], v + u1 ** 2, times


@pytest.mark.parametrize("p, multistep, eta, due", [(1, True, 1, 1), (2, True, 1, 2), (3, True, 1, 2), (2, False, 1, 2),
                                                    (1, True, 0.5, 1), (2, True, 0.5, 2), (2, False, 0.3, 2)])
def test_weak_order_of_the_sde(p, multistep, eta, due, x64):
    "With all of the noise renewed, or a part: the variance tends to that of the data's own marginal."
    errors = [np.subtract(*gaussian_variance(p, multistep, n, eta)[:2]) for n in (64, 128)]
    assert abs(np.log2(errors[0] / errors[1]) - due) < 0.15 and abs(errors[1]) < 1e-2


def test_without_eta_the_sde_is_the_ode(x64):
    for multistep, orders in ((True, (1, 2, 3)), (False, (1, 2))):
        for p in orders:
            ode = run(DPMSolverPlusPlusSampler, STEPS, order=p, multistep=multistep)
            np.testing.assert_array_equal(run(DPMSolverPlusPlusSampler, STEPS, order=p, multistep=multistep, stochastic=True, eta=0), ode)


def test_s_noise_multiplies_what_is_new(x64):
    for multistep in (True, False):
        ends = [run(DPMSolverPlusPlusSampler, STEPS[:2], rng=4, multistep=multistep, order=1, stochastic=True, eta=0.6, s_noise=s) for s in (0, 1, 2)]
        assert np.abs(ends[1] - ends[0]).min() > 1e-3
        np.testing.assert_allclose(ends[2] - ends[0], 2 * (ends[1] - ends[0]), rtol=1e-9)


@pytest.mark.parametrize("p, multistep, eta", [(2, True, 1), (3, True, 1), (2, False, 1), (2, True, 0.5), (2, False, 0.5)])
def test_samples_of_the_sde_obey_the_recursion(p, multistep, eta, x64):
    want, _, times = gaussian_variance(p, multistep, 6, eta)
    x = np.random.default_rng(0).normal(size=(40_000, 1)) * np.sqrt(0.25 + 9)
    got = run(DPMSolverPlusPlusSampler, times, x, data=GaussianMixture([0.0], 0.5), rng=2, order=p, multistep=multistep, stochastic=True, eta=eta).var()
    assert abs(got / want - 1) < 5 * np.sqrt(2 / 40_000)


# The order at the end

@pytest.mark.parametrize("cls, p", [(LMSSampler, 4), (PLMSSampler, 4), (MultiStepDPM, 3), (DEISSampler, 3), (DPMSolverPlusPlusSampler, 3), (UniPCSampler, 3)])
def test_lower_order_final_comes_down_to_one_slope(cls, p, x64):
    "One slope in the last step, two in the one before, three before that; earlier nothing changes."
    o = {} if cls in (PLMSSampler, MultiStepDPM) else {"order": p}
    fewer = {PLMSSampler: None, MultiStepDPM: (LMSSampler, {"order": 2})}.get(cls, (cls, {"order": 2}))
    table = lambda cls, o: np.asarray(plan_table(make(cls, **o), jnp.asarray(STEPS))["weights"])
    plain, lowered = table(cls, o), table(cls, o | {"lower_order_final": True})
    np.testing.assert_array_equal(lowered[:1 - p], plain[:1 - p])
    for n in range(1, p): assert np.all(lowered[-n, :n - 1] != 0) and np.all(lowered[-n, n - 1:] == 0) and np.all(plain[-n] != 0)
    if fewer: np.testing.assert_allclose(lowered[-2, 0], table(*fewer)[-2, 0], rtol=1e-12)
    assert np.all(np.isfinite(run(cls, STEPS[-2:], lower_order_final=True, **o)))


def test_lower_order_final_walks_as_planned(x64):
    "3M with it = 3M up to the last two steps; the same as the plain loop that takes the line there, and then DDIM's step."
    sigmas, x, m = np.asarray(EDM.sigma(STEPS)), X, []
    for n in range(len(STEPS) - 1):
        m = [np.asarray(MIXTURE.denoise(jnp.asarray(x), 1.0, sigmas[n])), *m]
        p = min(n + 1, 3, len(STEPS) - 1 - n)
        lam = -np.log(sigmas)
        w = np.asarray(step_weights(jnp.asarray(lam), n, range(3), kernel=lambda ahead: jnp.exp(-ahead), order=p, midpoint=True))
        x = sigmas[n + 1] / sigmas[n] * x + sum(a * b for a, b in zip(w, m))
    np.testing.assert_allclose(run(DPMSolverPlusPlusSampler, STEPS, order=3, lower_order_final=True), x, atol=1e-13)


def test_lower_order_final_where_the_last_step_leaps(x64):
    "Linear betas, ten levels equally spaced in t: from t = 112 to 1 log(α/σ) grows by 3.6, in no other step by more than 1.1."
    times = np.linspace(1000, 1, 10)
    rate = lambda t: (float(LINEAR.alpha(t)), float(LINEAR.sigma(t)))
    truth = np.asarray(MIXTURE.ode_solution(jnp.asarray(X), rate(1000.0), rate(1.0)))
    off = [np.sqrt(np.mean((run(DPMSolverPlusPlusSampler, times, schedule=LINEAR, order=3, lower_order_final=lower) - truth) ** 2)) for lower in (False, True)]
    assert off[1] < 0.5 * off[0], off


# Zero terminal SNR, and bad options

@pytest.mark.parametrize("cls, o", [(MultiStepDPM, {}), (UniPCSampler, {"order": 3}), (DPMSolverPlusPlusSampler, {"order": 3})])
def test_a_pure_level_is_as_if_the_list_began_one_later(cls, o, x64):
    "DDIM's step to the second level, and from there what a run that starts there does."
    x, steps = np.linspace(-1.5, 1.5, 6).reshape(6, 1), ZERO.max_timesteps * np.array([1, 0.93, 0.8, 0.6, 0.5, 0.3, 0.1])
    second = run(EulerSampler, steps[:2], x, ZERO)
    np.testing.assert_allclose(run(cls, steps, x, ZERO, **o), run(cls, steps[1:], second, ZERO, **o), rtol=1e-10, atol=1e-12)


def test_bad_options_are_refused():
    for cls in (LMSSampler, DEISSampler, DPMSolverSampler, DPMSolverPlusPlusSampler, UniPCSampler):
        for bad in (0, 7, 2.0, True, "2", None):
            with pytest.raises(ValueError, match="order"): cls(WAVE, Wave.params, EDM, V, order=bad)
    with pytest.raises(ValueError, match="order.*multistep=False"): DPMSolverPlusPlusSampler(WAVE, Wave.params, EDM, V, order=3, multistep=False, stochastic=True)
    with pytest.raises(ValueError, match="frame"): MultiStepDPM(WAVE, Wave.params, EDM, V, frame="time")
    sde = {"stochastic": True}
    for name, bad in (("eta", {"eta": 0.5}), ("s_noise", {"s_noise": 1.1}), ("eta", sde | {"eta": 1.5}), ("eta", sde | {"eta": np.nan}), ("eta", sde | {"eta": "all"}),
                      ("s_noise", sde | {"s_noise": -1}), ("lower_order_final", {"lower_order_final": "no"}), ("multistep", {"multistep": "no"}),
                      ("stochastic", {"stochastic": "no"}), ("lower_order_final", {"lower_order_final": True, "multistep": False})):
        with pytest.raises(ValueError, match=name): DPMSolverPlusPlusSampler(WAVE, Wave.params, EDM, V, **bad)
    with pytest.raises(ValueError, match="corrector"): UniPCSampler(WAVE, Wave.params, EDM, V, corrector="no")
    with pytest.raises(ValueError, match="variable"): DEISSampler(WAVE, Wave.params, EDM, V, variable="t")


def test_a_frame_whose_slope_is_no_prediction_is_refused():
    "In the angle or λ frame the slope is v̂: DDIM's step and a sum of differences would be of order 1, without a word."
    for frame in ("angle", "lambda", None):
        with pytest.raises(ValueError, match="frame"): MultistepSampler(WAVE, Wave.params, LINEAR, V, frame=frame)
