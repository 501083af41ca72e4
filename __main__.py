"""python -m wanqwen: the pack from a terminal."""

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .core.sampling.solvers import SOLVERS
from .core.types import Conditioning, ModelHandle, SampleRequest
from .families import FAMILIES
from .qwen_image import family as qwen_image
from .qwen_image.conditioning import with_references
from .qwen_image.config import NEGATIVE_PROMPT as QWEN_NEGATIVE
from .qwen_image.config import VARIANTS
from .qwen_image.editing import ALIGNED, CUSTOM, PUBLISHED, SIZES, Edit, lay_out
from .wan import family as wan
from .wan.config import NEGATIVE_PROMPT as WAN_NEGATIVE
from .wan.family import fit_clip

if TYPE_CHECKING:
    import torch

    from .core.codec import VideoCodec
    from .qwen_image.text_encoder import TextEncoder as QwenTextEncoder

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a request that can't be met, with one clear line."""
    parser = argparse.ArgumentParser(prog="wanqwen", description="Wan 2.1 and Qwen-Image, from a terminal")
    parser.add_argument("--verbose", action="store_true", help="show what is being done")
    commands = parser.add_subparsers(dest="command", required=True)
    _demo_arguments(
        commands.add_parser("demo", help="generate and score clips, pictures and edits with the bundled miniatures")
    )
    _generate_arguments(
        commands.add_parser("generate", help="a prompt to a video or a picture, or an edit of pictures")
    )
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
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the video and the contact sheets")
    parser.add_argument("--blind", action="store_true", help="zero the text: the score must fall to chance")
    parser.set_defaults(run=_demo)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from .loading import DEMO_FOLDER

    add = parser.add_argument
    add("--model", type=Path, default=DEMO_FOLDER / "wan_dit.safetensors", help="diffusion model")
    add("--variant", choices=list(VARIANTS), help="which Qwen-Image model the file holds, if it does not tell")
    add("--text-encoder", type=Path, help="needed unless the model is a miniature")
    add("--tokenizer", help="folder, file or `hub`, for a text encoder without its own")
    add("--text-device", choices=("auto", "cpu", "gpu"), default="auto", help="where to read the prompt")
    add("--text-vram-gb", type=float, help="the most VRAM that reading the prompt may take")
    add("--vae", type=Path, help="needed unless the model is a miniature")
    add("--prompt", required=True)
    add("--negative", help="what to steer away from (default: the published one, nothing for Wan's miniature)")
    add("--image", type=Path, action="append", default=[], help="a picture to edit; once more for each other")
    add("--edit-size", choices=SIZES, help="of an edit's result (default: published; custom with --size)")
    add("--out", type=Path, required=True, help="mp4, or png for a single frame")
    add("--size", help="WIDTHxHEIGHTxFRAMES, for pictures WIDTHxHEIGHT (default: the published one)")
    add("--steps", type=int, help="default: 30 for Wan, 50 for Qwen-Image")
    add("--guidance", type=float, nargs="+", help="one value, or one per step (default: 5 for Wan, 4 for Qwen-Image)")
    add("--shift", type=float, help="default: the published schedule")
    add("--solver", choices=sorted(SOLVERS), help="default: unipc for Wan, euler for Qwen-Image")
    add("--preset", choices=[name for family in FAMILIES for name in family.presets], help="instead of the four above")
    add("--seed", type=int, default=0)
    add("--fps", type=float, default=16.0)
    add("--precision", choices=PRECISIONS, default="auto", help="of the diffusion model")
    add("--vae-precision", choices=PRECISIONS, default="fp32")
    add("--noise-device", choices=("cpu", "gpu"), default="cpu", help="gpu: noise as the official code")
    parser.set_defaults(run=_generate)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _demo(options: argparse.Namespace) -> int:
    from .demo import show

    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    sys.stdout.write(show.run(options.count, seed, options.out, blind=options.blind))
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a family's models were published with, and what its miniature was trained for."""

    prefix: str  # of the miniature's files
    size: str
    demo_size: str
    negative: str
    demo_negative: str
    steps: int
    guidance: float
    solver: str


PUBLISHED_SETTINGS = {
    wan.NAME: Published(
        prefix="wan", size="832x480x81", demo_size="64x64x9", negative=WAN_NEGATIVE, demo_negative="",
        steps=30, guidance=5.0, solver="unipc",
    ),
    qwen_image.NAME: Published(
        prefix="qwen", size="1328x1328x1", demo_size="112x112x1", negative=QWEN_NEGATIVE, demo_negative=QWEN_NEGATIVE,
        steps=50, guidance=4.0, solver="euler",
    ),
}  # fmt: skip


