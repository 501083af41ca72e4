"""The one linear layer. What its weight is stored as is the business of `formats`, never of a model."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import formats


class Linear(nn.Module):
    """`x @ weight.T + bias`, computed in the dtype of `x` whatever the weight is stored in.

    `weight_scale` exists only where the checkpoint has one for this layer (scaled fp8): a scalar or one value per row.
    `stored` is the checkpoint's name of the weight's format where its shape and dtype don't tell it (blocks of GGUF).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("weight_scale", None)
        self.stored: str | None = None

    def at(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return the layer as a function of tensors of this dtype, its weight made ready once for all calls."""
        weight = formats.dequantise(self.weight, self.weight_scale, dtype, self.stored)
        bias = None if self.bias is None else self.bias.to(dtype)
        return lambda x: F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.at(x.dtype)(x)


def feed_forward(first: Linear, second: Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return two layers with a GELU (tanh form) between them as a function of tensors of this dtype."""
    widen, narrow = first.at(dtype), second.at(dtype)
    return lambda x: narrow(gelu_tanh(widen(x)))


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the GELU of x in its tanh form; x is lost, as the result is written over it, but not with gradients."""
    if torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    return torch.ops.aten.gelu_(x, approximate="tanh")
