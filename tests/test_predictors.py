"""Laws of every predictor: a row of a 2×2 system, read in both directions."""
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from flaxdiff import predictors, samplers, trainer
from flaxdiff.losses import diffusion_loss, edm_weight, plain_weight
from flaxdiff.predictors import (DiffusionPredictionTransform, EpsilonPredictor, KarrasEDMPredictor, VPredictor, X0Predictor)
from flaxdiff.predictors.common import check_predictor
from laws import ALL_SCHEDULES, PREDICTOR_CLASSES, PREDICTORS, SCHEDULES, ZERO_SNR, WAVE, decodable, over, x64


class Flow(DiffusionPredictionTransform):
    "A user's predictor, rectified flow's ε - x₀: decoding follows."
    def row(self, alpha, sigma): return -jnp.ones_like(alpha), jnp.ones_like(sigma)


EVERY = {**PREDICTORS, "a user's": Flow()}


def rates(schedule, n=9):
    "(α, σ) at n times, shaped for images; both ends among them."
    return schedule.get_rates(np.linspace(schedule.min_time, schedule.max_timesteps, n))


def batch(n=9, seed=0):
    x0, eps = np.random.default_rng(seed).normal(size=(2, n, 2, 3, 1))
    return x0, eps


@over(schedule=ALL_SCHEDULES, predictor=EVERY)
def test_decode_undoes_target(schedule, predictor, x64):
    alpha, sigma = (np.asarray(v) for v in rates(schedule))
    if not decodable(predictor, schedule): alpha, sigma = alpha[:-1], sigma[:-1]
    x0, eps = batch(len(alpha))
    x0_hat, eps_hat = predictor.decode(alpha * x0 + sigma * eps, predictor.get_target(x0, eps, alpha, sigma), alpha, sigma)
    # dividing by α magnifies rounding by σ/α, dividing by σ by α/σ
    assert np.all(np.abs(x0_hat - x0) <= 1e-14 * (1 + sigma / np.maximum(alpha, 1e-9)))
    assert np.all(np.abs(eps_hat - eps) <= 1e-14 * (1 + alpha / sigma))


@over(schedule=SCHEDULES, predictor=PREDICTORS)
def test_decode_undoes_target_in_float32(schedule, predictor):
    alpha, sigma = (np.asarray(v) for v in rates(schedule))
    if not decodable(predictor, schedule): alpha, sigma = alpha[:-1], sigma[:-1]
    x0, eps = (v.astype(np.float32) for v in batch(len(alpha)))
    x0_hat, eps_hat = predictor.decode(alpha * x0 + sigma * eps, predictor.get_target(x0, eps, alpha, sigma), alpha, sigma)
    assert x0_hat.dtype == eps_hat.dtype == jnp.float32
    assert np.all(np.abs(x0_hat - x0) <= 4e-6 * (1 + sigma / np.maximum(alpha, 1e-9))) and np.all(np.abs(eps_hat - eps) <= 4e-6 * (1 + alpha / sigma))


@over(schedule=SCHEDULES, predictor=EVERY)
def test_any_output_is_explained(schedule, predictor, x64):
    "Whatever the network says, x̂₀ and ε̂ mix to x_t and their target is what it said."
    alpha, sigma = (np.asarray(v) for v in rates(schedule))
    if not decodable(predictor, schedule): alpha, sigma = alpha[:-1], sigma[:-1]
    xt, F = batch(len(alpha), seed=1)
    x0, eps = predictor.decode(xt, F, alpha, sigma)
    scale = 1 + np.abs(x0) * (1 + alpha) + np.abs(eps) * (1 + sigma)
    assert np.all(np.abs(alpha * x0 + sigma * eps - xt) <= 1e-14 * scale)
    assert np.all(np.abs(predictor.get_target(x0, eps, alpha, sigma) - F) <= 1e-13 * scale * (1 + sigma / np.maximum(alpha, 1e-9) + alpha / sigma))


