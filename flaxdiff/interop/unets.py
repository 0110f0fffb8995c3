"x"
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from flaxdiff.interop.layers import (Attention, ResnetBlock, TextTransformer, activations, downsample,
                                     group_norm, time_features, upsample)
from flaxdiff.utils import check_choice, check_floats, check_positive_int, check_shape

UNET2D: dict[str, Any] = dict(  # the fields of a UNet2DModel, and what they are where config.json is silent
    sample_size=None, in_channels=3, out_channels=3, center_input_sample=False,
    time_embedding_type="positional", time_embedding_dim=None, freq_shift=0, flip_sin_to_cos=True,
    down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3), mid_block_type="UNetMidBlock2D",
    up_block_types=(*("AttnUpBlock2D",) * 3, "UpBlock2D"), block_out_channels=(224, 448, 672, 896),
    layers_per_block=2, mid_block_scale_factor=1, downsample_padding=1, downsample_type="conv",
    upsample_type="conv", dropout=0.0, act_fn="silu", attention_head_dim=8, norm_num_groups=32,
    attn_norm_num_groups=None, norm_eps=1e-5, resnet_time_scale_shift="default", add_attention=True,
    class_embed_type=None, num_class_embeds=None, num_train_timesteps=None)

UNET2D_CONDITION: dict[str, Any] = dict(  # the same of a UNet2DConditionModel
    sample_size=None, in_channels=4, out_channels=4, center_input_sample=False, flip_sin_to_cos=True,
    freq_shift=0, down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    only_cross_attention=False, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    downsample_padding=1, mid_block_scale_factor=1, dropout=0.0, act_fn="silu", norm_num_groups=32,
    norm_eps=1e-5, cross_attention_dim=1280, transformer_layers_per_block=1,
    reverse_transformer_layers_per_block=None, encoder_hid_dim=None, encoder_hid_dim_type=None,
    attention_head_dim=8, num_attention_heads=None, dual_cross_attention=False, use_linear_projection=False,
    class_embed_type=None, addition_embed_type=None, addition_time_embed_dim=None, num_class_embeds=None,
    upcast_attention=False, resnet_time_scale_shift="default", resnet_skip_time_act=False,
    resnet_out_scale_factor=1, time_embedding_type="positional", time_embedding_dim=None,
    time_embedding_act_fn=None, timestep_post_act=None, time_cond_proj_dim=None, conv_in_kernel=3,
    conv_out_kernel=3, projection_class_embeddings_input_dim=None, attention_type="default",
    class_embeddings_concat=False, mid_block_only_cross_attention=None, cross_attention_norm=None,
    addition_embed_type_num_heads=64)

BUILT: dict[str, tuple] = {  # fields that may say these and nothing else
    "act_fn": tuple(activations), "time_embedding_type": ("positional",), "downsample_type": ("conv",),
    "upsample_type": ("conv",), "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_padding": (0, 1), "mid_block_scale_factor": (1, 1.0), "resnet_out_scale_factor": (1, 1.0),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False)}
FREE = ("sample_size", "dropout", "upcast_attention", "num_train_timesteps", "force_upcast",
        "addition_embed_type_num_heads", "act_fn")  # nothing of the network's output depends on these
FLAGS = ("center_input_sample", "only_cross_attention", "dual_cross_attention", "resnet_skip_time_act",
         "class_embeddings_concat")  # must be False
NOTHING = ("class_embed_type", "addition_embed_type", "addition_time_embed_dim", "encoder_hid_dim",
           "encoder_hid_dim_type", "num_attention_heads", "reverse_transformer_layers_per_block",
           "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "cross_attention_norm",
           "projection_class_embeddings_input_dim", "latents_mean", "latents_std")  # must be null

def read_settings(
    config: Mapping[str, Any],  # of a config.json
    usual: Mapping[str, Any],  # every field there is, with its value where config.json is silent
) -> dict[str, Any]:
    "All fields by name; a `ValueError` that names a field we do not know, or whose value we do not build."
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in given:
        if name not in usual:
            raise ValueError(f"config.json must have fields of a {config.get('_class_name')} that are known "
                             f"here, and {name}={given[name]!r} is none")
    settings = {**usual, **given}
    only = {**BUILT, **dict.fromkeys(FLAGS, (False,)), **dict.fromkeys(NOTHING, (None,))}
    for name, value in settings.items():
        if name in only and not any(type(value) is type(due) and value == due for due in only[name]):
            raise ValueError(f"{name} in config.json must be one of {', '.join(map(str, only[name]))} "
                             f"to be built here, got {value!r}")
    return settings

def per_level(
    name: str,  # of a field
    value: Any,  # one for all levels, or a list
    levels: int,  # how many
) -> tuple:
    "One for each level; a `ValueError` where the list is of another length."
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels:
        raise ValueError(f"{name} in config.json must list {levels}, one a level, got {value!r}")
    return values

