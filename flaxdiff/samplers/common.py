"""A sampler is one small step in one compiled loop: denoise, move to a little less noise, denoise again."""

# %%
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxdiff.denoiser import Denoiser, Level, as_denoiser, check_conditioning
from flaxdiff.samplers.grids import check_resolution, check_steps, make_steps
from flaxdiff.utils import (NoRandomKey, RandomMarkovState, as_key, check_flag, check_floats,
                            check_positive_int, check_shape, clip_images)

# %%
class SamplerState(RandomMarkovState):
    "What a solver is given at a step: key and memory, which go on to the next, and what the levels decide."
    memory: Any = ()  # arrays of fixed shape, made by `init_memory`
    plan: Any = ()  # this step's row of `plan`
    level: Any = None  # the `Level` of t: α, σ and what the denoiser needs of them
    next_level: Any = None  # the `Level` of s
    second_half: Any = None  # (B, …): a second half of the network's channels, for networks that have one
    denoise: Callable = flax.struct.field(  # (x, time or `Level`) -> (x̂₀, ε̂): one network call more
        pytree_node=False, default=None)

    def ddim_step(self,
                  x0,  # (B, …): x̂₀
                  eps,  # (B, …): ε̂
                 ):
        "x_s = α_s x̂₀ + σ_s ε̂ (Song et al. 2021a, eq. 12 at η = 0): where the straight line in σ/α leads."
        return self.next_level.alpha * x0 + self.next_level.sigma * eps

# %%
def pair_step_forms(
    cls,  # a subclass of `Solver`
):
    "Where a class defines one form of the step, the other calls it: whichever was written last counts."
    if "step" in vars(cls) and "take_next_step" not in vars(cls):
        short = cls.step

        def take_next_step(self, current_samples, reconstructed_samples, pred_noise, current_step, state,
                           next_step=None):
            return short(self, current_samples, reconstructed_samples, pred_noise, current_step,
                         next_step, state)
        cls.take_next_step = take_next_step

    elif "take_next_step" in vars(cls) and "step" not in vars(cls):
        long = cls.take_next_step

        def step(self, x, x0, eps, t, s, state):
            return long(self, x, x0, eps, t, state, next_step=s)
        cls.step = step

# %%
class Solver:
    "What a sampler does at a step: `step`, or `take_next_step`, must be written; the other three may be."
    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        pair_step_forms(cls)

    def step(self,
             x,  # (B, …): x_t
             x0,  # (B, …): x̂₀
             eps,  # (B, …): ε̂
             t,  # scalar: the time of x
             s,  # scalar: the time to go to, s < t
             state,  # a `SamplerState`; α and σ of both times are in state.level and state.next_level
            ) -> Any:
        "The one method of a solver: (x_s, the state to carry on)."
        raise NotImplementedError(f"{type(self).__name__} must define step or take_next_step")

    def take_next_step(self,
                       current_samples,  # (B, …): x_t
                       reconstructed_samples,  # (B, …): x̂₀
                       pred_noise,  # (B, …): ε̂
                       current_step,  # scalar: the time t
                       state,  # a `SamplerState`
                       next_step=None,  # scalar: the time s < t
                      ) -> Any:
        "`step` in long words; a solver may define either."
        raise NotImplementedError(f"{type(self).__name__} must define step or take_next_step")

    def init_memory(self,
                    x,  # (B, …): the samples at the first level
                   ) -> Any:
        "What the solver remembers before its first step; nothing, unless it overrides this."
        return ()

    def plan(self,
             levels,  # the `Level`s of all times, a table
             i,  # which step: from levels[i] to levels[i + 1]
             last,  # the number of the last step
            ) -> Any:
        "Arrays that depend on the levels alone, for one step; nothing, unless it overrides this."
        return ()

    def before_denoising(self,
                         x,  # (B, …): x_t
                         level,  # its `Level`
                         state,  # a `SamplerState`
                        ) -> Any:
        "(x, level, state) for which the network is asked and the step is taken; as they came by default."
        return x, level, state

# %%
def make_ask(
    sampler,  # a `DiffusionSampler`
    denoiser,  # its own, or one like it
    conditioning,  # a dict or tuple of arrays, each (B, …)
):
    "(x, time or `Level`) -> (x̂₀, ε̂, second half of the channels or None): one call of the denoiser."
    def ask(x, level) -> tuple[Any, ...]:
        if not isinstance(level, Level):
            level = sampler.level(jnp.asarray(level))
        if hasattr(denoiser, "at"):
            return denoiser.at(x, level, conditioning)
        return *denoiser(x, level.time, conditioning), None
    return ask

