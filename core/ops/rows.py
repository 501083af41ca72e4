"""Work on a part of the tokens at a time, so that what is made on the way is small beside the tokens themselves.

With gradients nothing is divided or overwritten: the backward pass needs what was there.
"""
# B batch, L tokens, E width

import math

import torch
from torch import Tensor

from .norm import LayerConstants, gated_add, layer_norm

# Into how many chunks tokens are divided at most, and how many tokens each has at least: enough to keep a large card
# busy, and not to spend a processor's time on laying out the weights for each.
MOST_CHUNKS = 12
LEAST_ROWS = 2048


def row_chunks(num: int, chunk_rows: int = 0, first: int = 0) -> tuple[slice, ...]:
    """Return slices of about equal size that cover `num` rows from `first` on, none longer than `chunk_rows`.

    With 0 the number of rows alone decides. It must not be the free memory, as other chunks may round differently.
    """
    size = num if torch.is_grad_enabled() else chunk_size(num, chunk_rows)
    return tuple(slice(first + start, first + min(start + size, num)) for start in range(0, num, max(1, size)))


def chunk_size(num: int, chunk_rows: int = 0) -> int:
    """Return how many of `num` rows the longest chunk has without gradients, see `row_chunks`."""
    num_chunks = math.ceil(num / chunk_rows) if chunk_rows else min(MOST_CHUNKS, num // LEAST_ROWS)
    return math.ceil(num / max(1, num_chunks))


def add_to_rows(x_BLE: Tensor, rows: slice, branch_BLE: Tensor, gate_B1E: Tensor | None = None) -> Tensor:
    """Return float32 x with `branch`, times `gate` if there is one, added to some of its rows: x itself, changed.

    With gradients it is a new tensor.
    """
    part = x_BLE[:, rows]
    if not torch.is_grad_enabled():
        part.add_(branch_BLE) if gate_B1E is None else part.addcmul_(branch_BLE, gate_B1E)
        return x_BLE
    added = part + branch_BLE if gate_B1E is None else gated_add(part, branch_BLE, gate_B1E)
    if added.shape == x_BLE.shape:
        return added
    return torch.slice_scatter(x_BLE, added, dim=1, start=rows.start, end=rows.stop)


def add_norm(
    x_BLE: Tensor,
    rows: slice,
    branch_BLE: Tensor,
    gate_B1E: Tensor | None,
    constants: LayerConstants,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return what `add_to_rows` does, and those rows as `layer_norm` makes them of the sum."""
    x_BLE = add_to_rows(x_BLE, rows, branch_BLE, gate_B1E)
    return x_BLE, layer_norm(x_BLE[:, rows], constants, dtype)
