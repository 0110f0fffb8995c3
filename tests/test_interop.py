"""Models in diffusers' folders, as far as no PyTorch is needed to check them: sizes, names, round trips, refusals. test_parity_diffusers.py compares numbers."""
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.interop import ddim_times, load_autoencoder, load_diffusers, schedule_from, scheduler_config, write_part
from flaxdiff.interop.folders import WEIGHTS, make_twin, parameter_shapes, read_part, to_files
from flaxdiff.predictors import EpsilonPredictor, FlowPredictor, KarrasEDMPredictor, VPredictor, X0Predictor
from flaxdiff.pretrained import read_tensors, write_tensors
from flaxdiff.schedulers import (CosineNoiseSchedule, DiscreteNoiseScheduler, EDMNoiseScheduler, ExpNoiseSchedule, FlowNoiseScheduler, KarrasVENoiseScheduler,
                                 LinearNoiseSchedule)

# What the config.json of the published models say.
SD15 = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False, "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
        "out_channels": 4, "sample_size": 64, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
SD21 = {**SD15, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False,
        "sample_size": 96, "upcast_attention": True, "use_linear_projection": True}
VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
       "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4}
CIFAR = {"_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None, "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
         "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
         "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
         "time_embedding_type": "positional", "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
             "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
# Small ones of the same kinds.
TINY = {"_class_name": "UNet2DModel", "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8, "attention_head_dim": 8}
TINY_TEXT = {"_class_name": "UNet2DConditionModel", "block_out_channels": [8, 16], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
             "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8, "attention_head_dim": 2, "cross_attention_dim": 12,
             "in_channels": 4, "out_channels": 4}
TINY_VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 4, "scaling_factor": 0.25}


def count(config): return sum(math.prod(v.shape) for v in jax.tree.leaves(parameter_shapes(make_twin(config))))


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: (rng.normal(size=v.shape) * 0.2).astype(np.float32), parameter_shapes(make_twin(config)))


def write_pipeline(folder, unet=TINY, vae=None, scheduler=SCHEDULER):
    write_part(folder / "unet", unet, random_params(unet))
    if vae is not None: write_part(folder / "vae", vae, random_params(vae, 1))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize("config, size", [(SD15, 859_520_964), (SD21, 865_910_724), (VAE, 83_653_863), (CIFAR, 35_746_307)], ids=["SD 1.5", "SD 2.1", "VAE", "CIFAR-10"])
def test_published_sizes(config, size):
    assert count(config) == size


def test_names_are_those_of_the_files():
    names = {name for name in to_files(jax.tree.map(lambda v: np.zeros(v.shape), parameter_shapes(make_twin(TINY_TEXT))))}
    for name in ("conv_in.weight", "time_embedding.linear_1.bias", "down_blocks.0.resnets.0.time_emb_proj.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight",
                 "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.bias", "up_blocks.0.upsamplers.0.conv.weight", "up_blocks.1.resnets.1.conv_shortcut.weight",
                 "conv_norm_out.weight"):
        assert name in names


def test_heads_and_their_width():
    "`attention_head_dim` is the width of a head in one class, the number of heads in the other."
    from flaxdiff.interop.unets import heads_of
    assert heads_of("CrossAttn", 320, 8) == 8 and heads_of("Attn", 320, 8) == 40 and heads_of("Attn", 320, None) == 1


