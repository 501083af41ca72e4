"""Checkpoint files in the names and shapes of models, for measuring: full of random numbers, or of holes."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..core.types import Family

PATTERN = 1 << 22  # numbers that are made; the file repeats them
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(family: Family, config: object) -> dict[str, tuple[int, ...]]:
    """Return a model's tensors by their official names."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in family.build(config).state_dict().items()}


def write_sparse(path: Path, shapes: Shapes) -> tuple[int, int]:
    """Write a bf16 safetensors file of full size that is holes but for its header; return where its tensors lie."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text), 8 + len(text) + end


def write_random(path: Path, shapes: Shapes) -> Path:
    """Write a bf16 safetensors file of these tensors, with small random numbers."""
    begin, end = write_sparse(path, shapes)
    pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    content = memoryview(pattern.view(torch.uint8).numpy())
    with open(path, "r+b") as file:
        file.seek(begin)
        for at in range(begin, end, len(content)):
            file.write(content[: end - at])
    return path
