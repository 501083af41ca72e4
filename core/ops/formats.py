"""How one weight may be stored, and how it becomes a tensor to compute with."""

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def dequantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `weight` ready to compute with in `dtype`; no copy when it is stored that way already.

    `scale` is None, one number, or one number per output row ([out] or [out, 1]); the product is taken in float32
    so that a 16-bit result is rounded once. Format: ComfyUI's scaled fp8 files (`scale_weight`, `weight_scale`).
    """
    if scale is None:
        return weight.to(dtype)
    rows = scale.float() if scale.numel() == 1 else scale.float().reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.float() * rows).to(dtype)
