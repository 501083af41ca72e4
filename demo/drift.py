"""How far fast paths take whole runs of the miniatures from plain PyTorch, and whether the scores notice.

    python -m wanqwen.demo.drift [--count 8] [--precision bf16] [--seed 0] [--emulate]
                                 [--kernels] [--attention int8] [--weights fp8]

Fast are the fused kernels; or, of these, attention in 8 bits for any number of keys, and products in 8 bits of blocks
with weights in fp8 or int8, all that are asked for.

Every prompt is run from the same noise and weights with both, and in float32, to show how much of a difference the
precision itself makes. Where there is no card, kernels run in Triton's interpreter (set TRITON_INTERPRET=1), minutes
for a clip; or with --emulate in PyTorch, by the operations that the kernels take, in their order but for that of sums.
"""
# B batch, L tokens, E width

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import runtime
from ..core.ops import attention_choice
from ..core.ops.attention import attention_int8
from ..core.ops.attention_choice import BACKENDS
from ..core.ops.choice import EXACT, Ops, choose, proven
from ..core.ops.eight_bits import quantise_rows
from ..core.ops.formats import dequantise
from ..core.ops.norm import LayerConstants, RmsConstants
from ..core.storage import INT8_RECORD, METADATA_RECORD, WEIGHT_SCALES, companion
from ..core.types import AUTO_ATTENTION, AUTO_KERNELS, AUTO_PRODUCTS, EIGHT_BIT_PRODUCTS, EXACT_KERNELS, FastPaths
from ..core.weights.reader import open_checkpoint
from ..loading import DEMO_FOLDER, load_model
from .cards import score as cards_score
from .cards import show as cards
from .clips import score as clips_score
from .clips import show as clips

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
IN_8_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
CLIPS, CARDS = "wan_dit", "qwen_dit"


@dataclass(frozen=True, slots=True)
class Result:
    """One prompt's raw latents and pixels."""

    latents: Tensor
    pixels: Tensor


Run = Callable[[FastPaths, torch.dtype, int], Result]  # (fast paths, dtype, number of the prompt) -> what it makes
PLAIN = FastPaths(kernels=EXACT_KERNELS)


def main() -> None:
    """Print a line for every prompt, then the scores of both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--attention", choices=("int8",), default=AUTO_ATTENTION)
    parser.add_argument("--weights", choices=IN_8_BITS)
    options = parser.parse_args()
    is_fused = options.kernels or (options.attention == AUTO_ATTENTION and options.weights is None)
    fast = FastPaths(
        kernels=AUTO_KERNELS if is_fused else EXACT_KERNELS,
        attention=options.attention,
        products=AUTO_PRODUCTS if options.weights is None else EIGHT_BIT_PRODUCTS,
    )
    with kernels_anywhere(options.emulate), TemporaryDirectory() as folder:
        files = {file: DEMO_FOLDER / f"{file}.safetensors" for file in (CLIPS, CARDS)}
        if options.weights:
            dtype = IN_8_BITS[options.weights]
            files = {file: write_in_8_bits(path, Path(folder) / path.name, dtype) for file, path in files.items()}
        tasks = (
            clip_runs(files[CLIPS], options.count, options.seed),
            card_runs(files[CARDS], options.count, options.seed),
        )
        for name, run, rate in tasks:
            title = f"{name}, {options.precision}"
            _compare(title, run, rate, options.count, PRECISIONS[options.precision], fast)


def write_in_8_bits(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint with the matrices of its blocks in int8 or fp8, with a scale for each row, as ComfyUI does."""
    tensors, own = load_file(source), open_checkpoint(source).metadata
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(WEIGHT_SCALES)}
    kept = {name: tensor for name, tensor in tensors.items() if companion(name) is None}
    records = {}
    for name, tensor in kept.copy().items():
        layer = name.removesuffix(".weight")
        if "blocks." not in name or tensor.dim() != 2 or layer == name:
            continue
        scale = next((scales[layer + suffix] for suffix in WEIGHT_SCALES if layer + suffix in scales), None)
        kept[name], kept[f"{layer}.weight_scale"] = quantise_rows(dequantise(tensor, scale, torch.float32), dtype)
        records[layer] = {"format": INT8_RECORD if dtype == torch.int8 else "float8_e4m3fn"}
    save_file(kept, target, {**own, METADATA_RECORD: json.dumps({"layers": records})})
    return target


@contextmanager
def kernels_anywhere(emulated: bool) -> Iterator[None]:
    """Let runs take kernels on the CPU too, or what stands for them; that of attention for any number of keys."""

    def chosen(mode: str, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Ops, list[str]]:
        if mode == EXACT_KERNELS:
            return choose(mode, heads, dtype, device)
        found, said = (EMULATED, []) if emulated else proven(heads, dtype, device)
        if found == EXACT:
            raise SystemExit("; ".join(said))
        return found, said

    twin = replace(BACKENDS["int8"], load=lambda dtype, device, width: (attention_int8, ""))
    with (
        patch.object(runtime, "choose", chosen),
        patch.object(attention_choice, "LEAST_KEYS", 1),
        patch.dict(BACKENDS, {"int8": twin} if emulated else {}),
    ):
        yield


