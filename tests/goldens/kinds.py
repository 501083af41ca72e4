"""The kinds of golden files that we can run, recognised by what is in them, never by their names."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import cfg_loop, clip, df11, qwen_cfg_loop, qwen_mmdit, schedules, umt5, wan_dit, wan_vace, wan_vae
from .golden import Golden

Pairs = list[tuple[Tensor, Tensor]]  # (ours, the reference)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How to run one kind of file.

    `outputs(golden)` are the keys of what has to be checked. `ways(golden, key)` lists the ways in which one of them
    (`out/case/name`, or `mid/...`) is checked, if it is;
    `run(golden, key, way)` returns ours and the reference; `tolerance(way)` bounds max |ours - ref| / max |ref|.
    """

    name: str
    recognise: Callable[[Golden], bool]
    outputs: Callable[[Golden], list[str]]
    ways: Callable[[Golden, str], tuple[str, ...]]
    run: Callable[[Golden, str, str], Pairs]
    tolerance: Callable[[str], float]


def _kind(module) -> Kind:
    return Kind(
        name=module.__name__.rpartition(".")[2],
        recognise=module.recognise,
        outputs=getattr(module, "outputs", lambda golden: golden.keys("out")),
        ways=module.ways,
        run=module.run,
        tolerance=module.TOLERANCE.__getitem__,
    )


MODULES = (wan_dit, wan_vace, wan_vae, umt5, clip, schedules, cfg_loop, qwen_mmdit, qwen_cfg_loop, df11)
KINDS = tuple(map(_kind, MODULES))


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
