"""How fast is our Wan VAE, and how much memory does it take, beside diffusers' at the same weights?

    python -m wanqwen.bench.wan_vae [--device cuda] [--dtype bf16] [--size 128] [--frames 17] [--dim 96]
    python -m wanqwen.bench.wan_vae --against qwen --frames 1 --size 256        # a still, as Qwen-Image makes

`--peak-only --frames 17 81` prints our decode's peak besides its output, which must not grow with the frames.
"ours, exact" does every convolution as the published code writes it.
`--modes` prints what each mode of ours holds on a device at its fullest, counted on the meta device.
"""

import argparse
import sys
import time

import torch
from torch import Tensor

from ..core.codec import VideoCodec
from ..core.past import EXACT, MODES
from ..core.weights.keymap import Renamer
from ..wan.config import VAEConfig
from ..wan.family import LATENT_FORMAT
from ..wan.keymap import vae_spellings
from ..wan.vae import WanVAE, decode_bytes, encode_bytes
from .measure import compare, peak_bytes, table

CLASSES = {"wan": "AutoencoderKLWan", "qwen": "AutoencoderKLQwenImage"}
MODE_SIZES = ((480, 832, 81), (720, 1280, 81), (1328, 1328, 1))  # height, width, frames
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Print encode and decode of both, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--size", type=int, default=128, help="pixels, both sides")
    parser.add_argument("--frames", type=int, nargs="+", default=[17])
    parser.add_argument("--against", choices=CLASSES, default="wan", help="which of diffusers' classes")
    parser.add_argument("--dim", type=int, default=96, help="base width; 96 is the published one")
    parser.add_argument("--peak-only", action="store_true", help="our decode's peak memory, and nothing else")
    parser.add_argument("--modes", action="store_true", help="peaks of our modes at published sizes, and nothing else")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of CPU time, on one thread: for a busy machine"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    if options.modes:
        _print_modes(VAEConfig(dim=options.dim))
        return
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    ours, theirs = _twins(VAEConfig(dim=options.dim), CLASSES[options.against], device, dtype)
    ours.to(device)  # both contestants find their weights in place
    codec = VideoCodec(ours.channels_last, LATENT_FORMAT, dtype=dtype, device=device)
    codec.first_stage_model  # noqa: B018 - reads the weights, which are no part of the peaks
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(f"{where}, {options.dtype}, base width {options.dim}, torch {torch.__version__}\n")
    for frames in options.frames:
        if options.peak_only:
            latent = torch.randn(LATENT_FORMAT.shape(1, frames, options.size, options.size))
            peak = peak_bytes(lambda latent=latent: codec.decode(latent), device)
            peak -= 12 * frames * options.size**2 if device.type == "cpu" else 0  # the output, float32 RGB on the CPU
            sys.stdout.write(f"decode {frames} frames of {options.size} x {options.size}: peak {peak / 1e6:.1f} MB\n")
            continue
        pixels = torch.rand(frames, options.size, options.size, 3, generator=torch.Generator().manual_seed(0))
        latent = codec.encode(pixels)
        own, other = codec.decode(latent)[0], _decode(theirs, latent, device, dtype)
        error = ((own - other).abs().max() / other.abs().max()).item()
        what = f"{frames} frames of {options.size} x {options.size}"
        encode = {
            "ours": lambda pixels=pixels: codec.encode(pixels),
            "ours, exact": lambda pixels=pixels: codec.encode(pixels, mode=EXACT),
            "diffusers": lambda pixels=pixels: _encode(theirs, pixels, device, dtype),
        }
        decode = {
            "ours": lambda latent=latent: codec.decode(latent),
            "ours, exact": lambda latent=latent: codec.decode(latent, mode=EXACT),
            "diffusers": lambda latent=latent: _decode(theirs, latent, device, dtype),
        }
        sys.stdout.write(table(f"encode {what}", compare(encode, options.rounds, device, clock)) + "\n")
        sys.stdout.write(
            table(f"decode {what} (differs by {error:.1e})", compare(decode, options.rounds, device, clock)) + "\n"
        )


def _print_modes(config: VAEConfig) -> None:
    """Print a line for each size, dtype and mode: tensors alive at the fullest moment beside weights and output."""
    for height, width, frames in MODE_SIZES:
        for name in ("bf16", "fp32"):
            for mode in MODES:
                decode, encode = (
                    work(config, DTYPES[name], height, width, frames, mode) / 1e9
                    for work in (decode_bytes, encode_bytes)
                )
                what = f"{height} x {width} x {frames} {name} {mode.name}"
                sys.stdout.write(f"{what:<34}decode {decode:6.2f} GB   encode {encode:6.2f} GB\n")


def _twins(config: VAEConfig, name: str, device: torch.device, dtype: torch.dtype):
    """Return our network and diffusers' of that class with the same random weights."""
    import diffusers

    torch.manual_seed(0)
    ours = WanVAE(config)
    rename = Renamer(vae_spellings(config.num_res_blocks)[1].table)
    theirs = getattr(diffusers, name)(
        base_dim=config.dim, z_dim=config.z_dim, dim_mult=list(config.dim_mult), num_res_blocks=config.num_res_blocks
    )
    theirs.load_state_dict({rename(name): tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs.eval().requires_grad_(False).to(device, dtype)


@torch.inference_mode()
def _encode(vae, pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    video = (pixels.movedim(-1, 0)[None] * 2 - 1).to(device, dtype)
    return vae.encode(video).latent_dist.mode().float().cpu()


@torch.inference_mode()
def _decode(vae, latent: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    video = vae.decode(latent.to(device, dtype)).sample[0]
    return ((video.float().cpu() + 1) / 2).clamp(0, 1).movedim(0, -1)


if __name__ == "__main__":
    main()