# %%
def walk(
    sampler,  # a `DiffusionSampler`: the solver
    denoiser,  # its own, or one like it; its parameters may be traced
    x,  # (B, …): samples at times[0]
    times,  # (P,): times; those after times[last + 1] are not visited
    last,  # the number of the last step, counted from 0
    key,  # a JAX random key, or None where nothing is drawn
    conditioning=(),  # a dict or tuple of arrays, each (B, …)
    denoise_final=True,  # end with x̂₀ at the last level
):
    "The whole loop, for tracing: a step from each level to the next, then x̂₀ at the last."
    levels = sampler.level(times.astype(jnp.promote_types(x.dtype, jnp.float32)))
    numbers = jnp.arange(len(times) - 1)
    plans = jax.vmap(lambda i: sampler.plan(levels, jnp.minimum(i, last), last))(numbers)
    ask = make_ask(sampler, denoiser, conditioning)

    def one_step(carry, row, ask=ask):
        x, key, memory = carry
        _, level, next_level, plan = row
        state = SamplerState(key, memory, plan, level, next_level, denoise=lambda x, t: ask(x, t)[:2])
        x, level, state = sampler.before_denoising(x, level, state)
        x0, eps, second_half = ask(x, level)
        state = state.replace(level=level, second_half=second_half)
        x_next, state = sampler.step(x, x0, eps, level.time, next_level.time, state)
        check_shape("what step returns", x_next, x.shape)
        return x_next.astype(x.dtype), state.rng, state.memory

    def leave_pure_noise(carry, row):
        x, _, memory = carry
        _, key, _ = one_step(carry, row, lambda x, level: (x, x, x))  # for its key alone
        x0, eps, _ = ask(x, row[1])
        return SamplerState(key, next_level=row[2]).ddim_step(x0, eps).astype(x.dtype), key, memory

    def visit(carry, row):
        step = one_step
        if sampler.starts_pure:  # where α = 0 every solver takes DDIM's step, and no memory: σ/α is infinite
            step = lambda *now: jax.lax.cond(row[1].alpha == 0, leave_pure_noise, one_step, *now)
        return jax.lax.cond(row[0] <= last, step, lambda carry, row: carry, carry, row), None

    start = x, key, sampler.init_memory(x)
    (x, *_), _ = jax.lax.scan(visit, start, (numbers, levels[:-1], levels[1:], plans))
    return ask(x, levels[last + 1])[0].astype(x.dtype) if denoise_final else x

# %%
def pad_times(
    steps,  # (N,): times
):
    "`steps`, the last one repeated until their number is a power of two."
    n = len(steps)
    return np.pad(steps, (0, (1 << (n - 1).bit_length()) - n), mode="edge")

class Programs:
    "The compiled programs of one function, the last few used; older ones are let go, with their memory."
    def __init__(self,
                 function,  # pure; takes arrays by place and switches by name
                 switches=(),  # the names of its switches
                 keep=16,  # how many programs
                ):
        self.function = function
        self.switches = switches
        self.jitted = jax.jit(function, static_argnames=switches)
        self.keep = keep
        self.compiled = OrderedDict()

    def __call__(self, *arrays, **switches):
        "The function's answer; inside another traced function it is a part of that."
        leaves, structure = jax.tree.flatten(arrays)
        if any(isinstance(v, Tracer) for v in leaves):
            return self.jitted(*arrays, **switches)
        floats = jnp.result_type(float)  # float64 where that is switched on
        key = structure, tuple(switches.items()), floats, tuple(map(self.signature, leaves))
        if key not in self.compiled:
            function = partial(self.function)  # a new object: JAX keeps a program while its function lives
            jitted = jax.jit(function, static_argnames=self.switches)
            self.compiled[key] = jitted.lower(*arrays, **switches).compile()
        self.compiled.move_to_end(key)
        while len(self.compiled) > self.keep:
            self.compiled.popitem(last=False)
        return self.compiled[key](*arrays)

    @staticmethod
    def signature(leaf):  # an array
        "What of an array a program is compiled for."
        sharding, weak_type = getattr(leaf, "sharding", None), getattr(leaf, "weak_type", False)
        return jnp.shape(leaf), jnp.result_type(leaf), sharding, weak_type

# %%
def prior_std(
    noise_schedule,  # a `NoiseScheduler`
    t,  # scalar or (B,): times
):
    "The standard deviation of the noise that sampling starts from: σ where α ≡ 1, else √(α²+σ²)."
    sigma = noise_schedule.sigma(t)
    return sigma if noise_schedule.variance_exploding else jnp.hypot(noise_schedule.alpha(t), sigma)