def _generate(options: argparse.Namespace) -> int:
    import torch

    from . import media
    from .core import host, runtime
    from .loading import DEMO_FOLDER, load_model, load_text_encoder, load_vae

    model = load_model(options.model, _dtype(options.precision), variant=options.variant)
    published = PUBLISHED_SETTINGS[model.family.name]
    is_demo = options.model.resolve().parent == DEMO_FOLDER.resolve()
    width, height, frames = _size(options.size or (published.demo_size if is_demo else published.size), model)
    files = {"text_encoder": options.text_encoder, "vae": options.vae}
    for name, given in files.items():
        if given is None and not is_demo:
            raise ValueError(f"--{name.replace('_', '-')} is missing: {options.model.name} needs the published one")
        files[name] = given or DEMO_FOLDER / f"{published.prefix}_{name}.safetensors"
    if options.edit_size is None:
        options.edit_size = CUSTOM if options.size else ALIGNED if is_demo else PUBLISHED
    elif options.size and options.image and options.edit_size != CUSTOM:
        raise ValueError(f"--size and --edit-size {options.edit_size} exclude each other: leave one of them out")
    out = options.out.with_suffix(".png" if frames == 1 else ".mp4")
    media.check_writable(out)
    vae = load_vae(files["vae"], _dtype(options.vae_precision) or torch.float32)
    encoder = load_text_encoder(
        files["text_encoder"],
        family=model.family.name,
        device=options.text_device,
        max_vram_bytes=None if options.text_vram_gb is None else int(options.text_vram_gb * (1 << 30)),
        tokenizer=options.tokenizer,
    )
    negative = published.demo_negative if is_demo else published.negative
    texts = [options.prompt, negative if options.negative is None else options.negative]
    finish = None
    if options.image:
        edit, prompts = _edit(options, model, encoder, vae, texts, (width, height))
        width, height, finish = edit.width, edit.height, edit.finish
    else:
        prompts = encoder.encode(texts)
    encoder.release()
    request = _request(options, model, prompts, model.family.latent_format.shape(1, frames, height, width))
    latent = runtime.generate(model, request, host.LogProgress("sampling", _terminal_line))
    sys.stderr.write("\n")
    pixels = vae.decode(latent)[0]
    if finish is not None:
        pixels = finish.apply(pixels)
    if frames == 1:
        media.write_png(out, pixels[0])
    else:
        media.write_mp4(out, pixels, options.fps)
    sys.stdout.write(f"{out.resolve()}\n")
    return 0


def _request(
    options: argparse.Namespace, model: ModelHandle, prompts: list[Conditioning], shape: tuple[int, ...]
) -> SampleRequest:
    import torch

    published, preset = PUBLISHED_SETTINGS[model.family.name], None
    if options.preset is not None:
        preset = model.family.presets.get(options.preset)
        if preset is None:
            raise ValueError(f"--preset {options.preset} is not for {model.family.name} models: leave it out")
    return SampleRequest(
        latent=torch.zeros(shape),
        positive=prompts[0],
        negative=prompts[1],
        seed=options.seed,
        steps=preset.steps if preset else options.steps or published.steps,
        shift=preset.shift if preset else options.shift,
        guidance=(preset.guidance,) if preset else tuple(options.guidance or (published.guidance,)),
        solver=preset.solver if preset else options.solver or published.solver,
        noise_device=options.noise_device,
    )


def _edit(
    options: argparse.Namespace,
    model: ModelHandle,
    encoder: "QwenTextEncoder",
    vae: "VideoCodec",
    texts: list[str],
    size: tuple[int, int],
) -> tuple[Edit, list[Conditioning]]:
    """Return the layout of an edit and both prompts with their pictures."""
    from . import media

    qwen_image.check_is_qwen_image(model.identity)
    variant = VARIANTS[model.identity.variant]
    edit = lay_out([media.read_image(path) for path in options.image], variant, options.edit_size, size)
    for notice in edit.notices:
        sys.stderr.write(f"{notice}\n")
    latents = [vae.encode(picture[None]) for picture in edit.references]
    prompts = encoder.encode_edit(texts, edit.seen, variant.template)
    return edit, [with_references(prompt, latents) for prompt in prompts]


def _dtype(name: str) -> "torch.dtype | None":
    import torch

    return {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _size(text: str, model: ModelHandle) -> tuple[int, int, int]:
    """Return width, height and frames of WIDTHxHEIGHT[xFRAMES]. Raises ValueError for sizes that models can't make."""
    try:
        width, height, frames = (*(int(part) for part in text.lower().split("x")), 1)[:3]
    except ValueError as error:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHTxFRAMES, such as 832x480x81, or WIDTHxHEIGHT") from error
    fitting = fit_clip(width, height, 1 if model.family.name == qwen_image.NAME else frames)
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
