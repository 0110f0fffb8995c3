"""A solver that remembers the slopes it has already paid for reaches order 3 or 4 at Euler's price: one network call a step."""

# %%
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.samplers.common import DiffusionSampler
from flaxdiff.samplers.frames import Frame, make_frame
from flaxdiff.samplers.ode import HeunSampler, RK4Sampler
from flaxdiff.utils import check_choice, check_flag

# %%
def lagrange(
    nodes,  # (p,): the positions that a polynomial goes through
    known,  # (p,): which of them count
    z,  # (Q,): where to look
):
    "The Lagrange polynomials ℓ_j(z), (p, Q): 1 at node j, 0 at other known ones; all 0 if j is unknown."
    others = known[:, None] & known & ~np.eye(len(nodes), dtype=bool)  # (j, k)
    gap = jnp.where(others, nodes[:, None] - nodes, 1)
    ratio = (z - nodes[:, None]) / gap[..., None]  # (j, k, Q)
    return jnp.prod(jnp.where(others[..., None], ratio, 1), 1) * known[:, None]

# %%
GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(24)

def integrate(
    f: Callable[..., Any],  # function of z, (24,) -> (…, 24)
    a,  # scalar: the lower end
    b,  # scalar: the upper end
):
    "∫ f(z) dz from a to b by the 24-point rule of Gauss and Legendre: exact for polynomials up to degree 47."
    nodes = jnp.asarray((GAUSS_NODES + 1) / 2, a.dtype)
    weights = jnp.asarray(GAUSS_WEIGHTS / 2, a.dtype)
    return jnp.sum(f(a + (b - a) * nodes) * weights, -1) * (b - a)

# %%
def step_weights(
    z,  # (N,): the positions of all levels
    i,  # the step from z[i] to z[i + 1]
    ages,  # whole numbers: use the levels 0, 1, 2, … steps back; -1 is the one ahead
    kernel: Callable[..., Any] = jnp.ones_like,  # K(z_s - z), of how far ahead the end of the step lies
    first=0,  # levels before this one do not count
    order=None,  # use at most so many levels, the newest; all `ages` by default
    midpoint=False,  # where just two levels are known, take ℓ in the middle of the step out of the integral
):
    "w_j = ∫ K(z_s - z) ℓ_j(z) dz over one step, (len(ages),); the order ramps up as levels become known."
    ages = np.asarray(ages)
    known = i - ages >= first
    if order is not None:
        known &= np.arange(len(ages)) < order
    nodes, start, end = z[jnp.maximum(i - ages, 0)], z[i], z[i + 1]
    w = integrate(lambda z: kernel(end - z) * lagrange(nodes, known, z), start, end)
    if midpoint:
        middle = lagrange(nodes, known, (start + end)[None] / 2)[:, 0]
        w = jnp.where(known.sum() == 2, middle * integrate(lambda z: kernel(end - z), start, end), w)
    return w

# %%
class MultistepSampler(DiffusionSampler):
    "x_s = DDIM's step + Σ W_j (f_j - f), f_j past slopes, in a `Frame` whose slope is ε̂ or x̂₀."
    orders = (1, 2, 3, 4)  # what `order` may be
    midpoint = False  # see `step_weights`

    def __init__(self, *args,
                 order: int = 4,  # how many slopes to use, the newest among them
                 frame: Frame | str | None = "sigma",  # a `Frame` whose slope is ε̂ or x̂₀
                 lower_order_final=False,  # the last step uses one slope, the one before two, and so on
                 **kwargs):
        super().__init__(*args, **kwargs)
        order = int(order) if isinstance(order, np.integer) else order
        self.order = check_choice("order", order, self.orders)
        self.frame = make_frame(frame, self.noise_schedule)
        self.lower_order_final = check_flag("lower_order_final", lower_order_final)

    def first_level(self, levels):
        "(The number of the first level with α > 0, all positions: finite where α = 0, and not to be used.)"
        pure = levels.alpha == 0
        z = self.frame.position(jnp.where(pure, 1, levels.alpha), levels.sigma)
        return pure[0].astype(jnp.int32), z

    def allowed_order(self, i, last):
        "How many slopes step i may use at most; None where nothing limits it."
        return jnp.maximum(last - i + 1, 1) if self.lower_order_final else None

    def weights(self, levels, i, last, ages):
        "W_j = scale(s) ∫ K(z_s - z) ℓ_j(z) dz of one step, (len(ages),)."
        first, z = self.first_level(levels)
        w = step_weights(z, i, ages, self.frame.kernel, first, self.allowed_order(i, last), self.midpoint)
        return self.frame.scale(levels.alpha[i + 1], levels.sigma[i + 1]) * w

    def plan(self, levels, i, last) -> Any:
        "The weights of the past slopes, (order - 1,)."
        return {"weights": self.weights(levels, i, last, range(self.order))[1:]}

    def init_memory(self, x) -> Any:
        "The slopes of the last order - 1 steps, the newest first; none yet."
        return jnp.zeros((self.order - 1, *x.shape), x.dtype)

    def slope(self, x0, eps, state):
        "f: what is remembered of an answer."
        return self.frame.slope(x0, eps, state.level.alpha, state.level.sigma)

    def step(self, x, x0, eps, t, s, state):
        "x_s = α_s x̂₀ + σ_s ε̂ + Σ W_j (f_j - f)."
        past = state.memory
        f = self.slope(x0, eps, state).astype(past.dtype)
        correction = sum(w * (f_j - f) for w, f_j in zip(state.plan["weights"], past))
        newest = jnp.concatenate([f[None], past])[:len(past)]
        return state.ddim_step(x0, eps) + correction, state.replace(memory=newest)