@over(predictor=EVERY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_predictors_follow_the_dtype(predictor, dtype, x64):
    alpha, sigma = jnp.asarray([[0.8]], dtype), jnp.asarray([[0.6]], dtype)
    x = jnp.ones((1, 3), dtype)
    for value in (*predictor.row(alpha, sigma), predictor.get_input_scale(alpha, sigma), predictor.get_target(x, x, alpha, sigma),
                  predictor.determinant(alpha, sigma), *predictor.decode(x, x, alpha, sigma)):
        assert value.dtype == dtype


def test_what_each_output_is(x64):
    x0, eps = batch()
    for schedule in SCHEDULES.values():
        alpha, sigma = (np.asarray(v) for v in rates(schedule))
        n = np.sqrt(alpha ** 2 + sigma ** 2)
        for predictor, want in ((EpsilonPredictor(), eps + 0 * alpha), (X0Predictor(), x0 + 0 * alpha), (VPredictor(), (alpha * eps - sigma * x0) / n)):
            np.testing.assert_allclose(predictor.get_target(x0, eps, alpha, sigma), want, rtol=1e-12, atol=1e-14)
            assert np.all(predictor.get_input_scale(alpha, sigma) == 1)


@pytest.mark.parametrize("s", [0.5, 1.0, 0.13])
def test_edm_preconditioning(s, x64):
    "Karras et al. 2022, table 1: c_skip, c_out, c_in, and the weight that a plain error on F amounts to."
    predictor, sigma = KarrasEDMPredictor(sigma_data=s), np.geomspace(0.002, 80, 7).reshape(-1, 1, 1, 1)
    alpha, (x, F) = np.ones_like(sigma), batch(7)
    n = np.sqrt(sigma ** 2 + s ** 2)
    np.testing.assert_allclose(predictor.decode(x, F, alpha, sigma)[0], s ** 2 / n ** 2 * x + sigma * s / n * F, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(predictor.get_input_scale(alpha, sigma), 1 / n, rtol=1e-14)
    np.testing.assert_allclose(plain_weight(predictor)(alpha, sigma), (sigma ** 2 + s ** 2) / (sigma * s) ** 2, rtol=1e-12)
    np.testing.assert_allclose(edm_weight(s)(alpha, sigma), plain_weight(predictor)(alpha, sigma), rtol=1e-12)


@over(schedule=SCHEDULES)
def test_edm_input_and_target_have_unit_variance(schedule, x64):
    "For any α too: with data of standard deviation s, Var[c_in x_t] = Var[F] = 1."
    s = 0.37
    alpha, sigma = rates(schedule)
    predictor = KarrasEDMPredictor(s)
    a, b = predictor.row(alpha, sigma)
    np.testing.assert_allclose(a ** 2 * s ** 2 + b ** 2, 1, rtol=1e-12)
    np.testing.assert_allclose(predictor.get_input_scale(alpha, sigma) ** 2 * (alpha ** 2 * s ** 2 + sigma ** 2), 1, rtol=1e-12)


@over(predictor=PREDICTORS)
def test_one_weighting_whatever_the_output(predictor, x64):
    "The loss reweighted to EDM's λ is one number for one x̂₀, whichever predictor said it."
    x0, eps = batch()
    alpha, sigma = (np.asarray(v) for v in rates(SCHEDULES["CosineNoiseSchedule"]))
    alpha, sigma = alpha[:-1], sigma[:-1]
    x0, eps = x0[:-1], eps[:-1]
    guess = x0 + 0.1 * np.sin(7 * eps)
    guess_eps = (alpha * x0 + sigma * eps - alpha * guess) / sigma
    F, target = predictor.get_target(guess, guess_eps, alpha, sigma), predictor.get_target(x0, eps, alpha, sigma)
    loss = diffusion_loss(F, target, alpha.ravel(), sigma.ravel(), predictor, edm_weight(0.5))
    weight = (sigma ** 2 + (alpha * 0.5) ** 2) / (sigma * 0.5) ** 2
    np.testing.assert_allclose(loss, np.mean(weight * (guess - x0) ** 2, axis=(1, 2, 3)), rtol=1e-7)
    assert loss.shape == (8,)


def test_plain_loss_is_the_mean_squared_error():
    F, target = (np.asarray(v, np.float32) for v in batch())
    loss = diffusion_loss(F, target, np.ones(9), np.ones(9), EpsilonPredictor())
    np.testing.assert_allclose(loss, np.mean((F - target) ** 2, (1, 2, 3)), rtol=1e-5)
    low = diffusion_loss(jnp.asarray(F, jnp.bfloat16), target, np.ones(9), np.ones(9), EpsilonPredictor())
    assert low.dtype == jnp.float32


@over(schedule=ZERO_SNR)
def test_epsilon_says_nothing_at_zero_snr(schedule):
    "Refused by check, sampler and trainer; the other three are not."
    for build in (lambda p: check_predictor(p, schedule), lambda p: samplers.EulerSampler(WAVE, WAVE.params, schedule, p),
                  lambda p: trainer.DiffusionTrainer(WAVE, None, schedule, model_output_transform=p)):
        for predictor in PREDICTORS.values():
            if isinstance(predictor, EpsilonPredictor):
                with pytest.raises(ValueError, match="model_output_transform.*EpsilonPredictor"): build(predictor)
            elif decodable(predictor, schedule): build(predictor)
    assert all(decodable(PREDICTORS[name], schedule) for name in ("VPredictor", "X0Predictor"))


def test_bad_arguments_are_refused():
    for bad in (0, -1):
        with pytest.raises(ValueError, match="sigma_data"): KarrasEDMPredictor(bad)
    for bad in ("epsilon", EpsilonPredictor):
        with pytest.raises(ValueError, match="model_output_transform"): check_predictor(bad, SCHEDULES["EDMNoiseScheduler"])
    with pytest.raises(NotImplementedError, match="row"): DiffusionPredictionTransform().row(1.0, 0.0)


@over(cls=PREDICTOR_CLASSES)
def test_every_number_of_a_constructor_is_one(cls):
    for name in inspect.signature(cls).parameters:
        for bad in (np.nan, np.inf, -np.inf, -1.0, 0, "0.5", True, None, [0.5]):
            with pytest.raises(ValueError, match=name): cls(**{name: bad})


@over(predictor=EVERY)
def test_shapes_do_not_broadcast_by_accident(predictor):
    "Data are of one shape and floating point; α and σ are numbers or have the axes of the data."
    x, other, one = np.zeros((3, 8, 8, 3), np.float32), np.zeros((3, 8, 8, 1), np.float32), np.full((3, 1, 1, 1), 0.7, np.float32)
    for f, names in ((predictor.get_target, ("x0", "eps")), (predictor.decode, ("x_t", "F"))):
        for a, b, name in ((x, other, names[1]), (other, x, names[1]), (x, x[:1], names[1]), (x, x[0], names[1]), (x.astype(np.uint8), x, names[0]), (x, x.astype(int), names[1])):
            with pytest.raises(ValueError, match=f"{name} must"): f(a, b, one, one)
            with pytest.raises(ValueError, match=f"{name} must"): jax.jit(f)(a, b, one, one)
        for bad in (one.ravel(), one[..., 0], one[:2], np.ones((3, 8, 1), np.float32), one[None]):
            with pytest.raises(ValueError, match="alpha must"): f(x, x, bad, one)
            with pytest.raises(ValueError, match="sigma must"): f(x, x, one, bad)
        for good in (one, np.float32(0.7), x + 0.7): jax.tree.map(lambda v: np.testing.assert_equal(v.shape, x.shape), f(x, x, good, good))


def test_aliases():
    for long, short in (("EpsilonPredictionTransform", "EpsilonPredictor"), ("DirectPredictionTransform", "X0Predictor"),
                        ("VPredictionTransform", "VPredictor"), ("KarrasPredictionTransform", "KarrasEDMPredictor")):
        assert getattr(predictors, long) is getattr(predictors, short)


def test_a_new_predictor_is_a_row(x64):
    assert len(inspect.getsource(Flow).splitlines()) - 1 <= 3  # but for the docstring
    alpha, sigma = (np.asarray(v) for v in rates(SCHEDULES["CosineNoiseSchedule"]))
    x0, eps = batch()
    got = Flow().decode(alpha * x0 + sigma * eps, eps - x0, alpha, sigma)
    np.testing.assert_allclose(got[0], x0, atol=1e-13)
    np.testing.assert_allclose(got[1], eps, atol=1e-13)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(sorted(PREDICTORS)), alpha=st.floats(1e-3, 1), sigma=st.floats(1e-3, 100), x0=st.floats(-2, 2), eps=st.floats(-5, 5))
def test_any_rates(name, alpha, sigma, x0, eps):
    with jax.enable_x64(True):
        predictor, alpha, sigma = PREDICTORS[name], np.float64(alpha), np.float64(sigma)
        got = predictor.decode(alpha * x0 + sigma * eps, predictor.get_target(x0, eps, alpha, sigma), alpha, sigma)
        assert abs(got[0] - x0) <= 1e-13 * (1 + sigma / alpha) and abs(got[1] - eps) <= 1e-13 * (1 + alpha / sigma)
