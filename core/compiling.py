"""Blocks through torch.compile: one function for all blocks of a class, to which weights are inputs like any others.

So blocks that stream, and weights that come to lie elsewhere, are the same function's. It is compiled anew for what
changes its operations: another size of latents (after the second one for any), LoRAs that come, go or have another
rank, another format of weights. A LoRA's strength is not one of these, see `weights.adapters`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

# Versions of one function that may be: of published models some four have a use at a time (the first and later sizes,
# with a LoRA and without one). PyTorch's own limit, 8, is for all models together.
MOST_VERSIONS = 32


class CompiledBlocks:
    """What calls the blocks of a run: compiled, or if that fails, from then on as they are, which `tell` hears."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell, self._is_on = tell, True

    def __call__(self, block: nn.Module, *arguments: Any) -> Any:
        """Return what a block gives for these arguments.

        A function is compiled whole or not at all, and before it runs: what it would have changed is as it was.
        """
        if not self._is_on:
            return block(*arguments)
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            with config.patch(recompile_limit=MOST_VERSIONS):
                return compiled(type(block))(block, *arguments)
        except FailOnRecompileLimitHit:
            reason = f"a limit: more than {MOST_VERSIONS} programs of one kind of block"
        except TorchDynamoException as error:
            # The first line may be whose error it is, and the second one which.
            reason = " ".join((str(error).strip() or "no message").splitlines()[:2])
        self._is_on = False
        self._tell(f"Blocks are not compiled, and run as they are: torch.compile failed with {reason}")
        return block(*arguments)


@cache
def compiled(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the function that all blocks of a class share, compiled when it first meets arguments of a kind."""
    return torch.compile(kind.forward, fullgraph=True)


def num_compiled() -> int:
    """Return how many functions have been compiled in the life of the process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
