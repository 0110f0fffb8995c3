"""`FewStepSampler`: what a fit must gain on samples it has not seen, what it keeps, and what it refuses. The general laws are in test_samplers.py."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.exact import Gaussian, GaussianMixture
from flaxdiff.samplers import DEISSampler, DPMSolverPlusPlusSampler, FewStepSampler, LMSSampler, UniPCSampler
from flaxdiff.samplers.few_steps import bounded
from laws import plan_table, PREDICTORS, SCHEDULES, ZERO_SNR, exact_sampler, x64

EDM, ROW, N = SCHEDULES["EDMNoiseScheduler"], PREDICTORS["KarrasEDMPredictor"], 6
SPREAD = np.geomspace(1, 1e-2, 8)
ELLIPSE = Gaussian(np.linspace(-0.3, 0.3, 8), SPREAD)


def noise(seed, n=32): return 80 * np.random.default_rng(seed).normal(size=(n, 8))
def rms(a): return float(np.sqrt(np.mean(np.square(np.asarray(a)))))
def truth(x): return np.asarray(ELLIPSE.ode_solution(jnp.asarray(x), (1.0, 80.0), (1.0, 0.0)))


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True): return exact_sampler(FewStepSampler, EDM, ROW, ELLIPSE).fit(noise(0), N, progress=False)


def test_a_fit_beats_the_others_on_new_samples(fitted, x64):
    "Six calls on the same data; by far, since for a Gaussian a few weights can be right for every variance at once."
    x = noise(1, 64)
    mine = rms(fitted.sample(x, fitted.steps, rng=0) - truth(x))
    others = [exact_sampler(cls, EDM, ROW, ELLIPSE) for cls in (DEISSampler, DPMSolverPlusPlusSampler, LMSSampler, UniPCSampler)]
    assert mine < 0.1 * min(rms(s.sample(x, s.make_steps(N), rng=0) - truth(x)) for s in others)


def test_follow_is_the_ode(x64):
    "To the exact end, not to x̂₀ at σ = 0.002, which for the variance 0.01 is off by σ²/(2·0.1) = 2e-5."
    x = noise(2)
    assert rms(exact_sampler(FewStepSampler, EDM, ROW, ELLIPSE).follow(x) - truth(x)) < 1e-6


def test_levels_and_weights_are_all_there_is(fitted, x64):
    "The same sampler from its two arrays; levels from exactly T, never below the schedule's last; corrections for known x̂₀ only."
    x = noise(3)
    again = FewStepSampler(fitted.model, {}, EDM, ROW, steps=fitted.steps, corrections=fitted.corrections)
    np.testing.assert_array_equal(again.sample(x, again.steps, rng=0), fitted.sample(x, fitted.steps, rng=0))
    np.testing.assert_array_equal(again.make_steps(N), fitted.steps)
    assert fitted.steps[0] == EDM.max_timesteps and fitted.steps[-1] >= EDM.min_time and np.all(np.diff(fitted.steps) < 0)
    weights = np.asarray(plan_table(fitted, jnp.asarray(fitted.steps))["weights"])
    assert np.all(weights[0] == 0) and weights[1, 1] == 0 and np.all(weights[2:] != 0)


@pytest.mark.slow
def test_in_float32_and_on_another_schedule():
    data, schedule, row = GaussianMixture([[-0.7, 0.0], [0.6, 0.3]], 0.2), SCHEDULES["CosineContinuousNoiseScheduler"], PREDICTORS["VPredictor"]
    plain = exact_sampler(FewStepSampler, schedule, row, data)
    learn, new = (np.random.default_rng(s).normal(size=(64, 2)).astype(np.float32) for s in (0, 1))
    sampler = plain.fit(learn, 5, progress=False, iterations=15)
    target = plain.follow(new)
    off, before = (rms(s.sample(new, s.make_steps(5), rng=0) - target) for s in (sampler, plain))
    assert sampler.sample(new, sampler.steps, rng=0).dtype == jnp.float32 and off < before


def test_the_bounded_cost_and_its_slope(x64):
    "d/de of e²/(1 + e²/c²) is 2e/(1 + e²/c²)²: that of the residuals times the share."
    e = jnp.geomspace(1e-3, 10, 12)
    cost = lambda e: bounded(e[:, None], 0.04)[0] * len(e)
    np.testing.assert_allclose(jax.grad(cost)(e), 2 * e * bounded(e[:, None], 0.04)[1][:, 0] ** 2, rtol=1e-12)
    assert cost(e) < 0.04 * len(e)


def test_bad_requests_are_refused(fitted):
    plain = exact_sampler(FewStepSampler, EDM, ROW, ELLIPSE)
    for words, name in ((dict(n=2), "n must"), (dict(n=0), "n must"), (dict(n=4, knots=0), "knots"), (dict(n=4, target=np.zeros((3, 8))), "target")):
        with pytest.raises(ValueError, match=name): plain.fit(noise(0, 4), **words, progress=False)
    make = lambda **kw: FewStepSampler(fitted.model, {}, EDM, ROW, **kw)
    with pytest.raises(ValueError, match="both"): make(steps=[1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="corrections"): make(steps=[1.0, 0.5, 0.1], corrections=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="steps"): make(steps=[0.5, 1.0, 0.1], corrections=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="diffusion_steps"): fitted.make_steps(N + 1)
    with pytest.raises(ValueError, match="start_step"): fitted.make_steps(N, start_step=900)
    for other in (fitted.steps[:-1], np.linspace(1, 0, N)):  # as many levels, but not those
        with pytest.raises(ValueError, match="levels of the fit"): fitted.sample(noise(0, 2), other)
    with pytest.raises(ValueError, match="only leads down"): fitted.encode(noise(0, 2), fitted.steps)
    pure = ZERO_SNR["CosineNoiseSchedule-zero-snr"]
    with pytest.raises(ValueError, match="noise_schedule"):
        exact_sampler(FewStepSampler, pure, PREDICTORS["VPredictor"], ELLIPSE).fit(noise(0, 4), 4, progress=False)
