"""The names and calls that a user relies on, and the two programs that must run."""
import datetime
import importlib
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

NAMES = {
    "flaxdiff": ["get_dataset", "plotImages"],
    "flaxdiff.schedulers": ["NoiseScheduler", "LinearNoiseSchedule", "CosineNoiseSchedule", "ExpNoiseSchedule", "CosineContinuousNoiseScheduler",
                            "CosineGeneralNoiseScheduler", "KarrasVENoiseScheduler", "EDMNoiseScheduler", "CosineNoiseScheduler",
                            "LinearNoiseScheduler", "ExpNoiseScheduler"],
    "flaxdiff.predictors": ["DiffusionPredictionTransform", "EpsilonPredictor", "EpsilonPredictionTransform", "X0Predictor", "DirectPredictionTransform",
                            "VPredictor", "VPredictionTransform", "KarrasEDMPredictor", "KarrasPredictionTransform"],
    "flaxdiff.samplers": ["DiffusionSampler", "DDIMSampler", "EulerSampler", "EulerAncestralSampler", "HeunSampler", "RK4Sampler"],
    "flaxdiff.models.simple_unet": ["SimpleUNet", "Unet", "Upsample", "Downsample", "FourierEmbedding", "FouriedEmbedding", "TimeEmbedding",
                                    "AttentionBlock", "ResidualBlock"],
    "flaxdiff.trainer": ["DiffusionTrainer"],
    "flaxdiff.data": ["get_dataset"],
    "flaxdiff.utils": ["plotImages", "RandomMarkovState", "clip_images"],
}


@pytest.mark.parametrize("module, name", [(m, n) for m, names in NAMES.items() for n in names])
def test_name_imports(module, name):
    module = importlib.import_module(module)
    assert hasattr(module, name)
    if module.__name__ != "flaxdiff.models.simple_unet": assert name in module.__all__ or module.__name__ in ("flaxdiff.utils",)


@pytest.mark.parametrize("package", ["flaxdiff", "flaxdiff.schedulers", "flaxdiff.predictors", "flaxdiff.samplers", "flaxdiff.models"])
def test_all_is_complete(package):
    "Everything in __all__ is there, once, and documented."
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__: assert inspect.getdoc(getattr(module, name)), name


def signature(call, *arguments):
    "The call takes these arguments in this order, with these defaults."
    parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    for got, want in zip(parameters, arguments, strict=False):
        name, *default = want if isinstance(want, tuple) else (want,)
        assert got.name == name, (call, got, want)
        if default: assert got.default == default[0], (call, got, want)
    assert len(parameters) >= len(arguments)


def test_signatures():
    from flaxdiff import data, predictors, samplers, schedulers, trainer, utils
    from flaxdiff.models.simple_unet import SimpleUNet
    s = schedulers
    signature(s.LinearNoiseSchedule, "timesteps", ("beta_start", 1e-4), ("beta_end", 0.02))
    signature(s.CosineNoiseSchedule, "timesteps", ("s", 0.008), ("max_beta", 0.999))
    signature(s.ExpNoiseSchedule, "timesteps")
    signature(s.CosineContinuousNoiseScheduler, ("timesteps", 1))
    signature(s.CosineGeneralNoiseScheduler, ("timesteps", 1), ("sigma_min", 0.02), ("sigma_max", 80), ("kappa", 1))
    for cls in (s.KarrasVENoiseScheduler, s.EDMNoiseScheduler):
        signature(cls, ("timesteps", 1), ("sigma_min", 0.002), ("sigma_max", 80), ("rho", 7), ("sigma_data", 0.5))
    base = s.NoiseScheduler
    for call, arguments in ((base.alpha, ["t"]), (base.sigma, ["t"]), (base.get_rates, ["t", ("shape", (-1, 1, 1, 1))]), (base.log_snr, ["t"]),
                            (base.add_noise, ["x0", "eps", "t"]), (base.remove_all_noise, ["x_t", "eps", "t"]), (base.get_timesteps, ["sigmas"]),
                            (base.sample_timesteps, ["key", "n"]), (base.get_posterior_mean, ["x0", "x_t", "t", "s"]), (base.get_posterior_variance, ["t", "s"])):
        signature(call, *arguments)
    signature(predictors.KarrasEDMPredictor, ("sigma_data", 0.5))
    for cls in (samplers.DiffusionSampler, samplers.EulerSampler, samplers.HeunSampler, samplers.RK4Sampler):
        first = inspect.signature(cls).parameters
        if "model" in first: signature(cls, "model", "params", "noise_schedule", "model_output_transform", ("guidance_scale", 1.0))
    for cls, eta in ((samplers.DDIMSampler, 0.0), (samplers.EulerAncestralSampler, 1.0)): assert inspect.signature(cls).parameters["eta"].default == eta
    signature(samplers.DiffusionSampler.generate_images, ("num_images", 16), ("diffusion_steps", 50), ("start_step", 1000), ("end_step", 0), ("image_size", None),
              ("channels", None), ("rng", None), ("priors", None), ("conditioning", ()))
    signature(samplers.DiffusionSampler.sample, "x", "steps", ("rng", None), ("conditioning", ()), ("denoise_final", True))
    for cls in (samplers.DiffusionSampler, samplers.EulerSampler, samplers.HeunSampler):
        signature(cls.take_next_step, "current_samples", "reconstructed_samples", "pred_noise", "current_step", "state", ("next_step", None))
    for name, default in dict(output_channels=3, emb_features=256, feature_depths=(64, 128, 256, 512), num_res_blocks=2, num_middle_res_blocks=1).items():
        assert getattr(SimpleUNet(), name) == default
    assert [dict(c) for c in SimpleUNet().attention_configs] == [{"heads": 4}] * 5
    assert {"model", "optimizer", "noise_schedule", "rngs", "name", "model_output_transform", "time_density"} <= set(inspect.signature(trainer.DiffusionTrainer).parameters)
    signature(trainer.DiffusionTrainer.fit, "data", "steps_per_epoch", "epochs")
    assert {"name", "batch_size", "image_scale"} <= set(inspect.signature(data.get_dataset).parameters)
    signature(utils.plotImages, "images", ("fig_size", (8, 8)), ("dpi", 100))


