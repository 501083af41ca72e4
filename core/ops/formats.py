"""How one weight may be stored, and how it becomes a tensor to compute with."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import BLOCK_FORMATS
from .. import storage
from ..storage import DFLOAT11, PACKINGS
from ..types import TensorInfo
from .gguf_blocks import in_parts, unpack_blocks
from .proof import PROBE, verdict

DTYPES = {name: getattr(torch, own) for name, own in storage.TORCH_NAMES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dequantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, stored: str | None = None) -> Tensor:
    """Return `weight` ready to compute with in `dtype`; no copy when it is stored that way already.

    `scale` is None, one number, or one number per output row ([out] or [out, 1]); the product is taken in float32
    so that a 16-bit result is rounded once, and of a part of the rows at a time, so that it is small beside the result.
    Format: ComfyUI's scaled fp8 and int8 files (`scale_weight`, `weight_scale`). `stored` is the name of a block format
    of GGUF where `weight` is blocks, [..., bytes of a row]; any other name means nothing here.
    """
    if stored in PACKINGS:
        return _unpacker(stored, dtype, weight.device)(weight, stored, dtype)
    if scale is None:
        return weight.to(dtype)
    ones = [1] * (weight.dim() - 1)
    scales = scale.float().reshape(-1, *ones).expand(weight.shape[0], *ones)
    return in_parts(lambda rows: weight[rows].float() * scales[rows], tuple(weight.shape), dtype, weight.device)


def _unpacker(stored: str, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, str, torch.dtype], Tensor]:
    """Return what unpacks blocks on a device: plain PyTorch, or on CUDA a kernel that gives the same bits."""
    if device.type != "cuda" or stored not in BLOCK_FORMATS or torch.compiler.is_compiling():
        return unpack_blocks
    return verdict("unpack_blocks", PROBE, dtype, device).kernel or unpack_blocks


def layout(info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of a tensor as its bytes lie in a file: of blocks those of the bytes, of DFloat11 bf16's.

    Raises ValueError for a dtype that PyTorch does not have.
    """
    if packing := PACKINGS.get(info.dtype):
        return torch.uint8, (*info.shape[:-1], packing.row_bytes(info.shape[-1]))
    if info.dtype == DFLOAT11:
        return torch.bfloat16, info.shape
    if info.dtype not in DTYPES:
        raise ValueError(f"tensors of {info.dtype} can't be read")
    return DTYPES[info.dtype], info.shape
