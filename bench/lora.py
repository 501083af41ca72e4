"""What does a LoRA cost, and is the way that is taken the cheaper one?

    python -m wanqwen.bench.lora [--width 1536 1536] [--rank 64] [--rows 64 768 4096] [--stored bf16] [--device cuda]

One linear layer without a LoRA, with the pair taken beside the weight, and with the pair added to a copy of the weight.
"""

import argparse
import sys
from collections.abc import Callable

import torch

from ..core.ops.change import Change, LowRank, is_cheaper_beside
from ..core.ops.linear import MANY_ROWS, Linear
from .measure import compare
from .models import FORMATS

FEW_ROWS = 1


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs=2, default=[1536, 1536], metavar=("IN", "OUT"))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512, 768, 1024, 4096])
    parser.add_argument("--stored", choices=FORMATS, default="bf16")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), FORMATS[options.dtype]
    inputs, outputs = options.width
    plain, changed = (_layer(inputs, outputs, FORMATS[options.stored], device) for _ in range(2))
    down, up = (
        torch.randn(shape, device=device).to(dtype) * 0.02
        for shape in ((options.rank, inputs), (outputs, options.rank))
    )
    changed.changes = (Change(difference=LowRank(down, up)),)
    sys.stdout.write("| rows | without | beside | in the weight | taken |\n|---|---|---|---|---|\n")
    for rows in options.rows:
        x = torch.randn(rows, inputs, device=device).to(dtype)

        def call(layer: Linear, told: int, x: torch.Tensor = x) -> Callable[[], torch.Tensor]:
            return lambda: layer.at(dtype, told)(x)

        contestants = {
            "without": call(plain, rows),
            "beside": call(changed, FEW_ROWS),
            "in the weight": call(changed, MANY_ROWS),
        }
        with torch.inference_mode():
            figures = compare(contestants, options.rounds, device)
        taken = "beside" if is_cheaper_beside(changed.changes, (outputs, inputs), rows) else "in the weight"
        times = " | ".join(f"{figure.least_seconds * 1000:.2f} ms" for figure in figures.values())
        sys.stdout.write(f"| {rows} | {times} | {taken} |\n")
        sys.stdout.flush()


def _layer(inputs: int, outputs: int, stored: torch.dtype, device: torch.device) -> Linear:
    layer = Linear(inputs, outputs, bias=False).requires_grad_(False)
    weight = torch.randn(outputs, inputs, device=device) * 0.02
    layer.weight = torch.nn.Parameter(weight.to(stored), requires_grad=False)
    return layer


if __name__ == "__main__":
    main()