def test_positional_construction():
    "Model, params, schedule, predictor, guidance: in that order, for every sampler of the family."
    from flaxdiff import samplers
    from laws import PREDICTORS, SAMPLER_CLASSES, SCHEDULES, WAVE
    for cls in SAMPLER_CLASSES.values():
        sampler = cls(WAVE, WAVE.params, SCHEDULES["EDMNoiseScheduler"], PREDICTORS["VPredictor"], 1.0)
        assert sampler.model_output_transform is PREDICTORS["VPredictor"] and sampler.model is WAVE
        assert type(cls(WAVE, WAVE.params, SCHEDULES["EDMNoiseScheduler"]).model_output_transform).__name__ == "EpsilonPredictor"


def test_markov_state():
    from flaxdiff.utils import RandomMarkovState
    state = RandomMarkovState(jax.random.PRNGKey(0))
    after, key = state.get_random_key()
    after, other = after.get_random_key()
    assert np.any(np.asarray(key) != np.asarray(other)) and isinstance(after, RandomMarkovState)
    np.testing.assert_array_equal(RandomMarkovState(jax.random.PRNGKey(0)).get_random_key()[1], key)
    assert len(jax.tree.leaves(state)) == 1


def test_clip_images():
    from flaxdiff.utils import clip_images
    np.testing.assert_array_equal(clip_images(jnp.array([-2.0, 0.5, 3.0])), [-1, 0.5, 1])
    np.testing.assert_array_equal(clip_images(jnp.array([-2.0, 0.5, 3.0]), clip_min=0, clip_max=2), [0, 0.5, 2])


@pytest.mark.parametrize("n, channels", [(1, 3), (2, 1), (7, 3), (64, 3), (10, 4)])
def test_plot_images(n, channels):
    "Any number of them."
    import matplotlib.pyplot as plt
    from flaxdiff import plotImages
    figure = plotImages(np.zeros((n, 4, 4, channels), np.float32), fig_size=(2, 2), dpi=50, show=False)
    assert figure.get_size_inches().tolist() == [2, 2] and figure.dpi == 50
    plt.close("all")
    assert plotImages(np.zeros((n, 4, 4, channels), np.float32)) is None and not plt.get_fignums()  # none is left open


def test_digits_need_no_network():
    from flaxdiff import get_dataset
    data, datalen = get_dataset("digits", batch_size=16)
    batch = next(data)
    assert datalen == 1797 and batch.shape[0] == 16 and batch.min() >= -1 and batch.max() <= 1
    for _ in range(3): batch = next(data)
    assert iter(data) is not None


# The two programs

from flaxdiff.samplers import DiffusionSampler


class UsersEulerSampler(DiffusionSampler):
    "A user's own, by one method and with these keywords."
    def take_next_step(self, current_samples, reconstructed_samples, pred_noise, current_step, state, next_step=None):
        current_alpha, current_sigma = self.noise_schedule.get_rates(current_step)
        next_alpha, next_sigma = self.noise_schedule.get_rates(next_step)
        dt = next_sigma - current_sigma
        x_0_coeff = (current_alpha * next_sigma - next_alpha * current_sigma) / dt
        dx = (current_samples - x_0_coeff * reconstructed_samples) / current_sigma
        next_samples = current_samples + dx * dt
        return next_samples, state


