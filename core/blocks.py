"""The one loop over transformer blocks, and what lives for one sampling run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import nn

State = TypeVar("State")


class BlockHook(Protocol):
    """Something that must happen to a block's weights around its call: bring them in, unpack them, let them go."""

    def before(self, i: int) -> None: ...

    def after(self, i: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that lives for one sampling run; made by `core.runtime`, never stored on a model.

    `dtype` is what the large matrix products compute in, `chunk_rows` how many tokens at most they take at a time (0
    lets the number of tokens decide). `hooks` are per list of blocks, in order of arrival (swap in,
    then unpack). `check_interrupt` raises to stop the run; it is asked before every block.
    """

    dtype: torch.dtype = torch.float32
    chunk_rows: int = 0
    hooks: Mapping[str, Sequence[BlockHook]] = field(default_factory=dict)
    check_interrupt: Callable[[], None] = lambda: None


def run_blocks(
    blocks: nn.ModuleList,
    state: State,
    call: Callable[[int, nn.Module, State], State],
    *,
    run: Run,
    name: str = "blocks",
    inject: Mapping[int, Callable[[State], State]] | None = None,
) -> State:
    """Run `state = call(i, block, state)` over all blocks and return the last state.

    `state` is opaque (Wan: x; Qwen-Image: (img, txt)). `inject[i]` changes the state after block i (VACE, ControlNet).
    """
    hooks = run.hooks.get(name, ())
    for i, block in enumerate(blocks):
        run.check_interrupt()
        for hook in hooks:
            hook.before(i)
        state = call(i, block, state)
        if inject and i in inject:
            state = inject[i](state)
        for hook in reversed(hooks):
            hook.after(i)
    return state
