"""Laws of the denoiser as a value, of the loop around it, and of the two forms of a step."""
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.denoiser import Denoiser, Level, as_denoiser
from flaxdiff.likelihood import log_likelihood, variational_bound
from flaxdiff.samplers import DiffusionSampler, EulerMaruyamaSampler, EulerSampler, HeunSampler, RK4Sampler
from flaxdiff.samplers.common import Programs, walk
from flaxdiff.schedulers import LinearNoiseSchedule
from laws import ALL_SCHEDULES, MIXTURE, PREDICTORS, SAMPLER_CLASSES, SCHEDULES, WAVE, Wave, decodable, over, x64
from test_samplers import equations

EDM, LINEAR, V, KARRAS = SCHEDULES["EDMNoiseScheduler"], SCHEDULES["LinearNoiseSchedule"], PREDICTORS["VPredictor"], PREDICTORS["KarrasEDMPredictor"]
X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(2, 2, 2, 3)


def make(cls=EulerSampler, schedule=EDM, predictor=V, model=None, **options): return cls(model or Wave(), Wave.params, schedule, predictor, **options)


class Conditioned:
    "A network with one named condition."
    def apply(self, params, x, temb, shade=None): return x * params + (0 if shade is None else shade[:, None, None, None])


# The denoiser

@over(schedule=ALL_SCHEDULES, predictor=PREDICTORS)
def test_answers_are_the_predictors_decoding(schedule, predictor, x64):
    "At scalar times, at a time for each image, and from a table: F decoded at (α, σ)."
    if not decodable(predictor, schedule): pytest.skip("says nothing at the last level")
    denoiser, x = Denoiser(WAVE, Wave.params, schedule, predictor), jnp.asarray(X, jnp.float64)
    times = np.array([0.9, 0.2]) * schedule.max_timesteps
    alpha, sigma = schedule.get_rates(times)
    F = WAVE.apply(Wave.params, x * predictor.get_input_scale(alpha, sigma), schedule.network_time(times))
    want = predictor.decode(x, F, alpha, sigma)
    size = float(np.abs(np.asarray(want)).max())
    for got in (denoiser(x, times), denoiser.at(x, denoiser.level(jnp.asarray(times)))[:2]):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12 * size)
    one = denoiser(x[:1], times[0])
    np.testing.assert_allclose(one, np.asarray(want)[:, :1], rtol=1e-11, atol=1e-12 * size)


def test_it_is_a_pytree_of_its_parameters():
    denoiser = Denoiser(WAVE, Wave.params, EDM, V)
    assert jax.tree.leaves(denoiser) == [Wave.params["w"]]
    loss = lambda d: jnp.sum(d(X, 0.5)[0] ** 2)
    slope = jax.jit(jax.grad(loss))(denoiser)
    assert isinstance(slope, Denoiser) and slope.params["w"].shape == () and slope.params["w"] != 0
    h = np.float32(1e-2)
    difference = (loss(Denoiser(WAVE, {"w": Wave.params["w"] + h}, EDM, V)) - loss(Denoiser(WAVE, {"w": Wave.params["w"] - h}, EDM, V))) / (2 * h)
    np.testing.assert_allclose(slope.params["w"], difference, rtol=1e-2)
    many = Denoiser(WAVE, {"w": jnp.array([0.1, 0.7])}, EDM, V)
    np.testing.assert_allclose(jax.vmap(lambda d: d(X, 0.5)[0])(many)[1], denoiser(X, 0.5)[0], rtol=1e-6)


def test_two_denoisers_of_the_same_objects_are_one_program():
    model = Wave()
    ask = jax.jit(lambda d, x: d(x, 0.5)[0])
    a, b = (ask(Denoiser(model, {"w": np.float32(w)}, EDM, V), X) for w in (0.7, 0.1))
    assert model.traces == 1 and np.any(a != b)


