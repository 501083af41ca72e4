"""Rows in 8 bits with scales: those of weights become numbers, and others are rounded for products in 8 bits."""
# B batch, L rows, E width, O rows of a weight

import torch
import torch.nn.functional as F
from torch import Tensor

from .gguf_blocks import in_parts

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = 1e-12  # of rows of zeros


def dequantise_rows(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a weight [O, ...] times its scale in `dtype`; as it is, where there is none and that is its dtype.

    `scale` is one number, or one per row ([O] or [O, 1]); the product is taken in float32 so that a 16-bit result is
    rounded once, and of a part of the rows at a time, so that it is small beside the result.
    """
    if scale is None:
        return weight.to(dtype)
    ones = [1] * (weight.dim() - 1)
    scales = scale.float().reshape(-1, *ones).expand(weight.shape[0], *ones)
    return in_parts(lambda rows: weight[rows].float() * scales[rows], tuple(weight.shape), dtype, weight.device)


def quantise_rows(x_BLE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows as int8 or float8 (e4m3) and float32 scales [B, L, 1], by which to multiply them.

    The largest number of a row becomes the dtype's largest.
    """
    largest = LARGEST[dtype]
    scale = torch.linalg.vector_norm(x_BLE, float("inf"), dim=-1, keepdim=True).float() / largest
    scale.clamp_min_(SMALLEST_SCALE)
    scaled = torch.div(x_BLE, scale).clamp_(-largest, largest)  # in float32, as the scale is
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def rows_int8(x_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Return `quantise_rows` in int8."""
    return quantise_rows(x_BLE, torch.int8)


def rows_float8(x_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Return `quantise_rows` in float8 (e4m3)."""
    return quantise_rows(x_BLE, torch.float8_e4m3fn)


def gelu_int8(x_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Return `quantise_rows` in int8 of the rows' GELU (tanh form), which is computed in float32."""
    return quantise_rows(F.gelu(x_BLE.float(), approximate="tanh"), torch.int8)


def gelu_float8(x_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Return `quantise_rows` in float8 (e4m3) of the rows' GELU (tanh form), which is computed in float32."""
    return quantise_rows(F.gelu(x_BLE.float(), approximate="tanh"), torch.float8_e4m3fn)
