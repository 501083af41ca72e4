"""What do products in 8 bits save, and what do they cost the miniatures?

python -m wanqwen.bench.eight_bits                 # one product of a published size, beside 16 bits
python -m wanqwen.bench.eight_bits --count 40      # the miniatures in int8 and fp8: scores and differences
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.ops.eight_bits import quantise_rows
from ..core.ops.linear import Linear
from ..core.ops.product_choice import try_product
from ..core.ops.products import FLOAT8, FLOAT8_ROWS, INT8
from ..core.types import FastPaths, ModelHandle
from ..demo.cards import score as card_score
from ..demo.cards import show as cards
from ..demo.clips import score as clip_score
from ..demo.clips import show as clips
from ..demo.drift import IN_8_BITS, write_in_8_bits
from ..loading import DEMO_FOLDER, load_model
from .measure import compare, table

SHAPE = (13824, 5120)  # the first layer of a feed-forward of Wan-14B
Make = Callable[[ModelHandle], list[Tensor]]


def main() -> None:
    """Print speeds of a product, or scores of the miniatures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, help="prompts for each miniature")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.count:
        _print_scores(options.count, options.seed)
    else:
        _print_speeds(torch.device(options.device), options.rows, options.rounds)


def _print_scores(count: int, seed: int) -> None:
    writer, editor = cards.unseen_prompts(count, seed), cards.unseen_edits(count, seed)
    prompts = clips.unseen_prompts(count, seed)

    def clips_score(made: list[Tensor]) -> float:
        return clip_score.rates([clip_score.judge(frames) for frames in made], [scene for scene, _ in prompts])["all"]

    def cards_score(made: list[Tensor]) -> float:
        return card_score.rates([card_score.judge(p) for p in made], [wish.scene for wish in writer])["all"]

    def edits_score(made: list[Tensor]) -> float:
        return cards.edit_rates([cards.Picture(*pair, 0.0) for pair in zip(editor, made, strict=True)]).done["all"]

    movie, painter = clips.Pipeline(), cards.Pipeline()
    tasks: dict[str, tuple[str, Make, Callable[[list[Tensor]], float]]] = {
        "clips": ("wan_dit", lambda model: _clips(movie, model, prompts, seed), clips_score),
        "pictures": ("qwen_dit", lambda model: _pictures(painter, model, writer, seed), cards_score),
        "edits": ("qwen_edit_dit", lambda model: _pictures(painter, model, editor, seed), edits_score),
    }
    with tempfile.TemporaryDirectory() as folder:
        for task, (file, make, rate) in tasks.items():
            for name, dtype in IN_8_BITS.items():
                path = write_in_8_bits(
                    DEMO_FOLDER / f"{file}.safetensors", Path(folder) / f"{file}_{name}.safetensors", dtype
                )
                exact, rounded = (
                    make(replace(load_model(path), fast=FastPaths(products=products))) for products in ("exact", "8bit")
                )
                away = sum(psnr(*pair) for pair in zip(rounded, exact, strict=True)) / count
                sys.stdout.write(
                    f"{task:<9} weights in {name:<5} products exact: {rate(exact):6.1%} right, in 8 bits: "
                    f"{rate(rounded):6.1%}; PSNR between them {away:.1f} dB ({count} of seed {seed})\n"
                )
                sys.stdout.flush()


def _clips(pipeline: clips.Pipeline, model: ModelHandle, prompts: list[tuple], seed: int) -> list[Tensor]:
    pipeline.model = model
    return [pipeline.clip(scene, caption, seed + i).frames for i, (scene, caption) in enumerate(prompts)]


def _pictures(pipeline: cards.Pipeline, model: ModelHandle, wishes: list[cards.Wish], seed: int) -> list[Tensor]:
    pipeline.writer = pipeline.editor = model
    return [pipeline.picture(wish, seed + i).pixels for i, wish in enumerate(wishes)]


def psnr(found: Tensor, wanted: Tensor, span: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio in dB of numbers that span so much."""
    return float(10 * torch.log10(span**2 / (found - wanted).square().mean().clamp_min(1e-12)))


def _print_speeds(device: torch.device, rows: int, rounds: int) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(f"{where}, {rows} rows, weight {SHAPE[0]} x {SHAPE[1]}, torch {torch.__version__}\n")
    x = torch.randn(1, rows, SHAPE[1], device=device, dtype=torch.bfloat16)
    for product in (INT8, FLOAT8_ROWS, FLOAT8):
        found = try_product(product, (SHAPE,), device)
        if found.refusal is not None:
            sys.stdout.write(f"{product.name}: {found.refusal}\n")
            continue
        layer = Linear(*reversed(SHAPE), bias=False).to(device)
        weight, layer.weight_scale = quantise_rows(torch.randn(SHAPE, device=device), product.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        with torch.inference_mode():
            ways = {"ours": lambda layer=layer, product=product: layer.at(x.dtype, rows, (product,))(x),
                    "16 bits": lambda layer=layer: layer.at(x.dtype, rows)(x)}  # fmt: skip
            figures = compare(ways, rounds, device)
        sys.stdout.write(table(f"{product.name}, rounding costs {found.error:.1%}", figures) + "\n")


if __name__ == "__main__":
    main()