# %%
class LMSSampler(MultistepSampler):
    "Adams–Bashforth on ε̂ in σ/α, on any grid: `order` (1 to 4) slopes, one call a step."
    def __init__(self, *args,
                 order: int = 4,  # how many slopes
                 **kwargs):
        super().__init__(*args, order=order, **kwargs)

# %%
class StartedSampler(MultistepSampler):
    "A multistep method whose first steps are a Runge–Kutta method's, which needs no past."
    Starter: type = HeunSampler  # that method
    start_steps = 1  # how many steps are its

    def __init__(self, *args,
                 order: int,  # of the multistep method
                 frame: Frame | str | None = "sigma",  # the starter's frame
                 lower_order_final=False,  # the last step uses one slope, the one before two, and so on
                 **kwargs):
        super().__init__(*args, order=order, lower_order_final=lower_order_final, **kwargs)
        self.starter = self.Starter(*args, frame=frame, **kwargs)

    def plan(self, levels, i, last):
        "The weights, whether the step is the starter's, and what that needs."
        since_first = i - self.first_level(levels)[0]
        starts = (0 <= since_first) & (since_first < self.start_steps)
        starter = self.starter.plan(levels, i, last)
        return super().plan(levels, i, last) | {"starts": starts, "starter": starter}

    def step(self, x, x0, eps, t, s, state):
        "The starter's step while there is too little to remember, the multistep one from then on."
        x_s, remembering = super().step(x, x0, eps, t, s, state)

        def start():
            own = state.replace(plan=state.plan["starter"])
            return self.starter.step(x, x0, eps, t, s, own)[0].astype(x_s.dtype)

        return jax.lax.cond(state.plan["starts"], start, lambda: x_s), remembering

# %%
class MultiStepDPM(StartedSampler):
    "Adams–Bashforth 3 in σ/α on any grid, begun by Heun's step (order 3, N + 1 calls)."
    def __init__(self, *args,
                 frame: Frame | str | None = None,  # of Heun's step; default: σ/α where α ≡ 1, else the angle
                 **kwargs):
        super().__init__(*args, order=3, frame=frame, **kwargs)

class PLMSSampler(StartedSampler):
    "Adams–Bashforth 4 for equal steps (Liu et al. 2022, eq. 9), begun by Heun's (order 3, N + 1 calls)."
    def __init__(self, *args,
                 **kwargs):
        super().__init__(*args, order=4, **kwargs)

    def weights(self, levels, i, last, ages):
        "α_s h times the classical weights, (55, -59, 37, -9)/24, as if all steps in σ/α were equal."
        first, u = self.first_level(levels)
        numbers = jnp.arange(len(u), dtype=u.dtype)
        w = step_weights(numbers, i, ages, first=first, order=self.allowed_order(i, last))
        return levels.alpha[i + 1] * (u[i + 1] - u[i]) * w

class PNDMSampler(PLMSSampler):
    "The same after three Runge–Kutta steps in σ/α, as published (order 4, N + 9 calls for N > 3; F-PNDM)."
    Starter = RK4Sampler
    start_steps = 3