@pytest.fixture(scope="module", params=["small", pytest.param("its own depth", marks=pytest.mark.slow)])
def program(request):
    "1. Train, 2. Infer: as a user writes them, with a data set that is there and with small numbers."
    import flaxdiff
    from flaxdiff import get_dataset
    from flaxdiff.models.simple_unet import SimpleUNet as UNet
    from flaxdiff.predictors import KarrasPredictionTransform
    from flaxdiff.schedulers import EDMNoiseScheduler
    from flaxdiff.trainer import DiffusionTrainer

    BATCH_SIZE, IMAGE_SIZE = 16, 16
    depths, blocks, looks = ([8, 16], 1, [None, None, {"heads": 4}]) if request.param == "small" else ([8, 8, 16, 16], 2, [{"heads": 4}] * 5)
    edm_schedule = EDMNoiseScheduler(1, sigma_max=80, rho=7, sigma_data=0.5)
    unet = UNet(emb_features=32, feature_depths=depths, attention_configs=looks, num_res_blocks=blocks, num_middle_res_blocks=1)
    data, datalen = get_dataset("digits", batch_size=BATCH_SIZE, image_scale=IMAGE_SIZE, channels=3)
    batches = datalen // BATCH_SIZE
    solver = optax.adam(2e-4)
    trainer = DiffusionTrainer(unet, optimizer=solver, noise_schedule=edm_schedule, rngs=jax.random.PRNGKey(4),
                               name="Diffusion_SDE_VE_" + datetime.datetime.now().strftime("%Y-%m-%d_%H:%M:%S"),
                               model_output_transform=KarrasPredictionTransform(sigma_data=edm_schedule.sigma_data))
    final_state = trainer.fit(data, batches // 56, epochs=2)

    EulerSampler = UsersEulerSampler
    sampler = EulerSampler(trainer.model, trainer.state.ema_params, edm_schedule, model_output_transform=trainer.model_output_transform)
    samples = sampler.generate_images(num_images=9, diffusion_steps=100, start_step=1000, end_step=0)
    return types.SimpleNamespace(**locals())


def test_program_1_trains(program):
    assert int(program.final_state.step) == 4 and program.trainer.model.image_shape == (16, 16, 3)
    assert np.all(np.isfinite(program.trainer.losses))
    assert jax.tree.structure(program.final_state.params) == jax.tree.structure(program.trainer.state.ema_params)


def test_program_2_infers(program):
    assert program.samples.shape == (9, 16, 16, 3) and np.all(np.isfinite(program.samples))
    assert program.samples.min() >= -1 and program.samples.max() <= 1 and float(program.samples.std()) > 0.01
    import matplotlib.pyplot as plt
    assert program.flaxdiff.plotImages(program.samples, dpi=300, show=False).dpi == 300
    plt.close("all")


def test_a_users_euler_is_ours():
    from flaxdiff.samplers import EulerSampler
    from laws import MIXTURE, PREDICTORS, SCHEDULES
    from flaxdiff.exact import ExactModel
    args = ExactModel(MIXTURE, SCHEDULES["EDMNoiseScheduler"], PREDICTORS["KarrasEDMPredictor"]), {}, SCHEDULES["EDMNoiseScheduler"], PREDICTORS["KarrasEDMPredictor"]
    a, b = (np.asarray(cls(*args).generate_images(2, 100, image_size=2, channels=1, rng=0)) for cls in (EulerSampler, UsersEulerSampler))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_users_stochastic_sampler():
    "`state.get_random_key()` and `get_rates` inside the hook, in one scan; with memory too."
    from flaxdiff.samplers import DiffusionSampler
    from laws import PREDICTORS, SCHEDULES, WAVE, Wave
    class Ancestral(DiffusionSampler):
        def take_next_step(self, current_samples, reconstructed_samples, pred_noise, current_step, state, next_step=None):
            alpha, sigma = self.noise_schedule.get_rates(next_step)
            state, key = state.get_random_key()
            state, other = state.get_random_key()
            return alpha * reconstructed_samples + sigma * jax.random.normal(key, current_samples.shape) + 0 * jax.random.normal(other, current_samples.shape), state
    class Counting(DiffusionSampler):
        def init_memory(self, x): return jnp.zeros((), jnp.int32)
        def take_next_step(self, current_samples, reconstructed_samples, pred_noise, current_step, state, next_step=None):
            return jnp.full_like(current_samples, state.memory), state.replace(memory=state.memory + 1)
    schedule = SCHEDULES["EDMNoiseScheduler"]
    args = (WAVE, Wave.params, schedule, PREDICTORS["VPredictor"])
    a, b = (Ancestral(*args).generate_images(2, 4, image_size=2, channels=1, rng=k) for k in (0, 1))
    assert a.shape == (2, 2, 2, 1) and np.all(np.isfinite(a)) and np.any(a != b)
    counted = Counting(*args).sample(jnp.ones((1, 2, 2, 1)), np.linspace(schedule.max_timesteps, schedule.min_time, 6), denoise_final=False)
    assert np.all(counted == 4)
