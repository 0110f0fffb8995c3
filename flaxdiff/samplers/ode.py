"""Noise can be taken away without a single random number: what the network answers is a velocity, and solvers of every order can follow it."""

# %%
import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.samplers.common import DiffusionSampler
from flaxdiff.samplers.frames import FRAMES, AngleFrame, Frame, LambdaFrame, SigmaFrame, make_frame
from flaxdiff.utils import check_positive_int, check_real, per_image

# %%
class EulerSampler(DiffusionSampler):
    "A straight line in y = x/α against u = σ/α: DDIM's formula, on every schedule (order 1)."
    def step(self, x, x0, eps, t, s, state):
        "y_s = y_t + (u_s - u_t) ε̂, which is x_s = α_s x̂₀ + σ_s ε̂."
        return state.ddim_step(x0, eps), state

# %%
class RungeKuttaSampler(DiffusionSampler):
    "A solver that looks ahead; it steps in a frame: σ/α where α ≡ 1, the angle elsewhere."
    looks = ()  # where inside a step the network is asked too, as shares of the step

    def __init__(self, *args,
                 frame=None,  # "sigma", "angle", "lambda", or a `Frame`
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.frame = make_frame(frame, self.noise_schedule)
        if self.frame.rate:
            raise ValueError("frame must be one in which dy/dz is the slope itself, "
                             f"got {type(self.frame).__name__}; use DPMSolverSampler")
        self.y_is_x = False
        if self.noise_schedule.variance_exploding:
            self.y_is_x = isinstance(self.frame, SigmaFrame)  # a scale of 1

    def plan(self, levels, i, last):
        "The length of the step, and the levels inside it."
        return self.step_plan(levels[i], levels[i + 1])

    def step_plan(self,
                  level,  # a `Level`: where the step begins
                  next_level,  # a `Level`: where it ends
                 ):
        "The same for the step between two `Level`s."
        z = self.frame.position(level.alpha, level.sigma)
        h = self.frame.position(next_level.alpha, next_level.sigma) - z
        return {"h": h, "inside": [self.level_at(z + share * h) for share in self.looks]}

    def level_at(self,
                 z,  # scalar or (B,): positions
                ):
        "The `Level` of a position."
        return self.level(self.noise_schedule.get_timesteps(self.frame.ratio(z)))

    def to_frame(self,
                 x,  # (B, …): samples
                 level,  # their `Level`
                ):
        "y."
        return x if self.y_is_x else x / per_image(self.frame.scale(level.alpha, level.sigma), x)

    def from_frame(self,
                   y,  # (B, …): samples in the frame
                   level,  # their `Level`
                  ):
        "x."
        return y if self.y_is_x else per_image(self.frame.scale(level.alpha, level.sigma), y) * y

    def slope(self,
              x0,  # (B, …): x̂₀
              eps,  # (B, …): ε̂
              level,  # the `Level` of both
             ):
        "dy/dz of an answer."
        return self.frame.slope(x0, eps, per_image(level.alpha, eps), per_image(level.sigma, eps))

    def ask_slope(self,
                  state,  # a `SamplerState`
                  y,  # (B, …): samples in the frame
                  level,  # their `Level`
                 ):
        "dy/dz at y: one network call."
        x0, eps = state.denoise(self.from_frame(y, level), level)
        return self.slope(x0, eps, level)

# %%
class HeunSampler(RungeKuttaSampler):
    "Euler there, then the mean of both ends' slopes (order 2; on a Karras grid, Karras et al. 2022, alg. 1)."
    def step(self, x, x0, eps, t, s, state):
        "k₁ at t, k₂ at s; y_s = y_t + h (k₁ + k₂)/2."
        y, h = self.to_frame(x, state.level), state.plan["h"]
        k1 = self.slope(x0, eps, state.level)
        k2 = self.ask_slope(state, y + h * k1, state.next_level)
        return self.from_frame(y + h * (k1 + k2) / 2, state.next_level), state

# %%
class MidpointSampler(RungeKuttaSampler):
    "Half a step to see the slope there, then the whole step with it (order 2)."
    looks = (1 / 2,)

    def step(self, x, x0, eps, t, s, state):
        "k₁ at t, k₂ half-way; y_s = y_t + h k₂."
        y, h = self.to_frame(x, state.level), state.plan["h"]
        k1 = self.slope(x0, eps, state.level)
        k2 = self.ask_slope(state, y + h / 2 * k1, state.plan["inside"][0])
        return self.from_frame(y + h * k2, state.next_level), state

# %%
class RK4Sampler(RungeKuttaSampler):
    "The classical Runge–Kutta method: four slopes, two of them half-way (order 4)."
    looks = (1 / 2,)

    def step(self, x, x0, eps, t, s, state):
        "y_s = y_t + h (k₁ + 2 k₂ + 2 k₃ + k₄)/6."
        y, h = self.to_frame(x, state.level), state.plan["h"]
        half, end = state.plan["inside"][0], state.next_level
        k1 = self.slope(x0, eps, state.level)
        k2 = self.ask_slope(state, y + h / 2 * k1, half)
        k3 = self.ask_slope(state, y + h / 2 * k2, half)
        k4 = self.ask_slope(state, y + h * k3, end)
        return self.from_frame(y + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6, end), state

# %%
class AdaptiveSampler(RungeKuttaSampler):
    "Bogacki & Shampine's pair 3(2): each image takes its own steps between two levels, as tolerances ask."
    def __init__(self, *args,
                 rtol=1e-3,  # error allowed to a step, relative to |y|
                 atol=1e-4,  # and absolute: both count, root mean square over the image
                 max_substeps=1000,  # tries between two levels; an image that needs more becomes NaN
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.rtol = float(check_real("rtol", rtol, 0))
        self.atol = float(check_real("atol", atol, 0))
        if rtol == atol == 0:
            raise ValueError("rtol and atol must not both be 0")
        self.max_substeps = check_positive_int("max_substeps", max_substeps)

    def try_step(self,
                 state,  # a `SamplerState`
                 y,  # (B, …): samples in the frame
                 k1,  # (B, …): their slope
                 z,  # (B,): their positions
                 h,  # (B,): how far to go
                 end,  # the `Level` of z + h
                ):
        "From z to z + h, at `end`: (y, slope, error in units of the tolerance); three network calls."
        by = per_image(h, y)
        k2 = self.ask_slope(state, y + by / 2 * k1, self.level_at(z + h / 2))
        k3 = self.ask_slope(state, y + by * 3 / 4 * k2, self.level_at(z + h * 3 / 4))
        new = y + by * (2 * k1 + 3 * k2 + 4 * k3) / 9  # order 3
        k4 = self.ask_slope(state, new, end)
        error = by * (-5 * k1 + 6 * k2 + 8 * k3 - 9 * k4) / 72  # its difference from order 2
        share = error / (self.atol + self.rtol * jnp.maximum(jnp.abs(y), jnp.abs(new)))
        return new, k4, jnp.sqrt(jnp.mean(share ** 2, tuple(range(1, y.ndim))))

    def step(self, x, x0, eps, t, s, state):
        "Step after step, until every image is exactly at s; NaN for one that gave up."
        B, goal = len(x), state.next_level
        start, end = (self.frame.position(v.alpha, v.sigma) for v in (state.level, goal))

        def unfinished(y, k, z, h, tries, growth):
            return (z != end) & (z + h != z) & (tries < self.max_substeps)

        def attempt(carry):
            y, k, z, h, tries, growth = carry
            arrives = 1.01 * jnp.abs(h) >= jnp.abs(end - z)  # no sliver is left over
            h = jnp.where(arrives, end - z, h)
            there = jax.tree.map(lambda a, b: jnp.where(arrives, a, b), goal, self.level_at(z + h))
            y_new, k_new, error = self.try_step(state, y, k, z, h, there)
            factor = jnp.clip(jnp.where(jnp.isnan(error), 0, 0.9 * error ** (-1 / 3)), 0.2, growth)
            active = unfinished(*carry)
            accepted = active & (error <= 1)
            y, k = (jnp.where(per_image(accepted, y), new, old) for new, old in ((y_new, y), (k_new, k)))
            z = jnp.where(accepted, jnp.where(arrives, end, z + h), z)
            h = jnp.where(active, h * factor, h)
            return y, k, z, h, tries + active, jnp.where(accepted, 5.0, 1.0).astype(h.dtype)

        y = self.to_frame(x, state.level)
        k = self.slope(x0, eps, state.level).astype(y.dtype)
        h = jnp.full(B, end - start)
        carry = y, k, jnp.full(B, start), h, jnp.zeros(B, int), jnp.full_like(h, 5)
        y, _, z, *_ = jax.lax.while_loop(lambda carry: jnp.any(unfinished(*carry)), attempt, carry)
        return self.from_frame(jnp.where(per_image(z == end, y), y, jnp.nan), goal), state
