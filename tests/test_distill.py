"""Flow maps and what teaches them: exact on Gaussians in closed form, on every schedule; what they keep of a denoiser; what they refuse. The general laws are in test_samplers.py."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxdiff.denoiser import Denoiser
from flaxdiff.distill import (WAYS_TO_DISTIL, TwoTimes, consistency_loss, distillation, draw_jumps, equal_levels, jump_loss,
                              mean_flow_loss, ode_step, shortcut_loss, start_from, transport)
from flaxdiff.exact import Gaussian
from flaxdiff.guidance import ClassifierFreeGuidance
from flaxdiff.models.layers import TimeEmbedding
from flaxdiff.samplers import EulerSampler, FlowMap, FlowMapSampler, HeunSampler, uniform_grid
from flaxdiff.models import DiT, SimpleUNet
from flaxdiff.network import TrainedModel
from flaxdiff.pretrained import load_model
from flaxdiff.trainer import DiffusionTrainer
from flaxdiff.trainer.losses import LearnedUncertainty, diffusion_loss
from laws import PREDICTORS, SCHEDULES, WAVE, ZERO_SNR, Wave, over, x64

MEAN, SPREAD = 0.3, 0.5
BELL = Gaussian([MEAN], [SPREAD ** 2])


class PerfectMap:
    "k times the output whose flow map is exact for N(.3, ½²): its own derivation, from the quantile that the ODE keeps."
    def __init__(self, schedule, predictor): self.schedule, self.predictor = schedule, predictor

    def apply(self, k, x_in, temb, end=None):
        column = lambda v: jnp.reshape(v, (-1,) + (1,) * (x_in.ndim - 1))
        t = self.schedule.from_network_time(temb)
        a, b = column(self.schedule.alpha(t)), column(self.schedule.sigma(t))
        theta = column(jnp.ones_like(temb) if end is None else end) * jnp.arctan2(b, a)
        c, d = jnp.cos(theta), jnp.sin(theta)
        w, v = jnp.sqrt((a * SPREAD) ** 2 + b ** 2), jnp.sqrt((c * SPREAD) ** 2 + d ** 2)
        z = (x_in / self.predictor.get_input_scale(a, b) - a * MEAN) / (w * (c * w + a * v))
        return k * self.predictor.get_target(MEAN + (a * c * SPREAD ** 2 + w * v - b * d) * z, (c * b + a * d) * z, a, b)


PROCESSES = {**SCHEDULES, **ZERO_SNR}
FEW = {"EDM": (SCHEDULES["EDMNoiseScheduler"], PREDICTORS["KarrasEDMPredictor"]), "cosine": (SCHEDULES["CosineContinuousNoiseScheduler"], PREDICTORS["VPredictor"]),
       "straight": (SCHEDULES["FlowNoiseScheduler"], PREDICTORS["FlowPredictor"])}


def perfect(schedule, predictor=PREDICTORS["VPredictor"], k=1.0): return FlowMap(Denoiser(PerfectMap(schedule, predictor), k, schedule, predictor))
def rates(schedule, t): return schedule.alpha(t), schedule.sigma(t)


def quantiles(schedule, t, n=9):
    alpha, sigma = rates(schedule, t)
    return alpha * MEAN + jnp.linspace(-2, 2, n)[:, None] * jnp.sqrt((alpha * SPREAD) ** 2 + sigma ** 2)


# Jumps

@over(schedule=PROCESSES)
def test_a_jump_is_the_ode(schedule, x64):
    "To any end, from pure noise too; at s = t nothing moves, and the answer is the denoiser's."
    exact, T = perfect(schedule), schedule.max_timesteps
    for t, s in ((T, 0.2 * T), (0.8 * T, 0.75 * T)):
        x, start = quantiles(schedule, t), rates(schedule, t)
        np.testing.assert_allclose(exact.jump(x, t, s), BELL.ode_solution(x, start, rates(schedule, s)), atol=1e-10)
        np.testing.assert_allclose(exact.jump(x, t), BELL.ode_solution(x, start, (1.0, 0.0)), atol=1e-10)
        np.testing.assert_allclose(exact.jump(x, t, t), x, rtol=1e-12)
        np.testing.assert_allclose(exact(x, t)[0], BELL.denoise(x, *start), atol=1e-10)


@over(("EDMNoiseScheduler", "FlowNoiseScheduler", "CosineNoiseSchedule-zero-snr"), schedule=PROCESSES)
def test_any_number_of_calls_is_exact(schedule, x64):
    "One call or four, jumps of one length or another, stopped before the data or not."
    sampler, T = FlowMapSampler(perfect(schedule)), schedule.max_timesteps
    x, start = quantiles(schedule, T), rates(schedule, T)
    for n in (1, 2, 4):
        np.testing.assert_allclose(sampler.sample(x, sampler.make_steps(n), rng=0), BELL.ode_solution(x, start, (1.0, 0.0)), atol=1e-10)
    steps = [T, 0.3 * T, 0.25 * T]
    np.testing.assert_allclose(sampler.sample(x, steps, rng=0, denoise_final=False), BELL.ode_solution(x, start, rates(schedule, steps[-1])), atol=1e-10)


def test_a_flow_map_is_a_denoiser_for_other_solvers(x64):
    schedule, row = FEW["EDM"]
    exact, x = perfect(schedule, row), quantiles(FEW["EDM"][0], 1.0)
    as_denoiser, as_map = HeunSampler(exact.denoiser), HeunSampler(exact)
    np.testing.assert_array_equal(as_map.sample(x, as_map.make_steps(5), rng=0), as_denoiser.sample(x, as_map.make_steps(5), rng=0))


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_fresh_noise_keeps_the_distribution(gamma):
    "Four jumps of an exact map: mean and spread of the data, within five standard errors, and noise that is forgotten."
    sampler = FlowMapSampler(perfect(*FEW["straight"]), gamma=gamma)
    x, n = jax.random.normal(jax.random.key(0), (20000, 1)), 20000
    end = np.asarray(sampler.sample(x, sampler.make_steps(4), rng=1))
    assert abs(end.mean() - MEAN) < 5 * SPREAD / n ** 0.5 and abs(end.std() / SPREAD - 1) < 5 / (2 * n) ** 0.5
    kept = np.corrcoef(end[:, 0], x[:, 0])[0, 1]
    assert kept > 0.999 if gamma == 0 else kept < 0.8


def test_at_gamma_one_every_jump_goes_to_the_data(x64):
    "Song et al. 2023, algorithm 1: the network is told the end 0 alone, so one that knows no other will do."
    schedule, row = FEW["EDM"]
    class Blind(PerfectMap):
        def apply(self, k, x_in, temb): return super().apply(k, x_in, temb, 0 * temb)
    x = quantiles(schedule, 1.0)
    told = FlowMapSampler(perfect(schedule, row), gamma=1.0)
    blind = FlowMapSampler(Blind(schedule, row), 1.0, schedule, row, gamma=1.0)
    np.testing.assert_allclose(told.sample(x, told.make_steps(4), rng=2), blind.sample(x, told.make_steps(4), rng=2), atol=1e-10)


def test_two_calls_are_jumps_of_one_length():
    sampler = FlowMapSampler(perfect(*FEW["EDM"]))
    np.testing.assert_allclose(sampler.make_steps(4), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(sampler.make_steps(3, grid=uniform_grid), [1, 0.5, 0])


def test_a_network_without_an_end_gives_ddim():
    schedule, row = FEW["EDM"]
    jumps, euler = (cls(WAVE, Wave.params, schedule, row) for cls in (FlowMapSampler, EulerSampler))
    x = jnp.ones((2, 2, 2, 1))
    np.testing.assert_array_equal(jumps.sample(x, [1.0, 0.6, 0.2], rng=0), euler.sample(x, [1.0, 0.6, 0.2], rng=0))


# Losses

@functools.lru_cache(maxsize=None)
def judged(schedule):
    "student, teacher, key of the times, levels -> the losses with exact ends, of two jumps, of MeanFlow, and of consistency by the teacher."
    def losses(student, teacher, x0, eps, t, m, s):
        column = lambda v: jnp.reshape(v, (-1, 1))
        (a, b), (c, d) = (map(column, rates(schedule, v)) for v in (t, s))
        x = a * x0 + b * eps
        end = c * MEAN + (x - a * MEAN) * jnp.hypot(c * SPREAD, d) / jnp.hypot(a * SPREAD, b)
        return (jump_loss(student, x, t, s, end), shortcut_loss(student, x, t, (t + m) / 2, s),
                mean_flow_loss(student, x0, eps, t, s, teacher), consistency_loss(student, x0, eps, t, m, s, teacher))
    return jax.jit(losses)


@pytest.mark.parametrize("name", FEW)
def test_the_exact_map_has_no_loss(name, x64):
    "Zero with exact ends, with two jumps, and with the exact velocity; with a solver's step, its error, of third order at least."
    schedule, row = FEW[name]
    exact = perfect(schedule, row)
    data = BELL.sample(jax.random.key(0), 64), jax.random.normal(jax.random.key(1), (64, 1))
    ask = lambda student, levels: judged(schedule)(student, exact.denoiser, *data, *draw_jumps(schedule, jax.random.key(2), 64, levels))
    *zeros, coarse = ask(exact, 16)
    assert all(v.shape == (64,) for v in zeros) and max(map(np.max, zeros)) < 1e-10
    wrong = jax.tree.map(lambda k: 0.9 * k, exact)
    assert min(map(np.mean, ask(wrong, 16))) > 1e-7
    assert np.mean(ask(exact, 64)[-1]) < np.mean(coarse) / 64


def expected_pull(schedule, row, loss, t, s):
    "The derivative of the expected loss by k, at k = 1: exact, the integrand being a polynomial of degree 2 in x₀ and ε."
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    weights = np.outer(weights, weights).ravel() / weights.sum() ** 2
    x0, eps = (jnp.asarray(v.reshape(-1, 1)) for v in np.meshgrid(MEAN + SPREAD * nodes, nodes))
    mean = lambda student: jnp.sum(weights * loss(student, x0, eps, jnp.full(16, t), jnp.full(16, s)))
    return float(jax.jit(jax.grad(mean))(perfect(schedule, row, jnp.float64(1))).params)


@pytest.mark.parametrize("name", FEW)
def test_data_alone_pull_nowhere_at_the_exact_map(name, x64):
    "MeanFlow's gradient vanishes; that of steps h as h does."
    schedule, row = FEW[name]
    pull = functools.partial(expected_pull, schedule, row, t=0.7, s=0.2)
    in_steps = lambda h: lambda student, x0, eps, t, s: consistency_loss(student, x0, eps, t, t - h, s) / h
    assert abs(pull(mean_flow_loss)) < 1e-10
    assert abs(pull(in_steps(0.001))) < abs(pull(in_steps(0.01))) / 5


@pytest.mark.parametrize("name", FEW)
def test_at_no_length_mean_flow_is_training(name, x64):
    schedule, row = FEW[name]
    student = perfect(schedule, row, 0.8)
    x0, eps, t = BELL.sample(jax.random.key(0), 32), jax.random.normal(jax.random.key(1), (32, 1)), jnp.linspace(0.1, 0.9, 32)
    a, b = (v[:, None] for v in rates(schedule, t))
    F = row.get_target(*student(a * x0 + b * eps, t), a, b)
    due = diffusion_loss(F, row.get_target(x0, eps, a, b), a[:, 0], b[:, 0], row)
    np.testing.assert_allclose(jax.jit(mean_flow_loss)(student, x0, eps, t, t), due, rtol=1e-9)


def test_mean_flows_own_form(x64):
    "On the straight process: |u - sg(v - (t - s) du/dt)|², and its gradient (Geng et al. 2025, algorithm 1)."
    schedule, row = FEW["straight"]
    x0, eps = BELL.sample(jax.random.key(0), 8), jax.random.normal(jax.random.key(1), (8, 1))
    t, s = jnp.linspace(0.3, 0.9, 8), jnp.linspace(0, 0.3, 8)

    def theirs(student):
        z, v = (1 - t[:, None]) * x0 + t[:, None] * eps, eps - x0
        u_of = lambda z, t: student.denoiser.model.apply(student.params, z, schedule.network_time(t), jnp.arctan2(s, 1 - s) / jnp.arctan2(t, 1 - t))
        u, du = jax.jvp(u_of, (z, t), (v, jnp.ones_like(t)))
        return jnp.mean((u - jax.lax.stop_gradient(v - (t - s)[:, None] * du)) ** 2)
    student = perfect(schedule, row, jnp.float64(0.8))
    ours = lambda student: jnp.mean(mean_flow_loss(student, x0, eps, t, s))
    for f in (lambda loss: jax.jit(loss)(student), lambda loss: jax.jit(jax.grad(loss))(student).params):
        np.testing.assert_allclose(f(ours), f(theirs), rtol=1e-10)


@pytest.mark.parametrize("name", FEW)
def test_a_step_of_the_teacher_is_heuns(name, x64):
    schedule, row = FEW[name]
    denoiser, x = perfect(schedule, row).denoiser, quantiles(schedule, 0.8)
    np.testing.assert_allclose(ode_step(denoiser, x, jnp.full(9, 0.8), jnp.full(9, 0.6)), HeunSampler(denoiser).sample(x, [0.8, 0.6], rng=0, denoise_final=False), rtol=1e-12)


@over(schedule=PROCESSES)
def test_drawn_times_fall(schedule):
    t, m, s = (np.asarray(v) for v in draw_jumps(schedule, jax.random.key(0), 2000, 12))
    T, low = schedule.max_timesteps, schedule.min_time
    assert np.all(t > m) and np.all(m >= s) and np.all(s >= np.float32(low)) and np.all(t <= T * (1 + 1e-6)) and len(np.unique(t)) == 12
    assert 0.5 < np.mean(s == np.float32(low)) < 0.65  # half of them, and those of the lowest level


# Networks

class Tiny(nn.Module):
    "A network of labels, whose time goes through `TimeEmbedding`, as the UNet's does."
    null_condition = property(lambda self: {"label": np.int32(3)})

    @nn.compact
    def __call__(self, x, temb, label=None):
        told = TimeEmbedding(8)(temb) + nn.Embed(4, 8)(jnp.full(len(x), 3) if label is None else label)
        return nn.Dense(1)(jnp.tanh(nn.Dense(4)(x) + nn.Dense(4)(told)[:, None, None]))


TINY = Tiny()


@pytest.fixture(scope="module")
def students():
    "(the network of two times, its parameters with the teacher's in place, the teacher's)."
    network, x = TwoTimes(TINY), jnp.ones((1, 4, 4, 1))
    teacher = jax.jit(TINY.init)(jax.random.key(1), x, jnp.ones(1))
    return network, start_from(jax.jit(network.init)(jax.random.key(0), x, jnp.ones(1), jnp.ones(1)), teacher), teacher


def test_a_student_begins_as_its_teacher(students):
    "Whatever the end; then the end counts, and conditions reach the network inside."
    network, params, teacher = students
    x, temb, label = jax.random.normal(jax.random.key(2), (3, 4, 4, 1)), jnp.linspace(-1, 1, 3), jnp.arange(3)
    ask = jax.jit(network.apply)
    for end in (jnp.zeros(3), jnp.ones(3)):
        np.testing.assert_allclose(ask(params, x, temb, end, label=label), TINY.apply(teacher, x, temb, label=label), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(network.apply(params, x, temb), network.apply(params, x, temb, jnp.ones(3)))
    moved = jax.tree.map(lambda v: v + 0.1, params)
    assert np.abs(ask(moved, x, temb, jnp.zeros(3), label=label) - ask(moved, x, temb, jnp.ones(3), label=label)).max() > 1e-3
    assert int(network.null_condition["label"]) == 3


def test_guidance_and_new_weights_reach_a_flow_map(students):
    "In one compiled program; guided by twice the batch, the ends in it told too."
    network, params, _ = students
    schedule, row = FEW["EDM"]
    moved = jax.tree.map(lambda v: v + 0.05, params)
    sampler = FlowMapSampler(network, moved, schedule, row, guidance_scale=2.0)
    assert isinstance(sampler.denoiser, ClassifierFreeGuidance) and isinstance(sampler.denoiser.denoiser, FlowMap)
    x, label, steps = 80 * jnp.ones((2, 4, 4, 1)), {"label": jnp.arange(2)}, np.array([1.0, 0.5])
    got = sampler.sample(x, steps[:1], conditioning=label, rng=0)
    plain = FlowMap(Denoiser(network, moved, schedule, row))
    none, given = (plain.jump(x, 1.0, conditioning=c) for c in ({"label": jnp.full(2, 3)}, label))
    np.testing.assert_allclose(got, none + 2 * (given - none), rtol=1e-4, atol=1e-4)
    before = sampler.sample(x, steps, conditioning=label, rng=0)
    sampler.params = params
    assert np.abs(sampler.sample(x, steps, conditioning=label, rng=0) - before).max() > 1e-3 and len(sampler.programs.compiled) == 1


def test_a_loss_trains(students):
    "Its gradient is a flow map of the parameters' shape, finite, and nowhere zero in the last layer of the end."
    network, params, _ = students
    schedule, row = FEW["EDM"]
    student = FlowMap(Denoiser(network, params, schedule, row))
    assert np.all(student.params["params"]["end_embedding"]["Dense_1"]["kernel"] == 0)
    x0, eps = jnp.zeros((4, 4, 4, 1)), jax.random.normal(jax.random.key(0), (4, 4, 4, 1))
    t, m, s = draw_jumps(schedule, jax.random.key(1), 4)
    label = {"label": jnp.array([0, 1, 2, 3])}
    loss = lambda student: jnp.mean(mean_flow_loss(student, x0, eps, t, s, conditioning=label) + consistency_loss(student, x0, eps, t, m, s, conditioning=label))
    slope = jax.jit(jax.grad(loss))(student)
    assert isinstance(slope, FlowMap) and all(np.isfinite(v).all() for v in jax.tree.leaves(slope))
    assert np.abs(slope.params["params"]["end_embedding"]["Dense_1"]["kernel"]).max() > 0


# Refusals

def test_bad_requests_are_refused(students):
    network, params, teacher = students
    schedule, row = FEW["EDM"]
    with pytest.raises(ValueError, match="keyword `end`"): FlowMap(Denoiser(WAVE, Wave.params, schedule, row))
    with pytest.raises(ValueError, match="denoiser must be a Denoiser"): FlowMap(WAVE)
    student = FlowMap(Denoiser(network, params, schedule, row))
    with pytest.raises(ValueError, match="conditioning must be a dict"): student(jnp.ones((2, 4, 4, 1)), 0.5, (jnp.arange(2),))
    sampler = FlowMapSampler(student)
    with pytest.raises(ValueError, match="leads down only"): sampler.encode(jnp.ones((2, 4, 4, 1)), [0.5, 0.2])
    for gamma in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="gamma"): FlowMapSampler(student, gamma=gamma)
    with pytest.raises(ValueError, match="teacher_params"): start_from(params, {"params": teacher["params"] | {"more": {}}})
    with pytest.raises(ValueError, match="levels"): draw_jumps(schedule, jax.random.key(0), 3, 0)
    class Timeless(nn.Module):
        @nn.compact
        def __call__(self, x, temb): return nn.Dense(1)(x)
    with pytest.raises(ValueError, match="TimeEmbedding"): TwoTimes(Timeless()).init(jax.random.key(0), jnp.ones((1, 4, 4, 1)), jnp.ones(1))


def test_p_and_q_of_a_jump_of_no_length(x64):
    "P = 1 and Q = 0: the boundary condition, for every row; and the share there is 1, at σ = 0 too."
    for schedule, row in FEW.values():
        student = perfect(schedule, row)
        P, Q = transport(student.way(jnp.full(2, 0.4), jnp.full(2, 0.4)), jnp.ones((2, 1)))
        np.testing.assert_allclose(P, 1, rtol=1e-12), np.testing.assert_allclose(Q, 0, atol=1e-12)
    assert float(perfect(*FEW["straight"]).way(0.0, 0.0).share) == 1


# By the trainer

PICTURES = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)).astype(np.float32)
BATCH = {"image": PICTURES, "label": np.arange(8) % 3}


def new_trainer(students, by="consistency", **options):
    "A student of TINY at the teacher's weights, and the teacher."
    network, params, teacher = students
    schedule, row = FEW["EDM"]
    teacher = Denoiser(TrainedModel(TINY, (4, 4, 1)), jax.tree.map(lambda v: v + 0.05, teacher), schedule, row)
    options = {"objective": distillation(teacher, by), "time_density": equal_levels(schedule), **options}
    trainer = DiffusionTrainer(network, optax.sgd(0.1), schedule, model_output_transform=row, **options)
    trainer.initialize(BATCH)
    trainer.load_weights(start_from(trainer.state.params, teacher.params))
    return trainer


def moved(trainer, n=2):
    "Its parameters after n updates, flat."
    for _ in range(n): trainer.train_step(BATCH)
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(trainer.state.params)])


@pytest.mark.parametrize("by", WAYS_TO_DISTIL)
def test_parts_make_no_difference_to_a_student(students, by):
    "As in (6) of the step: each example draws from its own key."
    whole, parts = (moved(new_trainer(students, by, accumulate=n)) for n in (1, 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    assert np.abs(whole - moved(new_trainer(students, by), 0)).max() > 1e-4


def test_a_killed_student_is_one_never_killed(students, tmp_path):
    "Bit for bit; the checkpoint holds the teacher, too, and the average what is learned alone."
    def run(steps):
        trainer = new_trainer(students, checkpoint_dir=tmp_path)
        trainer.restore()
        trainer.fit(iter([BATCH] * 4), steps, progress=False)
        return trainer
    run(2)
    there = run(2)
    assert there.steps_done == 4 and there.run_checkpoints is not None
    whole = moved(new_trainer(students), 4)
    np.testing.assert_array_equal(moved(there, 0), whole)
    assert len(there.state.held) == len(jax.tree.leaves(students[2]))
    there.export(tmp_path / "model", without=["model"])
    again = load_model(tmp_path / "model", model=students[0])
    assert again.is_flow_map and isinstance(again.sampler(), FlowMapSampler) and isinstance(again.denoiser, FlowMap)


def test_a_teacher_is_an_argument_of_the_program(students):
    "Not numbers in it; and it is nobody's to give away: it is there after the step has used its state up."
    trainer = new_trainer(students)
    teacher = trainer.objective.args[0]
    moved(trainer)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(teacher.params))
    step = lambda state: trainer.training.parallel.program.lower(state, np.asarray(jax.random.key_data(trainer.key)), np.arange(8)[None], (PICTURES[None], {"label": BATCH["label"][None]}))
    kernel = np.asarray(jax.tree.leaves(teacher.params)[-1]).ravel()[0]
    assert f"{kernel:.6E}"[:7] not in step(trainer.training.copies).as_text().upper()


def test_the_regression_as_an_objective(students):
    def regression(denoiser, drawn, conditioning):
        a, b = (jnp.reshape(v, (-1, 1, 1, 1)) for v in rates(denoiser.noise_schedule, drawn.t))
        row = denoiser.model_output_transform
        F = row.get_target(*denoiser(a * drawn.x0 + b * drawn.eps, drawn.t, conditioning), a, b)
        return jnp.mean((F - row.get_target(drawn.x0, drawn.eps, a, b)) ** 2, (1, 2, 3))
    for options in ({}, {"uncertainty": LearnedUncertainty()}):
        own, library = (moved(new_trainer(students, objective=f, **options)) for f in (regression, None))
        np.testing.assert_allclose(own, library, rtol=2e-4, atol=1e-5)


def test_what_an_objective_would_ignore_is_refused(students):
    for name, value in (("loss", lambda *_: 0), ("loss_weight", lambda a, s: 1), ("learn_variance", True), ("augment", 0.1)):
        with pytest.raises(ValueError, match=f"^{name} "): new_trainer(students, **{name: value})
    with pytest.raises(ValueError, match="objective"): new_trainer(students, objective=3)
    with pytest.raises(ValueError, match="what objective returns"): moved(new_trainer(students, objective=lambda d, drawn, c: jnp.mean(drawn.x0)), 1)
    with pytest.raises(ValueError, match="by must be"): distillation(None, "magic")


@pytest.mark.parametrize("network", [DiT(1, 2, 8, 1, 2), SimpleUNet(1, 8, (4,), (None, {"heads": 2}), 1, norm_groups=2, remat=True)], ids=["dit", "unet"])
def test_every_network_of_the_book_can_be_told_an_end(network):
    x = jnp.ones((2, 4, 4, 1))
    params = jax.eval_shape(TwoTimes(network).init, jax.random.key(0), x, jnp.ones(2))
    assert set(params["params"]) == {"network", "end_embedding"}
