"x"
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.interop.autoencoder import Autoencoder
from flaxdiff.interop.folders import load_autoencoder, read_json, read_part
from flaxdiff.interop.schedules import schedule_from
from flaxdiff.interop.unets import TwinUNet
from flaxdiff.network import TrainedModel
from flaxdiff.pretrained import PretrainedModel, local_folder
from flaxdiff.samplers.common import finish_images
from flaxdiff.text.bert import check_tokens, embed_with, read_tokenizer, split_ids
from flaxdiff.text.clip import padding_token, read_clip
from flaxdiff.text.encoders import TextEncoder, full_name, text_encoders
from flaxdiff.utils import check_positive_int

class PromptEncoder(TextEncoder):
    "CLIP as Stable Diffusion listens to it: all M vectors, those behind the end of the text too."
    def __call__(self,
                 texts: list[str],  # B of them
                ) -> dict[str, np.ndarray]:
        "{textcontext: (B, M, E) float32}."
        tokens, mask = self.tokenize(texts)
        return {"textcontext": self.embed(tokens, np.ones_like(mask))}

def prompt_tokenizer(
    folder: Path,  # with tokenizer.json, or with vocab.json and merges.txt
) -> Any:
    "The `tokenizers.Tokenizer` of CLIP, which neither cuts nor pads."
    if (folder / "tokenizer.json").is_file() or not (folder / "vocab.json").is_file():
        return read_tokenizer(folder)
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    first, last = "<|startoftext|>", "<|endoftext|>"
    bytes_of_words = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                          end_of_word_suffix="</w>", unk_token=last)
    tokenizer = Tokenizer(bytes_of_words)
    tokenizer.add_special_tokens([first, last])
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}",
                                                             special_tokens=marks)
    return tokenizer

def load_prompts(
    path: str = "",  # a pipeline's folder, with text_encoder/ and tokenizer/ in it
    tokens: int | None = None,  # M, at most what the network knows, which is the usual value (77)
    truncate: bool = False,  # cut what is longer; else it is an error
) -> PromptEncoder:
    "The text half of a pipeline, as an encoder called diffusers:PATH."
    folder = local_folder("path", path)
    if read_json(folder / "text_encoder" / "config.json").get("use_attention_mask"):
        raise ValueError("use_attention_mask in text_encoder/config.json must be false to be read here")
    model, params = read_clip(folder / "text_encoder")
    tokenizer = prompt_tokenizer(folder / "tokenizer")
    tokens = model.places if tokens is None else tokens
    check_tokens(folder, tokenizer, model.vocabulary, tokens, model.places)
    name = full_name(f"diffusers:{folder}", tokens=(tokens, model.places), truncate=(truncate, False))
    pad = padding_token(folder / "tokenizer", tokenizer)
    split, embed = partial(split_ids, tokenizer), embed_with(model, params)
    return PromptEncoder(name, split, embed, pad, tokens, model.features, truncate)

text_encoders["diffusers"] = load_prompts

@dataclass(frozen=True, eq=False)
class DiffusersModel(PretrainedModel):
    "A `PretrainedModel` from a folder of diffusers', with its autoencoder and its text encoder, if any."
    autoencoder: Autoencoder | None = None  # None: the network works on the images themselves
    text: PromptEncoder | None = None  # texts -> the condition; None: there is no text

    def encode(self,
               images: Any,  # (B, H, W, C) in [-1, 1]
              ) -> jax.Array:
        "What the diffusion is run on: the mean of their latents, (B, h, w, c), or the images themselves."
        return jnp.asarray(images) if self.autoencoder is None else self.autoencoder.encode(images)[0]

    def decode(self,
               x: Any,  # (B, h, w, c): what `sampler.sample` returned
              ) -> jax.Array:
        "Images, (B, H, W, C), about [-1, 1]."
        return jnp.asarray(x) if self.autoencoder is None else self.autoencoder.decode(x)

    def sampler(self,
                name: str = "heun",  # one of `SAMPLERS`
                **options: Any,  # of that solver
               ) -> Any:
        "The sampler called `name`: `sample` works on latents, `generate_images` decodes, and then clips."
        sampler = super().sampler(name, **options)
        if self.autoencoder is not None:
            sampler.finish_images = lambda latents: finish_images(self.decode(latents))
        return sampler

