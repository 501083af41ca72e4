"""VACE: blocks that take controls along beside the clip, and add what they find to its tokens.

Source: Jiang et al. 2025, "VACE: All-in-One Video Creation and Editing", section 3.3 (context adapter).
"""
# B batch, L tokens, E width

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.ops.linear import Linear
from ..core.ops.rows import add_to_rows
from ..core.types import Control
from .blocks import Block, Keys, Shared
from .config import WanConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stream:
    """One pass on its way through the blocks: the clip's tokens, and those of its controls once they have begun."""

    x: Tensor
    controls: tuple[Tensor, ...] = ()


class VaceBlock(Block):
    """A block of the controls. Without gradients the tokens given to its functions are changed."""

    def __init__(self, config: WanConfig, is_first: bool):
        super().__init__(config)
        self.before_proj = Linear(config.dim, config.dim) if is_first else None
        self.after_proj = Linear(config.dim, config.dim)

    def begin(self, x_BLE: Tensor, control_BLE: Tensor, shared: Shared, dtype: torch.dtype) -> Tensor:
        """Return a control's first tokens: its own, projected, and those of the clip as no block has changed them."""
        assert self.before_proj is not None
        project = self.before_proj.at(dtype, x_BLE.shape[0] * x_BLE.shape[1], shared.ops.products)
        for rows in shared.chunks:
            x_BLE = add_to_rows(x_BLE, rows, project(control_BLE[:, rows].to(dtype)))
        return x_BLE

    def go_on(self, stream: Stream, shared: Shared, prompt: Sequence[Keys], visit: Callable[..., Tensor]) -> Stream:
        """Return the stream with all of its controls taken through the block, which `visit` calls."""
        return replace(stream, controls=tuple(visit(self, control, shared, prompt) for control in stream.controls))

    def add_hints(self, stream: Stream, controls: Sequence[Control], shared: Shared, dtype: torch.dtype) -> Stream:
        """Return the stream with its controls, projected and times their strengths, added to the clip's tokens."""
        x = stream.x
        project = self.after_proj.at(dtype, len(controls) * x.shape[0] * x.shape[1], shared.ops.products)
        for tokens, control in zip(stream.controls, controls, strict=True):
            strength = x.new_full((1, 1, 1), control.strength)
            for rows in shared.chunks:
                x = add_to_rows(x, rows, project(tokens[:, rows].to(dtype)), strength)
        return replace(stream, x=x)
