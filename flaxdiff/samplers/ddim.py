"""One network serves a whole family of samplers: the same marginals with any amount of fresh noise."""

# %%
import jax
import jax.numpy as jnp

from flaxdiff.samplers.common import DiffusionSampler
from flaxdiff.utils import check_real

# %%
class DDIMSampler(DiffusionSampler):
    "No chance at η = 0, DDPM's posterior at η = 1, for any pair of times (Song et al. 2021a, eq. 12 and 16)."
    def __init__(self, *args,
                 eta=0.0,  # η: share of the posterior's standard deviation that is drawn afresh
                 s_noise=1.0,  # standard deviation of the fresh noise, in units of what η asks for
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.eta = float(check_real("eta", eta, 0, 1))
        self.s_noise = float(check_real("s_noise", s_noise, 0))

    def plan(self, levels, i, last):
        "(√(σ_s² - ς²), ς), with ς = η √Var[x_s | x_t, x₀]."
        log_ratio = levels[i].log_snr - levels[i + 1].log_snr
        share, sigma = self.eta ** 2, levels[i + 1].sigma
        kept = 1 - share + share * jnp.exp(log_ratio)  # of σ_s²
        fresh = -share * jnp.expm1(log_ratio)
        return sigma * jnp.sqrt(kept), sigma * jnp.sqrt(fresh)

    def step(self, x, x0, eps, t, s, state):
        "x_s = α_s x̂₀ + √(σ_s² - ς²) ε̂ + ς z."
        if self.eta == 0:
            return state.ddim_step(x0, eps), state
        kept, fresh = state.plan
        state, key = state.get_random_key()
        z = jax.random.normal(key, x0.shape, x0.dtype)
        return state.next_level.alpha * x0 + kept * eps + self.s_noise * fresh * z, state

# %%
class EulerAncestralSampler(DDIMSampler):
    "DDIM with η = 1 by default: Euler down to √(σ_s² - ς²), then fresh noise of ς back up to σ_s."
    def __init__(self, *args,
                 eta=1.0,  # η
                 **kwargs):
        super().__init__(*args, eta=eta, **kwargs)
