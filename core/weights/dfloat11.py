"""DFloat11 files as checkpoints of the weights that they stand for: which group holds what, in which order.

The official tool writes a folder: a config.json with a `dfloat11_config`, whose `pattern_dict` has for each pattern of
module names the layers of such a module in the order of their stream, and one file, or one for each group and one for
the rest. Files of our own say the same in their metadata, so that each is complete alone.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from .. import dfloat11
from ..storage import DFLOAT11
from ..types import Checkpoint, TensorInfo
from .identity import read_json

CONFIG_FILE, CONFIG_KEY, PATTERNS = "config.json", "dfloat11_config", "pattern_dict"
SHAPES_KEY = "dfloat11_shapes"  # metadata of our own files: the shapes of weights, which the planes don't tell
SPLITS = "split_positions"  # I64 of a group: where in it each of its weights begins, but the first
GEOMETRY = {
    "threads_per_block": [dfloat11.SECTION_WINDOWS],
    "bytes_per_thread": dfloat11.WINDOW_BYTES,
}
TELLING = ".encoded_exponent"
SIGNS = "sign_mantissa"
AGAIN = "download it again"

# The layers of published groups, in order, for files that come without their config. Sources: the config.json of
# DFloat11/Qwen-Image-DF11 and of DFloat11/Wan2.1-T2V-14B-Diffusers-DF11.
PUBLISHED = {
    r"transformer_blocks\.\d+": (
        *("img_mod.1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj", "attn.add_q_proj"),
        *("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2"),
        *("txt_mod.1", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    r"blocks\.\d+": (
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    ),
}


def config_in(folder: Path) -> dict[str, Any]:
    """Return the `dfloat11_config` of a folder's config.json, nothing if there is none.

    A config.json that can't be read is none of ours to judge. Raises ValueError for a `dfloat11_config` of no use.
    """
    try:
        found = read_json(folder / CONFIG_FILE).get(CONFIG_KEY, {})
    except (ValueError, OSError):
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{folder / CONFIG_FILE}: {CONFIG_KEY} is no JSON object: download it again")
    return found


def files_with(path: Path) -> list[Path]:
    """Return all files of the model that a file belongs to, itself among them.

    Those are the ones of its folder that are called after groups of the folder's config, and what is not.
    """
    of_groups, others = _divided(path.parent)
    if path in of_groups:
        return [*of_groups, *others]
    return [path, *of_groups]


def rest_in(folder: Path) -> Path | None:
    """Return the file of a folder that has what is in none of its groups' files; None if that is not clear."""
    of_groups, others = _divided(folder)
    return others[0] if of_groups and len(others) == 1 else None


