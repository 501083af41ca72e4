"""python -m wanqwen: the pack from a terminal."""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

from .core.sampling.solvers import SOLVERS
from .wan.family import fit_clip

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a request that can't be met, with one clear line."""
    parser = argparse.ArgumentParser(prog="wanqwen", description="Wan 2.1 and Qwen-Image, from a terminal")
    parser.add_argument("--verbose", action="store_true", help="show what is being done")
    commands = parser.add_subparsers(dest="command", required=True)
    _demo_arguments(commands.add_parser("demo", help="generate and score clips with the bundled miniature"))
    _generate_arguments(commands.add_parser("generate", help="a prompt to a video"))
    inspect = commands.add_parser("inspect", help="say what a checkpoint is, reading its header only")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"wanqwen {options.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=_at_least_one, default=8, help="how many unseen prompts (default 8)")
    parser.add_argument("--seed", type=int, help="of prompts and noise; without it they are new every time")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the video and the contact sheet")
    parser.add_argument("--blind", action="store_true", help="zero the text: the score must fall to chance")
    parser.set_defaults(run=_demo)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from .loading import DEMO_FOLDER

    parser.add_argument("--model", type=Path, default=DEMO_FOLDER / "wan_dit.safetensors", help="diffusion model")
    parser.add_argument("--text-encoder", type=Path, default=DEMO_FOLDER / "wan_text_encoder.safetensors")
    parser.add_argument("--tokenizer", help="folder, spiece.model or `hub`, for a text encoder without its own")
    parser.add_argument(
        "--text-device", choices=("auto", "cpu", "gpu"), default="auto", help="where to read the prompt"
    )
    parser.add_argument("--text-vram-gb", type=float, help="the most VRAM that reading the prompt may take")
    parser.add_argument("--vae", type=Path, default=DEMO_FOLDER / "wan_vae.safetensors")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative", help="what to steer away from (default: Wan's own, nothing for the miniature)")
    parser.add_argument("--out", type=Path, required=True, help="mp4, or png for a single frame")
    parser.add_argument("--size", help="WIDTHxHEIGHTxFRAMES (default 832x480x81, for the miniature 64x64x9)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, nargs="+", default=[5.0], help="one value, or one per step")
    parser.add_argument("--shift", type=float)
    parser.add_argument("--solver", choices=sorted(SOLVERS), default="unipc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the diffusion model")
    parser.add_argument("--vae-precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--noise-device", choices=("cpu", "gpu"), default="cpu", help="gpu: noise as the official code")
    parser.set_defaults(run=_generate)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _demo(options: argparse.Namespace) -> int:
    from .demo import show

    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    clips = show.generate_clips(options.count, seed, options.blind)
    video, sheet = options.out / "demo.mp4", options.out / "demo.png"
    show.write_video(video, clips)
    show.write_sheet(sheet, clips)
    sys.stdout.write(f"{show.report(clips)}\nseed {seed}\nvideo: {video.resolve()}\ncontact sheet: {sheet.resolve()}\n")
    return 0


def _generate(options: argparse.Namespace) -> int:
    import torch

    from . import media
    from .core import host, runtime
    from .core.types import SampleRequest
    from .loading import DEMO_FOLDER, load_model, load_text_encoder, load_vae
    from .wan.config import NEGATIVE_PROMPT

    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    is_demo = options.model.parent == DEMO_FOLDER
    width, height, frames = _size(options.size or ("64x64x9" if is_demo else "832x480x81"))
    out = options.out.with_suffix(".png" if frames == 1 else ".mp4")
    media.check_writable(out)
    model = load_model(options.model, dtypes[options.precision])
    vae = load_vae(options.vae, dtypes[options.vae_precision] or torch.float32)
    encoder = load_text_encoder(
        options.text_encoder,
        device=options.text_device,
        max_vram_bytes=None if options.text_vram_gb is None else int(options.text_vram_gb * (1 << 30)),
        tokenizer=options.tokenizer,
    )
    negative_text = options.negative if options.negative is not None else ("" if is_demo else NEGATIVE_PROMPT)
    positive, negative = encoder.encode([options.prompt, negative_text])
    encoder.release()
    request = SampleRequest(
        latent=torch.zeros(model.family.latent_format.shape(1, frames, height, width)),
        positive=positive,
        negative=negative,
        seed=options.seed,
        steps=options.steps,
        shift=options.shift,
        guidance=tuple(options.guidance),
        solver=options.solver,
        noise_device=options.noise_device,
    )
    latent = runtime.generate(model, request, host.LogProgress("sampling", _terminal_line))
    sys.stderr.write("\n")
    pixels = vae.decode(latent)[0]
    if frames == 1:
        media.write_png(out, pixels[0])
    else:
        media.write_mp4(out, pixels, options.fps)
    sys.stdout.write(f"{out.resolve()}\n")
    return 0


def _size(text: str) -> tuple[int, int, int]:
    """Return width, height and frames of WIDTHxHEIGHTxFRAMES. Raises ValueError for sizes that Wan can't make."""
    try:
        width, height, frames = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHTxFRAMES, such as 832x480x81") from error
    fitting = fit_clip(width, height, frames)
    if fitting != (width, height, frames):
        found = "x".join(map(str, fitting))
        raise ValueError(f"--size {text}: width and height must be multiples of 16 and frames 4n + 1; try {found}")
    return fitting


def _terminal_line(text: str) -> None:
    sys.stderr.write(f"\r{text:<60}")
    sys.stderr.flush()


def _inspect(options: argparse.Namespace) -> int:
    from .core.weights.reader import open_checkpoint
    from .families import identify
    from .inspection import describe, render

    checkpoint = open_checkpoint(options.file)
    facts = describe(checkpoint, identify(checkpoint))
    sys.stdout.write((json.dumps(facts, indent=2, ensure_ascii=False) if options.json else render(facts)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
