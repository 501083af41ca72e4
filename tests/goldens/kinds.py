"""The kinds of golden files that we can run, recognised by what is in them, never by their names."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import cfg_loop, clip, qwen_cfg_loop, qwen_mmdit, schedules, umt5, wan_dit, wan_vae
from .golden import Golden

Pairs = list[tuple[Tensor, Tensor]]  # (ours, the reference)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How to run one kind of file.

    `ways(golden, key)` lists the ways in which an output (`out/case/name`, `mid/...`) is checked, if it is;
    `run(golden, key, way)` returns ours and the reference; `tolerance(way)` bounds max |ours - ref| / max |ref|.
    """

    name: str
    recognise: Callable[[Golden], bool]
    ways: Callable[[Golden, str], tuple[str, ...]]
    run: Callable[[Golden, str, str], Pairs]
    tolerance: Callable[[str], float]


def _kind(module) -> Kind:
    return Kind(
        name=module.__name__.rpartition(".")[2],
        recognise=module.recognise,
        ways=module.ways,
        run=module.run,
        tolerance=module.TOLERANCE.__getitem__,
    )


KINDS = tuple(
    _kind(module) for module in (wan_dit, wan_vae, umt5, clip, schedules, cfg_loop, qwen_mmdit, qwen_cfg_loop)
)


def find_kind(golden: Golden) -> Kind:
    """Return the kind of a file; raises ValueError if none or several fit."""
    fitting = [kind for kind in KINDS if kind.recognise(golden)]
    if len(fitting) != 1:
        raise ValueError(
            f"{golden.path.name} fits {[kind.name for kind in fitting] or 'none'} of the kinds that can be run, "
            f"{', '.join(kind.name for kind in KINDS)}: its weights begin with {list(golden.weights)[:3]}, "
            f"its outputs are {golden.keys('out')[:6]}, its config has {list(golden.config)}"
        )
    return fitting[0]