def block_kinds(
    name: str,  # of the field
    types: Sequence[str],  # what it lists
    endings: Sequence[str],  # what will do, such as DownBlock2D
    levels: int,  # how many
) -> tuple[str, ...]:
    "What stands before the ending, one a level: '' for none, 'Attn' or 'CrossAttn'."
    kinds = []
    for word in per_level(name, types, levels):
        if word not in endings:
            raise ValueError(f"{name} in config.json must be of {', '.join(endings)}, got {word!r}")
        kinds.append(word.partition("Down" if "Down" in word else "Up")[0])
    return tuple(kinds)

def heads_of(
    kind: str,  # of the attention: 'Attn' or 'CrossAttn'
    channels: int,  # of its level
    number: int | None,  # what config.json calls `attention_head_dim`
) -> int:
    "How many heads: C/number where it is the width of a head, and the number itself beside a text."
    if number is None:
        return 1
    number = check_positive_int("attention_head_dim", number)
    return number if kind == "CrossAttn" else channels // number

class TwinUNet(nn.Module):
    "The UNet of Ho et al. 2020 and of Rombach et al. 2022, whose layers have the names of their files."
    in_channels: int  # of the input
    out_channels: int  # of the output
    channels: tuple[int, ...]  # of each level
    down: tuple[str, ...]  # attention of each level on the way down: '', 'Attn' or 'CrossAttn'
    up: tuple[str, ...]  # the same on the way up, from the coarsest level
    middle: str | None  # the same in the middle; None: there is no middle
    layers: tuple[int, ...]  # residual blocks of each level on the way down; one more on the way up
    head_numbers: tuple[int | None, ...]  # `attention_head_dim` of each level
    depth: tuple[int, ...]  # transformer blocks of each level's 'CrossAttn'
    block: Any  # keywords of every `ResnetBlock`: groups, eps, activation, scale_shift
    middle_groups: int | None  # of the norm of the middle's 'Attn'
    time: Any  # (length of the features, cosine_first, shift, length of the embedding)
    edge: str = "silu"  # activation of the time embedding and before the last convolution
    padding: int = 1  # of the downsampling convolutions
    linear: bool = False  # matrices around each transformer
    num_classes: int | None = None  # rows of the table of labels; None: no labels
    text_features: int | None = None  # E of the text; None: no text
    dtype: Any = None  # of the computation; the parameters keep theirs

    @nn.compact
    def __call__(self,
                 x: jax.Array,  # (B, H, W, C): noisy images or latents
                 temb: jax.Array,  # (B,): the step i, from 0
                 textcontext: jax.Array | None = None,  # (B, M, E): the text
                 label: jax.Array | None = None,  # (B,): which class each is of
                ) -> jax.Array:
        "The output F, (B, H, W, out_channels)."
        check_twin_inputs(self, x, temb, textcontext, label)
        last, groups, dtype = len(self.channels) - 1, self.block["groups"], self.dtype
        emb = time_embedding(self, temb)
        if self.num_classes is not None:
            emb = emb + label_embedding(label, self.num_classes, emb.shape[-1], dtype)

        def layer(h, stage, j, level):
            return ResnetBlock(self.channels[level], **self.block, dtype=dtype,
                               name=f"{stage}.resnets.{j}")(h, emb)

        def attend(h, stage, j, level, kind, groups=groups):
            name = f"{stage}.attentions.{j}"
            heads = heads_of(kind, self.channels[level], self.head_numbers[level])
            if kind == "Attn":
                return Attention(heads, True, True, groups, self.block["eps"], dtype, name=name)(h)
            if textcontext is None or not kind:
                return h
            return TextTransformer(heads, groups, self.depth[level], self.linear, dtype,
                                   name=name)(h, textcontext)

        # Down, and what comes out of every layer is kept.
        h = nn.Conv(self.channels[0], (3, 3), padding=1, dtype=dtype, name="conv_in")(x)
        skips = [h]
        for i, kind in enumerate(self.down):
            for j in range(self.layers[i]):
                h = attend(layer(h, f"down_blocks.{i}", j, i), f"down_blocks.{i}", j, i, kind)
                skips.append(h)
            if i < last:
                h = downsample(h, f"down_blocks.{i}.downsamplers.0.conv", self.padding, dtype)
                skips.append(h)

        # The middle.
        if self.middle is not None:
            norm = self.middle_groups if self.middle == "Attn" else groups
            h = layer(h, "mid_block", 0, last)
            h = attend(h, "mid_block", 0, last, self.middle, norm)
            h = layer(h, "mid_block", 1, last)

        # Up; every layer reads what was kept, the last first.
        for i, kind in enumerate(self.up):
            level = last - i
            for j in range(self.layers[level] + 1):
                h = layer(jnp.concatenate([h, skips.pop()], -1), f"up_blocks.{i}", j, level)
                h = attend(h, f"up_blocks.{i}", j, level, kind)
            if level:
                h = upsample(h, f"up_blocks.{i}.upsamplers.0.conv", skips[-1].shape[1:3], dtype)

        h = activations[self.edge](group_norm(groups, self.block["eps"], dtype, "conv_norm_out")(h))
        return nn.Conv(self.out_channels, (3, 3), padding=1, dtype=dtype, name="conv_out")(h)

