"""`python -m wanqwen generate`: a prompt to a video or a picture, or an edit of pictures."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import media
from ..core import host, runtime, types
from ..core.codec import VideoCodec
from ..core.sampling.solvers import SOLVERS
from ..core.types import Conditioning, FastPaths, ModelHandle, SampleRequest
from ..families import FAMILIES
from ..loading import DEMO_FOLDER, load_image_encoder, load_model, load_text_encoder, load_vae
from ..qwen_image.config import VARIANTS
from ..qwen_image.editing import CUSTOM, SIZES, Edit, lay_out
from ..qwen_image.family import check_is_qwen_image
from ..wan.files import NAME as WAN
from ..wan.image_encoder import ImageEncoder
from ..wan.pictures import AREAS, COVER, FITS, fitted_video, known_ends, seen_ends, size_for
from .options import (
    PRECISIONS,
    Defaults,
    add_run_arguments,
    defaults_of,
    dtype_of,
    lacks_frames,
    memory_options,
    size_of,
    with_loras,
)

VIDEO_DENOISE = 0.6  # keeps layout and motion, and changes what is shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of `python -m wanqwen generate`."""
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
    add(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="to edit, once more for each other; or Wan's first frame",
    )
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
    add("--kernels", choices=types.KERNEL_CHOICES, default=types.AUTO_KERNELS, help="exact: plain PyTorch, bit for bit")
    add("--products", choices=types.PRODUCT_CHOICES, default=types.AUTO_PRODUCTS, help="with weights in 8 bits")
    add("--attention", choices=types.ATTENTION_CHOICES, default=types.AUTO_ATTENTION, help="int8, sage: in 8 bits")
    add("--compile", choices=types.COMPILE_CHOICES, default=types.COMPILE_OFF, help="blocks: through torch.compile")
    add("--noise-device", choices=("cpu", "gpu"), default="cpu", help="gpu: noise as the official code")
    add_run_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generate as the command line says, and print the new file's path."""
    model = load_model(options.model, dtype_of(options.precision), variant=options.variant)
    fast = FastPaths(
        kernels=options.kernels, products=options.products, attention=options.attention, compile=options.compile
    )
    model = replace(model, memory=memory_options(options), fast=fast)
    model = with_loras(model, options.lora)
    defaults = defaults_of(model)
    given = _given(options, model, defaults)
    width, height, frames = given.size if given else size_of(options.size or defaults.size, model)
    out = options.out.with_suffix(".png" if frames == 1 else ".mp4")
    media.check_writable(out)
    text_file, vae_file = _files(options, defaults)
    edit = _lay_out(options, model, defaults, (width, height)) if options.image and not given else None
    vae = load_vae(vae_file, dtype_of(options.vae_precision) or torch.float32)
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


def _files(options: argparse.Namespace, defaults: Defaults) -> tuple[Path, Path]:
    """Return the text encoder's file and the VAE's."""
    files = {role: getattr(options, role) or getattr(defaults, role) for role in ("text_encoder", "vae")}
    missing = [f"--{role.replace('_', '-')} is missing" for role, path in files.items() if path is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: {options.model.name} needs the published one")
    return files["text_encoder"], files["vae"]


def _lay_out(options: argparse.Namespace, model: ModelHandle, defaults: Defaults, size: tuple[int, int]) -> Edit:
    """Return the layout of an edit of the given pictures, and tell what was changed about them."""
    check_is_qwen_image(model.identity)
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
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    video: torch.Tensor | None = None
    image_encoder: ImageEncoder | None = None


def _given(options: argparse.Namespace, model: ModelHandle, defaults: Defaults) -> Given | None:
    """Read the pictures of a run of Wan; None if it has none. Raises ValueError for what the model does not take."""
    if options.denoise is not None and options.video is None:
        raise ValueError("--denoise says how much of a video to make anew: give --video too")
    if model.family.name != WAN:
        if options.last_image or options.video:
            raise ValueError(f"--last-image and --video are for Wan, and {options.model.name} is {model.family.name}")
        return None
    _check_pictures(options, model)
    if options.video:
        asked = size_of(options.size, model) if options.size else (0, 0, 0)
        if lacks_frames(options.size):
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
    width, height, frames = size_of(options.size or defaults.size, model)
    if lacks_frames(options.size):
        frames = size_of(defaults.size, model)[2]
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
    given: Given, latent: torch.Tensor, prompts: list[Conditioning], vae: VideoCodec, fit: str
) -> tuple[torch.Tensor, list[Conditioning]]:
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


def _terminal_line(text: str) -> None:
    sys.stderr.write(f"\r{text:<60}")
    sys.stderr.flush()
