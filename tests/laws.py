"""What the laws are checked on: every name in each package's `__all__`, built once and shared by all tests."""
import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff import predictors, samplers, schedulers
from flaxdiff.exact import ExactModel, GaussianMixture


def enrolled(package, base, abstract=()):
    "The classes in `package.__all__` below `base`, each once (an alias is the same object), by name."
    named = {}
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) and issubclass(value, base) and value not in (base, *abstract):
            named.setdefault(value.__name__, value)
    return named


def takes(cls, argument):
    "Does any constructor between `cls` and `object` name this argument?"
    return any(argument in inspect.signature(c.__init__).parameters for c in cls.__mro__ if "__init__" in vars(c))


SCHEDULE_CLASSES = enrolled(schedulers, schedulers.NoiseScheduler, (schedulers.DiscreteNoiseScheduler,))
PREDICTOR_CLASSES = enrolled(predictors, predictors.DiffusionPredictionTransform)
SAMPLER_CLASSES = enrolled(samplers, samplers.DiffusionSampler)
GRIDS = {name: getattr(samplers, name) for name in samplers.__all__
         if inspect.isfunction(getattr(samplers, name)) and next(iter(inspect.signature(getattr(samplers, name)).parameters)) == "schedule"}

# as they come, then with every option of the discrete ones and the shift of flow's, then with another T
SCHEDULES = {name: cls() for name, cls in SCHEDULE_CLASSES.items()}
ZERO_SNR = {f"{name}-zero-snr": cls(zero_terminal_snr=True) for name, cls in SCHEDULE_CLASSES.items() if takes(cls, "zero_terminal_snr")}
SCALED = {f"{name}-scaled": cls(beta_start=0.00085, beta_end=0.012, scaled=True) for name, cls in SCHEDULE_CLASSES.items() if takes(cls, "scaled")}
SHIFTED = {f"{name}-shifted": cls(shift=3.0) for name, cls in SCHEDULE_CLASSES.items() if takes(cls, "shift")}
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "5 of 10 betas are cut")
    OTHER_T = {f"{name}-T{T}": cls(T) for name, cls in SCHEDULE_CLASSES.items()
               for T in ((10,) if issubclass(cls, schedulers.DiscreteNoiseScheduler) else (1000,))}
ALL_SCHEDULES = {**SCHEDULES, **ZERO_SNR, **SCALED, **SHIFTED, **OTHER_T}
EACH_KIND = ("LinearNoiseSchedule", "CosineContinuousNoiseScheduler", "EDMNoiseScheduler", "CosineNoiseSchedule-zero-snr")
PREDICTORS = {name: cls() for name, cls in PREDICTOR_CLASSES.items()}


def is_discrete(schedule): return isinstance(schedule, schedulers.DiscreteNoiseScheduler)
def ends_pure(schedule): return float(schedule.alpha(schedule.max_timesteps)) == 0


def decodable(predictor, schedule):
    "Does the output say anything about x0 at the last level?"
    T = schedule.max_timesteps
    return float(predictor.determinant(schedule.alpha(T), schedule.sigma(T))) != 0


def over(at_once=None, **tables):
    "Parametrize over tables of named things, all with all; schedules that are not in `at_once` wait for --slow."
    def param(argument, name, value):
        waits = argument == "schedule" and at_once is not None and name not in at_once
        return pytest.param(value, id=name, marks=[pytest.mark.slow] if waits else [])
    def mark(test):
        for argument, table in tables.items():
            test = pytest.mark.parametrize(argument, [param(argument, *item) for item in table.items()])(test)
        return test
    return mark


@pytest.fixture
def x64():
    "float64 for one test."
    with jax.enable_x64(True): yield


# Networks that are written down

class Wave:
    "A cheap smooth network with a parameter; it counts how often it is traced and, if asked, how often it runs."
    def __init__(self, count_calls=False, dtype=None):
        self.traces, self.calls, self.count_calls, self.dtype = 0, 0, count_calls, dtype

    def init(self, key, x, temb): return self.params

    def apply(self, params, x, temb):
        self.traces += 1
        if self.count_calls: jax.debug.callback(self._called)
        if self.dtype: x, temb = x.astype(self.dtype), temb.astype(self.dtype)
        return jnp.tanh(params["w"].astype(x.dtype) * x + temb.reshape((-1,) + (1,) * (x.ndim - 1)).astype(x.dtype) / 4)

    def _called(self): self.calls += 1

    params = {"w": np.float32(0.7)}