def _divided(folder: Path) -> tuple[list[Path], list[Path]]:
    patterns = config_in(folder).get(PATTERNS, {})
    if not patterns or not isinstance(patterns, dict):
        return [], []
    files = sorted(folder.glob("*.safetensors"))
    of_groups = [file for file in files if any(_matches(p.replace(r"\.", "_"), file.stem) for p in patterns)]
    return of_groups, [file for file in files if file not in of_groups]


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def seen_through(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the weights that its DFloat11 groups hold in place of the groups' planes.

    Their `TensorInfo` is of dtype `storage.DFLOAT11`. Raises ValueError for groups that are damaged, of another
    geometry, or whose order or shapes nothing tells.
    """
    prefixes = [name.removesuffix(TELLING) for name in checkpoint.tensors if name.endswith(TELLING)]
    if not prefixes:
        return checkpoint
    config, shapes = _config(checkpoint), _json(checkpoint, SHAPES_KEY)
    tensors, location = dict(checkpoint.tensors), dict(checkpoint.location)
    planes: dict[str, TensorInfo] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for prefix in prefixes:
        inside = {kind: tensors.pop(f"{prefix}.{kind}") for kind in dfloat11.PLANES if f"{prefix}.{kind}" in tensors}
        where = f"{checkpoint.path}: {prefix}"
        dfloat11.check_sizes({kind: info.shape for kind, info in inside.items()}, where)
        if others := {info.dtype for info in inside.values()} - {"U8"}:
            raise ValueError(f"{where}: parts of a DFloat11 group are {', '.join(others)}, expected U8: {AGAIN}")
        splits = tensors.pop(f"{prefix}.{SPLITS}", None)
        layers = _layers(checkpoint, prefix, 1 + prod(splits.shape) if splits else 1, config)
        stated = [shapes.get(f"{layer}.weight") for layer in layers]
        if None in stated:
            ends = [*_splits(checkpoint, prefix, splits), prod(inside[SIGNS].shape)]
            counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        else:
            counts = [_count(checkpoint, shape) for shape in stated]
        if sum(counts) != prod(inside[SIGNS].shape):
            raise ValueError(f"{where}: {prod(inside[SIGNS].shape)} weights, and layers of {sum(counts)}: {AGAIN}")
        for layer, count in zip(layers, counts, strict=True):
            name = f"{layer}.weight"
            if name in tensors:
                raise ValueError(f"{where}: {name} is both in a DFloat11 group and apart from it: {AGAIN}")
            tensors[name] = TensorInfo(DFLOAT11, _shape(checkpoint, layer, count, shapes))
            location[name] = checkpoint.location[f"{prefix}.{SIGNS}"]
        planes |= {f"{prefix}.{kind}": info for kind, info in inside.items()}
        groups[prefix] = tuple(f"{layer}.weight" for layer in layers)
    return replace(checkpoint, tensors=tensors, location=location, planes=planes, groups=groups)


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return pattern -> layers. What else the config says must be what we know."""
    config = _json(checkpoint, CONFIG_KEY) or config_in(checkpoint.path.parent)
    for key, wanted in GEOMETRY.items():
        found = config.get(key, wanted)
        if (list(found) if isinstance(found, (list, tuple)) else found) != wanted:
            raise ValueError(
                f"{checkpoint.path}: its DFloat11 config says {key} {found!r}, and only {wanted!r} can be read: use "
                "a file that the official tool wrote"
            )
    patterns = config.get(PATTERNS, {})
    is_known = isinstance(patterns, dict) and all(
        isinstance(layers, (list, tuple)) and all(isinstance(layer, str) for layer in layers)
        for layers in patterns.values()
    )
    if not is_known:
        raise ValueError(f"{checkpoint.path}: {PATTERNS} in its DFloat11 config is no table of layers: {AGAIN}")
    return patterns or PUBLISHED


def _layers(checkpoint: Checkpoint, prefix: str, count: int, patterns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the layers of a group in order."""
    for pattern, paths in patterns.items():
        try:
            fits = re.fullmatch(pattern, prefix)
        except re.error as error:
            raise ValueError(f"{checkpoint.path}: {pattern!r} in its DFloat11 config is no pattern: {AGAIN}") from error
        layers = [f"{prefix}.{path}" for path in paths] or [prefix]
        if fits and (patterns is not PUBLISHED or all(f"{layer}.bias" in checkpoint.tensors for layer in layers)):
            if len(layers) != count:
                raise ValueError(
                    f"{checkpoint.path}: the DFloat11 group {prefix} holds {count} weights, and its config names "
                    f"{len(layers)}: {AGAIN}, with its {CONFIG_FILE}"
                )
            return layers
    raise ValueError(
        f"{checkpoint.path}: nothing says which weights the DFloat11 group {prefix} holds in which order: put the "
        f"{CONFIG_FILE} that was published with it, with its {CONFIG_KEY}, in the same folder"
    )


def _shape(checkpoint: Checkpoint, layer: str, count: int, shapes: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a layer's weight: as stated, or with as many rows as the layer has biases."""
    name, bias = f"{layer}.weight", checkpoint.tensors.get(f"{layer}.bias")
    if name in shapes:
        shape = tuple(shapes[name]) if isinstance(shapes[name], list) else ()
        if prod(shape) != count:
            raise ValueError(
                f"{checkpoint.path}: {name} is said to be {shapes[name]}, and has {count} weights: {AGAIN}"
            )
        return shape
    if bias is None:
        raise ValueError(
            f"{checkpoint.path}: nothing says how many rows {name} has, a DFloat11 weight without a bias. Convert the "
            "bf16 file of this model with `python -m wanqwen convert --to dfloat11`, which writes it down"
        )
    if len(bias.shape) != 1 or not bias.shape[0] or count % bias.shape[0]:
        raise ValueError(f"{checkpoint.path}: {count} weights of {name} don't fit its bias {list(bias.shape)}: {AGAIN}")
    return bias.shape[0], count // bias.shape[0]


def _count(checkpoint: Checkpoint, shape: Any) -> int:
    is_shape = isinstance(shape, list) and shape and all(type(side) is int and side > 0 for side in shape)
    if not is_shape:
        raise ValueError(f"{checkpoint.path}: metadata {SHAPES_KEY} has a shape {shape!r:.80}: {AGAIN}")
    return prod(shape)


def _splits(checkpoint: Checkpoint, prefix: str, info: TensorInfo | None) -> Iterator[int]:
    """Yield where the weights of a group begin, but the first; read from the file."""
    name = f"{prefix}.{SPLITS}"
    if info is None:
        return
    if info.dtype != "I64" or len(info.shape) != 1 or info.start is None:
        raise ValueError(
            f"{checkpoint.path}: {name} is {info.dtype} {list(info.shape)}, expected one row of I64: {AGAIN}"
        )
    with open(checkpoint.location[name], "rb") as file:
        file.seek(info.start)
        content = file.read(8 * info.shape[0])
    before, total = 0, prod(checkpoint.tensors[f"{prefix}.{SIGNS}"].shape)
    for at in range(0, len(content), 8):
        end = int.from_bytes(content[at : at + 8], "little", signed=True)
        if not before < end < total:
            raise ValueError(f"{checkpoint.path}: {name} divides {total} weights at {end}, after {before}: {AGAIN}")
        yield end
        before = end


def _json(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    try:
        found = json.loads(checkpoint.metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint.path}: metadata {key} is not JSON: {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{checkpoint.path}: metadata {key} is no JSON object: {AGAIN}")
    return found
