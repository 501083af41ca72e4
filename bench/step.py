"""How long does a step take, one forward without guidance, beside diffusers' model and ComfyUI's own?

    python -m wanqwen.bench.step [wan] [qwen] [--device cuda] [--dtype bf16] [--layers 40] [--comfyui FOLDER]

All have the same random weights; ours takes the fused kernels that work on the device, as a run does. Without --layers,
--dim and --size the models are small enough for a CPU. Each line tells the speed of the matrix products and the
attention that a step is made of, as a share of what one large product reaches here, or of --peak: the utilisation. On
a CPU seconds are those that it worked for the process: set OMP_NUM_THREADS=1.
"""
# S tokens, L text tokens

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from ..qwen_image.config import QwenImageConfig
from ..wan.config import WanConfig
from . import qwen_forward, wan_forward
from .measure import HEAD_WIDTH, compare, run_on, table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAN_TIMESTEP, QWEN_TIMESTEP = 700.0, 750.0
LARGE = {"cuda": 8192, "cpu": 1024}  # side of the product that tells what a device reaches

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One family's step: who takes it, how many multiplications and additions it is, and in words what it is."""

    title: str
    calls: dict[str, Call]
    operations: float


def main() -> None:
    """Print a table for each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=["wan", "qwen"], help="wan, qwen")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--dim", type=int, default=1536, help="of Wan; 14B has 5120")
    parser.add_argument("--ffn", type=int, default=8960, help="of Wan; 14B has 13824")
    parser.add_argument("--layers", type=int, default=2, help="Wan-14B has 40, Qwen-Image 60")
    parser.add_argument("--size", default="256x256x5", help="WIDTHxHEIGHTxFRAMES in pixels; pictures have one frame")
    parser.add_argument("--text", type=int, default=40, help="tokens of the prompt")
    parser.add_argument("--comfyui", help="a folder with ComfyUI")
    parser.add_argument("--peak", type=float, help="TFLOP/s that the device's maker promises for the dtype")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    reached = large_product(device, dtype, clock)
    sys.stdout.write(f"{where}, torch {torch.__version__}; one large product: {reached / 1e12:.3g} TFLOP/s\n")
    for family in options.families:
        with torch.inference_mode():
            step = {"wan": wan_step, "qwen": qwen_step}[family](options, device, dtype)
            figures = compare(step.calls, options.rounds, device, clock)
        sys.stdout.write(table(step.title, figures) + "\n")
        peak = options.peak * 1e12 if options.peak else reached
        shares = {name: step.operations / figure.median_seconds / peak for name, figure in figures.items()}
        sys.stdout.write("  utilisation: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + "\n")


def large_product(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Return the operations a second of one large matrix product."""
    side = LARGE.get(device.type, LARGE["cpu"])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / compare({"product": lambda: a @ b}, 5, device, clock)["product"].median_seconds


def wan_step(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Step:
    """Return a step of Wan, whose prompt's keys and values are there in ours, from the step before."""
    config = WanConfig(
        dim=options.dim, ffn_dim=options.ffn, num_heads=options.dim // HEAD_WIDTH, num_layers=options.layers
    )
    ours, theirs = wan_forward.twins(config, device, dtype)
    width, height, frames = map(int, options.size.split("x"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator).to(device)
    text = torch.randn(1, options.text, config.text_dim, generator=generator).to(device)
    padded = nn.functional.pad(text, (0, 0, 0, config.text_len - options.text)).to(dtype)
    timestep, run = torch.tensor([WAN_TIMESTEP], device=device), run_on(device, dtype, config.num_heads)
    prompt = ours.prompt(text, run)
    calls = {
        "ours": lambda: ours(x, timestep, prompt, run),
        "diffusers": lambda: theirs(x.to(dtype), timestep, padded, return_dict=False)[0],
    }
    if options.comfyui:
        names = "dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "freq_dim", "text_len"
        settings = {name: getattr(config, name) for name in names} | {"in_dim": config.in_dim, "out_dim": 16}
        comfy = _comfyui(options.comfyui, "wan.model.WanModel", ours, device, dtype, settings)
        calls["ComfyUI"] = lambda: comfy(x.to(dtype), timestep, padded)
    S, L, d, f = x[0, 0].numel() // 4, config.text_len, config.dim, config.ffn_dim
    block = 2 * S * (6 * d * d + 2 * d * f) + 4 * S * S * d + 4 * S * L * d
    return _checked(f"Wan, width {d}, {config.num_layers} blocks, {S} tokens", calls, config.num_layers * block)


def qwen_step(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Step:
    """Return a step of Qwen-Image, of whose passes ours makes the modulation once: here each time."""
    config = QwenImageConfig(num_layers=options.layers)
    ours, theirs = qwen_forward.twins(config, device, dtype)
    width, height, _ = map(int, options.size.split("x"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 1, height // 8, width // 8, generator=generator).to(device)
    text = torch.randn(1, options.text, config.text_dim, generator=generator).to(device)
    timestep, run = torch.tensor([QWEN_TIMESTEP]), run_on(device, dtype, config.num_heads)
    prompt, packed = ours.prompt(text, run), qwen_forward.packed(x).to(dtype)
    share, shapes = timestep.to(device) / 1000, [[(1, height // 16, width // 16)]]
    unpacked = (1, height // 16, width // 16, 16, 2, 2)

    def other() -> Tensor:
        out = theirs(packed, text.to(dtype), None, share, shapes, return_dict=False)[0]
        return out.view(unpacked).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    calls = {"ours": lambda: ours(x, timestep, prompt, run), "diffusers": other}
    if options.comfyui:
        name, settings = "qwen_image.model.QwenImageTransformer2DModel", {"num_layers": options.layers}
        module = _comfyui(options.comfyui, name, ours, device, dtype, settings)
        calls["ComfyUI"] = lambda: module(x.to(dtype), share, text.to(dtype))
    S, L, d = packed.shape[1], options.text, config.dim
    block = 24 * (S + L) * d * d + 4 * (S + L) ** 2 * d
    return _checked(f"Qwen-Image, {config.num_layers} blocks, {S} + {L} tokens", calls, config.num_layers * block)


def _checked(title: str, calls: dict[str, Call], operations: float) -> Step:
    """Say in the title how far the others' results are from ours."""
    wanted = calls["ours"]().float()
    away = {name: float((call().float() - wanted).norm() / wanted.norm()) for name, call in calls.items()}
    said = ", ".join(f"{name} differs by {error:.1e}" for name, error in away.items() if name != "ours")
    return Step(title=f"{title} ({said})", calls=calls, operations=operations)


def _comfyui(
    folder: str, name: str, ours: nn.Module, device: torch.device, dtype: torch.dtype, settings: Mapping[str, object]
) -> nn.Module:
    """Return ComfyUI's own model with our weights, each stored as ComfyUI does it: all in one dtype."""
    if folder not in sys.path:
        sys.path.append(folder)
    import_module("comfy.cli_args").args.cpu = device.type == "cpu"
    operations = import_module("comfy.ops").disable_weight_init
    module, _, name = name.rpartition(".")
    model = getattr(import_module(f"comfy.ldm.{module}"), name)
    made = model(device=device, dtype=dtype, operations=operations, **settings)
    made.load_state_dict({key: weight.to(dtype) for key, weight in ours.state_dict().items()})
    return made.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