@pytest.mark.parametrize("config, change", [
    (TINY, {"no_such_field": 1}), (TINY, {"time_embedding_type": "fourier"}), (TINY, {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}), (TINY, {"class_embed_type": "timestep"}),
    (TINY, {"center_input_sample": True}), (TINY, {"mid_block_scale_factor": 2 ** 0.5}), (TINY, {"resnet_time_scale_shift": "spatial"}), (TINY, {"downsample_type": "resnet"}),
    (TINY, {"act_fn": "tanh"}), (TINY, {"norm_num_groups": None}), (TINY, {"_class_name": "UNet3DConditionModel"}), (TINY, {"up_block_types": ["UpBlock2D"]}),
    (TINY, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}), (TINY_TEXT, {"addition_embed_type": "text_time"}), (TINY_TEXT, {"only_cross_attention": True}),
    (TINY_TEXT, {"attention_type": "gated"}), (TINY_TEXT, {"cross_attention_dim": [12, 16]}), (TINY_TEXT, {"num_attention_heads": 2}), (TINY_TEXT, {"attention_head_dim": [2]}),
    (TINY_VAE, {"latents_mean": [0.0]}), (TINY_VAE, {"out_channels": 4}), (TINY_VAE, {"up_block_types": ["AttnUpDecoderBlock2D"] * 2})])
def test_what_is_not_built_is_named(config, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make_twin({**config, **change})


def test_inputs_that_do_not_fit():
    module = make_twin(TINY_TEXT)
    params, x, text = random_params(TINY_TEXT), jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 3, 12))
    for match, inputs in {"textcontext must be given": (x, jnp.zeros(2)), "textcontext must have": (x, jnp.zeros(2), text[..., :4]), "temb": (x, jnp.zeros(3), text),
                          "label is not read": (x, jnp.zeros(2), text, jnp.zeros(2, int)), "floating": (x.astype(int), jnp.zeros(2), text)}.items():
        with pytest.raises(ValueError, match=match): jax.eval_shape(module.apply, params, *inputs)
    with pytest.raises(ValueError, match="attention_head_dim"):
        parameter_shapes(make_twin({**TINY_TEXT, "attention_head_dim": 3}))


def test_labels():
    config = {**TINY, "num_class_embeds": 3, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    module, params, x = make_twin(config), random_params(config), jnp.ones((4, 8, 8, 3))
    out = np.asarray(jax.jit(module.apply)(params, x, jnp.zeros(4), label=jnp.array([0, 2, 3, -1])))
    assert np.isfinite(out[:2]).all() and not np.array_equal(out[0], out[1]) and np.isnan(out[2:]).all()
    with pytest.raises(ValueError, match="label must be given"): jax.eval_shape(module.apply, params, x, jnp.zeros(4))
    with pytest.raises(ValueError, match="whole"): jax.eval_shape(module.apply, params, x, jnp.zeros(4), label=jnp.zeros(4))


# ---------------------------------------------------------------- folders

@pytest.mark.parametrize("config, dtype", [(TINY, "float32"), (TINY_TEXT, "float16"), (TINY_VAE, "bfloat16")], ids=["UNet", "with text", "autoencoder"])
def test_written_and_read_bit_for_bit(config, dtype, tmp_path):
    params = jax.tree.map(lambda v: v.astype(jnp.dtype(dtype)), random_params(config))
    write_part(tmp_path / "part", config, params)
    module, again, said = read_part(tmp_path / "part")
    assert said == config and module == make_twin(config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again)))
    assert {v.dtype for v in jax.tree.leaves(read_part(tmp_path / "part", "bfloat16")[1])} == {jnp.dtype("bfloat16")}


def test_dtypes_of_parameters_and_computation(tmp_path):
    part = write_part(tmp_path / "part", TINY, random_params(TINY))
    x, temb = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    for dtype, compute, due in (("bfloat16", None, "float32"), (jnp.float16, "bfloat16", "bfloat16")):
        module, params, _ = read_part(part, dtype, compute)
        assert jax.eval_shape(module.apply, params, x, temb).dtype == due
    for argument in ("dtype", "compute"):
        with pytest.raises(ValueError, match=f"{argument} must be one of"): read_part(part, **{argument: "int8"})
        with pytest.raises(ValueError, match=f"{argument} must be one of"): read_part(part, **{argument: "float7"})


