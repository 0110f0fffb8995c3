"""A denoiser is a value that knows network, weights, schedule and predictor, and answers (x̂₀, ε̂)."""

# %%
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.predictors.common import DiffusionPredictionTransform, EpsilonPredictor, check_predictor
from flaxdiff.schedulers.common import NoiseScheduler
from flaxdiff.utils import check_floats, per_image

# %%
class Level(flax.struct.PyTreeNode):
    "All that depends on a time alone, for one level or, with a leading axis, for a table of levels."
    time: Any  # t
    alpha: Any  # α(t)
    sigma: Any  # σ(t)
    temb: Any = None  # what the network is told of t
    input_scale: Any = None  # what the network's input is multiplied by
    decoding: Any = None  # (p, q, r, s) of x̂₀ = p x + q F and ε̂ = r x + s F

    def __getitem__(self, i):  # a number, or an array of them
        "The i-th level of a table."
        return jax.tree.map(lambda v: v[i], self)

    @property
    def log_snr(self):
        "log(α²/σ²) = 2λ; -∞ where α = 0."
        return 2 * (jnp.log(self.alpha) - jnp.log(self.sigma))

# %%
class Identity:
    "Objects that are the same if they are the very same objects: a key for programs compiled for them."
    def __init__(self, *parts):
        self.parts = parts

    def __hash__(self):
        return hash(tuple(map(id, self.parts)))

    def __eq__(self, other):
        if not isinstance(other, Identity) or len(self.parts) != len(other.parts):
            return False
        return all(a is b for a, b in zip(self.parts, other.parts))

# %%
def split_output(
    F,  # what a network returned
    x,  # (B, …): what it was given
):
    "(F, a second half of its channels or None): a network answers in x's shape, or with twice the channels."
    if not hasattr(F, "shape"):
        kind = type(F).__name__
        raise ValueError(f"model must return one array of the shape of its input, {x.shape}, got {kind}")
    if F.shape == (*x.shape[:-1], 2 * x.shape[-1]) and F.ndim:
        return F[..., :x.shape[-1]], F[..., x.shape[-1]:]
    if F.shape != x.shape:
        raise ValueError(f"model must return the shape of its input, {x.shape}, got {F.shape}")
    return F, None

def check_conditioning(
    conditioning,  # a dict of arrays by name, or a tuple of them by place
    batch,  # B
):
    "A `ValueError` unless it is a dict or a tuple whose arrays have one row for each image."
    if not isinstance(conditioning, (Mapping, tuple, list)):
        kind = type(conditioning).__name__
        raise ValueError(f"conditioning must be a dict of arrays or a tuple of them, got {kind}")
    named = conditioning.items() if isinstance(conditioning, Mapping) else enumerate(conditioning)
    for name, rows in named:
        if np.shape(rows)[:1] != (batch,):
            raise ValueError(f"conditioning must have one row for each of the {batch} samples, "
                             f"got shape {np.shape(rows)} for {name!r}")

