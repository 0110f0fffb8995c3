"""Networks, autoencoder, text, schedules and whole pipelines of diffusers, from its own folders, give here what they give there, to 1e-4 in float32."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from flaxdiff.interop import load_autoencoder, load_diffusers, schedule_from, scheduler_config, write_part
from flaxdiff.interop.folders import make_twin, read_part
from flaxdiff.interop.pipeline import prompt_tokenizer
from flaxdiff.interop.schedules import ddim_times
from flaxdiff.predictors import EpsilonPredictor, KarrasEDMPredictor, VPredictor, X0Predictor
from flaxdiff.schedulers import CosineNoiseSchedule, EDMNoiseScheduler, ExpNoiseSchedule, LinearNoiseSchedule
from test_interop import CIFAR, SD15, SD21, VAE, count
from test_parity_text import clip_settings, clip_tokenizer

CLOSE = 1e-4


def nchw(x): return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))
def nhwc(x): return x.detach().numpy().transpose(0, 2, 3, 1)


def roughen(model, seed=0):
    "Every parameter random: biases and scales too, which diffusers starts at 0 and 1."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.ndim == 1 and "norm" in name and name.endswith("weight") else noise * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model.eval()


def close(ours, theirs, tolerance=CLOSE):
    assert ours.shape == theirs.shape and np.isfinite(theirs).all()
    assert np.std(theirs) > 0.05, "nothing to compare"
    np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1, np.abs(theirs).max()), rtol=0)


def compare(model, folder, size=16, **conditions):
    "The twin from the model's own folder answers the same, at whole steps and between them."
    model.save_pretrained(folder)
    module, params, config = read_part(folder)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, size, size, config["in_channels"])).astype(np.float32)
    temb = np.array([999, 0, 417], np.float32)
    names = {"textcontext": "encoder_hidden_states", "label": "class_labels"}
    given = {names[name]: torch.from_numpy(v) for name, v in conditions.items()}
    with torch.no_grad(): theirs = model(nchw(x), torch.from_numpy(temb), **given).sample
    with jax.default_matmul_precision("highest"): ours = jax.jit(module.apply)(params, x, temb, **conditions)
    close(np.asarray(ours), nhwc(theirs))
    return module, params, config


# ---------------------------------------------------------------- networks

SMALL = dict(sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)
PLAIN = dict(SMALL, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
UNETS = {
    "no attention": dict(PLAIN, add_attention=False),
    "ddpm": dict(SMALL, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None, downsample_padding=0,
                 flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6),
    "many heads": dict(SMALL, down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"), attention_head_dim=4, layers_per_block=2),
    "scale and shift": dict(SMALL, down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2, resnet_time_scale_shift="scale_shift", act_fn="gelu"),
    "middle's own groups": dict(PLAIN, attn_norm_num_groups=4, act_fn="mish", time_embedding_dim=24),
    "no middle": dict(PLAIN, mid_block_type=None, act_fn="relu"),
    "one grey channel": dict(PLAIN, in_channels=1, out_channels=1)}


@pytest.mark.parametrize("name", UNETS)
def test_unet2d(name, tmp_path):
    compare(roughen(diffusers.UNet2DModel(**UNETS[name])), tmp_path)


def test_unet2d_with_classes(tmp_path):
    compare(roughen(diffusers.UNet2DModel(**PLAIN, num_class_embeds=5)), tmp_path, label=np.array([0, 4, 2]))


TEXT = dict(SMALL, block_out_channels=(16, 32, 32), down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24)
CONDITIONED = {
    "SD 1.x": dict(TEXT, attention_head_dim=4),  # the number of heads
    "SD 2.x": dict(TEXT, attention_head_dim=(2, 4, 8), use_linear_projection=True, upcast_attention=True, layers_per_block=2),
    "lists": dict(TEXT, attention_head_dim=2, layers_per_block=(1, 2, 1), transformer_layers_per_block=(2, 1, 3)),
    "with pixels' own attention": dict(TEXT, down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                                       up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"), attention_head_dim=8),
    "another activation": dict(TEXT, act_fn="gelu", attention_head_dim=4, resnet_time_scale_shift="scale_shift", mid_block_type=None)}


@pytest.mark.parametrize("name", CONDITIONED)
def test_unet2d_condition(name, tmp_path):
    text = np.random.default_rng(1).normal(size=(3, 7, 24)).astype(np.float32)
    compare(roughen(diffusers.UNet2DConditionModel(**CONDITIONED[name])), tmp_path, textcontext=text)


def test_odd_sizes(tmp_path):
    text = np.random.default_rng(1).normal(size=(3, 7, 24)).astype(np.float32)
    compare(roughen(diffusers.UNet2DConditionModel(**CONDITIONED["SD 1.x"])), tmp_path, size=13, textcontext=text)


@pytest.mark.parametrize("config, size", [(SD15, 859_520_964), (SD21, 865_910_724), (CIFAR, 35_746_307), (VAE, 83_653_863)], ids=["SD 1.5", "SD 2.1", "CIFAR-10", "VAE"])
def test_published_sizes(config, size):
    with torch.device("meta"): model = getattr(diffusers, config["_class_name"]).from_config(config)
    assert sum(p.numel() for p in model.parameters()) == size == count(config)


def test_sharded_and_halved_folders(tmp_path):
    model = roughen(diffusers.UNet2DModel(**UNETS["ddpm"]))
    for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        folder = tmp_path / str(i)
        model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        module, params, _ = read_part(folder)
        assert {str(v.dtype) for v in jax.tree.leaves(params)} == {str(dtype).removeprefix("torch.")}
        assert {str(v.dtype) for v in jax.tree.leaves(read_part(folder, "float32")[1])} == {"float32"}
        fresh = diffusers.UNet2DModel.from_pretrained(folder, torch_dtype=torch.float32)
        compare(fresh, tmp_path / f"{i} again")


def test_what_we_write_diffusers_reads(tmp_path):
    module, params, config = compare(roughen(diffusers.UNet2DModel(**UNETS["ddpm"])), tmp_path / "theirs")
    write_part(tmp_path / "ours", config, params)
    theirs, again = (diffusers.UNet2DModel.from_pretrained(tmp_path / name).state_dict() for name in ("theirs", "ours"))
    assert theirs.keys() == again.keys() and all(torch.equal(theirs[name], again[name]) for name in theirs)


# ---------------------------------------------------------------- autoencoder

AUTOENCODERS = {
    "SD": dict(block_out_channels=(16, 32), layers_per_block=2),
    "no small convolutions": dict(block_out_channels=(16,), use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, latent_channels=8, scaling_factor=0.3),
    "no attention": dict(block_out_channels=(16, 16, 32), mid_block_add_attention=False, act_fn="gelu", in_channels=1, out_channels=1)}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder(name, tmp_path):
    fields = AUTOENCODERS[name]
    levels = len(fields["block_out_channels"])
    model = roughen(diffusers.AutoencoderKL(norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **fields))
    model.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (5, 16, 24, model.config.in_channels)).astype(np.float32)
    scale, shift = model.config.scaling_factor, model.config.shift_factor or 0
    with torch.no_grad():
        latents = model.encode(nchw(images)).latent_dist
        decoded = model.decode(latents.mean).sample
    mean, std = ours.encode(images)
    close(np.asarray(mean), (nhwc(latents.mean) - shift) * scale)
    np.testing.assert_allclose(std, nhwc(latents.std) * scale, rtol=CLOSE)
    close(np.asarray(ours.decode(mean, batch=2)), nhwc(decoded))


def test_names_of_old_files(tmp_path):
    "Up to diffusers 0.16 the attention's matrices were called query, key, value and proj_attn."
    from safetensors.torch import load_file, save_file
    model = roughen(diffusers.AutoencoderKL(norm_num_groups=8, block_out_channels=(16,)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    def rename(name):
        for new, word in old.items(): name = name.replace(f".{new}.", f".{word}.")
        return name
    before = read_part(tmp_path)[1]
    save_file({rename(name): v for name, v in load_file(path).items()}, path)
    after = read_part(tmp_path)[1]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)))


# ---------------------------------------------------------------- schedules

SCHEDULERS = {
    "linear": dict(beta_schedule="linear"), "scaled": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"), "short": dict(num_train_timesteps=100, beta_end=0.2),
    "zero SNR": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "trained": dict(trained_betas=list(np.linspace(1e-3, 0.3, 40)), num_train_timesteps=40)}


def saved(scheduler, folder):
    scheduler.save_pretrained(folder)
    return json.loads((folder / "scheduler_config.json").read_text())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_their_schedules(name, tmp_path):
    "ᾱ of their step i is ours at t = i + 1, and i is what the network is told."
    theirs = diffusers.DDIMScheduler(**SCHEDULERS[name])
    schedule, _ = schedule_from(saved(theirs, tmp_path))
    t = np.arange(1, schedule.max_timesteps + 1)
    np.testing.assert_allclose(np.asarray(schedule.alpha(t)) ** 2, theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)
    assert np.array_equal(schedule.network_time(t), t - 1)
    x0, eps = np.random.default_rng(0).normal(size=(2, 4, 8, 8, 3)).astype(np.float32)
    i = np.array([0, 3, 20, schedule.max_timesteps - 1])
    noisy = theirs.add_noise(torch.from_numpy(x0), torch.from_numpy(eps), torch.from_numpy(i))
    close(np.asarray(schedule.add_noise(x0, eps, i + 1)), noisy.numpy())


OURS = {"linear": LinearNoiseSchedule(1000), "linear of 100": LinearNoiseSchedule(100), "scaled": LinearNoiseSchedule(1000, 0.00085, 0.012, scaled=True),
        "cosine": CosineNoiseSchedule(1000), "exp": ExpNoiseSchedule(200), "zero SNR": CosineNoiseSchedule(1000, zero_terminal_snr=True)}


@pytest.mark.parametrize("name", OURS)
def test_our_schedules_there(name):
    schedule = OURS[name]
    for predictor in (EpsilonPredictor(), VPredictor(), X0Predictor()):
        config = json.loads(json.dumps(scheduler_config(schedule, predictor)))
        theirs = diffusers.DDIMScheduler.from_config(config)
        t = np.arange(1, schedule.max_timesteps + 1)
        np.testing.assert_allclose(theirs.alphas_cumprod, np.asarray(schedule.alpha(t)) ** 2, rtol=2e-4, atol=1e-7)
        assert theirs.config.prediction_type == config["prediction_type"]


def test_our_edm_there():
    "The same ramp, the same preconditioning and the same time for the network."
    schedule, predictor = EDMNoiseScheduler(1, 0.01, 50, rho=5), KarrasEDMPredictor(0.4)
    theirs = diffusers.EDMEulerScheduler.from_config(scheduler_config(schedule, predictor))
    theirs.set_timesteps(9)
    t = np.linspace(1, 0, 9)
    sigma = np.asarray(schedule.sigma(t))
    np.testing.assert_allclose(sigma, theirs.sigmas[:-1], rtol=1e-5)
    np.testing.assert_allclose(schedule.network_time(t), theirs.timesteps, rtol=1e-5, atol=1e-6)
    x, F = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    x = x * sigma[:, None]
    decoded = theirs.precondition_outputs(torch.from_numpy(x), torch.from_numpy(F), torch.from_numpy(sigma.copy())[:, None]).numpy()
    np.testing.assert_allclose(predictor.decode(x, F, jnp.ones((9, 1)), sigma[:, None])[0], decoded, rtol=1e-4, atol=1e-4)
    again, _ = schedule_from(scheduler_config(schedule, predictor))
    np.testing.assert_allclose(again.sigma(t), sigma)


@pytest.mark.parametrize("kind, spacing", [("epsilon", dict(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)), ("v_prediction", dict(timestep_spacing="trailing")),
                                           ("sample", dict(timestep_spacing="leading"))], ids=["SD", "trailing", "leading"])
def test_ddim_end_to_end(kind, spacing, tmp_path):
    "A whole run of their DDIM with their network, and of ours with its twin, from the same noise."
    network = roughen(diffusers.UNet2DModel(**UNETS["ddpm"]))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind, **spacing)
    diffusers.DDIMPipeline(network, scheduler).save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(saved(scheduler, tmp_path)))  # the pipeline would make its own of it
    model = load_diffusers(tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    scheduler.set_timesteps(10)
    theirs = nchw(x)
    for i in scheduler.timesteps:
        with torch.no_grad(): theirs = scheduler.step(network(theirs, i).sample, i, theirs).prev_sample
    times, to_zero = ddim_times(dict(scheduler.config), 10)
    assert np.array_equal(times[:10] - 1, scheduler.timesteps)
    with jax.default_matmul_precision("highest"): ours = model.sampler("ddim").sample(x, times, denoise_final=to_zero)
    close(np.asarray(ours), nhwc(theirs))


# ---------------------------------------------------------------- a whole pipeline

@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    "A Stable Diffusion of a few thousand random parameters, in its folder, with a tokenizer as it was stored in 2022."
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**clip_settings(tokenizer), "hidden_size": 24, "num_hidden_layers": 2}))
    vae = roughen(diffusers.AutoencoderKL(norm_num_groups=8, block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))
    unet = roughen(diffusers.UNet2DConditionModel(**CONDITIONED["SD 1.x"]))
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(vae, text.eval(), tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe, folder


PROMPTS = ["the cat on the mat", "painting of a  naïve FOX, 4k!"]


def test_prompts(pipeline):
    pipe, folder = pipeline
    text = load_diffusers(folder).text
    texts = [*PROMPTS, "", "it's 12 o'clock\nin the café"]
    ids = pipe.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert np.array_equal(text.tokenize(texts)[0], ids)
    with torch.no_grad(): theirs = pipe.text_encoder(ids).last_hidden_state.numpy()
    close(text(texts)["textcontext"], theirs)


def test_tokenizer_of_two_files(pipeline, tmp_path):
    "vocab.json and merges.txt alone, as Stable Diffusion's own folders have them."
    pipe, folder = pipeline
    fast = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(fast["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in fast["model"]["merges"]))
    texts = [*PROMPTS, "", "it's 12 o'clock\nin the café", "日本語 🍎  two   spaces", "don't they'll we've I'm"]
    ours = prompt_tokenizer(tmp_path)
    assert [ours.encode(text).ids for text in texts] == pipe.tokenizer(texts).input_ids


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_stable_diffusion_step_by_step(pipeline, guidance):
    pipe, folder = pipeline
    model = load_diffusers(folder)
    latents = np.random.default_rng(0).normal(size=(2, *model.image_shape)).astype(np.float32)
    seen = []
    def watch(pipe, i, t, values):
        seen.append(nhwc(values["latents"]))
        return values
    decoded = pipe(PROMPTS, num_inference_steps=8, guidance_scale=guidance, latents=nchw(latents), output_type="np", callback_on_step_end=watch).images
    sampler = model.sampler("ddim", guidance_scale=guidance)
    condition = model.text(PROMPTS)
    times, to_zero = ddim_times(dict(pipe.scheduler.config), 8)
    x = latents
    with jax.default_matmul_precision("highest"):
        for n, theirs in enumerate(seen):
            x = sampler.sample(x, times[n:n + 2], conditioning=condition, denoise_final=False)
            close(np.asarray(x), theirs)
        assert not to_zero and len(seen) == len(times) - 1
        whole = sampler.sample(latents, times, conditioning=condition, denoise_final=False)
        close(np.asarray(whole), seen[-1])
        close(np.clip(np.asarray(model.decode(whole)) / 2 + 0.5, 0, 1), decoded)