def draw_noise(
    key,  # a JAX random key
    std,  # scalar: the standard deviation
    shape,  # (B, H, W, C)
):
    "Normal noise of that standard deviation."
    noise = jax.lax.optimization_barrier(jax.random.normal(key, shape))  # rounded before it is multiplied
    return noise * std

def image_shape(
    model,  # a network, which may carry `image_shape`
    image_size: Any = None,  # H = W, or (H, W); the model's own by default
    channels=None,  # C; the model's own by default, else 3
):
    "(H, W, C), from the arguments or else from the model."
    known = getattr(model, "image_shape", None) or ()
    if image_size is None and not known:
        raise ValueError("image_size must be given: the model carries no image shape of its own; "
                         "use image_size=32, channels=3")
    size = known[:2] if image_size is None else image_size
    size = tuple(size) if np.ndim(size) else (size, size)
    if len(size) != 2:
        raise ValueError(f"image_size must be one number or (H, W), got {image_size!r}")
    if channels is None:
        channels = known[2] if known else 3
    return (*(check_positive_int("image_size", v) for v in size), check_positive_int("channels", channels))

# %%
def check_priors(
    priors,  # (B, H, W, C): noisy images to start from
    num_images=None,  # what else was asked for: it must agree
    image_size: Any = None,  # the same
    channels=None,  # the same
):
    "`priors` as an array; a `ValueError` where they are no finite images, or others were asked for."
    priors = check_floats("priors", priors)
    if priors.ndim != 4:
        raise ValueError(f"priors must have shape (B, H, W, C), got {priors.shape}")
    size = tuple(image_size) if np.ndim(image_size) else (image_size, image_size)
    names = "num_images", "image_size", "image_size", "channels"
    for name, value, due in zip(names, (num_images, *size, channels), priors.shape):
        if value is not None and value != due:
            raise ValueError(f"{name} must be left out where priors are given, or agree with their shape "
                             f"{priors.shape}, got {value}")
    if not isinstance(priors, Tracer) and not bool(jnp.all(jnp.isfinite(priors))):
        raise ValueError("priors must be finite, got NaN or infinity in them")
    return priors

def finish_images(
    images,  # (B, H, W, C): what a sampler made
):
    "(the images in [-1, 1], how many of them are not finite)."
    lost = jnp.sum(~jnp.all(jnp.isfinite(images), (1, 2, 3)))
    return clip_images(images), lost

def warn_of_lost_images(
    lost,  # how many images are not finite
    batch,  # of how many
    params,  # the network's parameters
):
    "A `ValueError` where the parameters are not finite; a warning that counts the images which are not."
    if isinstance(lost, Tracer) or not lost:
        return
    if not all(np.all(np.isfinite(np.asarray(v, np.float32))) for v in jax.tree.leaves(params)):
        raise ValueError("params must be finite, got NaN or infinity in them: they can make no image")
    warnings.warn(f"{lost} of {batch} images are not finite: the solver left the range of numbers, "
                  "or gave up; try other levels (grid=), more steps, or another solver", stacklevel=3)

