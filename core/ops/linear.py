"""The one linear layer. What its weight is stored as is the business of `formats`, never of a model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import formats


class Linear(nn.Module):
    """`x @ weight.T + bias`, computed in the dtype of `x` whatever the weight is stored in.

    `weight_scale` exists only where the checkpoint has one for this layer (scaled fp8): a scalar or one value per row.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("weight_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        weight = formats.dequantise(self.weight, self.weight_scale, x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight, bias)
