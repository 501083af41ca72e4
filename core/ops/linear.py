"""The one linear layer. What its weight is stored as is the business of `formats`, never of a model."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import formats
from .change import Change, are_small_beside, beside, changed, is_cheaper_beside
from .products import InEightBits, Product

MANY_ROWS = 1 << 62  # more than any weight has: what is done once for all calls costs nothing then


class Linear(nn.Module):
    """`x @ weight.T + bias`, computed in the dtype of `x` whatever the weight is stored in.

    `weight_scale` exists only where the checkpoint has one for this layer (scaled fp8): a scalar or one value per row.
    `changes` are on top of the weight for the length of a run, as `weights.adapters` binds and unbinds them.
    `stored` is the checkpoint's name of the weight's format where its shape and dtype don't tell it (blocks of GGUF).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("weight_scale", None)
        self.stored: str | None = None
        self.changes: tuple[Change, ...] = ()

    def at(
        self, dtype: torch.dtype, num_rows: int = MANY_ROWS, products: Sequence[Product] = ()
    ) -> Callable[[Tensor], Tensor]:
        """Return the layer as a function of tensors of this dtype, its weight made ready once for all calls.

        `num_rows` is how many rows all calls together bring: of the two ways to take changes, both of which leave the
        stored weight alone, it decides which one is less work. `products` are those that may be taken in 8 bits.
        """
        if product := self._in_8_bits(products, num_rows):
            add = beside(self.changes, dtype) if self.changes else None
            return InEightBits(product, self.weight, self.weight_scale, self.bias, dtype, add)
        weight = formats.dequantise(self.weight, self.weight_scale, dtype, self.stored)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.changes and is_cheaper_beside(self.changes, weight.shape, num_rows):
            add = beside(self.changes, dtype)
            return lambda x: add(F.linear(x, weight, bias), x)
        if self.changes:
            is_stored = weight is self.weight  # what is not is a copy, and ours to write to
            weight = changed(weight, self.changes, torch.empty_like(weight) if is_stored else weight)
        return lambda x: F.linear(x, weight, bias)

    def _in_8_bits(self, products: Sequence[Product], num_rows: int) -> Product | None:
        """Return the product that this layer's rows are taken in; none with changes that its weight must take first."""
        if self.changes and not are_small_beside(self.changes, self.weight.shape):
            return None
        for product in products:  # PyTorch 2.7 can't compile `next` with a default
            if product.takes(self.weight, num_rows):
                return product
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.at(x.dtype, x.numel() // max(1, x.shape[-1]))(x)


def feed_forward(
    first: Linear, second: Linear, dtype: torch.dtype, num_rows: int = MANY_ROWS, products: Sequence[Product] = ()
) -> Callable[[Tensor], Tensor]:
    """Return two layers with a GELU (tanh form) between them as a function of tensors, see `Linear.at`."""
    widen, narrow = (layer.at(dtype, num_rows, products) for layer in (first, second))
    if isinstance(narrow, InEightBits) and narrow.beside is None:
        return lambda x: narrow.of(*narrow.product.gelu(widen(x)))
    return lambda x: narrow(gelu_tanh(widen(x)))


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the GELU of x in its tanh form; x is lost, as the result is written over it, but not with gradients."""
    if torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    return torch.ops.aten.gelu_(x, approximate="tanh")
