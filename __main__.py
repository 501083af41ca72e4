"""python -m wanqwen: the pack from a terminal."""

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import conversion
from .core.sampling.solvers import SOLVERS
from .core.types import Conditioning, ModelHandle, SampleRequest
from .downloads import command
from .families import FAMILIES
from .qwen_image import family as qwen_image
from .qwen_image.config import NEGATIVE_PROMPT as QWEN_NEGATIVE
from .qwen_image.config import VARIANTS
from .qwen_image.editing import ALIGNED, CUSTOM, PUBLISHED, SIZES, Edit, lay_out
from .run_options import add_fast_options, add_memory_options, fast_paths, memory_options
from .wan import family as wan
from .wan.config import NEGATIVE_PROMPT as WAN_NEGATIVE
from .wan.family import fit_clip
from .wan.pictures import AREAS, COVER, FITS, fitted_video, known_ends, seen_ends, size_for

if TYPE_CHECKING:
    import torch

    from .core.codec import VideoCodec
    from .wan.image_encoder import ImageEncoder

VIDEO_DENOISE = 0.6  # keeps layout and motion, and changes what is shown
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
    inspect = commands.add_parser("inspect", help="say what a checkpoint or a LoRA is, reading its header only")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    _plan_arguments(commands.add_parser("plan", help="what a run takes of a card, from the model's header alone"))
    command.add_arguments(commands.add_parser("download", help="fetch published files into ComfyUI's models folder"))
    conversion.add_arguments(commands.add_parser("convert", help="a model in other names, or in another format"))
    doctor = commands.add_parser("doctor", help="which kernels work on this machine, and how well")
    doctor.set_defaults(run=_doctor)
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
    add("--image", type=Path, action="append", default=[], help="to edit, once for each; or Wan's first frame")
    add("--last-image", type=Path, help="Wan's last frame")
    add("--image-encoder", type=Path, help="needed for these two unless the model is a miniature")
    add("--video", type=Path, help="a video, or a picture, that Wan changes")
    add("--denoise", type=float, help=f"how much of --video is made anew (default {VIDEO_DENOISE})")
    add("--fit", choices=list(FITS), default=COVER, help="cut Wan's pictures of another shape, or stretch them")
    add("--area", choices=list(AREAS), default=next(iter(AREAS)), help="pixels of a video from --image without --size")
    add("--edit-size", choices=SIZES, help="of an edit's result (default: published; custom with --size)")
    add("--out", type=Path, required=True, help="mp4, or png for a single frame")
    add(
        "--size",
        help="WIDTHxHEIGHTxFRAMES, for a picture WIDTHxHEIGHT, which with Wan's --image and --video is a clip of the "
        "usual length (default: the published one)",
    )
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
    add_fast_options(parser)
    add_memory_options(parser)
    parser.set_defaults(run=_generate)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from .plans import DEFAULT_CARD

    add = parser.add_argument
    add("--model", type=Path, required=True, help="diffusion model")
    add("--variant", choices=list(VARIANTS), help="which Qwen-Image model the file holds, if it does not tell")
    add("--size", help="WIDTHxHEIGHTxFRAMES, for pictures WIDTHxHEIGHT (default: the published one)")
    add("--vram", type=float, default=24.0, help="GB of the card (default 24)")
    add("--ram", type=float, default=32.0, help="GB of RAM (default 32)")
    add("--card", default=DEFAULT_CARD, help=f"whose speed to take (default {DEFAULT_CARD})")
    add("--precision", choices=PRECISIONS, default="auto", help="of the diffusion model (auto: bf16)")
    add("--vae-precision", choices=PRECISIONS, default="fp32")
    add("--text-tokens", type=int, default=512, help="length of the prompts (default 512)")
    add("--references", type=int, default=0, help="pictures of 1024 x 1024 that an edit is about")
    add("--no-guidance", action="store_true", help="no negative prompt, as with distilled models")
    add("--json", action="store_true", help="print JSON")
    add_memory_options(parser)
    parser.set_defaults(run=_plan)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _demo(options: argparse.Namespace) -> int:
    from .demo import show

    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    for report in show.run(options.count, seed, options.out, blind=options.blind):
        sys.stdout.write(report)
        sys.stdout.flush()
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a run takes when nothing else was asked for."""

    size: str
    negative: str
    steps: int
    guidance: float
    solver: str
    edit_size: str = PUBLISHED
    text_encoder: Path | None = None
    vae: Path | None = None
    image_encoder: Path | None = None


DEFAULTS = {
    wan.NAME: Defaults(size="832x480x81", negative=WAN_NEGATIVE, steps=30, guidance=5.0, solver="unipc"),
    qwen_image.NAME: Defaults(size="1328x1328x1", negative=QWEN_NEGATIVE, steps=50, guidance=4.0, solver="euler"),
}
# What the miniatures were trained for; their other files lie beside them.
MINIATURES = {
    wan.NAME: {"size": "64x64x9", "negative": ""},
    qwen_image.NAME: {"size": "112x112x1", "guidance": 3.0, "edit_size": ALIGNED},
}


def _defaults(model: ModelHandle) -> Defaults:
    from .loading import DEMO_FOLDER

    name, folder = model.family.name, model.checkpoint.path.resolve().parent
    defaults = DEFAULTS[name]
    if name == wan.NAME:
        defaults = replace(defaults, negative=model.identity.config.negative_prompt)
    if folder != DEMO_FOLDER.resolve():
        return defaults
    prefix = model.checkpoint.path.name.split("_")[0]
    files = {role: folder / f"{prefix}_{role}.safetensors" for role in ("text_encoder", "vae", "image_encoder")}
    return replace(defaults, **MINIATURES[name], **files)


def _generate(options: argparse.Namespace) -> int:
    import torch

    from . import media
    from .core import host, runtime
    from .loading import load_model, load_text_encoder, load_vae

    model = load_model(options.model, _dtype(options.precision), variant=options.variant)
    model = replace(model, memory=memory_options(options), fast=fast_paths(options))
    model = _with_loras(model, options.lora)
    defaults = _defaults(model)
    given = _given(options, model, defaults)
    width, height, frames = given.size if given else _size(options.size or defaults.size, model)
    out = options.out.with_suffix(".png" if frames == 1 else ".mp4")
    media.check_writable(out)
    text_file, vae_file = _files(options, defaults)
    edit = _lay_out(options, model, defaults, (width, height)) if options.image and not given else None
    vae = load_vae(vae_file, _dtype(options.vae_precision) or torch.float32)
    text_encoder = load_text_encoder(
        text_file,
        family=model.family.name,
        device=options.text_device,
        max_vram_bytes=None if options.text_vram_gb is None else int(options.text_vram_gb * (1 << 30)),
        tokenizer=options.tokenizer,
    )
    texts = [options.prompt, defaults.negative if options.negative is None else options.negative]
    if edit is None:
        prompts = text_encoder.encode(texts)
    else:
        prompts = edit.encode(texts, text_encoder, vae)
        width, height = edit.width, edit.height
    text_encoder.release()
    latent = torch.zeros(model.family.latent_format.shape(1, frames, height, width))
    if given is not None:
        latent, prompts = _begin(given, latent, prompts, vae, options.fit)
    request = SampleRequest(
        latent=latent,
        positive=prompts[0],
        negative=prompts[1],
        seed=options.seed,
        steps=options.steps or defaults.steps,
        shift=options.shift,
        guidance=tuple(options.guidance or (defaults.guidance,)),
        solver=options.solver or defaults.solver,
        noise_device=options.noise_device,
        denoise=_denoise(options),
    )
    if options.preset is not None:
        request, said = runtime.with_preset(model, request, options.preset)
        sys.stderr.write(f"{said}\n")
    progress = host.LogProgress("sampling", _terminal_line)
    latent = runtime.generate(model, request, progress, lambda line: sys.stderr.write(f"{line}\n"))
    sys.stderr.write("\n")
    pixels = vae.decode(latent)[0]
    if edit is not None and edit.finish is not None:
        pixels = edit.finish.apply(pixels)
    if frames == 1:
        media.write_png(out, pixels[0])
    else:
        media.write_mp4(out, pixels, options.fps)
    sys.stdout.write(f"{out.resolve()}\n")
    return 0


def _with_loras(model: ModelHandle, loras: list[tuple[Path, float]]) -> ModelHandle:
    """Return the model with LoRAs, and tell what is used of each."""
    from .loading import with_lora

    for file, strength in loras:
        model, lines = with_lora(model, file, strength)
        sys.stderr.writelines(f"{line}\n" for line in lines)
    return model


def _files(options: argparse.Namespace, defaults: Defaults) -> tuple[Path, Path]:
    """Return the text encoder's file and the VAE's."""
    files = {role: getattr(options, role) or getattr(defaults, role) for role in ("text_encoder", "vae")}
    missing = [f"--{role.replace('_', '-')} is missing" for role, path in files.items() if path is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: {options.model.name} needs the published one")
    return files["text_encoder"], files["vae"]


def _lay_out(options: argparse.Namespace, model: ModelHandle, defaults: Defaults, size: tuple[int, int]) -> Edit:
    """Return the layout of an edit of the given pictures, and tell what was changed about them."""
    from . import media

    qwen_image.check_is_qwen_image(model.identity)
    if options.size and options.edit_size not in (None, CUSTOM):
        raise ValueError(f"--size and --edit-size {options.edit_size} exclude each other: leave one of them out")
    if options.edit_size == CUSTOM and not options.size:
        raise ValueError("--edit-size custom needs a size: give --size WIDTHxHEIGHT too")
    chosen = CUSTOM if options.size else options.edit_size or defaults.edit_size
    pictures = [media.read_image(path) for path in options.image]
    edit = lay_out(pictures, VARIANTS[model.identity.variant], chosen, size)
    for notice in edit.notices:
        sys.stderr.write(f"{notice}\n")
    return edit


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Given:
    """Pictures [F, H, W, C] that a clip of Wan of (width, height, frames) begins and ends with, or is made of.

    `image_encoder` sees the first two, None where the model does not need it.
    """

    size: tuple[int, int, int]
    first: "torch.Tensor | None" = None
    last: "torch.Tensor | None" = None
    video: "torch.Tensor | None" = None
    image_encoder: "ImageEncoder | None" = None


def _given(options: argparse.Namespace, model: ModelHandle, defaults: Defaults) -> Given | None:
    """Read the pictures of a run of Wan; None if it has none. Raises ValueError for what the model does not take."""
    from . import media
    from .loading import load_image_encoder

    if options.denoise is not None and options.video is None:
        raise ValueError("--denoise says how much of a video to make anew: give --video too")
    if model.family.name != wan.NAME:
        if options.last_image or options.video:
            raise ValueError(f"--last-image and --video are for Wan, and {options.model.name} is {model.family.name}")
        return None
    _check_pictures(options, model)
    if options.video:
        asked = _size(options.size, model) if options.size else (0, 0, 0)
        if _lacks_frames(options.size):
            asked = (*asked[:2], 0)  # all of its frames
        pixels, notices = fitted_video(media.read_video(options.video, asked[2] or None), asked, options.fit)
        for notice in notices:
            sys.stderr.write(f"{notice}\n")
        return Given(size=(pixels.shape[2], pixels.shape[1], len(pixels)), video=pixels)
    if not options.image and options.last_image is None:
        return None
    encoder = None
    if model.identity.config.image_dim:
        file = options.image_encoder or defaults.image_encoder
        if file is None:
            raise ValueError(f"--image-encoder is missing: {options.model.name} needs CLIP ViT-H (clip_vision_h)")
        encoder = load_image_encoder(file)
    first, last = (
        None if path is None else media.read_image(path)[None]
        for path in (next(iter(options.image), None), options.last_image)
    )
    width, height, frames = _size(options.size or defaults.size, model)
    if _lacks_frames(options.size):
        frames = _size(defaults.size, model)[2]
    if options.size is None and defaults.vae is None:  # a miniature has a size of its own
        shown = last if first is None else first
        width, height = size_for(*shown.shape[1:3], AREAS[options.area])
    return Given(size=(width, height, frames), first=first, last=last, image_encoder=encoder)


def _check_pictures(options: argparse.Namespace, model: ModelHandle) -> None:
    has_ends, name = bool(options.image or options.last_image), options.model.name
    if model.identity.config.vace_dim:
        raise ValueError(
            f"{name} is Wan 2.1 {model.identity.variant}, whose controls this command does not make: use the node Wan "
            "VACE in ComfyUI, or a T2V file"
        )
    if has_ends and options.video:
        raise ValueError("--video and --image exclude each other: a video is changed, or begins with a picture")
    if len(options.image) > 1:
        raise ValueError(f"--image is given {len(options.image)} times, and a video begins with one picture")
    if has_ends and not model.identity.config.extra_dim:
        raise ValueError(
            f"{name} is Wan 2.1 {model.identity.variant}, which takes no --image: choose an I2V file such as "
            "wan2.1_i2v_480p_14B, or change a picture with --video"
        )
    if model.identity.config.extra_dim and not has_ends:
        raise ValueError(f"{name} is Wan 2.1 {model.identity.variant}, which starts from a picture: give --image")


def _begin(
    given: Given, latent: "torch.Tensor", prompts: list[Conditioning], vae: "VideoCodec", fit: str
) -> "tuple[torch.Tensor, list[Conditioning]]":
    """Return what a run starts from: latents, and prompts with what belongs to its pictures."""
    if given.video is not None:
        return vae.encode(given.video), prompts
    known, notices = known_ends(vae, given.first, given.last, given.size, fit)
    for notice in notices:
        sys.stderr.write(f"{notice}\n")
    rows = None
    if given.image_encoder is not None:
        rows = seen_ends(given.image_encoder.encode, given.first, given.last)
    return latent, [replace(prompt, image=rows, extra=known.channels) for prompt in prompts]


def _denoise(options: argparse.Namespace) -> float:
    if options.video is None:
        return 1.0
    return VIDEO_DENOISE if options.denoise is None else options.denoise


def _dtype(name: str) -> "torch.dtype | None":
    import torch

    return {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _size(text: str, model: ModelHandle) -> tuple[int, int, int]:
    """Return width, height and frames of WIDTHxHEIGHT[xFRAMES]. Raises ValueError for sizes that models can't make."""
    try:
        width, height, frames = (*(int(part) for part in text.lower().split("x")), 1)[:3]
    except ValueError as error:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHTxFRAMES, such as 832x480x81, or WIDTHxHEIGHT") from error
    makes_pictures = model.family.name == qwen_image.NAME
    fitting = fit_clip(width, height, 1 if makes_pictures else frames)
    if fitting != (width, height, frames):
        rule = "Qwen-Image makes one picture" if makes_pictures else "frames must be 4n + 1"
        found = "x".join(map(str, fitting))
        raise ValueError(f"--size {text}: width and height must be multiples of 16, and {rule}; try {found}")
    return fitting


