"""How fast is one forward of our Qwen-Image transformer beside diffusers' at the same weights, dtype and size?

    python -m wanqwen.bench.qwen_forward [--device cuda] [--dtype fp32 bf16] [--size 256x256] [--reference 256x256]

"ours" is the second forward of a step with guidance: it finds the modulation of the timestep ready. "ours, first"
makes it. A guided step is one of each, beside two of diffusers'. Peaks are beyond the weights.
"""

import argparse
import sys

import torch
from torch import Tensor, nn

from ..qwen_image.config import PATCH, QwenImageConfig
from ..qwen_image.family import keep_float32
from ..qwen_image.transformer import QwenImageTransformer
from .measure import compare, run_on, table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPATIAL_FACTOR = 8  # pixels per latent position
TEXT_ROWS = 40
TIMESTEP = 750.0  # diffusers divides by 1000 and rounds to the compute dtype; bfloat16 has 0.75
Size = tuple[int, int]  # latent rows and columns


def main() -> None:
    """Print one forward of both at each size and dtype, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--size", nargs="+", default=["256x256", "512x512"], help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--reference", nargs="*", default=[], help="WIDTHxHEIGHT of each picture to edit")
    parser.add_argument("--zero-cond-t", action="store_true", help="as Edit-2511")
    parser.add_argument("--layers", type=int, default=1, help="340 million weights each")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    config = QwenImageConfig(num_layers=options.layers, zero_cond_t=options.zero_cond_t)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(f"{where}, width {config.dim}, {options.layers} blocks, torch {torch.__version__}\n")
    for name in options.dtype:
        ours, theirs = twins(config, device, DTYPES[name])
        for size in options.size:
            sizes = [_latent_size(text) for text in (size, *options.reference)]
            _measure(ours, theirs, sizes, DTYPES[name], options.rounds)


def _latent_size(text: str) -> Size:
    width, height = (int(side) // SPATIAL_FACTOR for side in text.split("x"))
    return height, width


@torch.inference_mode()
def _measure(ours: QwenImageTransformer, theirs: nn.Module, sizes: list[Size], dtype: torch.dtype, rounds: int) -> None:
    device = next(ours.parameters()).device
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(1, 16, 1, *size, generator=generator).to(device) for size in sizes]
    text = torch.randn(1, TEXT_ROWS, ours.config.text_dim, generator=generator).to(device)
    timestep, run = (
        torch.tensor([TIMESTEP]),
        run_on(device, dtype, ours.config.num_heads),
    )  # on the CPU, as the sampler gives it
    tokens = torch.cat([packed(image) for image in images], dim=1)
    shapes = [[(1, height // PATCH, width // PATCH) for height, width in sizes]]
    num_target = shapes[0][0][1] * shapes[0][0][2]
    prompt, lent = ours.prompt(text, run), ours.modulations()

    def own(modulations) -> Tensor:
        return ours(images[0], timestep, prompt, run, images[1:], modulations)

    def other() -> Tensor:
        out = theirs(tokens.to(dtype), text.to(dtype), None, timestep.to(device) / 1000, shapes, return_dict=False)[0]
        return out[:, :num_target]

    expected = other().float()
    error = ((packed(own(lent)) - expected).abs().max() / expected.abs().max()).item()
    contestants = {"ours": lambda: own(lent), "ours, first": lambda: own(ours.modulations()), "diffusers": other}
    title = f"{str(dtype).removeprefix('torch.')}, {tokens.shape[1]} image tokens (differs by {error:.1e})"
    sys.stdout.write(table(title, compare(contestants, rounds, device)) + "\n")


def packed(image_BCTHW: Tensor) -> Tensor:
    """Lay an image out as diffusers' pipelines do: a token holds (channel, row, column) of 2 x 2 positions."""
    batch, channels, _, height, width = image_BCTHW.shape
    blocks = image_BCTHW.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def twins(config: QwenImageConfig, device: torch.device, dtype: torch.dtype) -> tuple[QwenImageTransformer, nn.Module]:
    """Return our network and diffusers' over the same random weights, each stored as it is when run."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel(num_layers=config.num_layers, zero_cond_t=config.zero_cond_t)
        ours = QwenImageTransformer(config)
    theirs.pos_embed = type(theirs.pos_embed)(theta=10000, axes_dim=list(config.axes), scale_rope=True)
    generator = torch.Generator().manual_seed(0)
    weights = {name: _random(like, generator, device, dtype) for name, like in ours.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)
    ours.load_state_dict({name: w.float() if keep_float32(name) else w for name, w in weights.items()}, assign=True)
    for network in (ours, theirs):
        network.eval().requires_grad_(False)
    return ours, theirs


def _random(like: Tensor, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return weights that keep a signal at its size, and ones for norms."""
    if like.dim() == 1:
        return torch.ones(like.shape, device=device, dtype=dtype)
    out = torch.randn(like.shape, generator=generator) / like.shape[1] ** 0.5
    return out.to(device, dtype)


if __name__ == "__main__":
    main()
