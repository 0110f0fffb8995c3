"""Bayes' rule says where a noisy sample came from; DDPM draws from the answer, and must choose how widely."""

# %%
import jax
import jax.numpy as jnp

from flaxdiff.samplers.common import DiffusionSampler
from flaxdiff.utils import check_choice

# %%
class DDPMSampler(DiffusionSampler):
    "x_s drawn from the posterior of each pair of times, with x̂₀ for x₀ (Ho et al. 2020, algorithm 2)."
    variances = {"posterior": 0.0, "beta": 1.0, "learned": None}  # f

    def __init__(self, *args,
                 variance="posterior",  # "posterior" (β̃ = σ_s² g), "beta" (β = σ_t² g), or "learned"
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.variance = check_choice("variance", variance, tuple(self.variances))

    def plan(self, levels, i, last):
        "For a pair: the posterior mean's weights of x̂₀ and x_t, √β̃, and √(β/β̃) = σ_t/σ_s."
        t, s = levels[i], levels[i + 1]
        log_ratio = t.log_snr - s.log_snr
        g = -jnp.expm1(log_ratio)
        widen = t.sigma / s.sigma
        return s.alpha * g, jnp.exp(log_ratio / 2) / widen, s.sigma * jnp.sqrt(g), widen

    def step(self, x, x0, eps, t, s, state):
        "x_s = α_s g x̂₀ + (σ_s/σ_t) √(1-g) x_t + √Σ z, with Σ = β̃ (β/β̃)^f."
        x0_weight, x_weight, std, widen = state.plan
        f = self.variances[self.variance]  # 0 for β̃, 1 for β
        if self.variance == "learned":
            f = self.learned_share(state)
        state, key = state.get_random_key()
        z = jax.random.normal(key, x.shape, x.dtype)
        return x0_weight * x0 + x_weight * x + std * widen ** f * z, state

    def learned_share(self,
                      state,  # a `SamplerState` with the second half of the channels, (B, …)
                     ):
        "f = (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15)."
        if state.second_half is None:
            raise ValueError("variance='learned' needs a network with twice the channels of x, "
                             "got one without; use 'posterior' or 'beta'")
        return (state.second_half + 1) / 2