def test_shards(tmp_path):
    params = random_params(TINY)
    tensors = to_files(params)
    write_part(tmp_path / "part", TINY, params)
    (tmp_path / "part" / WEIGHTS).unlink()
    halves = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in halves.items(): write_tensors(tmp_path / "part" / file, {name: tensors[name] for name in names})
    with pytest.raises(ValueError, match="must hold"): read_part(tmp_path / "part")  # two files and no index
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (tmp_path / "part" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    again = read_part(tmp_path / "part")[1]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again)))


def test_every_tensor_is_used_and_every_parameter_filled(tmp_path):
    part = write_part(tmp_path / "part", TINY, random_params(TINY))
    tensors = read_tensors(part / WEIGHTS)
    lost = {name: v for name, v in tensors.items() if not name.startswith("down_blocks.1.attentions.0.to_")}
    wrong = {**tensors, "conv_in.weight": tensors["conv_in.weight"][:4]}
    whole = {**tensors, "conv_in.bias": np.zeros(8, np.int32)}
    for match, changed in {r"down_blocks\.1\.attentions\.0\.to_.*and 5 more": lost, "hold extra, of which": {**tensors, "extra": np.zeros(2, np.float32)},
                           "conv_in.weight must have": wrong, "conv_in.bias must be floating": whole}.items():
        write_tensors(part / WEIGHTS, changed)
        with pytest.raises(ValueError, match=match): read_part(part)
    with pytest.raises(ValueError, match="must hold"): write_part(tmp_path / "new", TINY_VAE, random_params(TINY))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="new folder"): write_part(part, TINY, random_params(TINY))


@pytest.mark.parametrize("change", [{"block_out_channels": 8}, {"block_out_channels": "8"}, {"down_block_types": None}, {"layers_per_block": "one"}, {"attention_head_dim": {}},
                                    {"norm_num_groups": 3}, {"num_class_embeds": -1}])
def test_descriptions_of_another_kind(change, tmp_path):
    part = write_part(tmp_path / "part", TINY, random_params(TINY))
    (part / "config.json").write_text(json.dumps({**TINY, **change}))
    with pytest.raises(ValueError, match="part does not make a network"): read_part(part)
    for text in ("", "[]", "{"):
        (part / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"): read_part(part)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="scheduler_config.json"): load_diffusers(tmp_path)
    write_pipeline(tmp_path / "whole", TINY_TEXT, TINY_VAE)
    with pytest.raises(ValueError, match="AutoencoderKL"): load_autoencoder(tmp_path / "whole" / "unet")
    with pytest.raises(ValueError, match="on this machine"): load_diffusers("gs://bucket/model")
    (tmp_path / "whole" / "model_index.json").write_text(json.dumps({"_class_name": "X", "text_encoder_2": ["transformers", "CLIP"], "safety_checker": [None, None]}))
    with pytest.raises(ValueError, match="text_encoder_2"): load_diffusers(tmp_path / "whole")
    write_pipeline(tmp_path / "hole", {**TINY_TEXT, "in_channels": 9})
    with pytest.raises(ValueError, match="in_channels"): load_diffusers(tmp_path / "hole")
    write_pipeline(tmp_path / "misfit", TINY_TEXT, {**TINY_VAE, "latent_channels": 3})
    with pytest.raises(ValueError, match="latent_channels"): load_diffusers(tmp_path / "misfit")
    write_pipeline(tmp_path / "sizeless", {**TINY, "sample_size": None})
    with pytest.raises(ValueError, match="sample_size"): load_diffusers(tmp_path / "sizeless")
    assert load_diffusers(tmp_path / "sizeless", sample_size=(8, 16)).image_shape == (8, 16, 3)


# ---------------------------------------------------------------- schedules

@pytest.mark.parametrize("schedule", [LinearNoiseSchedule(1000), LinearNoiseSchedule(100), LinearNoiseSchedule(1000, 0.00085, 0.012, scaled=True), CosineNoiseSchedule(1000),
                                      CosineNoiseSchedule(64, zero_terminal_snr=True), ExpNoiseSchedule(50), DiscreteNoiseScheduler([0.1, 0.5, 0.2])],
                         ids=["linear", "linear of 100", "scaled", "cosine", "zero SNR", "exp", "list"])
@pytest.mark.parametrize("predictor", [EpsilonPredictor(), VPredictor(), X0Predictor()], ids=lambda p: type(p).__name__)
def test_round_trip_of_betas(schedule, predictor):
    config = json.loads(json.dumps(scheduler_config(schedule, predictor)))
    if schedule.zero_terminal_snr and isinstance(predictor, EpsilonPredictor):
        with pytest.raises(ValueError, match="zero terminal SNR"): schedule_from(config)
        return
    again, meaning = schedule_from(config)
    assert type(meaning) is type(predictor)
    np.testing.assert_allclose(again.log_alpha_bar, schedule.log_alpha_bar, rtol=1e-9, atol=1e-15)
    assert np.array_equal(again.network_time(np.array([1.0, 2.5])), [0, 1.5]) and np.array_equal(again.from_network_time(np.array([0, 1.5])), [1, 2.5])
    assert scheduler_config(again, meaning) == config


def test_betas_that_have_a_name_are_named():
    assert scheduler_config(LinearNoiseSchedule(1000, 0.00085, 0.012, scaled=True), EpsilonPredictor()) | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012} \
        == scheduler_config(LinearNoiseSchedule(1000, 0.00085, 0.012, scaled=True), EpsilonPredictor())
    assert scheduler_config(CosineNoiseSchedule(1000), VPredictor())["beta_schedule"] == "squaredcos_cap_v2"
    assert scheduler_config(DiscreteNoiseScheduler([0.1, 0.5, 0.2]), VPredictor())["trained_betas"] == pytest.approx([0.1, 0.5, 0.2])
    constant = scheduler_config(ExpNoiseSchedule(50), VPredictor())
    assert constant["beta_schedule"] == "linear" and constant["beta_start"] == constant["beta_end"]


