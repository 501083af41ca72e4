"""Write a bf16 checkpoint as DFloat11: one group for each block, one block in memory at a time."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..ops.dfloat11 import PLANES
from ..ops.dfloat11_encoder import encode, refusal
from ..types import Checkpoint
from .dfloat11 import CONFIG_FILE, CONFIG_KEY, GEOMETRY, PATTERNS, PUBLISHED, SHAPES_KEY, SPLITS
from .identity import read_json
from .reader import TORCH_NAMES, read_tensors

VERSION = "0.5.0"  # of the official tool, whose files ours are like
FILE = "model.safetensors"
WEIGHT = ".weight"
LOOKED_UP = ("embed", "relative_attention_bias")  # pieces of names of tables, which official loaders don't divide
OFFSET_DIGITS = 16  # kept for each number of the header, which is written when the sizes are known


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """What was written: the config for official loaders, bytes before and after, and weights left as they are.

    `left` has the reasons why by the weights' names; those outside of blocks, norms and biases are not named.
    """

    file: Path
    config: Mapping[str, Any]
    num_groups: int
    num_bytes: int
    num_bytes_before: int
    left: Mapping[str, str]


def compress(
    checkpoint: Checkpoint,
    out: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compressed:
    """Write a checkpoint as DFloat11 into the file `out`, or into the folder of that name with a config.json.

    Names and all tensors outside of groups stay as they are. Weights that the format can't hold stay uncompressed.
    `progress` is told after each group how many are done, and may stop the work by raising; nothing is left of it then.
    Raises ValueError where there is nothing to compress.
    """
    found = _blocks(checkpoint)
    if not found:
        stored = sorted({info.dtype for info in checkpoint.tensors.values()})
        raise ValueError(
            f"{checkpoint.path} has no bf16 weights in blocks (it is stored as {', '.join(stored)}): DFloat11 holds "
            "bf16 only, so give the bf16 file of this model, or convert it to bf16 first"
        )
    is_folder = out.suffix != ".safetensors"
    file = out / FILE if is_folder else out
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.part")
    try:
        written = _write(checkpoint, found, partial, threads, progress)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    if is_folder:
        beside = read_json(checkpoint.path.parent / CONFIG_FILE) | {CONFIG_KEY: written.config}
        (out / CONFIG_FILE).write_text(json.dumps(beside, indent=2) + "\n", encoding="utf-8")
    return Compressed(
        file=file,
        config=written.config,
        num_groups=written.num_groups,
        num_bytes=file.stat().st_size,
        num_bytes_before=sum(path.stat().st_size for path in set(checkpoint.location.values())),
        left=written.left,
    )


def _blocks(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return the layers with bf16 matrices of each block, all blocks in one order: the published one, if they have it.

    A block is what comes up to the first number in a name.
    """
    found: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        match = re.match(r"(.*?\.\d+)\.(.+)\.weight", name)
        if match and info.dtype == "BF16" and len(info.shape) == 2:
            block, layer = match.groups()
            if not any(piece in layer.rpartition(".")[2] for piece in LOOKED_UP):
                found.setdefault(block, []).append(layer)
    order = list(dict.fromkeys(layer for layers in found.values() for layer in layers))
    for published in PUBLISHED.values():
        if set(published) <= set(order):
            order = [*published, *(layer for layer in order if layer not in published)]
    return {block: sorted(layers, key=order.index) for block, layers in found.items() if len(layers) > 1}


@dataclass(frozen=True, slots=True)
class _Written:
    config: dict[str, Any]
    num_groups: int
    left: dict[str, str]


def _write(
    checkpoint: Checkpoint,
    blocks: Mapping[str, Sequence[str]],
    path: Path,
    threads: int | None,
    progress: Callable[[int, int], None],
) -> _Written:
    inside = {f"{block}.{layer}{WEIGHT}": block for block, layers in blocks.items() for layer in layers}
    names = [name for name in checkpoint.tensors if name not in inside]
    names += [f"{block}.{plane}" for block in blocks for plane in (*PLANES, SPLITS)] + list(inside)
    kept: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    # As long as the metadata can get: with every weight in it, and a pattern of its own for each block.
    shapes = {name: list(checkpoint.tensors[name].shape) for name in inside}
    with open(path, "wb") as opened:
        longest = _metadata(checkpoint, _config_of({b: [*ls, b] for b, ls in blocks.items()}), shapes)
        file = _File(opened, names, longest)
        for name, tensor in read_tensors(checkpoint, [name for name in checkpoint.tensors if name not in inside]):
            file.add(name, tensor)
        for done, (block, layers) in enumerate(blocks.items()):
            progress(done, len(blocks))
            weights = dict(read_tensors(checkpoint, [f"{block}.{layer}{WEIGHT}" for layer in layers]))
            reasons = {name: reason for name, weight in weights.items() if (reason := refusal(weight))}
            left |= reasons
            for name in reasons:
                file.add(name, weights.pop(name))
            order = [layer for layer in layers if f"{block}.{layer}{WEIGHT}" in weights]
            if not order:
                continue
            kept[block] = order
            chosen = [weights[f"{block}.{layer}{WEIGHT}"] for layer in order]
            for plane, tensor in encode(chosen, threads).items():
                file.add(f"{block}.{plane}", tensor)
            file.add(f"{block}.{SPLITS}", torch.tensor([w.numel() for w in chosen]).cumsum(0)[:-1])
        progress(len(blocks), len(blocks))
        config = _config_of(kept)
        shapes = {name: shape for name, shape in shapes.items() if name not in left}
        file.finish(_metadata(checkpoint, config, shapes))
    return _Written(config, len(kept), left)


def _metadata(checkpoint: Checkpoint, config: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, str]:
    return {**checkpoint.metadata, CONFIG_KEY: json.dumps(config), SHAPES_KEY: json.dumps(shapes)}


def _config_of(blocks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the config of groups: a pattern for all blocks of a stack that have the same layers."""
    stacks: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for block, layers in blocks.items():
        stack, _, number = block.rpartition(".")
        stacks.setdefault(stack, {}).setdefault(tuple(layers), []).append(number)
    patterns = {}
    for stack, kinds in stacks.items():
        for layers, numbers in kinds.items():
            which = r"\d+" if len(kinds) == 1 else f"({'|'.join(numbers)})"
            patterns[rf"{re.escape(stack)}\.{which}"] = list(layers)
    return {"version": VERSION, **GEOMETRY, PATTERNS: patterns}


class _File:
    """A safetensors file whose tensors are written as they come, and its header last, into room that was kept.

    `names` are all that may come, `metadata` is as long as it may get.
    """

    def __init__(self, opened: BinaryIO, names: Sequence[str], metadata: Mapping[str, str]):
        widest = 10**OFFSET_DIGITS
        entries = {name: _entry("F8_E4M3", [widest] * 5, widest, widest) for name in names}
        self.opened, self.room = opened, len(_header(entries, metadata)) // 8 * 8 + 8
        self.entries: dict[str, dict[str, Any]] = {}
        self.end = 0
        opened.write(bytes(8 + self.room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor behind the others."""
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.opened.write(memoryview(content))
        begin, self.end = self.end, self.end + content.nbytes
        self.entries[name] = _entry(TORCH_NAMES[tensor.dtype], list(tensor.shape), begin, self.end)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header; the room that it does not take is filled with spaces, as the format allows."""
        self.opened.seek(0)
        self.opened.write(self.room.to_bytes(8, "little") + _header(self.entries, metadata).ljust(self.room))


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    return json.dumps({"__metadata__": dict(metadata), **entries}).encode()