PARTS = ("unet", "scheduler", "vae", "text_encoder", "tokenizer")  # of a pipeline, that are read
UNUSED = ("safety_checker", "feature_extractor")  # that may be there, and are not

def check_pipeline(
    folder: Path,  # of a pipeline
) -> None:
    "A `ValueError` for a pipeline that needs a part which is not read here."
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    for name, described in index.items():
        is_part = isinstance(described, list) and described[:1] != [None]
        if is_part and name not in (*PARTS, *UNUSED):
            raise ValueError(f"{path} asks for {name}={described}; the parts read here are {', '.join(PARTS)}")

def latent_shape(
    unet: TwinUNet,  # the network
    config: Mapping[str, Any],  # of its config.json
    sample_size: Any = None,  # H = W, or (H, W), in place of the one in config.json
) -> tuple[int, ...]:
    "(H, W, C) of what the network works on; a `ValueError` where it cannot be sampled from noise alone."
    size = config.get("sample_size") if sample_size is None else sample_size
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    shape = check_positive_int("sample_size", height), check_positive_int("sample_size", width)
    if unet.out_channels not in (unet.in_channels, 2 * unet.in_channels):
        raise ValueError(f"in_channels in config.json must be out_channels={unet.out_channels} to be sampled "
                         f"from noise alone, got {unet.in_channels}")
    return (*shape, unet.in_channels)

def load_diffusers(
    folder: str | Path,  # of a pipeline, or of a UNet beside its scheduler_config.json
    dtype: Any = None,  # of the parameters: "float32", "bfloat16", …; None: as they are stored
    compute: Any = None,  # dtype of the computation; None: the wider one of parameters and input
    sample_size: Any = None,  # H = W, or (H, W), of what is sampled, in place of the one in config.json
) -> DiffusersModel:
    "The model in a folder that diffusers wrote, to be used as one of `load_model`. No torch is needed."
    root = local_folder("folder", folder)
    check_pipeline(root)
    inside = {name: root / name if (root / name).is_dir() else root for name in ("unet", "scheduler")}
    schedule, predictor = schedule_from(read_json(inside["scheduler"] / "scheduler_config.json"))
    unet, params, config = read_part(inside["unet"], dtype, compute)
    if not isinstance(unet, TwinUNet):
        raise ValueError(f"folder must hold a UNet, got an AutoencoderKL in {root}; use load_autoencoder")
    shape = latent_shape(unet, config, sample_size)
    autoencoder = load_autoencoder(root / "vae", dtype, compute) if (root / "vae").is_dir() else None
    text = load_prompts(str(root)) if (root / "text_encoder").is_dir() else None
    check_fit(unet, autoencoder, text)
    network = TrainedModel(unet, shape, None if text is None else text.null)
    takes = {"textcontext": unet.text_features, "label": unet.num_classes}
    conditions = tuple(name for name, there in takes.items() if there is not None)
    return DiffusersModel(network, params, schedule, predictor, shape, conditions,
                          None if text is None else text.name, autoencoder=autoencoder, text=text)

def check_fit(
    unet: TwinUNet,  # of a pipeline
    autoencoder: Autoencoder | None,  # of the same
    text: PromptEncoder | None,  # of the same
) -> None:
    "A `ValueError` where the parts do not fit together."
    if autoencoder is not None and autoencoder.module.latent_channels != unet.in_channels:
        raise ValueError(f"latent_channels of the vae must be in_channels={unet.in_channels} of the unet, "
                         f"got {autoencoder.module.latent_channels}")
    if text is not None and text.features != unet.text_features:
        raise ValueError(f"cross_attention_dim of the unet must be the {text.features} features of the "
                         f"text encoder, got {unet.text_features}")