def test_round_trip_of_edm():
    schedule, predictor = schedule_from(scheduler_config(EDMNoiseScheduler(1, 0.01, 50, rho=5), KarrasEDMPredictor(0.4)))
    assert (schedule.sigma_min, schedule.sigma_max, schedule.rho, predictor.sigma_data) == (0.01, 50, 5, 0.4)


@pytest.mark.parametrize("schedule, predictor, match", [(FlowNoiseScheduler(), FlowPredictor(), "noise_schedule"), (EDMNoiseScheduler(), VPredictor(), "predictor"),
                                                        (KarrasVENoiseScheduler(), EpsilonPredictor(), "predictor"), (LinearNoiseSchedule(100), KarrasEDMPredictor(), "predictor")])
def test_schedules_that_have_no_name_there(schedule, predictor, match):
    with pytest.raises(ValueError, match=match): scheduler_config(schedule, predictor)


@pytest.mark.parametrize("change", [{"beta_schedule": "sigmoid"}, {"prediction_type": "flow"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"timestep_type": "continuous"},
                                    {"trained_betas": [0.1]}, {"trained_betas": 0.1}, {"use_flow_sigmas": True}, {"beta_start": 0}, {"num_train_timesteps": 0}, {"rescale_betas_zero_snr": 1}])
def test_schedules_that_are_not_read(change):
    with pytest.raises(ValueError, match=next(iter(change))): schedule_from({**SCHEDULER, **change})


def test_times_of_their_ddim():
    times, to_zero = ddim_times(SCHEDULER, 50)
    assert not to_zero and times[0] == 982 and times[49] == 2 and times[50] == 1 and np.all(np.diff(times[:50]) == -20)
    times, to_zero = ddim_times({**SCHEDULER, "timestep_spacing": "trailing", "set_alpha_to_one": True}, 4)
    assert to_zero and list(times) == [1000, 750, 500, 250]
    for config, n, match in (({"timestep_spacing": "trailing"}, 7, "divide"), ({"timestep_spacing": "linspace"}, 7, "timestep_spacing"), ({}, 1001, "diffusion_steps")):
        with pytest.raises(ValueError, match=match): ddim_times(config, n)


