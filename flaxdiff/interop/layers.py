"x"
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.models.layers import attention

activations: dict[str, Callable[..., Any]] = {  # by the names that config.json uses
    "silu": jax.nn.silu, "swish": jax.nn.silu, "mish": jax.nn.mish, "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False)}

def group_norm(
    groups: int,  # must divide the channels
    eps: float,  # added to the variance
    dtype: Any,  # of the result; the statistics are float32
    name: str,  # of the layer
) -> nn.GroupNorm:
    "Group normalisation (Wu & He 2018) with a learned scale and shift."
    return nn.GroupNorm(groups, epsilon=eps, use_fast_variance=False, dtype=dtype, name=name)

def time_features(
    temb: jax.Array,  # (B,): the step i, from 0
    features: int,  # length, even
    cosine_first: bool = True,  # `flip_sin_to_cos`: cosines before the sines
    shift: float = 0,  # `freq_shift`: the last frequency is 10000^(-(h-1)/(h-shift)), h = features/2
) -> jax.Array:
    "(B, features): sines and cosines of i ω_k, ω_k = 10000^(-k/(h-shift)) (Vaswani et al. 2017, section 3.5)."
    half = features // 2
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    angle = jnp.asarray(temb, jnp.float32)[:, None] * np.exp(exponent)  # in float32, as it was trained
    parts = [jnp.cos(angle), jnp.sin(angle)]
    return jnp.concatenate(parts if cosine_first else parts[::-1], -1)

class ResnetBlock(nn.Module):
    "Norm, activation, convolution; the time is added; the same again; added to the input (He et al. 2016)."
    features: int  # channels out
    groups: int  # of both norms
    eps: float  # of both norms
    activation: str = "silu"  # a key of `activations`
    scale_shift: bool = False  # the time scales and shifts after the second norm; else it is added before
    dtype: Any = None  # of the computation

    @nn.compact
    def __call__(self,
                 x: jax.Array,  # (B, H, W, C)
                 temb: jax.Array | None = None,  # (B, E): what is known of the time; None: nothing
                ) -> jax.Array:
        "(B, H, W, features)."
        act = activations[self.activation]
        conv = partial(nn.Conv, self.features, dtype=self.dtype)
        norm = partial(group_norm, self.groups, self.eps, self.dtype)
        h = conv((3, 3), padding=1, name="conv1")(act(norm("norm1")(x)))
        scale, shift = 0, 0
        if temb is not None:
            width = self.features * (2 if self.scale_shift else 1)
            shift = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(act(temb))[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(shift, 2, -1)
            h = norm("norm2")(h) * (1 + scale) + shift
        else:
            h = norm("norm2")(h + shift)
        h = conv((3, 3), padding=1, name="conv2")(act(h))
        if x.shape[-1] != self.features:
            x = conv((1, 1), name="conv_shortcut")(x)
        return x + h

class Attention(nn.Module):
    "softmax(q·kᵀ/√d) v (Vaswani et al. 2017, eq. 1), of pixels or tokens, at themselves or at a text."
    heads: int  # must divide the channels
    bias: bool = False  # of queries, keys and values
    residual: bool = False  # whether the input is added
    groups: int | None = None  # of a norm before it; None: no norm
    eps: float = 1e-5  # of that norm
    dtype: Any = None  # of the computation

    @nn.compact
    def __call__(self,
                 x: jax.Array,  # (B, …, C): who looks
                 context: jax.Array | None = None,  # (B, M, E): what is looked at; x by default
                ) -> jax.Array:
        "(B, …, C)."
        channels = x.shape[-1]
        check_heads(self.heads, channels)
        h = x if self.groups is None else group_norm(self.groups, self.eps, self.dtype, "group_norm")(x)
        h = h.reshape(len(x), -1, channels)
        context = h if context is None else context

        def project(seen, name):
            dense = nn.Dense(channels, use_bias=self.bias, dtype=self.dtype, name=name)
            return dense(seen).reshape(*seen.shape[:2], self.heads, -1)

        out = attention(project(h, "to_q"), project(context, "to_k"), project(context, "to_v"))
        out = nn.Dense(channels, dtype=self.dtype, name="to_out.0")(out.reshape(h.shape))
        out = out.reshape(x.shape)
        return x + out if self.residual else out

def check_heads(
    heads: int,  # of an attention
    channels: int,  # of its level
) -> None:
    "A `ValueError` unless the heads divide the channels."
    if not heads or channels % heads:
        raise ValueError(f"attention_head_dim must divide the {channels} channels of its level, "
                         f"got what makes {heads} heads")

class TransformerBlock(nn.Module):
    "Tokens look at each other, then at the text, then think: x + (a·gelu(g)) W (GEGLU, Shazeer 2020)."
    heads: int  # must divide the channels
    dtype: Any = None  # of the computation

    @nn.compact
    def __call__(self,
                 h: jax.Array,  # (B, N, C): the pixels as tokens
                 context: jax.Array,  # (B, M, E): the text
                ) -> jax.Array:
        "(B, N, C)."
        norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False, dtype=self.dtype)
        channels = h.shape[-1]
        h = h + Attention(self.heads, dtype=self.dtype, name="attn1")(norm(name="norm1")(h))
        h = h + Attention(self.heads, dtype=self.dtype, name="attn2")(norm(name="norm2")(h), context)
        wide = nn.Dense(8 * channels, dtype=self.dtype, name="ff.net.0.proj")(norm(name="norm3")(h))
        value, gate = jnp.split(wide, 2, -1)
        gated = value * jax.nn.gelu(gate, approximate=False)
        return h + nn.Dense(channels, dtype=self.dtype, name="ff.net.2")(gated)

class TextTransformer(nn.Module):
    "An image as tokens through `depth` transformer blocks that read the text; added to the image."
    heads: int  # must divide the channels
    groups: int  # of the norm before it
    depth: int = 1  # blocks
    linear: bool = False  # `use_linear_projection`: matrices in and out; else 1×1 convolutions, the same
    dtype: Any = None  # of the computation

    @nn.compact
    def __call__(self,
                 x: jax.Array,  # (B, H, W, C)
                 context: jax.Array,  # (B, M, E): the text
                ) -> jax.Array:
        "(B, H, W, C)."
        channels = x.shape[-1]
        make = partial(nn.Dense, channels) if self.linear else partial(nn.Conv, channels, (1, 1))
        h = make(dtype=self.dtype, name="proj_in")(group_norm(self.groups, 1e-6, self.dtype, "norm")(x))
        h = h.reshape(len(x), -1, channels)
        for i in range(self.depth):
            h = TransformerBlock(self.heads, self.dtype, name=f"transformer_blocks.{i}")(h, context)
        return x + make(dtype=self.dtype, name="proj_out")(h.reshape(x.shape))

def downsample(
    h: jax.Array,  # (B, H, W, C)
    name: str,  # of the layer
    padding: int = 1,  # zeros on all four sides; 0: on the right and below alone
    dtype: Any = None,  # of the computation
) -> jax.Array:
    "Half the resolution by a 3×3 convolution of stride 2, inside a compact module."
    pads = ((padding, padding),) * 2 if padding else ((0, 1), (0, 1))
    return nn.Conv(h.shape[-1], (3, 3), (2, 2), pads, dtype=dtype, name=name)(h)

def upsample(
    h: jax.Array,  # (B, H, W, C)
    name: str,  # of the layer
    shape: tuple[int, ...] | None = None,  # (H, W) of the result, where twice would be too much
    dtype: Any = None,  # of the computation
) -> jax.Array:
    "Each pixel four times, cut to `shape`, then a 3×3 convolution, inside a compact module."
    h = jnp.repeat(jnp.repeat(h, 2, 1), 2, 2)
    h = h if shape is None else h[:, :shape[0], :shape[1]]
    return nn.Conv(h.shape[-1], (3, 3), padding=1, dtype=dtype, name=name)(h)