def test_conditions_by_name_and_by_place():
    denoiser, shade = Denoiser(Conditioned(), np.float32(0.5), EDM, V), np.float32([1, 2])
    named, placed = denoiser(X, 0.5, {"shade": shade}), denoiser(X, 0.5, (shade,))
    np.testing.assert_array_equal(named, placed)
    assert np.any(named[0] != denoiser(X, 0.5)[0])
    sampler = EulerSampler(denoiser)
    a, b = (sampler.sample(X, [1.0, 0.5], 0, conditioning) for conditioning in ({"shade": shade}, (shade,)))
    np.testing.assert_array_equal(a, b)
    for bad in ({"shade": shade[:1]}, (np.float32(1),), "shade"):
        with pytest.raises(ValueError, match="conditioning"): sampler.sample(X, [1.0, 0.5], 0, bad)
        with pytest.raises(ValueError, match="conditioning"): denoiser(X, 0.5, bad)


@over(cls=SAMPLER_CLASSES)
def test_any_callable_denoises(cls):
    "A sampler of a network, of its denoiser alone, of a plain function, and of a denoiser made of a denoiser."
    sampler = make(cls)
    plain = lambda x, t, conditioning=(): sampler.denoiser(x, t, conditioning)
    want = sampler.sample(X, [0.9, 0.5, 0.3], 0)
    for again in (cls(sampler.denoiser), cls(plain, noise_schedule=EDM)):
        np.testing.assert_allclose(again.sample(X, [0.9, 0.5, 0.3], 0), want, rtol=2e-5, atol=2e-5)


def test_likelihood_takes_a_denoiser(x64):
    denoiser, x = make().denoiser, jnp.asarray(X, jnp.float64)
    np.testing.assert_array_equal(log_likelihood(denoiser, x, 5), log_likelihood(EulerSampler(denoiser), x, 5))
    np.testing.assert_array_equal(variational_bound(denoiser, x, 5, rng=0).total, variational_bound(RK4Sampler(denoiser), x, 5, key=0).total)


def test_what_is_no_denoiser_is_refused():
    for args, name in (((WAVE, {}, None), "noise_schedule"), ((3, {}, EDM), "model"), ((lambda x, t: x,), "noise_schedule"),
                       ((lambda x, t: x, {}, EDM), "params"), ((WAVE, {}, EDM, "v"), "model_output_transform")):
        with pytest.raises(ValueError, match=name): as_denoiser(*args)
    denoiser = Denoiser(WAVE, Wave.params, EDM, V)
    for call, name in ((lambda: denoiser(X.astype(int), 0.5), "x"), (lambda: denoiser(X, np.ones(3)), "t"), (lambda: denoiser(X, np.nan), "t")):
        with pytest.raises(ValueError, match=name): call()

    class Pair:
        def apply(self, params, x, temb): return x, x
    with pytest.raises(ValueError, match="tuple"): Denoiser(Pair(), {}, EDM, V)(X, 0.5)


# The loop

def test_a_karras_loop_holds_no_power_and_no_logarithm():
    "All that depends on the levels alone stands in tables, made before the loop."
    sampler = make(predictor=KARRAS)
    jaxpr = jax.make_jaxpr(lambda d, x: walk(sampler, d, x, jnp.linspace(1, 0, 8), 6, jax.random.key(0)))(sampler.denoiser, X)
    loop, = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
    inside = {e.primitive.name for e in equations(loop.params["jaxpr"])}
    assert not inside & {"pow", "integer_pow", "log", "exp", "sqrt"} and "tanh" in inside, inside
    assert {"pow", "log"} & {e.primitive.name for e in equations(jaxpr)}, "outside it they are"


def test_four_programs_serve_all_numbers_of_steps():
    model = Wave()
    sampler = make(HeunSampler, model=model)
    ends = {n: np.asarray(sampler.generate_images(2, n, image_size=2, channels=1, rng=0)) for n in range(5, 65)}
    assert len(sampler.programs.compiled) == 4
    for n in (5, 33, 64):  # and what is filled up changes nothing
        times = jnp.asarray(sampler.make_steps(n), jnp.float32)
        noise, key = jax.random.split(jax.random.key(0))
        alone = jax.jit(lambda d, x: walk(sampler, d, x, times, n - 2, key))(sampler.denoiser, jax.random.normal(noise, (2, 2, 2, 1)) * 80)
        np.testing.assert_allclose(ends[n], np.clip(alone, -1, 1), rtol=1e-5, atol=1e-5)


