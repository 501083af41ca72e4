"""GGUF files made by tests: written by the `gguf` package, of blocks that it, too, says the meaning of."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from wanqwen.core.storage import PACKINGS
from wanqwen.core.types import TensorInfo

# Where the 16-bit floats of a block are.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
Facts = Mapping[str, str | bool | Sequence[Any]]
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Blocks = tuple[str, Tensor]  # GGUF's name of a format, and bytes [..., bytes of a row]


def random_blocks(kind: str, rows: int, numbers: int, size: float = 0.05, seed: int = 0) -> Blocks:
    """Return a weight [rows, numbers] of random blocks, whose values are of about this size."""
    generator, packing = torch.Generator().manual_seed(seed), PACKINGS[kind]
    count = rows * numbers // packing.numbers
    blocks = torch.randint(256, (count, packing.num_bytes), dtype=torch.uint8, generator=generator)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = torch.randn(count, 1, generator=generator).half().view(torch.uint8)
    found = meaning((kind, blocks[:256])).square().mean().sqrt().item()
    for at in HALVES[kind]:
        halves = blocks[:, at : at + 2].contiguous().view(torch.float16) * (size / found)
        blocks[:, at : at + 2] = halves.half().view(torch.uint8)
    return kind, blocks.view(rows, -1)


def quantised(tensor: Tensor, kind: str) -> Blocks:
    """Return a tensor in one of the formats that the package can make."""
    return kind, torch.from_numpy(gguf.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind]))


def meaning(blocks: Blocks) -> Tensor:
    """Return what blocks mean, in float32, by the package's reference."""
    kind, packed = blocks
    with np.errstate(invalid="ignore"):  # some scales are not numbers
        return torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]))


def write(path: Path, tensors: Mapping[str, Tensor | Blocks], facts: Facts | None = None, arch: str = "wan") -> Path:
    """Write tensors as they are, and blocks."""
    writer = _writer(path, facts, arch)
    for name, tensor in tensors.items():
        kind, data = tensor if isinstance(tensor, tuple) else (FLOATS[tensor.dtype], tensor)
        if kind in ("F32", "F16"):
            writer.add_tensor(name, data.contiguous().numpy())
        else:
            raw = data.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sparse(path: Path, tensors: Mapping[str, TensorInfo], arch: str = "wan") -> Path:
    """Write a file of full size whose tensors have never been written: only its header takes room."""
    writer, end = _writer(path, None, arch), 0
    for name, info in tensors.items():
        kind = gguf.GGMLQuantizationType[info.dtype]
        numbers, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(info.shape) // numbers * num_bytes
        writer.add_tensor_info(name, info.shape, np.dtype(np.float32), size, raw_dtype=kind)
        end = -(-end // 32) * 32 + size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as opened:
        begin = -(-path.stat().st_size // 32) * 32
        opened.truncate(begin + end)
    return path


def _writer(path: Path, facts: Facts | None, arch: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (facts or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    return writer
