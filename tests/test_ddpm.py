"""Laws of DDPM's step, of the variance that a network learns, and of the way back from an image to its noise."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxdiff.exact import ExactModel, GaussianMixture
from flaxdiff.losses import variance_loss
from flaxdiff.predictors import EpsilonPredictor, VPredictor
from flaxdiff.samplers import DDIMSampler, DDPMSampler, DiffusionSampler, EulerAncestralSampler, EulerSampler, HeunSampler
from flaxdiff.schedulers import CosineContinuousNoiseScheduler, LinearNoiseSchedule
from flaxdiff.trainer import DiffusionTrainer
from laws import ends_pure, plan_table, MIXTURE, PREDICTORS, SAMPLER_CLASSES, SCHEDULES, WAVE, ZERO_SNR, Wave, default_predictor, exact_sampler, over, wave_sampler, x64

WITH_ZERO_SNR = {**SCHEDULES, **ZERO_SNR}
EDM, LINEAR = SCHEDULES["EDMNoiseScheduler"], SCHEDULES["LinearNoiseSchedule"]
SHAPE = (2, 2, 2, 1)
TWO = ("EDMNoiseScheduler", "CosineNoiseSchedule-zero-snr")  # the rest waits for --slow


class Halves:
    "The wave network, with a second half of channels."
    def __init__(self, v): self.v = v
    def apply(self, params, x, temb): return jnp.concatenate([WAVE.apply(params, x, temb), jnp.full_like(x, self.v)], -1)


def start(schedule): return jax.random.normal(jax.random.PRNGKey(0), SHAPE) * (schedule.sigma(schedule.max_timesteps) if schedule.variance_exploding else 1)


def run(sampler, N, **kwargs): return np.asarray(sampler.sample(start(sampler.noise_schedule), sampler.make_steps(N), 3, **kwargs))


# The step

@over(TWO, schedule=WITH_ZERO_SNR)
def test_the_posterior_is_ddim_at_eta_one(schedule):
    "The same key gives the same z: equal to rounding, in float32, at any N."
    predictor = default_predictor(schedule)
    ours, ddim = wave_sampler(DDPMSampler, schedule, predictor), wave_sampler(DDIMSampler, schedule, predictor, options=(("eta", 1.0),))
    atol = 1e-6 * max(10, float(schedule.sigma(schedule.max_timesteps)))
    for N in (3, 9): np.testing.assert_allclose(run(ours, N), run(ddim, N), rtol=1e-5, atol=atol)


@over(TWO, schedule=WITH_ZERO_SNR)
def test_learned_at_both_ends_is_the_two_bounds(schedule):
    "v = -1 is the posterior's variance, v = 1 the forward one; the geometric mean at 0. Finite at every N."
    predictor = default_predictor(schedule)
    learned = lambda v: DDPMSampler(Halves(v), Wave.params, schedule, predictor, variance="learned")
    for v, name in ((-1.0, "posterior"), (1.0, "beta")):
        plain = wave_sampler(DDPMSampler, schedule, predictor, options=(("variance", name),))
        np.testing.assert_allclose(run(learned(v), 9), run(plain, 9), rtol=2e-5, atol=2e-5)
    assert np.all(np.isfinite(run(learned(0.3), 1))) and np.all(np.isfinite(run(learned(0.3), 2)))


@over(TWO, schedule=WITH_ZERO_SNR)
def test_one_step_is_drawn_with_the_stated_moments(schedule, x64):
    "Mean and variance of one step over many draws, for each choice, for a pair that are no neighbours."
    T = schedule.max_timesteps
    t, s, n = 0.8 * T, 0.55 * T, 2 ** 16
    network = ExactModel(GaussianMixture([0.4], 0.3), schedule, VPredictor())
    x = jnp.full((n, 1), 0.9)
    at, st, as_, ss = (float(f(u)) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
    a = at / as_
    beta = st ** 2 - a ** 2 * ss ** 2
    tilde = 1 / (1 / ss ** 2 + a ** 2 / beta)
    x0 = float(network.data.denoise(x[:1], at, st)[0, 0])
    mean = tilde * (as_ * x0 / ss ** 2 + a * 0.9 / beta)
    for variance, due in (("posterior", tilde), ("beta", beta)):
        drawn = np.asarray(DDPMSampler(network, {}, schedule, VPredictor(), variance=variance).sample(x, [t, s], 1, denoise_final=False))
        assert abs(drawn.mean() - mean) < 5 * np.sqrt(due / n) and abs(drawn.var() / due - 1) < 5 * np.sqrt(2 / n), variance


@over(TWO, schedule=WITH_ZERO_SNR)
def test_plan_and_its_gradient_are_finite(schedule):
    sampler = wave_sampler(DDPMSampler, schedule, default_predictor(schedule))
    first = int(ends_pure(schedule))  # the step from pure noise is DDIM's
    total = lambda times: sum(jnp.sum(row) for row in plan_table(sampler, times, first))
    times = jnp.linspace(schedule.max_timesteps, schedule.min_time, 5, dtype=jnp.float32)
    assert all(row.shape == (4,) for row in plan_table(sampler, times)) and all(row.shape == (0,) for row in plan_table(sampler, times[:1]))
    assert np.isfinite(total(times)) and np.all(np.isfinite(jax.grad(total)(times)))


def test_bad_variances_are_refused():
    for bad in ("fixed", None, 1.0):
        with pytest.raises(ValueError, match="variance"): DDPMSampler(WAVE, Wave.params, EDM, VPredictor(), variance=bad)
    with pytest.raises(ValueError, match="variance.*posterior"): run(DDPMSampler(WAVE, Wave.params, EDM, VPredictor(), variance="learned"), 3)


# The loss

def test_variance_loss_is_the_divergence(x64):
    "Against an integral over x_s, for a pair on each kind of schedule, and each v; entries are averaged, not summed."
    for schedule, t, s in ((LINEAR, 600.0, 450.0), (EDM, 0.5, 0.4)):
        rates = [(schedule.alpha(u), schedule.sigma(u)) for u in (t, s)]
        v, x0, x0_hat, x_t = jnp.array([[-1.4], [-1.0], [0.3], [1.0]]), jnp.full((4, 1), 0.5), jnp.full((4, 1), -0.2), jnp.full((4, 1), 0.7)
        got = variance_loss(v, x0_hat, x0, *rates)
        tilde = float(schedule.get_posterior_variance(t, s))
        p, q = (float(schedule.get_posterior_mean(x, x_t, t, s)[0, 0]) for x in (x0, x0_hat))
        xs = p + np.sqrt(tilde) * np.linspace(-12, 12, 4001)
        log = lambda mean, var: -(xs - mean) ** 2 / (2 * var) - np.log(2 * np.pi * var) / 2
        for value, row in zip(got, v[:, 0]):
            var = tilde * float(rates[0][1] / rates[1][1]) ** (row + 1)
            integral = np.trapezoid(np.exp(log(p, tilde)) * (log(p, tilde) - log(q, var)), xs)
            np.testing.assert_allclose(value, integral, rtol=1e-8)
        wide = [jnp.repeat(a, 6, 1).reshape(4, 2, 3, 1) for a in (v, x0_hat, x0)]
        np.testing.assert_allclose(variance_loss(*wide, *rates), got, rtol=1e-12)
        np.testing.assert_allclose(variance_loss(*wide, *[[jnp.full(4, r) for r in rate] for rate in rates]), got, rtol=1e-12)
        np.testing.assert_array_equal(variance_loss(v, x0_hat, x0, rates[0], rates[0]), 0)


def test_variance_loss_leaves_the_mean_alone():
    rates, ones = [(jnp.float32(0.8), jnp.float32(0.6)), (jnp.float32(0.9), jnp.float32(0.4))], jnp.ones((2, 3))
    slope = jax.grad(lambda v, x0_hat: variance_loss(v, x0_hat, ones, *rates).sum(), argnums=(0, 1))(0.3 * ones, 0.2 * ones)
    assert np.all(slope[0] != 0) and np.all(slope[1] == 0)
    half = variance_loss(jnp.full((2, 3), 0.3, jnp.bfloat16), 0.2 * ones, ones, *rates)
    assert half.dtype == jnp.float32
    with pytest.raises(ValueError, match="v must"): variance_loss(ones[:, :2], ones, ones, *rates)


def test_its_optimum_is_the_exact_variance(x64):
    "Newton's minimum over v of the mean loss = the variance of the exact reverse step, found by integration (no formula of ours)."
    t, s, x = 300.0, 200.0, 0.15
    (at, st), (as_, ss) = rates = [(float(LINEAR.alpha(u)), float(LINEAR.sigma(u))) for u in (t, s)]
    a, xs, x0s = at / as_, np.linspace(-4, 4, 8001), np.linspace(-3, 3, 4001)
    beta = st ** 2 - a ** 2 * ss ** 2
    p = np.exp(MIXTURE.log_prob(xs[:, None], as_, ss) - (x - a * xs) ** 2 / (2 * beta))
    m = np.sum(p * xs) / np.sum(p)
    exact = np.sum(p * (xs - m) ** 2) / np.sum(p)
    weight = np.exp(MIXTURE.log_prob(x0s[:, None]) - (x - at * x0s) ** 2 / (2 * st ** 2))  # of each x₀ behind x
    weight /= weight.sum()
    x0_hat = np.full((4001, 1), np.sum(weight * x0s))
    loss = lambda v: jnp.sum(weight * variance_loss(jnp.full((4001, 1), v), x0_hat, x0s[:, None], *rates))
    v = 0.0
    for _ in range(20): v = v - jax.grad(loss)(v) / jax.grad(jax.grad(loss))(v)
    np.testing.assert_allclose(ss ** 2 * beta / st ** 2 * (st / ss) ** (v + 1), exact, rtol=1e-6)


# The trainer

class Twice(nn.Module):
    "x̂-part a fixed linear map of x, v-part learned from (x, temb), pixel by pixel."
    channels: int = 2
    @nn.compact
    def __call__(self, x, temb):
        told = jnp.broadcast_to(temb[:, None, None, None], x.shape)
        h = jnp.concatenate([x, x ** 2, told], -1)
        for _ in range(2): h = nn.tanh(nn.Dense(24)(h))
        return nn.Dense(self.channels)(h)


def images_of(data, n, seed): return np.clip(np.asarray(data.sample(jax.random.PRNGKey(seed), n * 16)), -1, 1).reshape(n, 4, 4, 1)


@pytest.fixture(scope="module")
def trained():
    "Pixels are draws from N(0.1, 0.3²), each alone: the best v at each time is known."
    data = GaussianMixture([0.1], 0.25)
    trainer = DiffusionTrainer(Twice(), optax.adam(optax.cosine_decay_schedule(1e-2, 600)), CosineContinuousNoiseScheduler(), model_output_transform=VPredictor(),
                               learn_variance=True, devices=jax.local_devices()[:1])
    trainer.fit((images_of(data, 64, i) for i in range(600)), 600, progress=False)
    return data, trainer


class Free:
    "F = w x, the best there is for Gaussian data at one time, and a v of its own: nothing stands between training and the optimum."
    def init(self, key, x, temb): return {"w": jnp.float32(0.0), "v": jnp.float32(0.0)}
    def apply(self, p, x, temb): return jnp.concatenate([p["w"] * x, p["v"] + 0 * x], -1)


@pytest.mark.parametrize("t", [0.3, 0.7])
def test_the_trainer_learns_the_variance(t):
    "At one time, for steps of T/50: f is that of Gaussian data, log(1 + (SNR_s - SNR_t) Var[x₀|x_t]) / log(σ_t²/σ_s²)."
    schedule, variance = CosineContinuousNoiseScheduler(), 0.25 ** 2
    trainer = DiffusionTrainer(Free(), optax.adam(optax.cosine_decay_schedule(3e-2, 400)), schedule, model_output_transform=VPredictor(), learn_variance=True,
                               time_density=lambda key, n: jnp.full(n, t), devices=jax.local_devices()[:1])
    trainer.fit((images_of(GaussianMixture([0.0], 0.25), 64, i) for i in range(400)), 400, progress=False)
    with jax.enable_x64(True): (at, st), (as_, ss) = ((float(schedule.alpha(u)), float(schedule.sigma(u))) for u in (t, t - 0.02))
    left = variance * st ** 2 / (at ** 2 * variance + st ** 2)
    due = np.log1p(((as_ / ss) ** 2 - (at / st) ** 2) * left) / (2 * np.log(st / ss))
    assert abs((float(trainer.state.params["v"]) + 1) / 2 - due) < 0.02, due


@pytest.mark.slow
def test_what_it_learned_can_be_sampled(trained):
    "By `variance='learned'` in few steps the samples are as wide as the data; the posterior's variance is narrower."
    data, trainer = trained
    parts = trainer.model, trainer.state.ema_params, trainer.noise_schedule, trainer.model_output_transform
    std = {name: float(np.asarray(DDPMSampler(*parts, variance=name).generate_images(200, 12, rng=0)).std()) for name in ("posterior", "learned")}
    assert abs(std["learned"] - 0.25) < 0.035 and std["posterior"] < std["learned"] - 0.03, std
    assert np.asarray(EulerSampler(*parts).generate_images(2, 3, rng=0)).shape == (2, 4, 4, 1)  # the second half does not disturb others


def test_the_trainers_mean_is_trained_as_ever():
    "With v of its own parameters, the gradient of the first half is that of a plain trainer, and v has one."
    class Apart:
        def init(self, key, x, temb): return {"w": jnp.float32(0.4), "v": jnp.float32(0.2)}
        def apply(self, p, x, temb): return jnp.concatenate([p["w"] * x, p["v"] + 0 * x], -1)
    class Alone:
        def init(self, key, x, temb): return {"w": jnp.float32(0.4)}
        def apply(self, p, x, temb): return p["w"] * x
    batch = images_of(MIXTURE, 8, 0)
    schedule = ZERO_SNR["CosineNoiseSchedule-zero-snr"]
    make = lambda model, **kw: DiffusionTrainer(model, optax.sgd(0.1), schedule, model_output_transform=VPredictor(), rngs=1, devices=jax.local_devices()[:1], **kw)
    both, alone = make(Apart(), learn_variance=True), make(Alone())
    for trainer in (both, alone): trainer.fit(iter([batch] * 3), 3, progress=False)
    np.testing.assert_allclose(both.state.params["w"], alone.state.params["w"], rtol=1e-6)
    assert both.state.params["v"] != np.float32(0.2) and np.all(np.isfinite(both.losses))


def test_the_wrong_number_of_channels_is_refused():
    batch = images_of(MIXTURE, 4, 0)
    for channels, learn, words in ((1, True, "learn_variance"), (2, False, "output channels")):
        trainer = DiffusionTrainer(Twice(channels), noise_schedule=EDM, learn_variance=learn, devices=jax.local_devices()[:1])
        with pytest.raises(ValueError, match=words): trainer.train_step(batch)


# The way back

@over(("LinearNoiseSchedule",), cls=SAMPLER_CLASSES, schedule={"LinearNoiseSchedule": LINEAR, "EDMNoiseScheduler": EDM})
def test_every_solver_encodes_or_is_refused(cls, schedule, x64):
    "With a memory or a plan too, the noise is near the exact one, and goes back to the start; a stochastic one names eta."
    sampler = exact_sampler(cls, schedule, PREDICTORS["VPredictor"])
    steps = np.asarray(schedule.get_timesteps(jnp.geomspace(6, 0.3, 65)))
    x = jnp.linspace(-1, 1, 8).reshape(SHAPE)
    try: z = sampler.encode(x, steps)
    except ValueError as e:
        assert "eta" in str(e)
        return
    rates = [(schedule.alpha(t), schedule.sigma(t)) for t in steps[[-1, 0]]]
    assert jnp.abs(z - MIXTURE.ode_solution(x, *rates)).max() < 0.08 * jnp.hypot(*rates[1])
    assert jnp.abs(sampler.sample(z, steps, 0, denoise_final=False) - x).max() < 0.08


def test_chance_cannot_be_undone():
    class Draws(DiffusionSampler):
        def take_next_step(self, current_samples, reconstructed_samples, pred_noise, current_step, state, next_step=None):
            state, key = state.get_random_key()
            return current_samples + jax.random.normal(key, current_samples.shape), state
    x, steps = jnp.ones(SHAPE), [0.7, 0.2]
    make = lambda cls, schedule=EDM, **kw: cls(WAVE, Wave.params, schedule, VPredictor(), **kw)
    for sampler in (make(DDIMSampler, eta=0.1), make(EulerAncestralSampler), make(DDPMSampler), make(Draws)):
        with pytest.raises(ValueError, match="eta"): sampler.encode(x, steps)
    assert make(EulerAncestralSampler, eta=0.0).encode(x, steps).shape == SHAPE
    for bad in ([0.2, 0.7], [0.5, 0.5], [], [0.5, -0.1]):
        with pytest.raises(ValueError, match="steps"): make(DDIMSampler).encode(x, bad)
    with pytest.raises(ValueError, match="x must"): make(DDIMSampler).encode(jnp.ones(SHAPE, int), steps)
    with pytest.raises(ValueError, match="steps.*α"): make(DDIMSampler, ZERO_SNR["LinearNoiseSchedule-zero-snr"]).encode(x, [1000, 500])
    np.testing.assert_array_equal(make(DDIMSampler).encode(x, [0.3]), x)  # one level: no step


def test_a_single_point_comes_back_exactly(x64):
    "ε̂ is constant along its path: DDIM's way up and down is exact in one step."
    sampler = exact_sampler(DDIMSampler, LINEAR, VPredictor(), GaussianMixture([0.3], 0.0))
    x = jnp.linspace(-1, 1, 8).reshape(SHAPE)
    z = sampler.encode(x, [900.0, 40.0])
    eps = (x - LINEAR.alpha(40.0) * 0.3) / LINEAR.sigma(40.0)
    np.testing.assert_allclose(z, LINEAR.alpha(900.0) * 0.3 + LINEAR.sigma(900.0) * eps, rtol=1e-11)
    np.testing.assert_allclose(sampler.sample(z, [900.0, 40.0], 0, denoise_final=False), x, atol=1e-11)


def test_orders_of_the_way_back(x64):
    "The noise: that of the solver. The round trip: one more where that order is even, since its leading errors cancel."
    x, T = jnp.linspace(-1, 1, 8).reshape(SHAPE), LINEAR
    for cls, noise, trip in ((DDIMSampler, 1, 1), (HeunSampler, 2, 3)):
        sampler, errors = exact_sampler(cls, T, VPredictor()), []
        for N in (32, 64):
            steps = np.asarray(T.get_timesteps(jnp.geomspace(6, 0.3, N + 1)))
            rates = [(T.alpha(t), T.sigma(t)) for t in steps[[-1, 0]]]
            z = sampler.encode(x, steps)
            errors.append([float(jnp.abs(z - MIXTURE.ode_solution(x, *rates)).max()), float(jnp.abs(sampler.sample(z, steps, 0, denoise_final=False) - x).max())])
        np.testing.assert_allclose(np.log2(np.array(errors[0]) / errors[1]), [noise, trip], atol=0.2)