# ---------------------------------------------------------------- drawing

def test_a_ddpm_draws(tmp_path):
    "From a folder where all lies side by side, as the first ones of the hub do."
    part = write_part(tmp_path / "flat", TINY, random_params(TINY))
    (part / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    model = load_diffusers(part)
    assert model.image_shape == (8, 8, 3) and model.conditions == () and model.autoencoder is None and model.text is None
    sampler = model.sampler("ddim")
    images = sampler.generate_images(3, 2, rng=0)
    assert images.shape == (3, 8, 8, 3) and np.abs(images).max() <= 1
    x, schedule = jnp.ones((3, 8, 8, 3)), model.noise_schedule
    F = jax.jit(model.model.apply)(model.params, x, jnp.full(3, 499.0))  # it is told i = t - 1
    np.testing.assert_allclose(sampler.sample(x, [500.0]), (x - schedule.sigma(500.0) * F) / schedule.alpha(500.0), rtol=1e-4, atol=1e-3)


def test_latents_are_decoded_and_never_clipped(tmp_path):
    model = load_diffusers(write_pipeline(tmp_path, TINY_TEXT, TINY_VAE))
    condition = {"textcontext": np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)}
    assert model.image_shape == (8, 8, 4) and model.conditions == ("textcontext",)
    sampler = model.sampler("euler")
    x = 3 * jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    latents = sampler.sample(x, [700.0, 300.0], conditioning=condition)
    assert np.abs(latents).max() > 1
    images = sampler.generate_images(2, priors=x, conditioning=condition, grid=lambda *_: np.array([700.0, 300.0]), diffusion_steps=2, start_step=700)
    assert images.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(images, np.clip(model.decode(latents), -1, 1), atol=1e-5)
    mean, std = model.autoencoder.encode(images)
    assert mean.shape == (2, 8, 8, 4) == std.shape and np.all(std > 0)
    np.testing.assert_allclose(model.encode(images), mean, atol=1e-6)
    raw = model.autoencoder.programs["encode"](model.autoencoder.params, images)[0]
    np.testing.assert_allclose(mean, 0.25 * raw, atol=1e-5)
    for match, bad in {"sides": images[:, :15], "lie in": images * 3}.items():
        with pytest.raises(ValueError, match=match): model.autoencoder.encode(bad)
    with pytest.raises(ValueError, match="latents"): model.decode(latents[..., :3])


def test_guidance_by_given_texts(tmp_path):
    "Without a text encoder of its own the null condition is given."
    from flaxdiff.guidance import ClassifierFreeGuidance
    model = load_diffusers(write_pipeline(tmp_path, TINY_TEXT))
    with pytest.raises(ValueError, match="null_condition"): model.sampler("ddim", guidance_scale=3.0)
    sampler = object()
    assert model.decoding(sampler) is sampler  # there is nothing to decode
    guided = ClassifierFreeGuidance(model.denoiser, {"textcontext": np.zeros((3, 12), np.float32)}, 3.0)
    x, text = jnp.ones((1, 8, 8, 4)), {"textcontext": np.ones((1, 3, 12), np.float32)}
    x0, eps = jax.jit(lambda denoiser, x, text: denoiser(x, 500.0, text))(guided, x, text)
    both = jax.jit(model.model.apply)(model.params, jnp.concatenate([x, x]), jnp.full(2, 499.0), textcontext=jnp.stack([text["textcontext"][0], jnp.zeros((3, 12))]))
    np.testing.assert_allclose(eps[0], both[1] + 3 * (both[0] - both[1]), atol=1e-4)
