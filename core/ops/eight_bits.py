"""Rows in 8 bits, each with a scale of its own, for matrix products in 8 bits."""
# B batch, L rows, E width

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = 1e-12  # of rows of zeros


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
