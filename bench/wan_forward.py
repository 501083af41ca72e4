"""How fast is one forward of our Wan transformer beside diffusers' at the same weights, dtype and size?

    python -m wanqwen.bench.wan_forward [--device cuda] [--dtype fp32 bf16] [--size 256x256x9] [--layers 4] [--dim 1536]

The prompt's keys and values are computed once per prompt in ours; "ours, first" pays for them, "ours" is every later
step. Peaks are beyond the weights.
"""

import argparse
import sys

import torch

from ..core.weights.keymap import Renamer
from ..wan.config import WanConfig
from ..wan.family import keep_float32
from ..wan.keymap import DIFFUSION_MODEL_SPELLINGS
from ..wan.transformer import WanTransformer
from .measure import HEAD_WIDTH, compare, run_on, table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Print one forward of both at each size and dtype, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--size", nargs="+", default=["128x128x9", "256x256x17"], help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    config = WanConfig(
        dim=options.dim, ffn_dim=options.ffn, num_heads=options.dim // HEAD_WIDTH, num_layers=options.layers
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(f"{where}, width {options.dim}, {options.layers} blocks, torch {torch.__version__}\n")
    for name in options.dtype:
        ours, theirs = twins(config, device, DTYPES[name])
        for size in options.size:
            width, height, frames = map(int, size.split("x"))
            _measure(
                ours, theirs, (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8), DTYPES[name], options.rounds
            )


@torch.inference_mode()
def _measure(ours: WanTransformer, theirs, shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> None:
    device = next(ours.parameters()).device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(device)
    text = torch.randn(1, 40, ours.config.text_dim, generator=generator).to(device)
    timestep, run = torch.tensor([700.0], device=device), run_on(device, dtype, ours.config.num_heads)
    padded = torch.nn.functional.pad(text, (0, 0, 0, ours.config.text_len - text.shape[1])).to(dtype)
    prompt = ours.prompt(text, run)

    def other() -> torch.Tensor:
        return theirs(x.to(dtype), timestep, padded, return_dict=False)[0]

    contestants = {
        "ours": lambda: ours(x, timestep, prompt, run),
        "ours, first": lambda: ours(x, timestep, ours.prompt(text, run), run),
        "diffusers": other,
    }
    expected = other().float()
    error = ((ours(x, timestep, prompt, run) - expected).abs().max() / expected.abs().max()).item()
    tokens = shape[2] * shape[3] * shape[4] // 4
    title = f"{str(dtype).removeprefix('torch.')}, {tokens} tokens (differs by {error:.1e})"
    sys.stdout.write(table(title, compare(contestants, rounds, device)) + "\n")


def twins(config: WanConfig, device: torch.device, dtype: torch.dtype):
    """Return our network and diffusers' with the same random weights, each stored as it is when run."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads, ffn_dim=config.ffn_dim,
        num_layers=config.num_layers, text_dim=config.text_dim, freq_dim=config.freq_dim,
    )  # fmt: skip
    rename = Renamer(next(s for s in DIFFUSION_MODEL_SPELLINGS if s.name == "diffusers").table)
    ours = WanTransformer(config)
    weights = theirs.state_dict()
    ours.load_state_dict({name: weights[rename(name)] for name, _ in ours.named_parameters()})
    for name, parameter in ours.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep_float32(name) else dtype)
    theirs = theirs.to(dtype) if dtype != torch.float32 else theirs
    return ours.to(device).eval().requires_grad_(False), theirs.to(device).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
