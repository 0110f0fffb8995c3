"x"
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from flaxdiff.interop.layers import Attention, ResnetBlock, downsample, group_norm, upsample
from flaxdiff.interop.unets import block_kinds, read_settings
from flaxdiff.utils import check_choice, check_floats, check_images, check_positive_int, check_shape

AUTOENCODER_KL: dict[str, Any] = dict(  # the fields of an AutoencoderKL, with their usual values
    in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",), block_out_channels=(64,), layers_per_block=1, act_fn="silu",
    latent_channels=4, norm_num_groups=32, sample_size=32, scaling_factor=0.18215, shift_factor=None,
    latents_mean=None, latents_std=None, force_upcast=True, use_quant_conv=True, use_post_quant_conv=True,
    mid_block_add_attention=True)

class Half(nn.Module):
    "One half of the autoencoder: levels of residual blocks, and a middle in which every pixel sees all."
    out_channels: int  # of the output
    channels: tuple[int, ...]  # of each level, from the finest
    layers: int  # residual blocks of a level
    groups: int  # of every norm
    encodes: bool  # True: down and then the middle; False: the middle and then up
    activation: str = "silu"  # of the residual blocks
    middle_attends: bool = True  # whether the middle has attention
    dtype: Any = None  # of the computation

    @nn.compact
    def __call__(self,
                 h: jax.Array,  # (B, H, W, C)
                ) -> jax.Array:
        "(B, H/2ᴸ⁻¹, …) for L levels, or back."
        dtype, last = self.dtype, len(self.channels) - 1
        make = partial(ResnetBlock, groups=self.groups, eps=1e-6, activation=self.activation, dtype=dtype)
        levels = self.channels if self.encodes else self.channels[::-1]

        def middle(h):
            h = make(self.channels[-1], name="mid_block.resnets.0")(h)
            if self.middle_attends:
                h = Attention(1, True, True, self.groups, 1e-6, dtype, name="mid_block.attentions.0")(h)
            return make(self.channels[-1], name="mid_block.resnets.1")(h)

        h = nn.Conv(levels[0], (3, 3), padding=1, dtype=dtype, name="conv_in")(h)
        h = h if self.encodes else middle(h)
        for i, features in enumerate(levels):
            stage = f"{'down' if self.encodes else 'up'}_blocks.{i}"
            for j in range(self.layers):
                h = make(features, name=f"{stage}.resnets.{j}")(h)
            if i < last and self.encodes:
                h = downsample(h, f"{stage}.downsamplers.0.conv", 0, dtype)
            elif i < last:
                h = upsample(h, f"{stage}.upsamplers.0.conv", dtype=dtype)
        h = middle(h) if self.encodes else h
        h = jax.nn.silu(group_norm(self.groups, 1e-6, dtype, "conv_norm_out")(h))
        return nn.Conv(self.out_channels, (3, 3), padding=1, dtype=dtype, name="conv_out")(h)

class TwinAutoencoder(nn.Module):
    "From images to the mean and spread of small latents, and back (Rombach et al. 2022, section 3.1)."
    image_channels: int  # of what is encoded, and of what comes back
    latent_channels: int  # of the latents
    half: Any  # keywords of both halves: channels, groups, activation, middle_attends
    layers: int  # residual blocks of a level of the encoder; the decoder has one more
    quant: bool = True  # a 1×1 convolution after the encoder
    post_quant: bool = True  # and one before the decoder
    dtype: Any = None  # of the computation

    def setup(self):
        "Both halves, and the small convolutions between them."
        width = 2 * self.latent_channels
        self.encoder = Half(width, layers=self.layers, encodes=True, dtype=self.dtype, **self.half)
        self.decoder = Half(self.image_channels, layers=self.layers + 1, encodes=False, dtype=self.dtype,
                            **self.half)
        if self.quant:
            self.quant_conv = nn.Conv(width, (1, 1), dtype=self.dtype)
        if self.post_quant:
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self,
               images: jax.Array,  # (B, H, W, C) in [-1, 1]
              ) -> tuple[jax.Array, jax.Array]:
        "(mean, standard deviation) of the latents, each (B, h, w, c); log σ² is kept within [-30, 20]."
        h = self.encoder(images)
        mean, log_variance = jnp.split(self.quant_conv(h) if self.quant else h, 2, -1)
        return mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2)

    def decode(self,
               latents: jax.Array,  # (B, h, w, c)
              ) -> jax.Array:
        "(B, H, W, C), about [-1, 1]."
        return self.decoder(self.post_quant_conv(latents) if self.post_quant else latents)

    def __call__(self,
                 images: jax.Array,  # (B, H, W, C) in [-1, 1]
                ) -> jax.Array:
        "There and back, by the mean."
        return self.decode(self.encode(images)[0])