# %%
class DiffusionSampler(Solver):
    "From noise to data in one compiled scan; a subclass says, as a `Solver`, what happens at a step."
    def __init__(self,
                 model,  # a denoiser alone, or anything with .apply(params, x, temb, *conditioning)
                 params=None,  # the model's parameters
                 noise_schedule=None,  # a `NoiseScheduler`
                 model_output_transform=None,  # what the output means; `EpsilonPredictor()` by default
                 guidance_scale=1.0,  # 1: no guidance
                ):
        if guidance_scale != 1.0:
            raise NotImplementedError(f"guidance_scale={guidance_scale}: guidance is not built yet, "
                                      "only 1.0 (none) works")
        parts = model, params, noise_schedule, model_output_transform
        self.denoiser, self.noise_schedule = as_denoiser(*parts)
        self.model = getattr(self.denoiser, "model", model)
        self.model_output_transform = getattr(self.denoiser, "model_output_transform", None)
        self.guidance_scale = guidance_scale
        self.starts_pure = float(self.noise_schedule.alpha(self.noise_schedule.max_timesteps)) == 0
        self.programs = Programs(partial(walk, self), ("denoise_final",))
        self.draw_noise = Programs(draw_noise, ("shape",))
        self.finish_images = Programs(finish_images)

    @property
    def params(self):
        "The network's parameters, those of `denoiser`; they can be set, and no program is compiled anew."
        return getattr(self.denoiser, "params", None)

    @params.setter
    def params(self, params):
        self.denoiser = Denoiser(self.model, params, self.noise_schedule, self.model_output_transform)

    def level(self,
              t,  # scalar or (N,): times
             ):
        "The `Level` of a time, or a table of them."
        if hasattr(self.denoiser, "level"):
            return self.denoiser.level(t)
        return Level(t, self.noise_schedule.alpha(t), self.noise_schedule.sigma(t))

    def check_steps(self,
                    steps,  # (N,): times
                   ):
        "`steps` as NumPy float64, if they can be walked down."
        return check_steps(self.noise_schedule, steps)

    def make_steps(self,
                   diffusion_steps=50,  # N: how many noise levels
                   start_step=1000,  # the first, 1000 is T
                   end_step=0,  # the last, or the schedule's smallest if that is larger
                   grid=None,  # (schedule, t_start, t_end, N) -> N times; uniform in t by default
                  ):
        "N decreasing times, the first exactly `start_step`·T/1000; step s is time s·T/1000."
        return make_steps(self.noise_schedule, diffusion_steps, start_step, end_step, grid)

    def run(self,
            x,  # (B, …): samples at steps[0]
            steps,  # (N,): checked times
            key,  # a JAX random key, or None
            conditioning,  # a dict or a tuple
            denoise_final,  # end with x̂₀
           ):
        "`walk`, compiled."
        check_conditioning(conditioning, len(x))
        check_resolution(steps, jnp.promote_types(x.dtype, jnp.float32))
        conditioning = dict(conditioning) if isinstance(conditioning, Mapping) else tuple(conditioning)
        conditioning = jax.tree.map(jnp.asarray, conditioning)
        times, last = jnp.asarray(pad_times(steps)), jnp.int32(len(steps) - 2)
        return self.programs(self.denoiser, x, times, last, key, conditioning, denoise_final=denoise_final)

    def sample(self,
               x,  # (B, …): samples at time steps[0]
               steps,  # (N,): decreasing times, the network is called at each
               rng=None,  # a key or a seed, for stochastic solvers; fresh by default
               conditioning=(),  # a dict of further arguments of the model, or a tuple of them, each (B, …)
               denoise_final=True,  # end with the jump to σ = 0; False: stop at steps[-1]
              ):
        "The bare solver, not clipped. `ValueError` for times that do not fall or lie outside the schedule."
        x = check_floats("x", x)
        steps = self.check_steps(steps)
        return self.run(x, steps, as_key(rng), conditioning, check_flag("denoise_final", denoise_final))

    def encode(self,
               x,  # (B, …): samples at time steps[-1]
               steps,  # (N,): decreasing times, those of `sample`; here walked from the last up to the first
               conditioning=(),  # a dict of further arguments of the model, or a tuple of them, each (B, …)
              ):
        "The noise at steps[0] that leads to x. `ValueError` if the solver draws noise, or α(steps[0]) = 0."
        x = check_floats("x", x)
        steps = self.check_steps(steps)
        if self.noise_schedule.alpha(steps[0]) == 0:
            raise ValueError(f"steps must start where α > 0, got {steps[0]:g}: "
                             "no signal is left there to come back from")
        try:
            return self.run(x, steps[::-1], None, conditioning, False)  # without a key
        except NoRandomKey:
            name = type(self).__name__
            raise ValueError(f"eta must be 0, and no other option stochastic, to encode: {name} draws fresh "
                             "noise, which cannot be found again") from None

    def generate_images(self,
                        num_images=None,  # B; 16 by default
                        diffusion_steps=50,  # N: noise levels; Euler calls the network once at each
                        start_step=1000,  # from: 1000 is T
                        end_step=0,  # down to
                        image_size=None,  # H = W, or (H, W); the model's own by default
                        channels=None,  # C; the model's own by default
                        rng=None,  # a key or a seed; fresh noise by default
                        priors=None,  # (B, H, W, C): start from these noisy images instead
                        conditioning=(),  # a dict of further arguments of the model, or a tuple of them
                        grid=None,  # how the levels are spaced; uniform in t by default
                       ):
        "New images, (B, H, W, C) in [-1, 1]; image i depends on `rng` and i alone."
        steps = self.make_steps(diffusion_steps, start_step, end_step, grid)
        noise_key, key = jax.random.split(as_key(rng))
        if priors is None:
            batch = check_positive_int("num_images", 16 if num_images is None else num_images)
            shape = batch, *image_shape(self.model, image_size, channels)
            priors = self.draw_noise(noise_key, prior_std(self.noise_schedule, steps[0]), shape=shape)
        else:
            priors = check_priors(priors, num_images, image_size, channels)
        images, lost = self.finish_images(self.run(priors, steps, key, conditioning, True))
        warn_of_lost_images(lost, len(images), self.params)
        return images
