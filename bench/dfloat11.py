"""How fast is a block compressed as DFloat11 and decoded again, in how much memory, and how small does it get?

    python -m wanqwen.bench.dfloat11 [--block qwen-image wan-14b wan-1.3b] [--threads 2] [--rounds 3] [--device cuda]

The weights of one block of the published shapes, random numbers whose rows are as loud as one another by a factor of
four. Memory is what encoding took at its fullest beyond the weights. The bound is the entropy of the exponents, with
what the format adds to the code at the least. On CUDA the kernel decodes, by the clock; elsewhere plain PyTorch, by the
processors' seconds of work.
"""

import argparse
import sys
import time

import torch
from torch import Tensor

from .. import kernels
from ..core.dfloat11 import GAP_BITS, PLANES, WINDOW_BITS
from ..core.ops.dfloat11 import Decode, decode
from ..core.ops.dfloat11_encoder import encode
from ..core.ops.linear import Linear
from ..qwen_image.config import QwenImageConfig
from .memory import watched
from .models import META, QWEN_IMAGE, WAN, WAN_1_3B, WAN_14B

MODELS = {"qwen-image": (QWEN_IMAGE, QwenImageConfig()), "wan-14b": (WAN, WAN_14B), "wan-1.3b": (WAN, WAN_1_3B)}


def main() -> None:
    """Print a line for each block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", nargs="+", choices=MODELS, default=["qwen-image"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=1, help="of decoding, the least of which counts")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    sys.stdout.write("| block | weights | encoding, clock | work | memory / block | size | bound | decoding |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for name in options.block:
        weights = block_of(name)
        whole = sum(weight.nbytes for weight in weights)
        planes, seconds, work, peak = watched(lambda weights=weights: encode(weights, options.threads))
        size = sum(plane.nbytes for plane in planes.values())
        clock = decoding(planes, weights, device, options.rounds)
        sys.stdout.write(
            f"| {name} | {whole / 2e6:.0f} M | {seconds:.1f} s | {work:.1f} s | {peak / whole:.2f} | "
            f"{size / whole:.2%} | {bound(weights):.2%} | {whole / clock / 1e9:.3f} GB/s |\n"
        )
        sys.stdout.flush()


def block_of(name: str) -> list[Tensor]:
    """Return the matrices of the first block of a model."""
    family, config = MODELS[name]
    with META:
        block = family.blocks(family.build(family.shallow(config, 1)))[0]
    shapes = [part.weight.shape for part in block.modules() if isinstance(part, Linear)]
    generator, found = torch.Generator().manual_seed(0), []
    for shape in shapes:
        weight = torch.empty(shape, dtype=torch.bfloat16)
        for rows in weight.split(512):
            loud = torch.rand(len(rows), 1, generator=generator).mul(2).exp2()
            rows.copy_(torch.randn(rows.shape, generator=generator) * loud * 0.02)
        found.append(weight)
    return found


def decoding(planes: dict[str, Tensor], weights: list[Tensor], device: torch.device, rounds: int) -> float:
    """Return the least seconds of decoding, see above. Raises RuntimeError if other weights come out."""
    parts = [planes[name].to(device) for name in PLANES]
    out = torch.empty(sum(weight.numel() for weight in weights), dtype=torch.bfloat16, device=device)
    run: Decode = decode
    if device.type == "cuda":
        kernel, reason = kernels.find("dfloat11_decode", *parts, out)
        if kernel is None:
            raise RuntimeError(reason)
        run = kernel
    seconds, now = [], time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(rounds + (device.type == "cuda")):
        started = now()
        run(*parts, out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(now() - started)
    for found, weight in zip(out.cpu().split([weight.numel() for weight in weights]), weights, strict=True):
        if not torch.equal(found.view(torch.int16), weight.flatten().view(torch.int16)):
            raise RuntimeError("decoding gives other weights")
    return min(seconds)


def bound(weights: list[Tensor]) -> float:
    """Return the least share of their bytes that weights could take in this format."""
    counts = sum(torch.bincount((part.view(torch.int16).int() >> 7) & 0xFF, minlength=256).double()
                 for weight in weights for part in weight.flatten().split(1 << 24))  # fmt: skip
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    return (8 + entropy * (1 + GAP_BITS / WINDOW_BITS)) / 16


if __name__ == "__main__":
    main()
