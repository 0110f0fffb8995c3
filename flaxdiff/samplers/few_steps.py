"""With eight network calls every solver is far from its order; fit its levels and weights to the data's own denoiser, and it beats them all."""

# %%
import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from flaxdiff.samplers.common import walk
from flaxdiff.samplers.dpm_solver import UniPCSampler
from flaxdiff.samplers.frames import DataFrame
from flaxdiff.samplers.grids import karras_grid, lambda_grid
from flaxdiff.samplers.multistep import MultistepSampler
from flaxdiff.utils import check_floats, check_positive_int, check_shape

# %%
def first_guess(
    schedule,  # a `NoiseScheduler`
    grid: Callable[..., Any],  # a known one
    n,  # how many levels
    knots,  # places, at most
):
    "θ of a known grid: log(step in λ) and two corrections of 0 at each of `knots` places; 0.1 for the end."
    k = min(knots, n - 1)
    with jax.enable_x64(True):
        lam = np.asarray(schedule.log_snr(grid(schedule, schedule.max_timesteps, schedule.min_time, n))) / 2
    levels = np.interp(np.linspace(0, 1, k), np.linspace(0, 1, n - 1), np.log(np.diff(lam)))
    return np.concatenate([levels, np.zeros(2 * k), [0.1]])

def unfold(
    schedule,  # a `NoiseScheduler`
    theta,  # (3 knots + 1,): θ
    n,  # how many levels
):
    "(times (n,), corrections (n-1, 2)) of θ, straight lines between knots; λ ends θ²₋₁ before its largest."
    knots = jnp.reshape(theta[:-1], (3, -1))
    places = jnp.linspace(0, 1, n - 1)
    steps, *corrections = (jnp.interp(places, jnp.linspace(0, 1, len(k)), k) for k in knots)
    ends = jnp.array([schedule.max_timesteps, schedule.min_time], theta.dtype)
    first, last = schedule.log_snr(ends) / 2 - jnp.stack([0 * theta[-1], theta[-1] ** 2])
    lam = first + (last - first) * jnp.cumsum(jax.nn.softmax(steps))
    times = jnp.maximum(schedule.get_timesteps(jnp.exp(-lam)), ends[1])
    return jnp.concatenate([ends[:1], times]), jnp.stack(corrections, 1)

# %%
def bounded(
    residual,  # (B, …)
    limit,  # c²: what an image can cost at most
):
    "(Mean of e²/(1 + e²/c²), e² an image's mean square; 1/(1 + e²/c²), by which to multiply the residuals)."
    square = jnp.mean(residual ** 2, range(1, residual.ndim), keepdims=True)
    share = 1 / (1 + square / limit)
    return jnp.mean(square * share), share

# %%
def least_squares(
    linearize: Callable[..., Any],  # θ (P,) -> (r (M,), its derivative J (P, M))
    cost: Callable[..., float],  # θ -> the number that should fall
    theta,  # (P,): where to begin
    iterations=40,  # at most
    progress=True,  # show a bar
):
    "θ by Levenberg's and Marquardt's damped Gauss–Newton steps; ends when one gains less than a thousandth."
    best, damping = cost(theta), 1e-3
    bar = tqdm(range(iterations), desc="fit", disable=not progress)
    for _ in bar:
        r, J = (np.asarray(v, np.float64) for v in linearize(theta))
        A, b = J @ J.T, J @ r
        # Damp until the cost falls
        for _ in range(12):
            damped = A + damping * np.diag(np.diag(A)) + 1e-12 * np.trace(A) * np.eye(len(A))
            trial = theta - np.linalg.solve(damped, b)
            value = cost(trial)
            if value < best:
                break
            damping *= 4
        else:
            break
        # Go there
        gain = 1 - value / best
        theta, best = trial, value
        damping = max(damping / 4, 1e-9)
        bar.set_postfix(error=f"{best ** 0.5:.2e}")
        if gain < 1e-3:
            break
    return theta

# %%
def follow(
    sampler,  # a `DiffusionSampler`, whose denoiser and schedule count
    x,  # (B, …): noise at the first level
    conditioning=(),  # a dict or tuple of further arguments of the model, each (B, …)
    n=400,  # network calls
):
    "Where the ODE carries x, (B, …): UniPC-3 on a Karras grid, then half a stretch, as ε̂ falls like σ."
    guide = UniPCSampler(sampler.denoiser, noise_schedule=sampler.noise_schedule, order=3)
    steps = guide.make_steps(n, grid=karras_grid)
    x = guide.sample(x, steps, rng=0, conditioning=conditioning, denoise_final=False)
    x0 = guide.sample(x, steps[-1:], rng=0, conditioning=conditioning)
    return (x / sampler.noise_schedule.alpha(steps[-1]) + x0) / 2