def _lacks_frames(size: str | None) -> bool:
    return size is not None and size.lower().count("x") == 1


def _terminal_line(text: str) -> None:
    sys.stderr.write(f"\r{text:<60}")
    sys.stderr.flush()


def _plan(options: argparse.Namespace) -> int:
    import torch

    from .loading import load_model
    from .plans import Question, facts, render

    model = load_model(options.model, _dtype(options.precision), variant=options.variant)
    width, height, frames = _size(options.size or _defaults(model).size, model)
    question = Question(
        width=width,
        height=height,
        frames=frames,
        text_tokens=options.text_tokens,
        references=options.references,
        guided=not options.no_guidance,
        vae_dtype=_dtype(options.vae_precision) or torch.float32,
        vram=options.vram,
        ram=options.ram,
        card=options.card,
    )
    model = _with_loras(replace(model, memory=memory_options(options)), options.lora)
    found = facts(model, question)
    sys.stdout.write((json.dumps(found, indent=2, ensure_ascii=False) if options.json else render(found)) + "\n")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    for line in examine():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .core.weights.lora import is_lora
    from .core.weights.reader import open_checkpoint
    from .families import identify
    from .inspection import describe, describe_lora, render

    checkpoint = open_checkpoint(options.file)
    facts = describe_lora(checkpoint) if is_lora(checkpoint) else describe(checkpoint, identify(checkpoint))
    sys.stdout.write((json.dumps(facts, indent=2, ensure_ascii=False) if options.json else render(facts)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
