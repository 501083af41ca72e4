"""How near does each kernel come to what the card's memory allows, and how far ahead of plain PyTorch is it?

    python -m wanqwen.bench.kernels [--rows 4096] [--dtype bf16] [--rounds 50]

On a card: each kernel's time, over the time that reading its inputs and writing its results once would take at the
speed of a large copy, and against its eager twin. On the CPU, where no kernel runs: the eager twin's time against the
obvious spelling, one operation after the other, as diffusers has it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..core import host
from ..core.ops.attention import attention
from ..core.ops.attention_choice import BACKENDS, Attended, choose_attention
from ..core.ops.proof import verdict
from ..core.ops.trials import TRIALS, Tokens, Trial, attention_arguments
from .measure import compare
from .models import FORMATS

# Model -> its heads; GELU's rows are three times as wide, near the four of models.
MODELS = {"Wan-14B": (40, 128), "Qwen-Image": (24, 128)}
COPIED = 1 << 30  # bytes of the copy that tells a card's bandwidth
ATTENTION = "attention_int8"
AIM = 1.25  # times the least


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="tokens at once (default: 4096 on a card, 256 on the CPU)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a card, fp32 on the CPU")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--device", type=torch.device, default=host.device())
    options = parser.parse_args()
    is_card = options.device.type == "cuda"
    dtype = FORMATS[options.dtype or ("bf16" if is_card else "fp32")]
    rows = options.rows or (4096 if is_card else 256)
    for model, (heads, head_width) in MODELS.items():
        tokens = Tokens(rows=rows, heads=heads, head_width=head_width)
        title = f"{model}, {rows} tokens, {str(dtype).removeprefix('torch.')}"
        lines = _on_a_card(tokens, dtype, options) if is_card else _on_the_cpu(tokens, dtype, options)
        sys.stdout.write("\n".join((title, *lines)) + "\n")


def _on_a_card(tokens: Tokens, dtype: torch.dtype, options: argparse.Namespace) -> list[str]:
    device = options.device
    bandwidth = copy_bandwidth(device)
    lines = [
        f"{torch.cuda.get_device_name(device)}: {bandwidth / 1e9:.0f} GB/s of a large copy",
        "| kernel | time | the least | over it | against eager |",
        "|---|---|---|---|---|",
    ]
    for name, trials in TRIALS.items():
        if name == ATTENTION:
            continue  # its bytes are not what takes its time
        found = verdict(name, replace(tokens, rows=64), dtype, device)
        if found.kernel is None:
            lines.append(f"| {name} | off: {found.reason} | | | |")
            continue
        for trial in trials:
            arguments = trial.arguments(tokens, dtype, device)
            calls = (partial(trial.run, call, arguments) for call in (found.kernel, trial.plain))
            fused, eager = (card_seconds(call, device, options.rounds) for call in calls)
            least = trial.moved_bytes(arguments, trial.run(found.kernel, arguments)) / bandwidth
            mark = "" if fused <= AIM * least else f", above the aim of {AIM}"
            lines.append(
                f"| {name} | {fused * 1e6:.1f} us | {least * 1e6:.1f} us | {fused / least:.2f}{mark} "
                f"| {fused / eager:.2f} |"
            )
    return [*lines, *_attentions(tokens, dtype, options)]


def _attentions(tokens: Tokens, dtype: torch.dtype, options: argparse.Namespace) -> list[str]:
    """Return lines on each attention that can be had here, for so many queries and keys."""
    width, device = tokens.head_width, options.device
    shape = tokens.rows, tokens.rows, tokens.heads, width
    arguments = attention_arguments(*shape, dtype, device, is_biased=False)
    operations, asked = 4 * tokens.rows**2 * tokens.width, Attended(queries=tokens.rows, keys=tokens.rows)
    lines = ["", "| attention | time | TFLOP/s | against SDPA |", "|---|---|---|---|"]
    exact = None
    for choice in ("sdpa", *BACKENDS):
        call, said = choose_attention(choice, width, dtype, device, frozenset([asked]))
        if said and call is attention:
            lines.append(f"| {choice} | {said[0]} | | |")
            continue
        with torch.inference_mode():
            seconds = card_seconds(partial(call, *arguments), device, options.rounds)
        exact = exact or seconds
        lines.append(
            f"| {choice} | {seconds * 1e3:.2f} ms | {operations / seconds / 1e12:.0f} | {seconds / exact:.2f} |"
        )
    return lines


def copy_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """Return the bytes that a card reads and writes in a second of a large copy."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / card_seconds(lambda: target.copy_(source), device, rounds)


def card_seconds(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a call on a card, its cache emptied of the call's tensors before each."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # several times the largest cache
    call()
    times = []
    for _ in range(rounds):
        flush.zero_()
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        call()
        ended.record()
        torch.cuda.synchronize(device)
        times.append(started.elapsed_time(ended) / 1000)
    return statistics.median(times)


def _on_the_cpu(tokens: Tokens, dtype: torch.dtype, options: argparse.Namespace) -> list[str]:
    lines = ["| operation | ours, eager | the obvious spelling | ours / it |", "|---|---|---|---|"]
    for name, spell in OBVIOUS.items():
        trial = TRIALS[name][0]
        figures = compare(_contestants(trial, spell, tokens, dtype, options.device), options.rounds, options.device)
        ours, other = (figures[key].least_seconds for key in ("ours", "obvious"))
        lines.append(f"| {name} | {ours * 1e3:.2f} ms | {other * 1e3:.2f} ms | {ours / other:.2f} |")
    names = [name for name in kernels.KERNELS if name not in OBVIOUS]
    return [*lines, f"No other spelling is usual of {', '.join(names)}."]


def _contestants(
    trial: Trial, spell: Callable[..., Any], tokens: Tokens, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Callable[[], Any]]:
    ours, obvious = (trial.arguments(tokens, dtype, device) for _ in range(2))
    return {"ours": lambda: trial.run(trial.eager, ours), "obvious": lambda: trial.run(spell, obvious)}


def _layer_norm(x: Tensor, constants: tuple[Tensor, Tensor, float], dtype: torch.dtype) -> Tensor:
    weight, bias, eps = constants
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * weight + bias).to(dtype)


def _add_to_rows(x: Tensor, rows: slice, branch: Tensor, gate: Tensor) -> Tensor:
    return x.float() + branch * gate


def _add_norm(
    x: Tensor, rows: slice, branch: Tensor, gate: Tensor, constants: tuple[Tensor, Tensor, float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = _add_to_rows(x, rows, branch, gate)
    return x, _layer_norm(x, constants, dtype)


def _rms_norm(x: Tensor, constants: tuple[Tensor, float], dtype: torch.dtype) -> Tensor:
    weight, eps = constants
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps) * weight).to(dtype)


def _norm_rotate(x: Tensor, constants: tuple[Tensor, float], rope: tuple[Tensor, Tensor], out: Tensor) -> None:
    heads = _rms_norm(x, constants, x.dtype).view(out.shape)
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table[:, None] for table in rope)
    turned = torch.empty_like(heads)
    turned[..., 0::2] = even * cos - odd * sin
    turned[..., 1::2] = even * sin + odd * cos
    out.copy_(turned)


def _norm_silu(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return out.copy_(F.silu(F.normalize(x, dim=1) * len(weight) ** 0.5 * weight + 0.0))


OBVIOUS = {
    "layer_norm": _layer_norm,
    "add_norm": _add_norm,
    "add_to_rows": _add_to_rows,
    "rms_norm": _rms_norm,
    "norm_rotate": _norm_rotate,
    "norm_silu_into": _norm_silu,
}


if __name__ == "__main__":
    main()