def _compare(
    title: str, run: Run, rate: Callable[[list[Tensor]], float], count: int, dtype: torch.dtype, fast: FastPaths
) -> None:
    made: dict[FastPaths, list[Tensor]] = {PLAIN: [], fast: []}
    apart, exact_off, fast_off = [], [], []
    for i in range(count):
        exact, found = run(PLAIN, dtype, i), run(fast, dtype, i)
        true = exact if dtype == torch.float32 else run(PLAIN, torch.float32, i)
        apart.append(psnr(found.latents, exact.latents))
        exact_off.append(psnr(exact.latents, true.latents))
        fast_off.append(psnr(found.latents, true.latents))
        made[PLAIN].append(exact.pixels)
        made[fast].append(found.pixels)
        farthest = (found.pixels - exact.pixels).abs().max() * 255
        _say(f"{title} {i}: latents {apart[-1]:.1f} dB, pixels at most {farthest:.2f} / 255 apart")
    rates = {paths: rate(pixels) for paths, pixels in made.items()}
    _say(
        f"{title}, {count} prompts: right {rates[PLAIN]:.1%} exact, {rates[fast]:.1%} fast; latents "
        f"of the two {_dB(apart)} apart"
    )
    if dtype != torch.float32:
        _say(f"{title}: from exact ones in float32, exact ones {_dB(exact_off)}, fast ones {_dB(fast_off)}")


def _dB(ratios: list[float]) -> str:
    return f"{sum(ratios) / len(ratios):.1f} dB on the average, {min(ratios):.1f} at worst"


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Return the ratio of the range of `wanted` to the root mean square difference, in dB."""
    span, error = wanted.max() - wanted.min(), (found - wanted).square().mean().sqrt()
    return float(20 * torch.log10(span / error.clamp_min(1e-20)))


def clip_runs(file: Path, count: int, seed: int) -> tuple[str, Run, Callable[[list[Tensor]], float]]:
    pipeline, prompts, model = clips.Pipeline(), clips.unseen_prompts(count, seed), load_model(file)

    def run(fast: FastPaths, dtype: torch.dtype, i: int) -> Result:
        pipeline.model = replace(model, dtype=dtype, fast=fast)
        return _kept(lambda: pipeline.clip(*prompts[i], seed + i).frames)

    def rate(pixels: list[Tensor]) -> float:
        return clips_score.rates([clips_score.judge(p) for p in pixels], [scene for scene, _ in prompts])["all"]

    return "clips", run, rate


def card_runs(file: Path, count: int, seed: int) -> tuple[str, Run, Callable[[list[Tensor]], float]]:
    pipeline, wishes, model = cards.Pipeline(), cards.unseen_prompts(count, seed), load_model(file)

    def run(fast: FastPaths, dtype: torch.dtype, i: int) -> Result:
        pipeline.writer = replace(model, dtype=dtype, fast=fast)
        return _kept(lambda: pipeline.picture(wishes[i], seed + i).pixels)

    def rate(pixels: list[Tensor]) -> float:
        return cards_score.rates([cards_score.judge(p) for p in pixels], [wish.scene for wish in wishes])["all"]

    return "cards", run, rate


def _kept(make: Callable[[], Tensor]) -> Result:
    """Return what a pipeline makes, with the latents on the way."""
    latents, generate = [], runtime.generate

    def noted(*arguments: object) -> Tensor:
        latents.append(generate(*arguments))
        return latents[-1]

    with patch.object(runtime, "generate", noted):
        pixels = make()
    return Result(latents[0], pixels)


def _layer_norm(x_BLE: Tensor, constants: LayerConstants, dtype: torch.dtype) -> Tensor:
    weight, bias, eps = constants
    x = x_BLE.float()
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = centred.square().sum(-1, keepdim=True) / x.shape[-1]
    return (centred * (1 / (variance + eps).sqrt()) * weight.float() + bias.float()).to(dtype)


def _add_norm(
    x_BLE: Tensor, rows: slice, branch: Tensor, gate: Tensor | None, constants: LayerConstants, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x_BLE = _add_to_rows(x_BLE, rows, branch, gate)
    return x_BLE, _layer_norm(x_BLE[:, rows], constants, dtype)


def _add_to_rows(x_BLE: Tensor, rows: slice, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    x_BLE[:, rows] += branch.float() if gate is None else branch.float() * gate.float()
    return x_BLE


def _rms_norm(x_BLE: Tensor, constants: RmsConstants, dtype: torch.dtype) -> Tensor:
    weight, eps = constants
    x = x_BLE.float().unflatten(-1, (-1, len(weight)))
    scale = 1 / (x.square().sum(-1, keepdim=True) / len(weight) + eps).sqrt()
    return (x * scale * weight.float()).flatten(-2).to(dtype)


def _norm_rotate(x_BLE: Tensor, constants: RmsConstants, rope: tuple[Tensor, Tensor], out_BLND: Tensor) -> None:
    normed = _rms_norm(x_BLE, constants, torch.float32).view(*out_BLND.shape[:-1], -1, 2)
    (even, odd), (cos, sin) = normed.unbind(-1), (table[:, None] for table in rope)
    out_BLND.copy_(torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2))


EMULATED = Ops(
    layer_norm=_layer_norm,
    rms_norm=_rms_norm,
    norm_rotate=_norm_rotate,
    add_to_rows=_add_to_rows,
    add_norm=_add_norm,
)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
