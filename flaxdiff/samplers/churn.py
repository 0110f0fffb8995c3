"""Put a little noise back before each step of an ODE solver, and the sample forgets its old errors."""

# %%
import math

import jax
import jax.numpy as jnp

from flaxdiff.samplers.ode import HeunSampler
from flaxdiff.utils import check_real

# %%
class EDMSampler(HeunSampler):
    """Heun's method with churn: noise up to (1+γ)σ, then one step down (Karras et al. 2022, algorithm 2).

    The last jump, from the smallest level to σ = 0, is not churned.
    """
    def __init__(self, *args,
                 S_churn=0.0,  # the sum of all γ, shared by N levels; 0 is Heun's method
                 S_tmin=0.0,  # churn from this σ/α on
                 S_tmax=math.inf,  # up to this σ/α, both included
                 S_noise=1.0,  # standard deviation of the new noise, in units of what the level asks for
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.S_churn = float(check_real("S_churn", S_churn, 0))
        self.S_tmin = float(check_real("S_tmin", S_tmin, 0))
        self.S_tmax = S_tmax if S_tmax == math.inf else float(check_real("S_tmax", S_tmax, self.S_tmin))
        self.S_noise = float(check_real("S_noise", S_noise, 0))

    def highest_ratio(self,
                      dtype,  # of the answer
                     ):
        "The largest σ/α that churn may reach: that of the schedule's last time, ∞ where there is none."
        if math.isinf(self.noise_schedule.last_time) or self.starts_pure:
            return math.inf
        end = jnp.asarray(self.noise_schedule.last_time, dtype)
        return self.noise_schedule.sigma(end) / self.noise_schedule.alpha(end)

    def plan(self, levels, i, last):
        "Heun's, from the raised `Level`; that, α̂/α, and α̂ S_noise √(û² - u²): (t's, 1, 0) where γ = 0."
        if self.S_churn == 0:
            return super().plan(levels, i, last)
        # Raise u = σ/α to û = (1 + γ) u
        level = levels[i]
        pure = level.alpha == 0  # from u = ∞ nothing is raised
        u = level.sigma / jnp.where(pure, 1, level.alpha)
        gamma = jnp.minimum(self.S_churn / (last + 2), math.sqrt(2) - 1)
        u_hat = jnp.minimum((1 + gamma) * u, self.highest_ratio(u.dtype))
        inside = (u >= self.S_tmin * (1 - 1e-5)) & (u <= self.S_tmax * (1 + 1e-5))  # up to rounding
        raised = inside & (u_hat > u) & ~pure
        # Where that is, and what leads there
        time = jnp.where(raised, self.noise_schedule.get_timesteps(u_hat), level.time)
        higher = self.level(jnp.minimum(time, jnp.maximum(self.noise_schedule.last_time, level.time)))
        higher = jax.tree.map(lambda a, b: jnp.where(raised, a, b), higher, level)
        keep = jnp.where(raised, higher.alpha / jnp.where(pure, 1, level.alpha), 1)
        add = higher.alpha * self.S_noise * jnp.sqrt(jnp.where(raised, u_hat ** 2 - u ** 2, 1))
        step = self.step_plan(higher, levels[i + 1])
        return step | {"higher": higher, "keep": keep, "add": jnp.where(raised, add, 0)}

    def before_denoising(self, x, level, state):
        "x̂ = α̂ (x/α + S_noise √(û² - u²) z) at the time of û = (1+γ) u."
        if self.S_churn == 0:
            return x, level, state
        state, key = state.get_random_key()
        z = jax.random.normal(key, x.shape, x.dtype)
        return (state.plan["keep"] * x + state.plan["add"] * z).astype(x.dtype), state.plan["higher"], state
