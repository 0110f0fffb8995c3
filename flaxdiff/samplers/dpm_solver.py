"""In λ = log(α/σ) half of the ODE is solved exactly; what is left is one integral, and DPM-Solver, DPM-Solver++, DEIS and UniPC are four ways to take it."""

# %%
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.samplers.common import DiffusionSampler
from flaxdiff.samplers.frames import DataFrame, Frame, NoiseFrame, SigmaFrame
from flaxdiff.samplers.multistep import MultistepSampler, integrate
from flaxdiff.utils import check_choice, check_flag, check_real

# %%
class DEISSampler(MultistepSampler):
    "ε̂ as a polynomial through `order` (1 to 4) past levels, integrated exactly (Zhang & Chen 2023)."
    def __init__(self, *args,
                 order: int = 3,  # how many levels
                 variable="log_rho",  # of the polynomial: "log_rho" is -λ, "rho" is σ/α (ρAB-DEIS, or LMS)
                 **kwargs):
        frames: dict[str, Frame] = {"log_rho": NoiseFrame(), "rho": SigmaFrame()}
        frame = frames[check_choice("variable", variable, tuple(frames))]
        super().__init__(*args, order=order, frame=frame, **kwargs)

# %%
def renew(
    eps,  # (B, …): ε̂
    kept,  # scalar: κ, the share of it that stays
    state,  # a `SamplerState`
    s_noise=1.0,  # standard deviation of what is new, in units of what κ asks for
):
    "(κ ε̂ + √(1-κ²) z, the state): part of the noise replaced by fresh noise, as an SDE does."
    state, key = state.get_random_key()
    z = jax.random.normal(key, eps.shape, eps.dtype)
    return kept * eps + s_noise * jnp.sqrt(jnp.maximum(1 - kept ** 2, 0)) * z, state

# %%
class SingleStepSampler(DiffusionSampler):
    "A solver in λ that looks inside the step instead of back: `order` calls a step, nothing to remember."
    looks = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}  # where, as shares of the step in λ

    def __init__(self, *args,
                 order: int = 2,  # 1, 2 or 3
                 frame: Frame = NoiseFrame(),  # a `Frame` against λ whose slope is ε̂ or x̂₀
                 eta: float = 0.0,  # η: 0 is the ODE, 1 the SDE
                 s_noise: float = 1.0,  # standard deviation of the SDE's noise, in units of what η asks for
                 **kwargs):
        super().__init__(*args, **kwargs)
        order = int(order) if isinstance(order, np.integer) else order
        self.order = check_choice("order", order, tuple(self.looks))
        self.frame = frame
        self.eta = float(check_real("eta", eta, 0, 1))
        self.s_noise = float(check_real("s_noise", s_noise, 0))

    def plan(self, levels, i, last) -> Any:
        "For each look and the end: its `Level`, the weight of the look before, the share κ of ε̂ kept."
        lam = self.frame.position(levels.alpha, levels.sigma)
        start, h = lam[i], lam[i + 1] - lam[i]
        ends = [start + share * h for share in (*self.looks[self.order], 1)]
        inside = [self.level(self.noise_schedule.get_timesteps(self.frame.ratio(end))) for end in ends[:-1]]
        goals = [*inside, levels[i + 1]]
        weights = [0 * h]
        for look, end, goal in zip(ends, ends[1:], goals[1:]):

            def weight(lam):
                line = 1 if self.order == 2 else (lam - start) / (look - start)
                return self.frame.kernel(end - lam) * line

            weights.append(self.frame.scale(goal.alpha, goal.sigma) * integrate(weight, start, end))
        kept = [jnp.exp(-self.eta * (end - before)) for before, end in zip([start, *ends], ends)]
        return list(zip(goals, weights, kept))

    def step(self, x, x0, eps, t, s, state):
        "At each look, and at s: x = α x̂₀ + σ ε̂ + W (g - f), g found at the look before."
        f = g = self.frame.slope(x0, eps, state.level.alpha, state.level.sigma)
        before, y = None, x
        for goal, weight, kept in state.plan:
            if before is not None:
                g = self.frame.slope(*state.denoise(y, before), before.alpha, before.sigma)
            if self.eta:
                eps, state = renew(eps, kept, state, self.s_noise)
            y = (goal.alpha * x0 + goal.sigma * eps + weight * (g - f)).astype(x.dtype)
            before = goal
        return y, state

# %%
class DPMSolverSampler(SingleStepSampler):
    "DPM-Solver-1, -2, -3: single-step, on ε̂ (Lu et al. 2022a, algorithms 1 and 2); N, 2N - 1, 3N - 2 calls."
    def __init__(self, *args,
                 order: int = 2,  # 1, 2 or 3
                 **kwargs):
        super().__init__(*args, order=order, frame=NoiseFrame(), **kwargs)