def time_embedding(
    unet: TwinUNet,  # inside whose `__call__` this stands
    temb: jax.Array,  # (B,): the step i, from 0
) -> jax.Array:
    "(B, E): sines and cosines, a matrix, an activation, a matrix."
    length, cosine_first, shift, width = unet.time
    h = time_features(temb, length, cosine_first, shift)
    h = nn.Dense(width, dtype=unet.dtype, name="time_embedding.linear_1")(h)
    return nn.Dense(width, dtype=unet.dtype, name="time_embedding.linear_2")(activations[unet.edge](h))

def label_embedding(
    label: Any,  # (B,), whole numbers
    num_classes: int,  # rows of the table
    width: int,  # length of a row
    dtype: Any,  # of the result
) -> jax.Array:
    "(B, width): each label's row of a learned table; NaN for a label that there is not."
    row = nn.Embed(num_classes, width, dtype=dtype, name="class_embedding")(label)
    return jnp.where(((label >= 0) & (label < num_classes))[:, None], row, jnp.nan)

def check_twin_inputs(
    unet: TwinUNet,  # the network
    x: Any,  # (B, H, W, C), floating point
    temb: Any,  # (B,)
    textcontext: Any,  # (B, M, E), or None
    label: Any,  # (B,), or None
) -> None:
    "A `ValueError` for inputs that do not fit, and for a condition that is missing or not read."
    check_shape("x", x, (None, None, None, None))
    check_floats("x", x)
    check_shape("temb", temb, (len(x),))
    takes = {"textcontext": unet.text_features, "label": unet.num_classes}
    for name, given in (("textcontext", textcontext), ("label", label)):
        if (given is None) != (takes[name] is None):
            verb = "must be given: this network reads it" if given is None else "is not read by this network"
            raise ValueError(f"{name} {verb}")
    if textcontext is not None:
        check_shape("textcontext", textcontext, (len(x), None, unet.text_features))
    if label is not None:
        check_shape("label", label, (len(x),))
        if not jnp.issubdtype(jnp.result_type(label), jnp.integer):
            raise ValueError(f"label must be whole numbers, got {jnp.result_type(label)}")

def make_unet(
    config: Mapping[str, Any],  # of a config.json of a UNet2DModel or a UNet2DConditionModel
    dtype: Any = None,  # of the computation
) -> TwinUNet:
    "The twin of what config.json describes; a `ValueError` that names the field which is not built here."
    name = check_choice("_class_name in config.json", config.get("_class_name"),
                        ("UNet2DModel", "UNet2DConditionModel"))
    reads = name == "UNet2DConditionModel"
    s = read_settings(config, UNET2D_CONDITION if reads else UNET2D)
    channels = tuple(check_positive_int("block_out_channels", c) for c in s["block_out_channels"])
    levels = partial(per_level, levels=len(channels))
    words = ("", "Attn", "CrossAttn") if reads else ("", "Attn")
    down, up = (block_kinds(f"{way.lower()}_block_types", s[f"{way.lower()}_block_types"],
                            [f"{word}{way}Block2D" for word in words], len(channels))
                for way in ("Down", "Up"))
    middles = {"UNetMidBlock2DCrossAttn": "CrossAttn"} if reads else {"UNetMidBlock2D": "Attn"}
    kind = check_choice("mid_block_type in config.json", s["mid_block_type"], (None, *middles))
    middle = None if kind is None else middles[kind] if s.get("add_attention", True) else ""
    groups = check_positive_int("norm_num_groups", s["norm_num_groups"])
    scale_shift = s["resnet_time_scale_shift"] == "scale_shift"
    block = FrozenDict(groups=groups, eps=s["norm_eps"], activation=s["act_fn"], scale_shift=scale_shift)
    width = s["time_embedding_dim"] or 4 * channels[0]
    texts = set(levels("cross_attention_dim", s["cross_attention_dim"])) if reads else {None}
    if len(texts) > 1:
        raise ValueError(f"cross_attention_dim in config.json must be one number, got {texts}")
    return TwinUNet(
        s["in_channels"], s["out_channels"], channels, down, up, middle,
        layers=levels("layers_per_block", s["layers_per_block"]),
        head_numbers=levels("attention_head_dim", s["attention_head_dim"]),
        depth=levels("transformer_layers_per_block", s.get("transformer_layers_per_block", 1)),
        block=block, middle_groups=s.get("attn_norm_num_groups") or (None if scale_shift else groups),
        time=(channels[0], s["flip_sin_to_cos"], s["freq_shift"], width),
        edge=s["act_fn"] if reads else "silu", padding=s["downsample_padding"],
        linear=s.get("use_linear_projection", False), num_classes=s["num_class_embeds"],
        text_features=texts.pop(), dtype=dtype)