def make_autoencoder(
    config: Mapping[str, Any],  # of a config.json of an AutoencoderKL
    dtype: Any = None,  # of the computation
) -> TwinAutoencoder:
    "The twin of what config.json describes; a `ValueError` that names the field which is not built here."
    check_choice("_class_name in config.json", config.get("_class_name"), ("AutoencoderKL",))
    s = read_settings(config, AUTOENCODER_KL)
    channels = tuple(check_positive_int("block_out_channels", c) for c in s["block_out_channels"])
    for name, due in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        block_kinds(name, s[name], [due], len(channels))
    if s["in_channels"] != s["out_channels"]:
        raise ValueError(f"out_channels in config.json must be in_channels={s['in_channels']}, "
                         f"got {s['out_channels']}")
    half = FrozenDict(channels=channels, groups=s["norm_num_groups"], activation=s["act_fn"],
                      middle_attends=s["mid_block_add_attention"])
    return TwinAutoencoder(s["in_channels"], s["latent_channels"], half, s["layers_per_block"],
                           s["use_quant_conv"], s["use_post_quant_conv"], dtype)


@dataclass(frozen=True, eq=False)
class Autoencoder:
    "Images to latents as the diffusion is run on, scaled, and back."
    module: TwinAutoencoder  # the network
    params: Any = field(repr=False)  # its parameters
    scale: float = 1.0  # `scaling_factor`: the latents are multiplied by it, so that their spread is about 1
    shift: float = 0.0  # `shift_factor`: subtracted from them before

    @cached_property
    def programs(self) -> dict[str, Any]:
        "The network's two methods, compiled once for each shape."
        return {name: jax.jit(partial(self.module.apply, method=name)) for name in ("encode", "decode")}

    def encode(self,
               images: Any,  # (B, H, W, C) in [-1, 1]
               batch: int = 4,  # images at a time
              ) -> tuple[jax.Array, jax.Array]:
        "(mean, standard deviation) of their scaled latents, each (B, h, w, c)."
        check_images(images)
        size = 2 ** (len(self.module.half["channels"]) - 1)
        if images.shape[1] % size or images.shape[2] % size or images.shape[3] != self.module.image_channels:
            raise ValueError(f"images must have sides that {size} divides, and {self.module.image_channels} "
                             f"channels, got {images.shape}")
        mean, std = self._run("encode", jnp.asarray(images), batch)
        return (mean - self.shift) * self.scale, std * self.scale

    def decode(self,
               latents: Any,  # (B, h, w, c), scaled
               batch: int = 4,  # latents at a time
              ) -> jax.Array:
        "(B, H, W, C): images, about [-1, 1], not clipped."
        check_shape("latents", latents, (None, None, None, self.module.latent_channels))
        return self._run("decode", check_floats("latents", latents) / self.scale + self.shift, batch)

    def _run(self, name, x, batch):
        "The method on a few rows at a time, so that memory does not grow with their number."
        n = check_positive_int("batch", batch)
        parts = [self.programs[name](self.params, x[i:i + n]) for i in range(0, len(x), n)]
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)