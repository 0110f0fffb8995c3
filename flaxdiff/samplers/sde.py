"""A random walk can be run backwards, and the only thing one must know for it is what a denoiser says."""

# %%
import jax
import jax.numpy as jnp

from flaxdiff.samplers.common import DiffusionSampler
from flaxdiff.utils import check_real, check_whole

# %%
class EulerMaruyamaSampler(DiffusionSampler):
    "The reverse SDE by Euler's method with noise, in y = x/α on the clock u² = σ²/α² (Anderson 1982; Song et al. 2021b)."
    def __init__(self, *args,
                 eta=1.0,  # η: 1 is the reverse SDE, 0 the ODE by the same clock, between them the family of equal marginals
                 s_noise=1.0,  # standard deviation of the fresh noise, in units of what η asks for
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.eta = check_real("eta", eta, 0, 1)
        self.s_noise = check_real("s_noise", s_noise, 0)

    def plan(self, levels, i, last):
        "(α_s, σ_s (1/ρ - (1+η²)/2 (1/ρ - ρ)), η σ_s √(1/ρ² - 1)) with ρ = u_s/u_t: the weights of x̂₀, ε̂ and z."
        alpha, sigma = levels[i + 1].alpha, levels[i + 1].sigma
        fall = levels[i + 1].log_snr - levels[i].log_snr  # log 1/ρ²
        kept = (1 + self.eta ** 2) / 2 * jnp.exp(-fall / 2)
        if self.eta < 1:
            kept += (1 - self.eta ** 2) / 2 * jnp.exp(fall / 2)
        return alpha, sigma * kept, self.eta * sigma * jnp.sqrt(jnp.expm1(fall))

    def step(self, x, x0, eps, t, s, state):
        "y_s = y_t - (1+η²)/2 (u_t² - u_s²) ε̂/u_t + η √(u_t² - u_s²) z."
        alpha, kept, fresh = state.plan
        if self.eta == 0:
            return alpha * x0 + kept * eps, state
        state, key = state.get_random_key()
        z = jax.random.normal(key, x.shape, x.dtype)
        return alpha * x0 + kept * eps + self.s_noise * fresh * z, state

# %%
def square_norm(
    v,  # (B, …)
):
    "|v|² of each image, (B, 1, …, 1), in float32 at least."
    v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return jnp.sum(jnp.square(v), tuple(range(1, v.ndim)), keepdims=True)

class PredictorCorrectorSampler(EulerMaruyamaSampler):
    "Euler–Maruyama to the next level, then Langevin steps there (Song et al. 2021b, algorithms 4 and 5)."
    def __init__(self, *args,
                 corrector_steps=1,  # Langevin steps at each new level, one network call each
                 snr=0.16,  # r: length of the pull over length of the noise, in a Langevin step
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.corrector_steps = check_whole("corrector_steps", corrector_steps)
        self.snr = check_real("snr", snr, 0, ends="(]")

    def plan(self, levels, i, last):
        "Euler–Maruyama's, and α_s over α a thousandth of T before s."
        schedule, s = self.noise_schedule, levels[i + 1]
        before = schedule.alpha(jnp.maximum(s.time - schedule.max_timesteps / 1000, 0))
        return super().plan(levels, i, last), s.alpha / before

    def step(self, x, x0, eps, t, s, state):
        "Predict x_s, then correct it."
        predictor_plan, alpha_ratio = state.plan
        x_s, state = super().step(x, x0, eps, t, s, state.replace(plan=predictor_plan))
        for _ in range(self.corrector_steps):
            x_s, state = self.correct(x_s.astype(x.dtype), alpha_ratio, state)
        return x_s, state

    def correct(self, x, alpha_ratio, state):
        "One Langevin step at s: x + ε ∇log p + √(2ε) z, ε = 2 (α_s/α) (r |z|/|∇log p|)² for each image, at most α² + σ²."
        alpha, sigma = state.next_level.alpha, state.next_level.sigma
        state, key = state.get_random_key()
        z = jax.random.normal(key, x.shape, x.dtype)
        eps = state.denoise(x, state.next_level)[1]
        size = 2 * alpha_ratio ** 2 * self.snr ** 2 * square_norm(z) / square_norm(eps)  # ε in units of σ²
        size = jnp.minimum(size, 1 + (alpha / sigma) ** 2)
        return x + sigma * (jnp.sqrt(2 * size) * z - size * eps), state