MEMORY = """
import gc, jax, numpy as np
from flaxdiff.samplers import HeunSampler
from flaxdiff.schedulers import EDMNoiseScheduler
class Net:
    def apply(self, params, x, temb): return x * params
def maps(): return sum(1 for _ in open("/proc/self/maps"))
sampler, counts = HeunSampler(Net(), np.float32(0.5), EDMNoiseScheduler()), []
for call in range(%d):
    sampler.generate_images(1 + call, 2 + call %% 60, image_size=4, channels=1, rng=0)
    counts.append(maps())
gc.collect()
print(counts[len(counts) // 2], counts[-1], len(sampler.programs.compiled))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts Linux's memory maps")
@pytest.mark.parametrize("calls", [48, pytest.param(300, marks=pytest.mark.slow)])
def test_old_programs_are_let_go(calls):
    "Every call another batch and number of steps: the memory maps of the process stop growing."
    done = subprocess.run([sys.executable, "-c", MEMORY % calls], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    half, end, kept = map(int, done.stdout.split())
    assert kept == 16 and end < half + min(3 * calls, 300), (half, end)  # 13 maps a program before: the second half would add 6.5 times the calls


def test_programs_are_let_go_one_by_one():
    programs = Programs(lambda x, double: 2 * x if double else x, ("double",), keep=2)
    for n in (1, 2, 3, 3): assert programs(jnp.ones(n), double=True).sum() == 2 * n
    assert len(programs.compiled) == 2 and programs(jnp.ones(3), double=False).sum() == 3
    assert jax.jit(lambda x: programs(x, double=True))(jnp.ones(2)).sum() == 4


def test_nothing_stays_alive():
    "A sampler, its parameters and their programs go with the last name for them; likelihoods keep none."
    shape = (123, 457)

    class Net:
        def apply(self, params, x, temb): return x * jnp.mean(params)
    alive = lambda: sum(v.shape == shape for v in jax.live_arrays())
    for _ in range(3):
        sampler = EulerSampler(Net(), jnp.ones(shape), EDM, V)
        sampler.generate_images(1, 3, image_size=2, channels=1, rng=0)
        log_likelihood(sampler, X, 3), variational_bound(sampler.denoiser, X, 3, rng=0)
        here = weakref.ref(sampler)
        del sampler
        gc.collect()
        assert here() is None and alive() == 0


@over(cls={name: SAMPLER_CLASSES[name] for name in ("EulerSampler", "HeunSampler", "UniPCSampler", "DDPMSampler")})
def test_the_loop_is_differentiable(cls, x64):
    "Backwards through the whole loop, filled up with steps that are skipped."
    sampler, x = make(cls, LINEAR), jnp.asarray(X, jnp.float64)
    end = lambda w: jnp.sum(EulerSampler.sample(cls(Wave(), {"w": w}, LINEAR, V), x, [900.0, 500.0, 200.0, 60.0, 20.0], rng=0))
    h = 1e-6
    np.testing.assert_allclose(jax.grad(end)(0.7), (end(0.7 + h) - end(0.7 - h)) / (2 * h), rtol=1e-5)
    assert sampler.sample(x, [900.0, 500.0, 200.0], rng=0).dtype == jnp.float64


# The two forms of a step

@over(cls={name: SAMPLER_CLASSES[name] for name in ("EulerSampler", "UniPCSampler", "DDPMSampler")})
def test_both_loops_take_the_same_steps(cls, x64):
    "The light loop of a compiled call, and the differentiable one inside somebody's own program."
    sampler, x = make(cls), np.float64(X) * 80
    for n in (1, 2, 7):
        steps = sampler.make_steps(n)
        light, heavy = sampler.sample(x, steps, rng=0), jax.jit(lambda x: sampler.sample(x, steps, rng=0))(x)
        np.testing.assert_allclose(light, heavy, rtol=1e-12, atol=1e-12)


def test_a_bar_counts_the_steps_and_changes_nothing(capfd):
    sampler = make(HeunSampler)
    ask = lambda **more: sampler.generate_images(2, 6, image_size=2, channels=1, rng=0, **more)
    plain, shown = ask(), ask(progress=True)
    assert "5/5" in capfd.readouterr().err and sampler.bar.shown.n == 5
    np.testing.assert_array_equal(plain, shown)
    with pytest.raises(ValueError, match="progress"): ask(progress="yes")
    with pytest.raises(ValueError, match="progress must be False"): jax.jit(lambda key: sampler.generate_images(2, 6, image_size=2, channels=1, rng=key, progress=True))(jax.random.key(0))


class Short(DiffusionSampler):
    def step(self, x, x0, eps, t, s, state): return state.ddim_step(x0, eps), state


class Long(DiffusionSampler):
    def take_next_step(self, current_samples, reconstructed_samples, pred_noise, current_step, state, next_step=None):
        alpha, sigma = self.noise_schedule.get_rates(next_step)
        return alpha * reconstructed_samples + sigma * pred_noise, state


class LongOverShort(HeunSampler):
    def take_next_step(self, current_samples, reconstructed_samples, pred_noise, current_step, state, next_step=None):
        x, state = super().take_next_step(current_samples, reconstructed_samples, pred_noise, current_step, state, next_step=next_step)
        return x + 1, state


class ShortOverLong(Long):
    def step(self, x, x0, eps, t, s, state):
        x, state = super().step(x, x0, eps, t, s, state)
        return x + 1, state


def test_either_form_of_a_step_will_do():
    steps = [0.9, 0.4]
    run = lambda cls: np.asarray(make(cls).sample(X, steps, 0, denoise_final=False))
    np.testing.assert_allclose(run(Short), run(EulerSampler))
    np.testing.assert_allclose(run(Long), run(EulerSampler), rtol=1e-6)
    np.testing.assert_allclose(run(LongOverShort), run(HeunSampler) + 1, rtol=1e-6)
    np.testing.assert_allclose(run(ShortOverLong), run(EulerSampler) + 1, rtol=1e-6)
    with pytest.raises(NotImplementedError, match="step"): run(DiffusionSampler)


def test_a_level_is_a_row_of_its_table():
    table = make().denoiser.level(jnp.linspace(1, 0, 5))
    row = table[2]
    assert isinstance(row, Level) and row.sigma == EDM.sigma(0.5) and row.time == 0.5
    np.testing.assert_allclose(table.log_snr, EDM.log_snr(np.linspace(1, 0, 5)), rtol=1e-5)


# What cannot be walked

@over(cls=SAMPLER_CLASSES)
def test_times_closer_than_their_numbers_are_refused(cls):
    for gap in (1e-9, 0.0):
        with pytest.raises(ValueError, match="steps"): make(cls).sample(X, 1 - np.arange(10) * gap, 0)


def test_nothing_asked_for_is_ignored():
    sampler, priors = make(predictor=KARRAS), np.ones((3, 4, 4, 2), np.float32)
    for extra, name in ((dict(num_images=5), "num_images"), (dict(image_size=32), "image_size"), (dict(image_size=(4, 5)), "image_size"), (dict(channels=3), "channels")):
        with pytest.raises(ValueError, match=name): sampler.generate_images(priors=priors, **extra)
    assert sampler.generate_images(priors=priors, num_images=3, image_size=4, channels=2, diffusion_steps=2).shape == (3, 4, 4, 2)
    with pytest.raises(ValueError, match="priors"): sampler.generate_images(priors=priors * np.nan)
    with pytest.raises(ValueError, match="denoise_final"): sampler.sample(X, [1.0], 0, denoise_final="no")


def test_lost_images_are_told():
    with pytest.raises(ValueError, match="params"):
        EulerSampler(WAVE, {"w": np.float32(np.nan)}, EDM, V).generate_images(2, 3, image_size=2, channels=1, rng=0)

    class Lost:
        def apply(self, params, x, temb): return jnp.where(jnp.arange(len(x))[:, None, None, None] == 1, jnp.nan, x)
    with pytest.warns(UserWarning, match="1 of 3 images"):
        EulerSampler(Lost(), {}, EDM, V).generate_images(3, 3, image_size=2, channels=1, rng=0)


def test_sampling_loads_no_pictures():
    code = "import sys, flaxdiff, flaxdiff.samplers; assert 'matplotlib' not in sys.modules, 'matplotlib'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