# %%
class FewStepSampler(MultistepSampler):
    "A multistep solver on x̂₀ with levels and weights found by `fit`; before that, second order in λ."
    def __init__(self, *args,
                 steps=None,  # (N,): the levels, falling times
                 corrections=None,  # (N-1, 2): added to the weights of two past x̂₀, as shares of the step
                 **kwargs):
        super().__init__(*args, order=3, frame=DataFrame(), **kwargs)
        self.steps = self.corrections = None
        if (steps is None) != (corrections is None):
            raise ValueError("steps and corrections belong together: give both, or neither")
        if steps is not None:
            self.steps = super().check_steps(steps)
            self.corrections = np.asarray(corrections, np.float64)
            check_shape("corrections", self.corrections, (len(self.steps) - 1, 2))
            if not np.all(np.isfinite(self.corrections)):
                raise ValueError("corrections must be finite, got NaN or infinity in them")

    def plan(self, levels, i, last) -> Any:
        "Weights (2,) of the x̂₀ one and two steps back: a straight line's, and what was learned."
        w = jnp.pad(self.weights(levels, i, last, range(2))[1:], (0, 1))
        if self.corrections is None:
            return {"weights": w}
        t, s = levels[i], levels[i + 1]
        whole = s.alpha - t.alpha * s.sigma / t.sigma  # the weight of all x̂₀ together
        known = i >= jnp.array([1, 2])
        return {"weights": w + jnp.where(known, whole * jnp.asarray(self.corrections, w.dtype)[i], 0)}

    def check_steps(self, steps):
        "After a fit its own levels alone: the weights belong to them."
        steps = super().check_steps(steps)
        if self.steps is None or np.array_equal(steps, self.steps):
            return steps
        raise ValueError(f"steps must be the {len(self.steps)} levels of the fit, `sampler.steps`, "
                         f"got {len(steps)} from {steps[0]:g} to {steps[-1]:g}")

    def make_steps(self, diffusion_steps=50, start_step=1000, end_step=0, grid=None):
        "The levels of the fit; before it, any others."
        if self.steps is None:
            return super().make_steps(diffusion_steps, start_step, end_step, grid)
        if diffusion_steps != len(self.steps):
            raise ValueError(f"diffusion_steps must be {len(self.steps)}, the levels of the fit, "
                             f"got {diffusion_steps}")
        if grid is not None or (start_step, end_step) != (1000, 0):
            raise ValueError("start_step, end_step and grid must be left at their defaults: "
                             "the fit has found the levels")
        return self.steps

    def encode(self, x, steps, conditioning=()):
        "Upwards the learned weights mean nothing: refused after a fit."
        if self.corrections is not None:
            raise ValueError("a fitted FewStepSampler only leads down; "
                             "encode with DDIMSampler, or with one that was not fitted")
        return super().encode(x, steps, conditioning)

    def residual(self, theta, denoiser, x, target, n, conditioning):
        "What n calls from x are off by, at θ: the whole sampler as a function of its levels and weights."
        trial = copy.copy(self)
        times, corrections = unfold(self.noise_schedule, theta.astype(x.dtype), n)
        trial.steps, trial.corrections = None, corrections
        return walk(trial, denoiser, x, times, jnp.int32(n - 2), jax.random.PRNGKey(0), conditioning) - target

    def fitting_problem(self, x, target, n, conditioning):
        "(θ -> (residual, derivative), θ -> cost), compiled; c is a tenth of the data's spread."
        limit = (0.1 * jnp.std(target)) ** 2
        data = self.denoiser, x, target, conditioning

        def residual(theta, denoiser, x, target, conditioning):
            return self.residual(theta, denoiser, x, target, n, conditioning)

        @jax.jit
        def linearize(theta, data):
            r, push = jax.linearize(lambda theta: residual(theta, *data), theta)
            share = bounded(r, limit)[1]
            J = jax.lax.map(lambda e: push(e) * share, jnp.eye(len(theta), dtype=theta.dtype), batch_size=8)
            return (r * share).ravel(), J.reshape(len(theta), -1)

        cost = jax.jit(lambda theta, data: bounded(residual(theta, *data), limit)[0])

        def cast(theta):
            return jnp.asarray(theta, x.dtype)

        return (lambda theta: linearize(cast(theta), data)), (lambda theta: float(cost(cast(theta), data)))

    def follow(self,
               x,  # (B, …): noise at the first level
               conditioning=(),  # a dict or tuple of further arguments of the model, each (B, …)
               n=400,  # network calls
              ):
        "Where the ODE carries x, (B, …), by `follow`."
        return follow(self, x, conditioning, n)

    def fit(self,
            x,  # (B, …): noise at the first level, a few dozen samples
            n,  # how many levels: the network calls of the fitted sampler
            target=None,  # (B, …): where the exact ODE carries x; by UniPC-3 with 400 calls if not given
            conditioning=(),  # a dict or tuple of further arguments of the model, each (B, …)
            knots=12,  # how finely levels and weights vary over the steps, at most
            iterations=40,  # of least squares, at most
            progress=True,  # show a bar
           ):
        "A new sampler of n calls, with the levels and weights that carry x closest to `target`."
        x, schedule = check_floats("x", x), self.noise_schedule
        if check_positive_int("n", n) < 3:
            raise ValueError(f"n must be at least 3, got {n}")
        check_positive_int("knots", knots)
        check_positive_int("iterations", iterations)
        if self.starts_pure:
            raise ValueError("noise_schedule must have α > 0 at its last level to be fitted: "
                             "λ is infinite there")
        if target is None:
            target = follow(self, x, conditioning)
        check_shape("target", target, x.shape)
        # Begin at the better of two known grids
        linearize, cost = self.fitting_problem(x, jnp.asarray(target, x.dtype), n, conditioning)
        begin = min((first_guess(schedule, grid, n, knots) for grid in (karras_grid, lambda_grid)), key=cost)
        # Fit
        theta = least_squares(linearize, cost, begin, iterations, progress)
        with jax.enable_x64(True):
            steps, corrections = (np.asarray(v) for v in unfold(schedule, jnp.asarray(theta), n))
        return type(self)(self.denoiser, noise_schedule=schedule, steps=steps, corrections=corrections)