class InTwoPrecisions:
    "The first half of the batch through a float32 network, the rest through a bfloat16 one."
    def apply(self, params, x, temb):
        half = len(x) // 2
        return jnp.concatenate([WAVE.apply(params, x[:half], temb[:half]), BFLOAT16.apply(params, x[half:], temb[half:]).astype(x.dtype)])


WAVE, BFLOAT16, BOTH = Wave(), Wave(dtype=jnp.bfloat16), InTwoPrecisions()
MIXTURE = GaussianMixture([-0.8, 0.1, 0.7], [0.3, 0.2, 0.25], [0.3, 0.3, 0.4])
POINT = GaussianMixture([0.3], 0.0)


@functools.lru_cache(maxsize=None)
def exact_sampler(cls, schedule, predictor, data=MIXTURE, options=()):
    "A sampler of the exact network of `data`; the same object, with what it compiled, for the same question."
    return cls(ExactModel(data, schedule, predictor), {}, schedule, predictor, **dict(options))


@functools.lru_cache(maxsize=None)
def wave_sampler(cls, schedule, predictor, model=WAVE, options=()):
    "A sampler of a cheap network, for laws that hold for any network."
    return cls(model, Wave.params, schedule, predictor, **dict(options))


def default_predictor(schedule):
    "One that the schedule can be decoded with."
    return PREDICTORS["VPredictor"] if ends_pure(schedule) else PREDICTORS["EpsilonPredictor"]


@functools.lru_cache(maxsize=None)
def is_stochastic(cls, options=()):
    "Do two keys give two answers?"
    schedule = SCHEDULES["EDMNoiseScheduler"]
    sampler = wave_sampler(cls, schedule, PREDICTORS["KarrasEDMPredictor"], options=options)
    x = jnp.ones((2, 3), jnp.float32)
    a, b = (sampler.sample(x, [1.0, 0.5], rng=key, denoise_final=False) for key in (0, 1))
    return bool(jnp.any(a != b))


def has_memory(sampler):
    "Does it carry anything from step to step?"
    return bool(jax.tree.leaves(sampler.init_memory(jnp.zeros(1))))


def walk(sampler, x, steps, rng=0, stride=1, denoise_final=False):
    "`sampler.sample`, but `stride` intervals at a time: one compilation serves grids of every length. Not for solvers that remember."
    assert not has_memory(sampler) and (len(steps) - 1) % stride == 0
    key = jax.random.PRNGKey(rng)
    for i in range(0, len(steps) - 1, stride):
        x = sampler.sample(x, steps[i:i + stride + 1], rng=jax.random.fold_in(key, i), denoise_final=False)
    return sampler.sample(x, steps[-1:], rng=0) if denoise_final else x


def plan_table(sampler, times, first=0):
    "What a solver plans for the steps from `first` on, a row for each."
    levels = sampler.level(times)
    return jax.vmap(lambda i: sampler.plan(levels, i, len(times) - 2))(jnp.arange(first, len(times) - 1))


class OneOf(predictors.DiffusionPredictionTransform):
    "Any of these predictors; `which` may be traced, so that all are one program."
    def __init__(self, choices): self.choices, self.which = list(choices), 0
    def _pick(self, ask): return jax.tree.map(lambda *values: jax.lax.select_n(self.which, *values), *map(ask, self.choices)) if len(self.choices) > 1 else ask(self.choices[0])
    def row(self, alpha, sigma): return self._pick(lambda p: p.row(alpha, sigma))
    def get_input_scale(self, alpha, sigma): return self._pick(lambda p: p.get_input_scale(alpha, sigma))
    def decode(self, x_t, F, alpha, sigma): return self._pick(lambda p: p.decode(x_t, F, alpha, sigma))


def sample_each(cls, schedule, choices, model, x, lists, rng=0, options=()):
    "`sample` with each of these predictors from x along each of these lists of times, (predictors, lists, B, …), in one compilation."
    sampler = cls(model, Wave.params, schedule, OneOf(choices), **dict(options))
    longest = max(map(len, lists))
    table = jnp.asarray(np.stack([np.pad(steps, (0, longest - len(steps)), mode="edge") for steps in lists]))
    last = jnp.asarray([len(steps) - 2 for steps in lists])

    def run(which, steps, last):
        sampler.model_output_transform.which = which
        return samplers.common.walk(sampler, sampler.denoiser, x, steps, last, jax.random.PRNGKey(rng))
    return jax.jit(jax.vmap(jax.vmap(run, (None, 0, 0)), (0, None, None)))(jnp.arange(len(choices)), table, last)