# %%
@jax.tree_util.register_pytree_node_class
class Denoiser:
    "(x, t, condition) -> (x̂₀, ε̂): a pytree whose leaves are the parameters, never constants of a program."
    def __init__(self,
                 model,  # anything with .apply(params, x, temb, *tuple) or .apply(params, x, temb, **dict)
                 params,  # the model's parameters
                 noise_schedule,  # a `NoiseScheduler`
                 model_output_transform=None,  # what the output means; `EpsilonPredictor()` by default
                ):
        if not callable(getattr(model, "apply", None)):
            raise ValueError(f"model must have a method apply(params, x, temb), got {type(model).__name__}")
        if not isinstance(noise_schedule, NoiseScheduler):
            raise ValueError(f"noise_schedule must be a NoiseScheduler, got {noise_schedule!r}")
        predictor = EpsilonPredictor() if model_output_transform is None else model_output_transform
        check_predictor(predictor, noise_schedule)
        self.model = model
        self.params = params
        self.noise_schedule = noise_schedule
        self.model_output_transform: DiffusionPredictionTransform = predictor

    def tree_flatten(self):
        "The parameters, and what a program is compiled for."
        return (self.params,), Identity(self.model, self.noise_schedule, self.model_output_transform)

    @classmethod
    def tree_unflatten(cls,
                       identity,  # network, schedule and predictor
                       children,  # the parameters, alone in a tuple
                      ):
        "The denoiser of these parts, unchecked: they may be traced."
        denoiser = object.__new__(cls)
        denoiser.model, denoiser.noise_schedule, denoiser.model_output_transform = identity.parts
        (denoiser.params,) = children
        return denoiser

    def level(self,
              t,  # scalar or (N,): times
             ):
        "α, σ, the network's time and the predictor's coefficients at t, as a `Level`."
        alpha = self.noise_schedule.alpha(t)
        sigma = self.noise_schedule.sigma(t)
        one, zero = jnp.ones_like(sigma), jnp.zeros_like(sigma)
        x0_by_x, eps_by_x = self.model_output_transform.decode(one, zero, alpha, sigma)
        x0_by_F, eps_by_F = self.model_output_transform.decode(zero, one, alpha, sigma)
        return Level(time=t, alpha=alpha, sigma=sigma,
                     temb=self.noise_schedule.network_time(t),
                     input_scale=self.model_output_transform.get_input_scale(alpha, sigma),
                     decoding=(x0_by_x, x0_by_F, eps_by_x, eps_by_F))

    def at(self,
           x,  # (B, …): noisy images
           level,  # their `Level`, of scalars or (B,)
           conditioning=(),  # a dict, or a tuple
          ):
        "(x̂₀, ε̂, second half of the channels or None) by one network call; that half tells a variance."
        temb = jnp.broadcast_to(level.temb, x.shape[:1])
        x_in = (x * per_image(level.input_scale, x)).astype(x.dtype)
        if isinstance(conditioning, Mapping):
            F = self.model.apply(self.params, x_in, temb, **conditioning)
        else:
            F = self.model.apply(self.params, x_in, temb, *conditioning)
        F, second_half = split_output(F, x)
        F = F.astype(x.dtype)
        x0_by_x, x0_by_F, eps_by_x, eps_by_F = (per_image(v, x) for v in level.decoding)
        return x0_by_x * x + x0_by_F * F, eps_by_x * x + eps_by_F * F, second_half

    def __call__(self,
                 x,  # (B, …): noisy images x_t
                 t,  # scalar or (B,): their time
                 conditioning=(),  # a dict of arrays by name, or a tuple of them by place, each (B, …)
                ):
        "(x̂₀, ε̂), each of x's shape."
        x = check_floats("x", x)
        times = jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32))
        if times.shape not in ((), x.shape[:1]):
            raise ValueError(f"t must be one time, or one for each of {len(x)} images, got {times.shape}")
        check_conditioning(conditioning, len(x))
        return self.at(x, self.level(self.noise_schedule.as_times(times)), conditioning)[:2]

# %%
@runtime_checkable
class DenoiserLike(Protocol):
    "Anything called like a `Denoiser`: what samplers, likelihood, guidance and editing take."
    def __call__(self,
                 x,  # (B, …): noisy images x_t
                 t,  # scalar or (B,): their time
                 conditioning=(),  # a dict of arrays by name, or a tuple of them by place, each (B, …)
                ) -> tuple[jax.Array, jax.Array]:
        "(x̂₀, ε̂), each of x's shape."
        ...

def as_denoiser(
    model,  # a network with .apply(params, x, temb), a `Denoiser`, or any callable like one
    params=None,  # the network's parameters
    noise_schedule=None,  # a `NoiseScheduler`; a denoiser that carries one needs none
    model_output_transform=None,  # what the network's output means; `EpsilonPredictor()` by default
) -> tuple[Any, NoiseScheduler]:
    "(a denoiser that is a pytree, its schedule), from a network and what belongs to it, or a denoiser alone."
    if callable(getattr(model, "apply", None)):
        denoiser = Denoiser(model, params, noise_schedule, model_output_transform)
        return denoiser, denoiser.noise_schedule
    if not callable(model):
        raise ValueError("model must have a method apply(params, x, temb), or be a denoiser "
                         f"(x, t, conditioning), got {type(model).__name__}")
    schedule = getattr(model, "noise_schedule", noise_schedule)
    if not isinstance(schedule, NoiseScheduler):
        raise ValueError("noise_schedule must be given: this denoiser carries none of its own")
    if params is not None or model_output_transform is not None:
        raise ValueError("model must have a method apply(params, x, temb) where params or "
                         f"model_output_transform are given, got {type(model).__name__}")
    leaves = jax.tree.leaves(model)
    if len(leaves) == 1 and leaves[0] is model:
        model = jax.tree_util.Partial(model)
    return model, schedule
