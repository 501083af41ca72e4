"""Matrix products in 8 bits, for weights that are stored in 8 bits.

The rows are rounded to the weight's dtype, each with a scale of its own. Input scales that some files bring, one for a
whole layer, are not used: a row's own scale rounds it no worse.
"""
# M rows, I inputs, O outputs of a layer

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .eight_bits import gelu_float8, gelu_int8, rows_float8, rows_int8

LEAST_ROWS = 32  # below that the way of the weight to the processor is what takes the time
CUDA_ROWS = 17  # the fewest that `torch._int_mm` takes there


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One way to multiply rows with weights of one dtype.

    `multiply` takes rows [M, I] and their scales [M, 1], a weight [O, I] and its scales [1, O]; both sides of a weight
    must be multiples of `sides`. `rows` rounds rows [B, L, I], and `gelu` their GELU.
    """

    name: str
    dtype: torch.dtype
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    gelu: Callable[[Tensor], tuple[Tensor, Tensor]]
    sides: int = 16

    def takes(self, weight: Tensor, num_rows: int) -> bool:
        """Say whether so many rows are multiplied with such a weight in this way."""
        return weight.dtype == self.dtype and num_rows >= LEAST_ROWS and not any(s % self.sides for s in weight.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Rows as they are, and in 8 bits with their scales."""

    x: Tensor
    rows: Tensor
    scale: Tensor


class InEightBits:
    """A layer as a function of tensors; `beside` adds to the result what does not go through the layer's weight."""

    def __init__(
        self,
        product: Product,
        weight_OI: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        beside: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.product, self.weight, self.bias, self.dtype, self.beside = product, weight_OI, bias, dtype, beside
        one = torch.ones((), device=weight_OI.device) if scale is None else scale.float()
        self.scale_1O = one.reshape(1, -1).expand(1, len(weight_OI)).contiguous()

    def __call__(self, x: Tensor | Rounded) -> Tensor:
        given = x if isinstance(x, Rounded) else Rounded(x, *self.product.rows(x))
        y = self.of(given.rows, given.scale)
        return y if self.beside is None else self.beside(y, given.x)

    def of(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Return the result for rows that are rounded already, and their scales."""
        flat, scales = rows.reshape(-1, rows.shape[-1]), scale.reshape(-1, 1)
        y = self.product.multiply(flat, scales, self.weight, self.scale_1O)
        y = y.to(self.dtype) if self.bias is None else (y + self.bias).to(self.dtype)
        return y.view(*rows.shape[:-1], -1)


def round_once(x: Tensor, *layers: Callable[[Tensor], Tensor]) -> Tensor | Rounded:
    """Return what to call layers with that all take x: x itself, or rounded once where all of them would round it."""
    alike = all(isinstance(layer, InEightBits) and layer.product == layers[0].product for layer in layers)
    return Rounded(x, *layers[0].product.rows(x)) if alike else x


def multiply_int8(rows_MI: Tensor, scale_M1: Tensor, weight_OI: Tensor, scale_1O: Tensor) -> Tensor:
    """Return the product in float32; sums are exact."""
    missing = CUDA_ROWS - len(rows_MI) if rows_MI.device.type == "cuda" else 0
    padded = F.pad(rows_MI, (0, 0, 0, missing)) if missing > 0 else rows_MI
    return torch._int_mm(padded, weight_OI.t())[: len(rows_MI)].float().mul_(scale_M1).mul_(scale_1O)


def multiply_float8_rows(rows_MI: Tensor, scale_M1: Tensor, weight_OI: Tensor, scale_1O: Tensor) -> Tensor:
    """Return the product in bfloat16, the only dtype that this one has on all devices; scales are applied on the way.

    Sums are not taken in fewer bits for speed (`use_fast_accum`): on Hopper these have 14, too few for thousands of
    inputs.
    """
    return torch._scaled_mm(rows_MI, weight_OI.t(), scale_M1, scale_1O, out_dtype=torch.bfloat16)


def multiply_float8(rows_MI: Tensor, scale_M1: Tensor, weight_OI: Tensor, scale_1O: Tensor) -> Tensor:
    """Return the product in float32; scales are applied afterwards."""
    one = torch.ones((), device=rows_MI.device)
    product = torch._scaled_mm(rows_MI, weight_OI.t(), one, one, out_dtype=torch.float32)
    return product.mul_(scale_M1).mul_(scale_1O)


INT8 = Product(name="int8", dtype=torch.int8, multiply=multiply_int8, rows=rows_int8, gelu=gelu_int8)
FLOAT8_ROWS = Product(
    name="fp8 by rows",
    dtype=torch.float8_e4m3fn,
    multiply=multiply_float8_rows,
    rows=rows_float8,
    gelu=gelu_float8,
)
FLOAT8 = replace(FLOAT8_ROWS, name="fp8", multiply=multiply_float8)