# %%
class DPMSolverPlusPlusSampler(MultistepSampler):
    "DPM-Solver++, on x̂₀: multistep (1, 2M, 3M) or single-step (2S, 3S), ODE or SDE (Lu et al. 2022b)."
    orders = (1, 2, 3)
    midpoint = True

    def __init__(self, *args,
                 order: int = 2,  # 1, 2 or 3
                 multistep=True,  # look back, N calls; False: look inside the step, `order` calls a step
                 stochastic=False,  # the SDE: renew part of the noise at every step
                 eta: float | None = None,  # η of the SDE: 1, the reverse SDE, by default; towards 0 the ODE
                 s_noise: float | None = None,  # std of its noise in units of what η asks for; 1 by default
                 lower_order_final=False,  # the last step uses one slope, the one before two, and so on
                 **kwargs):
        self.multistep = check_flag("multistep", multistep)
        self.stochastic = check_flag("stochastic", stochastic)
        for name, value in (("eta", eta), ("s_noise", s_noise)):
            if value is not None and not stochastic:
                raise ValueError(f"{name} belongs to the SDE, got {value} with stochastic=False")
        if lower_order_final and not multistep:
            raise ValueError("lower_order_final belongs to multistep methods, got True with multistep=False")
        if stochastic and not multistep and order == 3:
            raise ValueError("order must be 1 or 2 where multistep=False and stochastic=True, got 3; "
                             "multistep=True has an SDE of order 3")
        self.eta = float(check_real("eta", float(stochastic) if eta is None else eta, 0, 1))
        self.s_noise = float(check_real("s_noise", 1.0 if s_noise is None else s_noise, 0))
        frame = DataFrame(1 + self.eta)
        super().__init__(*args, order=order, frame=frame, lower_order_final=lower_order_final, **kwargs)
        sde = {"eta": self.eta, "s_noise": self.s_noise}
        self.single = SingleStepSampler(*args, order=order, frame=frame, **sde, **kwargs)

    def init_memory(self, x):
        "The past x̂₀, where it looks back."
        return super().init_memory(x) if self.multistep else ()

    def plan(self, levels, i, last):
        "The weights of the past x̂₀ and κ = e^-η(λ_s - λ_t), the share of ε̂ kept; or a single step's plan."
        if not self.multistep:
            return self.single.plan(levels, i, last)
        lam = self.frame.position(levels.alpha, levels.sigma)
        return super().plan(levels, i, last) | {"kept": jnp.exp(-self.eta * (lam[i + 1] - lam[i]))}

    def step(self, x, x0, eps, t, s, state):
        "The multistep or the single step; an SDE first renews part of ε̂."
        if not self.multistep:
            return self.single.step(x, x0, eps, t, s, state)
        if self.eta:
            eps, state = renew(eps, state.plan["kept"], state, self.s_noise)
        return super().step(x, x0, eps, t, s, state)

# %%
class UniPCSampler(MultistepSampler):
    "Predict by p past x̂₀, correct by the next one (order p + 1, N calls; Zhao et al. 2023, B₂)."
    orders = (1, 2, 3)
    midpoint = True

    def __init__(self, *args,
                 order: int = 2,  # p: 1, 2 or 3
                 corrector=True,  # False: the predictor alone, order p
                 **kwargs):
        super().__init__(*args, order=order, frame=DataFrame(), **kwargs)
        self.corrector = check_flag("corrector", corrector)

    def init_memory(self, x):
        "(DDIM's step from the last corrected x, the last p x̂₀)."
        if not self.corrector:
            return super().init_memory(x)
        return x, jnp.zeros((self.order, *x.shape), x.dtype)

    def plan(self, levels, i, last):
        "The predictor's weights, and the corrector's of the step before."
        plan = super().plan(levels, i, last)
        if not self.corrector:
            return plan
        # Of x̂₀ at the end of that step, and of the past but for the newest, from which the rest is measured
        w = self.weights(levels, jnp.maximum(i - 1, 0), last, range(-1, self.order))
        return plan | {"correct": jnp.delete(w, 1), "starts": i <= self.first_level(levels)[0]}

    def step(self, x, x0, eps, t, s, state):
        "Correct x_t by x̂₀ (not at the first step), then predict x_s."
        if not self.corrector:
            return super().step(x, x0, eps, t, s, state)
        # Correct: the last step again, now that x̂₀ at its end is known
        base, past = state.memory
        slopes = [x0, *past[1:]]
        corrected = base + sum(w * (f - past[0]) for w, f in zip(state.plan["correct"], slopes))
        level = state.level
        eps = jnp.where(state.plan["starts"], eps, (corrected - level.alpha * x0) / level.sigma)
        # Predict
        x_s, after = super().step(x, x0, eps, t, s, state.replace(memory=past[:-1]))
        base = state.ddim_step(x0, eps).astype(base.dtype)
        past = jnp.concatenate([x0[None].astype(past.dtype), past])[:-1]
        return x_s, after.replace(memory=(base, past))
