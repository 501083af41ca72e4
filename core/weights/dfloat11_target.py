"""Write weights as DFloat11: which layers make a group, what it becomes, and how the file says so.

A group is a block, in the names of the file that is written: what comes up to the first number in a name.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..dfloat11 import GAP_BITS, MOST_TABLES, PLANES, POSITION_BYTES, SECTION_WINDOWS, TABLE, num_sections
from ..ops.dfloat11_encoder import encode, most_bytes, refusal
from ..types import TensorInfo
from .dfloat11 import CONFIG_KEY, GEOMETRY, PATTERNS, PUBLISHED, SHAPES_KEY, SPLITS

VERSION = "0.5.0"  # of the official tool, whose files ours are like
BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")
LOOKED_UP = ("embedding", "relative_attention_bias")  # tables, which the official loader can't put back

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # path of a layer -> shape of its weight


def is_in_block(name: str) -> bool:
    """Say whether a weight, by its official name, is one of those that are compressed: a matrix of a block."""
    return BLOCK.match(name.removesuffix(".weight")) is not None and not any(piece in name for piece in LOOKED_UP)


def block_of(layer: str) -> str:
    """Return the block that a layer is in, by its path."""
    found = BLOCK.match(layer)
    return found[1] if found else layer


def planes_of(layers: Shapes) -> dict[str, TensorInfo]:
    """Return the tensors of a group of layers; what is compressed is as large as it could get."""
    count = sum(map(prod, layers.values()))
    stream = most_bytes(count)
    sections = num_sections(stream)
    sizes: dict[str, Shape] = {
        "encoded_exponent": (stream,),
        "sign_mantissa": (count,),
        "luts": (MOST_TABLES + 1, TABLE),
        "output_positions": (POSITION_BYTES * (sections + 1),),
        "gaps": (sections * SECTION_WINDOWS * GAP_BITS // 8,),
    }
    block = block_of(next(iter(layers)))
    found = {f"{block}.{plane}": TensorInfo("U8", sizes[plane]) for plane in PLANES}
    return found | {f"{block}.{SPLITS}": TensorInfo("I64", (len(layers) - 1,))}


def pack(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a group, made of bf16 weights by the paths of their layers.

    Raises ValueError for what the format can't hold.
    """
    for layer, weight in weights.items():
        if reason := refusal(weight):
            raise ValueError(
                f"{layer}.weight can't be compressed as DFloat11: {reason}. --keep {layer}.weight leaves this one as "
                "it is."
            )
    order = _ordered(list(weights))
    chosen = [weights[layer] for layer in order]
    block = block_of(order[0])
    for plane, tensor in encode(chosen).items():
        yield f"{block}.{plane}", tensor
    yield f"{block}.{SPLITS}", torch.tensor([weight.numel() for weight in chosen]).cumsum(0)[:-1]


def facts_of(layers: Shapes) -> dict[str, str]:
    """Return the metadata of a file in which these layers are compressed: its config, and shapes that planes lack."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        blocks.setdefault(block_of(layer), []).append(layer)
    config = config_of({block: _ordered(inside) for block, inside in blocks.items()})
    shapes = {f"{layer}.weight": list(shape) for layer, shape in layers.items()}
    return {CONFIG_KEY: json.dumps(config), SHAPES_KEY: json.dumps(shapes)}


def config_of(blocks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the official tool's config for blocks and their layers in order.

    All blocks of a stack that have the same layers share a pattern.
    """
    stacks: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for block, layers in blocks.items():
        stack, _, number = block.rpartition(".")
        inside = tuple(layer.removeprefix(f"{block}.") for layer in layers)
        stacks.setdefault(stack, {}).setdefault(inside, []).append(number)
    patterns = {}
    for stack, kinds in stacks.items():
        for inside, numbers in kinds.items():
            which = r"\d+" if len(kinds) == 1 else f"({'|'.join(numbers)})"
            patterns[rf"{re.escape(stack)}\.{which}"] = list(inside)
    return {"version": VERSION, **GEOMETRY, PATTERNS: patterns}


def _ordered(layers: Sequence[str]) -> list[str]:
    """Return the layers of a block in the order of published files, where these have them."""
    block = block_of(layers[0])
    known = [f"{block}.{layer}" for published in PUBLISHED.values() for layer in published]
    return sorted(layers, key=lambda layer: known.index(layer) if layer in known else len(known))
