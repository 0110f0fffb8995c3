"""What CONTRIBUTING.md shows is run as it stands there: a schedule, a predictor and a solver, each as short as it says."""
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxdiff import get_dataset
from flaxdiff.models import SimpleUNet
from flaxdiff.predictors import DiffusionPredictionTransform, EpsilonPredictor
from flaxdiff.samplers import EulerSampler, HeunSampler
from flaxdiff.samplers.ode import RungeKuttaSampler
from flaxdiff.schedulers import EDMNoiseScheduler, NoiseScheduler
from flaxdiff.trainer import DiffusionTrainer
from laws import MIXTURE, PREDICTORS, SCHEDULES, Wave, exact_sampler, x64

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


def made(number):
    "(the class of a code block, its lines without the docstring)."
    names = {}
    exec(BLOCKS[number], {**globals()}, names)
    lines = [line for line in BLOCKS[number].splitlines() if line.strip() and not line.strip().startswith('"')]
    return next(iter(names.values())), len(lines)


def test_as_short_as_promised():
    assert [made(k)[1] <= most for k, most in enumerate((6, 3, 15, 15, 15, 15))] == [True] * 6 and len(BLOCKS) == 6


def test_the_schedule_is_one(x64):
    schedule = made(0)[0](2.0)
    times = np.linspace(0.05, 2, 9)
    np.testing.assert_allclose(schedule.get_timesteps(schedule.sigma(times)), times)
    assert np.all(np.diff(schedule.log_snr(times)) < 0)
    end = exact_sampler(HeunSampler, schedule, PREDICTORS["KarrasEDMPredictor"]).generate_images(2, 30, image_size=2, channels=1, rng=0)
    assert np.all(np.isfinite(end))


def test_the_predictor_is_one(x64):
    predictor, schedule = made(1)[0](), SCHEDULES["CosineContinuousNoiseScheduler"]
    x, steps = jnp.ones((2, 3)) * 0.4, np.linspace(0.9, 0.1, 6)
    np.testing.assert_allclose(exact_sampler(EulerSampler, schedule, predictor).sample(x, steps, 0),
                               exact_sampler(EulerSampler, schedule, EpsilonPredictor()).sample(x, steps, 0), rtol=1e-9)


def test_the_solver_has_the_order_it_says(x64):
    cls, schedule = made(2)[0], SCHEDULES["EDMNoiseScheduler"]
    x, errors = jnp.linspace(-2, 2, 9)[:, None] * 3, []
    ends = [float(v) for v in schedule.get_timesteps(np.array([3.0, 0.4]))]
    truth = MIXTURE.ode_solution(x, (1.0, 3.0), (1.0, 0.4))
    for n in (33, 65):
        steps = np.linspace(*ends, n)
        errors.append(np.abs(exact_sampler(cls, schedule, PREDICTORS["VPredictor"]).sample(x, steps, 0, denoise_final=False) - truth).max())
    assert 1.8 < np.log2(errors[0] / errors[1]) < 2.3


def test_a_trainer_takes_the_loss_the_callback_and_the_metric():
    huber, Worst, spread = (made(k)[0] for k in (3, 4, 5))
    data, _ = get_dataset("digits", batch_size=16)
    make = lambda **options: DiffusionTrainer(SimpleUNet(1, 16, (8,), None, 1, norm_groups=2), noise_schedule=EDMNoiseScheduler(), **options)
    trainer, worst = make(loss=huber), Worst()
    trainer.fit(data, 6, progress=False, report_every=2, callbacks=[worst], evaluate=spread)
    rows = trainer.history
    assert [row["worst_loss"] for row in rows] == list(np.maximum.accumulate([row["loss"] for row in rows])) and worst.loss > 0
    assert 0 < rows[-1]["spread"] <= 1 and "spread" not in rows[0], "an evaluation comes at the end of an epoch"
    batch = next(data)
    plain, other = make(), make(loss=huber)
    assert 0 < float(other.train_step(batch)) < 0.5 * float(plain.train_step(batch)) + 1e-6, "Huber's loss is half the square, or less"
