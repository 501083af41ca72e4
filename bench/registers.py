"""What kernels take of a card: registers, shared memory and spills, from compiling them ahead of time. Needs no GPU.

    python -m wanqwen.bench.registers [--json]

Launchers are called as a run would call them, on the CPU, with something in the place of Triton's functions that notes
the call.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

from .. import kernels
from ..core.ops.trials import TRIALS, Tokens

CAPABILITIES = (80, 86, 89, 90, 120)
# The widest rows of published models: Wan-14B's, with heads like Qwen-Image's.
TOKENS = Tokens(rows=16, heads=40, head_width=128)
DTYPE = torch.bfloat16
TYPE_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
ALIGNED = 16  # bytes and counts that Triton compiles special code for


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one launch of a kernel takes on one generation of cards: `local` are bytes that registers did not hold."""

    kernel: str
    launch: int
    capability: int
    warps: int
    registers: int
    shared: int
    local: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a Triton function: all of its arguments in their order, and how it is to be compiled."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def capabilities_of(name: str) -> list[int]:
    """Return the generations of cards that a kernel is for."""
    major, minor = kernels.KERNELS[name].capability
    return [capability for capability in CAPABILITIES if capability >= 10 * major + minor]


def launches_of(name: str) -> list[Launch]:
    """Return how a kernel is launched in each of its trials."""
    launcher = kernels.KERNELS[name].load(name)
    module = sys.modules[launcher.__module__]
    functions = {key: value for key, value in vars(module).items() if key.endswith("_kernel")}
    stand_ins = {key: MagicMock() for key in functions}
    with patch.multiple(module, **stand_ins):
        for trial in TRIALS[name]:
            launcher(*trial.arguments(TOKENS, DTYPE, torch.device("cpu")))
    return [
        _launch(functions[key], call.args, call.kwargs)
        for key, stand_in in stand_ins.items()
        for call in stand_in.__getitem__.return_value.call_args_list
    ]


def _launch(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    names = function.arg_names
    given = {**dict(zip(names, arguments, strict=False)), **{key: named[key] for key in names if key in named}}
    options = {key: value for key, value in named.items() if key not in names}
    return Launch(function, tuple(given[key] for key in names), options)


def compiled(launch: Launch, capability: int) -> Any:
    """Return what Triton makes of a launch for a generation of cards."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(launch.function.params, launch.arguments, strict=True)):
        is_special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (is_special and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name], is_aligned = "*" + TYPE_NAMES[value.dtype], True
        elif isinstance(value, int):
            signature[parameter.name], is_aligned = "i32", is_special and value % ALIGNED == 0
        else:
            signature[parameter.name], is_aligned = "fp32", False
        if is_aligned:
            attributes[(i,)] = [["tt.divisibility", ALIGNED]]
    source = ASTSource(launch.function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def usage(name: str, number: int, launch: Launch, capability: int) -> Usage:
    """Compile one launch and read what it takes. Raises RuntimeError if the tool that tells it says nothing."""
    import triton

    made = compiled(launch, capability)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    if len(found) < 4:
        raise RuntimeError(f"cuobjdump says nothing of kernel {name}: {said!r}")
    return Usage(
        kernel=name,
        launch=number,
        capability=capability,
        warps=launch.options["num_warps"],
        registers=found["REG"],
        shared=made.metadata.shared,
        local=found["LOCAL"] + found["STACK"],
    )


def table(found: list[Usage]) -> str:
    """Return the figures as text: a line for each launch, with its registers on each generation of cards."""
    title = f"{'kernel':<16}{'warps':>6}{'shared':>8}{'spilled':>9}   registers on"
    lines = [title + "".join(f"{f'sm_{capability}':>8}" for capability in CAPABILITIES)]
    for key, group in groupby(found, lambda one: (one.kernel, one.launch)):
        by_card = {one.capability: one for one in group}
        usages = by_card.values()
        shared, local = max(one.shared for one in usages), max(one.local for one in usages)
        line = f"{key[0]:<16}{next(iter(usages)).warps:>6}{shared:>8}{local:>9}{'':<15}"
        lines.append(line + "".join(f"{by_card[c].registers if c in by_card else '-':>8}" for c in CAPABILITIES))
    return "\n".join(lines)


def main() -> None:
    """Print the table for all kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if kernels.is_interpreted():
        raise SystemExit("TRITON_INTERPRET is set: Triton compiles nothing")
    found = [
        usage(name, number, launch, capability)
        for name in TRIALS
        for number, launch in enumerate(launches_of(name))
        for capability in capabilities_of(name)
    ]
    print(json.dumps([asdict(one) for one in found]) if options.json else table(found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)  # so that everything is compiled, now
        main()
