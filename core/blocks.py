"""The one loop over transformer blocks, and what lives for one sampling run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from .ops.choice import EXACT, Ops

State = TypeVar("State")


def as_it_is(block: nn.Module, *arguments: Any) -> Any:
    """Return what a block gives for these arguments."""
    return block(*arguments)


class BlockHook(Protocol):
    """Something that must happen to a block's weights around its call: bring them in, unpack them, let them go."""

    def before(self, i: int) -> None: ...

    def after(self, i: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that lives for one sampling run; made by `core.runtime`, never stored on a model.

    `dtype` is what the large matrix products compute in, `chunk_rows` how many tokens at most they take at a time (0
    lets the number of tokens decide), `ops` how the operations around them are spelled. `visit` calls a block with its
    arguments, `hooks` surround every block,
    in order of arrival (swap in, then unpack). `check_interrupt` raises to stop the run; it is asked before every
    block.
    """

    dtype: torch.dtype = torch.float32
    chunk_rows: int = 0
    ops: Ops = EXACT
    visit: Callable[..., Any] = as_it_is
    hooks: Sequence[BlockHook] = ()
    check_interrupt: Callable[[], None] = lambda: None


def run_blocks(
    blocks: Sequence[nn.Module],
    state: State,
    call: Callable[[int, nn.Module, State], State],
    *,
    run: Run,
    inject: Mapping[int, Callable[[State], State]] | None = None,
) -> State:
    """Run `state = call(i, block, state)` over all blocks and return the last state.

    `state` is opaque (Wan: streams of tokens; Qwen-Image: (img, txt)). `inject[i]` changes the state after block i,
    whose weights are still there (VACE, ControlNet).
    """
    for i, block in enumerate(blocks):
        run.check_interrupt()
        for hook in run.hooks:
            hook.before(i)
        state = call(i, block, state)
        if inject and i in inject:
            state = inject[i](state)
        for hook in reversed(run.hooks):
            hook.after(i)
    return state
