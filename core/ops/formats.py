"""How one weight may be stored, and how it becomes a tensor to compute with."""

import torch
from torch import Tensor

from ...kernels import BLOCK_FORMATS, BYTE_FORMATS
from .. import storage
from ..storage import DFLOAT11, PACKINGS
from ..types import TensorInfo
from .eight_bits import dequantise_rows
from .gguf_blocks import unpack_blocks
from .proof import spelling

DTYPES = {name: getattr(torch, own) for name, own in storage.TORCH_NAMES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dequantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, stored: str | None = None) -> Tensor:
    """Return `weight` ready to compute with in `dtype`; no copy when it is stored that way already.

    `scale` is None, one number, or one number per output row ([out] or [out, 1]).
    Format: ComfyUI's scaled fp8 and int8 files (`scale_weight`, `weight_scale`). `stored` is the name of a block format
    of GGUF where `weight` is blocks, [..., bytes of a row]; any other name means nothing here.
    """
    if stored in PACKINGS:
        unpack = spelling(unpack_blocks, dtype, weight.device) if stored in BLOCK_FORMATS else unpack_blocks
        return unpack(weight, stored, dtype)
    multiply = spelling(dequantise_rows, dtype, weight.device) if weight.dtype in BYTE_FORMATS else dequantise_rows
    return multiply(weight, scale, dtype)


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
