"""Laws of steps that a solver chooses itself, of the frames it may choose them in, and of the grids that came with them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.exact import ExactModel
from flaxdiff.samplers import AdaptiveSampler, HeunSampler, MidpointSampler, RK4Sampler, exponential_grid, lambda_grid, leading_grid, trailing_grid, uniform_grid
from flaxdiff.samplers.ode import FRAMES, make_frame
from laws import ALL_SCHEDULES, MIXTURE, POINT, PREDICTORS, SCHEDULES, WAVE, ZERO_SNR, Wave, is_discrete, over, walk, x64
from test_samplers import between, convergence_case, exact_path, rates

EDM, LINEAR, COSINE = SCHEDULES["EDMNoiseScheduler"], SCHEDULES["LinearNoiseSchedule"], SCHEDULES["CosineContinuousNoiseScheduler"]
V = PREDICTORS["VPredictor"]


class Counted(ExactModel):
    "An exact network that counts its calls."
    calls = 0
    def _count(self): self.calls += 1
    def apply(self, *args):
        jax.debug.callback(self._count)
        return super().apply(*args)


def adaptive(schedule, data=MIXTURE, **options):
    return AdaptiveSampler(Counted(data, schedule, V), {}, schedule, V, **options)


def run(sampler, x, steps):
    "(where x ends, network calls)."
    sampler.model.calls = 0
    end = sampler.sample(x, steps, rng=0, denoise_final=False).block_until_ready()
    jax.effects_barrier()
    return np.asarray(end), sampler.model.calls


@pytest.mark.parametrize("name, frame", [("LinearNoiseSchedule", "angle"), ("LinearNoiseSchedule", "lambda"), ("EDMNoiseScheduler", "sigma")])
def test_the_error_follows_the_tolerance(name, frame, x64):
    schedule = SCHEDULES[name]
    (x, truth), steps = convergence_case(schedule), between(schedule, 1)
    before = 0
    for tolerance in (1e-3, 1e-6):
        end, calls = run(adaptive(schedule, rtol=tolerance, atol=tolerance, frame=frame), x, steps)
        assert np.abs(end - truth).max() < 5 * tolerance and before < calls < 1500
        before = calls


@over(schedule={"EDM": EDM, "linear": LINEAR, "zero-snr": ZERO_SNR["CosineNoiseSchedule-zero-snr"]})
def test_whole_walk_with_two_levels_or_ten(schedule, x64):
    T, low = float(schedule.max_timesteps), float(schedule.min_time)
    sampler = adaptive(schedule, rtol=1e-6, atol=1e-6)
    first = T if schedule.alpha(T) > 0 else 0.995 * T
    x = np.hypot(*rates(schedule, first)) * np.linspace(-2, 2, 8).reshape(8, 1)
    truth = np.asarray(exact_path(x, rates(schedule, first), rates(schedule, low)))
    for n in (2, 10) if schedule is LINEAR else (2,): np.testing.assert_allclose(run(sampler, x, np.linspace(first, low, n))[0], truth, atol=1e-5)


def test_an_easy_interval_costs_three_calls(x64):
    "One to begin with, three a try; an image that has arrived costs its batch nothing."
    sampler = adaptive(EDM, POINT, frame="sigma")
    x = np.linspace(-3, 3, 4).reshape(4, 1)
    for n in (2, 6): assert run(sampler, x, between(EDM, n - 1))[1] == 4 * (n - 1)


def test_an_image_does_not_know_its_neighbours(x64):
    "Steps and errors are each image's own: to the last digits, alone or beside one that needs many more."
    x, steps = jnp.array([[2.0], [0.02], [-0.35], [1.0]]), [1.0, 0.01]
    sampler = adaptive(COSINE, rtol=1e-3, atol=1e-4)
    together, calls = run(sampler, x, steps)
    alone = [run(sampler, x[i:i + 1], steps) for i in range(4)]
    np.testing.assert_allclose(together, np.concatenate([end for end, _ in alone]), rtol=1e-12, atol=1e-13)
    assert calls == max(c for _, c in alone) and len({c for _, c in alone}) > 1
    pictures = jnp.stack([jnp.full((2, 2, 1), v[0]) for v in x])  # four equal pixels have the error of one
    np.testing.assert_allclose(run(sampler, pictures, steps)[0][:, 0, 0, 0], together[:, 0], rtol=1e-12)


def test_giving_up_is_seen(x64):
    x, steps = jnp.array([[2.0], [0.02], [1.0]]), [1.0, 0.01]
    tries = [(run(adaptive(COSINE, rtol=1e-4, atol=1e-5), x[i:i + 1], steps)[1] - 1) // 3 for i in range(3)]
    most = sorted(tries)[1]  # enough for all but the one that needs most
    tight = run(adaptive(COSINE, rtol=1e-4, atol=1e-5, max_substeps=most), x, steps)[0]
    assert np.array_equal(np.isnan(tight[:, 0]), np.array(tries) > most) and max(tries) > most


def test_a_network_that_fails_does_not_hang_it():
    class Broken:
        def apply(self, params, x, temb): return jnp.where(x > 0, x, jnp.nan)
    end = AdaptiveSampler(Broken(), {}, EDM, V).sample(jnp.array([[-1.0], [1.0]]), [0.8, 0.2], rng=0)
    assert np.isnan(end[0, 0]) and np.isfinite(end[1, 0])


def test_tolerances_beyond_rounding_do_not_hang_it():
    end = AdaptiveSampler(ExactModel(MIXTURE, LINEAR, V), {}, LINEAR, V, rtol=1e-12, atol=1e-12).sample(jnp.ones((1, 1), jnp.float32), [900.0, 100.0], rng=0)
    assert end.shape == (1, 1)  # NaN or not: it came back


def test_options_are_checked():
    make = lambda cls=AdaptiveSampler, **options: cls(WAVE, Wave.params, EDM, V, **options)
    for options, name in ((dict(rtol=-1e-3), "rtol"), (dict(rtol=np.nan), "rtol"), (dict(atol=np.inf), "atol"), (dict(rtol=0, atol=0), "rtol"),
                          (dict(max_substeps=0), "max_substeps"), (dict(max_substeps=2.5), "max_substeps"), (dict(frame="t"), "frame")):
        with pytest.raises(ValueError, match=name): make(**options)
    with pytest.raises(ValueError, match="sigma, angle, lambda"): make(MidpointSampler, frame="time")


# Frames

@pytest.mark.parametrize("cls, order", [(HeunSampler, 2), (MidpointSampler, 2), (RK4Sampler, 4)])
def test_orders_in_lambda(cls, order, x64):
    sampler = cls(ExactModel(MIXTURE, LINEAR, V), {}, LINEAR, V, frame="lambda")
    x, truth = convergence_case(LINEAR)
    errors = [np.sqrt(np.mean((walk(sampler, x, between(LINEAR, n), stride=16) - truth) ** 2)) for n in (128, 256)]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15


@pytest.mark.parametrize("name", FRAMES)
@over(schedule={"EDM": EDM, "linear": LINEAR, "cosine": COSINE})
def test_a_frame_is_the_ode(name, schedule, x64):
    "dy/dτ is the slope along the exact path, `time` undoes `position`, the ratio is that of the position, and each image may have a level of its own."
    frame, T, point = make_frame(name, schedule), schedule.max_timesteps, jnp.full((1, 1), 0.7)
    times = jnp.asarray(schedule.get_timesteps(np.array([0.013, 0.5, 1.3, 30.0])))
    at = lambda t: (schedule.alpha(t), schedule.sigma(t))
    position, scale = (lambda t: frame.position(*at(t))), (lambda t: frame.scale(*at(t)))
    time = lambda tau: schedule.get_timesteps(frame.ratio(tau))
    np.testing.assert_allclose(time(position(times)), times, rtol=1e-9)
    where = lambda t: exact_path(point, rates(schedule, 0.6 * T), rates(schedule, t))
    x = jnp.concatenate([where(t) for t in times])
    alpha, sigma = schedule.alpha(times)[:, None], schedule.sigma(times)[:, None]
    x0 = MIXTURE.denoise(x, alpha[:, 0], sigma[:, 0])
    eps = (x - alpha * x0) / sigma
    slopes = frame.slope(x0, eps, alpha, sigma)
    for i, t in enumerate(times):
        h = 1e-5 * abs(position(t))
        y = [where(time(position(t) + d))[0, 0] / scale(time(position(t) + d)) for d in (-h, h)]
        assert abs((y[1] - y[0]) / (2 * h) - slopes[i, 0]) < 1e-6 * max(1, abs(slopes[i, 0]))
        np.testing.assert_array_equal(frame.slope(x0[i:i + 1], eps[i:i + 1], *at(t)), slopes[i:i + 1])


# Grids

@over(schedule=ALL_SCHEDULES)
def test_leading_and_trailing(schedule):
    "First the start; strictly down; leading ends where it is told, trailing a step above nothing."
    T, low = schedule.max_timesteps, schedule.min_time
    for start, end in ((T, low), (0.95 * T, 0.37 * T)):
        for n in (1, 2, 7, 50, 1000):
            lead, trail = leading_grid(schedule, start, end, n), trailing_grid(schedule, start, end, n)
            for times in (lead, trail):
                assert times.shape == (n,) and times.dtype == np.float64 and times[0] == start and np.all(np.diff(times) < 0)
            if n == 1: continue
            assert lead[-1] == end and trail[-1] == max(start / n, end)
            np.testing.assert_allclose(np.diff(trail), trail[1] - trail[0], rtol=1e-9)
            if n > 2:
                np.testing.assert_allclose(np.diff(lead[1:]), trail[1] - trail[0], rtol=1e-9)
                assert lead[0] - lead[1] <= 2 * (trail[0] - trail[1]) + 1e-9 * T


def test_the_published_whole_numbers():
    "Lin et al. 2024, table 2, T = 1000 and 10 steps; leading but for its first."
    np.testing.assert_allclose(trailing_grid(LINEAR, 1000, 1, 10), np.arange(1000, 0, -100))
    np.testing.assert_allclose(leading_grid(LINEAR, 1000, 1, 10), [1000, *range(801, 0, -100)])
    np.testing.assert_allclose(np.round(uniform_grid(LINEAR, 1000, 1, 10)), [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1])
    assert exponential_grid is lambda_grid and is_discrete(LINEAR)
