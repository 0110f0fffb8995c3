"x"
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxdiff.interop.autoencoder import AUTOENCODER_KL, Autoencoder, TwinAutoencoder, make_autoencoder
from flaxdiff.interop.unets import TwinUNet, make_unet
from flaxdiff.pretrained import (local_folder, new_folder, read_tensors, whole_folder, write_tensors,
                                 write_text)
from flaxdiff.utils import check_real

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}  # of a layer, in files
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # up to diffusers 0.16

def file_name(
    path: Sequence[str],  # such as ("encoder", "down_blocks.0.resnets.0", "conv1", "kernel")
) -> str:
    "The parameter's name in diffusers' files: the layers joined by dots, and weight or bias."
    return ".".join([*path[:-1], LEAVES[path[-1]]])

def turned(
    value: Any,  # an array, or its shape and dtype
    leaf: str,  # kernel, scale, embedding or bias
    back: bool = False,  # from diffusers' order to ours; else from ours to theirs
) -> Any:
    "A kernel (in, out) as (out, in), one of (h, w, in, out) as (out, in, h, w); all else as it is."
    if leaf != "kernel":
        return value
    axes = {2: (1, 0), 4: (2, 3, 1, 0) if back else (3, 2, 0, 1)}[value.ndim]
    return value.transpose(axes)

def to_files(
    params: Mapping[str, Any],  # of a twin, as `init` makes them
) -> dict[str, np.ndarray]:
    "{name in diffusers' files: array}, every bit kept."
    flat = flatten_dict(params["params"])
    return {file_name(path): np.ascontiguousarray(turned(np.asarray(value), path[-1]))
            for path, value in flat.items()}

def from_files(
    shapes: Any,  # of the parameters, as `jax.eval_shape` of `init` gives them
    tensors: Mapping[str, np.ndarray],  # by their names in the files
    dtype: Any = None,  # of the parameters; None: as they are stored
) -> dict[str, Any]:
    "The parameters; a `ValueError` for tensors missing, left over or of another shape."
    old = re.compile(rf"\.({'|'.join(OLD)})\.(weight|bias)$")
    left = {old.sub(lambda m: f".{OLD[m[1]]}.{m[2]}", name): value for name, value in tensors.items()}
    flat: dict[Any, Any] = dict(flatten_dict(shapes["params"]))
    missing = [name for name in map(file_name, flat) if name not in left]
    if missing:
        raise ValueError(f"the weights must hold {named(missing)}, as config.json promises, and do not")
    params = {}
    for path, due in flat.items():
        value = turned(left.pop(name := file_name(path)), path[-1], back=True)
        if value.shape != due.shape:
            raise ValueError(f"the weight {name} must have the shape that config.json promises: "
                             f"{due.shape} in our order, got {value.shape}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"the weight {name} must be floating point, got {value.dtype}")
        params[path] = jnp.asarray(value, dtype)
    if left:
        raise ValueError(f"the weights hold {named(sorted(left))}, of which config.json says nothing")
    return {"params": unflatten_dict(params)}

def named(
    names: Sequence[str],  # of tensors
) -> str:
    "The first three, and how many more there are."
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

WEIGHTS = "diffusion_pytorch_model.safetensors"

def read_json(
    path: Path,  # a file
) -> dict[str, Any]:
    "The JSON object in it; a `ValueError` that names the file where there is none."
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config

def read_weights(
    folder: Path,  # of one network
) -> dict[str, np.ndarray]:
    "All tensors of its safetensors files: one file, those of an index, or one of another precision alone."
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        paths = [folder / WEIGHTS]
    elif index.is_file():
        files = read_json(index).get("weight_map", {}).values()
        paths = [folder / Path(name).name for name in sorted(set(files))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if len(paths) != 1:
            raise ValueError(f"{folder} must hold {WEIGHTS}, {index.name}, or one other safetensors file, and "
                             f"holds {', '.join(p.name for p in paths) or 'none'}; a .bin is not read")
    return {name: value for path in paths for name, value in read_tensors(path).items()}

def parameter_shapes(
    module: Any,  # a `TwinUNet` or a `TwinAutoencoder`
) -> Any:
    "Shapes and dtypes of its parameters; nothing is computed."
    if isinstance(module, TwinAutoencoder):
        size = 2 ** (len(module.half["channels"]) - 1)
        inputs = (jnp.zeros((1, size, size, module.image_channels)),)
        return jax.eval_shape(module.init, jax.random.key(0), *inputs)
    size = 2 ** (len(module.channels) - 1)
    x = jax.ShapeDtypeStruct((1, size, size, module.in_channels), jnp.float32)
    temb = jax.ShapeDtypeStruct((1,), jnp.float32)
    text = None if module.text_features is None else jnp.zeros((1, 1, module.text_features))
    label = None if module.num_classes is None else jnp.zeros(1, jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), x, temb, text, label)

def make_twin(
    config: Mapping[str, Any],  # of a config.json
    dtype: Any = None,  # of the computation
) -> TwinUNet | TwinAutoencoder:
    "The network that config.json describes."
    is_autoencoder = config.get("_class_name") == "AutoencoderKL"
    return make_autoencoder(config, dtype) if is_autoencoder else make_unet(config, dtype)

def read_part(
    folder: Path,  # with config.json and weights
    dtype: Any = None,  # of the parameters; None: as they are stored
    compute: Any = None,  # dtype of the computation; None: the wider one of parameters and input
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    "(the network, its parameters, what config.json says); a `ValueError` that names folder and fault."
    config = read_json(folder / "config.json")
    try:
        module = make_twin(config, compute)
        params = from_files(parameter_shapes(module), read_weights(folder), dtype)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from e
    return module, params, config

def write_part(
    folder: str | Path,  # to write; it must be new
    config: Mapping[str, Any],  # what config.json should say, with its _class_name
    params: Mapping[str, Any],  # of the twin it describes
) -> Path:
    "A network as a folder that diffusers' `from_pretrained` reads: config.json and its weights."
    tensors = to_files(params)
    from_files(parameter_shapes(make_twin(config)), tensors)  # a ValueError where they do not belong together
    with whole_folder(path := new_folder(folder)) as partial:
        write_tensors(partial / WEIGHTS, tensors)
        write_text(partial / "config.json", json.dumps(dict(config), indent=2) + "\n")
    return path

def load_autoencoder(
    folder: str | Path,  # of an AutoencoderKL: config.json and weights
    dtype: Any = None,  # of the parameters; None: as they are stored
    compute: Any = None,  # dtype of the computation
) -> Autoencoder:
    "The autoencoder in a folder of diffusers'."
    module, params, config = read_part(local_folder("folder", folder), dtype, compute)
    if not isinstance(module, TwinAutoencoder):
        raise ValueError(f"folder must hold an AutoencoderKL, got a {config['_class_name']} in {folder}")
    scale = check_real("scaling_factor", config.get("scaling_factor", AUTOENCODER_KL["scaling_factor"]), 0,
                       ends="(]")
    return Autoencoder(module, params, scale, config.get("shift_factor") or 0.0)