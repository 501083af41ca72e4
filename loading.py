"""Open a file as what it is meant to be: diffusion model, VAE, text or image encoder. Shared by nodes and commands."""

from dataclasses import replace
from pathlib import Path

import torch

from .core import host
from .core.codec import VideoCodec
from .core.text import Placement
from .core.types import Checkpoint, Identity, Lora, ModelHandle
from .core.weights.assemble import assemble, check_formats
from .core.weights.identity import own_metadata
from .core.weights.lora import Fit, LoraFile, fit, is_lora, read_names
from .core.weights.reader import open_checkpoint
from .core.weights.tensors import read_tensors
from .downloads.catalog import set_with
from .families import family as family_of
from .families import (
    family_of_lora,
    fits_of_lora,
    identify,
    presets_of_lora,
    width_of_lora,
    with_variant,
)
from .qwen_image.files import NAME as QWEN_IMAGE
from .qwen_image.text_encoder import TextEncoder as QwenVL
from .qwen_image.tokenizer import Tokenizer as QwenTokenizer
from .wan.family import LATENT_FORMAT
from .wan.files import NAME as WAN
from .wan.image_encoder import ImageEncoder
from .wan.text_encoder import TextEncoder as UMT5
from .wan.tokenizer import Tokenizer as WanTokenizer
from .wan.vae import WanVAE

DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoints"

ROLES = {
    "diffusion_model": "a diffusion model (Load Wan Model, Load Qwen-Image Model)",
    "vae": "a VAE (Load Wan / Qwen-Image VAE)",
    "text_encoder": "a text encoder (Load Wan Text Encoder, Load Qwen-Image Text Encoder)",
    "image_encoder": "an image encoder (Load Wan Image Encoder)",
}
HUB = "hub"
SHOWN = 5  # names in an error
LEAST_SHARE = 0.1  # of a LoRA's tensors that a model must take: a LoRA of another width fits in the odd bias too

TEXT_ENCODERS = {WAN: (UMT5, WanTokenizer), QWEN_IMAGE: (QwenVL, QwenTokenizer)}


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    variant: str | None = None,
) -> ModelHandle:
    """Open a diffusion model; its weights are read on the first run. Raises ValueError for any other file.

    `family`, if given, is the only one that will do. `variant` is a user's word for what the file does not tell:
    which of Qwen-Image's models it holds.
    """
    checkpoint, identity = _opened(path, "diffusion_model", family)
    check_formats(checkpoint, identity.names)
    known = family_of(identity.family)
    try:
        if variant is not None:
            identity = with_variant(identity, variant)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path.name}: {error}") from error
    if dtype is not None and dtype not in known.dtypes:
        names = ", ".join(str(one).removeprefix("torch.") for one in known.dtypes)
        raise ValueError(
            f"precision is {str(dtype).removeprefix('torch.')}, in which {known.name} models overflow: choose {names}."
        )
    # A model trained on another VAE than the published one, such as a miniature, brings the colours of its own latents.
    own = own_metadata(checkpoint)
    if "rgb" in own:
        rgb, bias = tuple(tuple(row) for row in own["rgb"]), tuple(own["rgb_bias"])
        known = replace(known, latent_format=replace(known.latent_format, rgb=rgb, rgb_bias=bias))
    return ModelHandle(checkpoint=checkpoint, identity=identity, family=known, dtype=dtype)


def with_lora(
    handle: ModelHandle, path: str | Path, strength: float = 1.0, start: float = 0.0, end: float = 1.0
) -> tuple[ModelHandle, list[str]]:
    """Return the model with one more LoRA, and what to tell: what is used of it, what not and why, which preset.

    Nothing but its header is read. It works in the steps from the share `start` of the schedule up to the share `end`.
    Raises ValueError for a file that is none, or that is made for another model.
    """
    checkpoint = _open(path)
    name, known = checkpoint.path.name, handle.family.files
    if not is_lora(checkpoint):
        raise ValueError(
            f"{name} is no LoRA: none of its {len(checkpoint.tensors)} tensors ({_some(tuple(checkpoint.tensors))}) is "
            "named as those of LoRAs are. Choose a LoRA, or load this file with the loader of its kind."
        )
    file = read_names(checkpoint, known.spellings)
    found = fit(file, known.parameters(handle.identity.config), known.parts)
    if found.num_used < LEAST_SHARE * len(checkpoint.tensors):
        raise ValueError(_is_for_another(handle, checkpoint, found))
    lora = Lora(checkpoint=checkpoint, parts=found.parts, strength=strength, start=start, end=end)
    return replace(handle, loras=(*handle.loras, lora)), _report(handle, file, found)


def _report(handle: ModelHandle, file: LoraFile, found: Fit) -> list[str]:
    total, ranks = len(file.checkpoint.tensors), " to ".join(map(str, sorted({*file.ranks[:1], *file.ranks[-1:]})))
    lines = [
        f"{file.checkpoint.path.name}: {found.num_used} of {total} tensors used, for {len(found.parts)} parameters; "
        f"{file.dialect}{f'; rank {ranks}' if ranks else ''}",
        *(f"{len(names)} not used ({_some(names[:1])}): {reason}" for reason, names in found.unused.items()),
    ]
    for name, preset in presets_of_lora(handle.family.files, file.checkpoint).items():
        lines.append(
            f"A distilled LoRA: choose preset {name} in the Sampler ({preset.steps} steps of {preset.solver}, shift "
            f"{preset.shift:g}, guidance {preset.guidance:g})."
        )
    return lines


def _is_for_another(handle: ModelHandle, checkpoint: Checkpoint, found: Fit) -> str:
    """Return in words that a LoRA is not for a model, and which one it is for."""
    of, file = family_of_lora(checkpoint)
    width = width_of_lora(file)
    fitting = ", ".join(fits_of_lora(of, file))
    seems = f"{of.name} {fitting}" if fitting else f"a model of the {of.name} family that is not known"
    reasons = "; ".join(f"{len(names)} x {reason}" for reason, names in list(found.unused.items())[:SHOWN])
    return (
        f"{checkpoint.path.name} does not fit this model, {handle.checkpoint.path.name} ({handle.family.name} "
        f"{handle.identity.variant}): {found.num_used} of its {len(checkpoint.tensors)} tensors match ({reasons}). It "
        f"seems to be made for {seems}{f', of width {width}' if width else ''}: choose a LoRA made for this model."
    )


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> VideoCodec:
    """Open a VAE; its weights are read on first use. Raises ValueError for any other file."""
    checkpoint, identity = _opened(path, "vae")

    def load() -> WanVAE:
        vae = assemble(
            lambda: WanVAE(identity.config),
            identity.names,
            checkpoint,
            float32=lambda name: False,
            dtype=dtype,
            ignored=identity.ignored,
        )
        return vae.channels_last()

    return VideoCodec(load, LATENT_FORMAT, dtype=dtype, device=device)


def load_text_encoder(
    path: str | Path,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    max_vram_bytes: int | None = None,
    tokenizer: Path | str | None = None,
) -> UMT5 | QwenVL:
    """Open a text encoder; its weights are read at the first new prompt. Raises ValueError for any other file.

    `family`, if given, is the only one that will do. `device` is cpu, gpu, or auto (the device the models run on).
    `tokenizer` is a folder, a file (`spiece.model` for Wan, `tokenizer.json` for Qwen-Image), or "hub" to download the
    published one; None takes the one that came with the file.
    """
    where = _device("text encoder", device)
    checkpoint, identity = _opened(path, "text_encoder", family)
    check_formats(checkpoint, identity.names)
    encoder, tokenizers = TEXT_ENCODERS[identity.family]
    if tokenizer is None:
        own = tokenizers.comfy_folder and host.comfy_folder(tokenizers.comfy_folder)
        pieces = tokenizers.find(checkpoint, read_tensors, [own] if own else [])
    elif tokenizer == HUB:
        pieces = tokenizers.from_hub()
    elif Path(tokenizer).is_dir():
        pieces = tokenizers.from_folder(Path(tokenizer))
    elif Path(tokenizer).is_file():
        pieces = tokenizers.from_file(Path(tokenizer))
    else:
        raise ValueError(f"There is no tokenizer at {tokenizer}: give a folder, a file, or {HUB}.")
    placement = Placement(device=where, max_vram_bytes=max_vram_bytes)
    return encoder(checkpoint, identity, pieces, dtype=dtype, placement=placement)


def load_image_encoder(path: str | Path, dtype: torch.dtype | None = None, device: str = "auto") -> ImageEncoder:
    """Open the CLIP of Wan; its weights are read at the first new picture. Raises ValueError for any other file.

    `device` is cpu, gpu, or auto (the device the models run on).
    """
    where = _device("image encoder", device)
    checkpoint, identity = _opened(path, "image_encoder")
    check_formats(checkpoint, identity.names)
    return ImageEncoder(checkpoint, identity, dtype=dtype, placement=Placement(device=where))


def _open(path: str | Path) -> Checkpoint:
    """Open a checkpoint; if a published one is missing, say how to get it."""
    path = Path(path)
    if not path.exists() and set_with(path.name):
        raise ValueError(
            f"{path} does not exist: check the path, or fetch the file with `python -m wanqwen download {path.name} "
            "--to DIR`"
        )
    return open_checkpoint(path)


def _device(what: str, name: str) -> torch.device:
    if name not in ("auto", "cpu", "gpu"):
        raise ValueError(f"{what} device is {name!r}: choose auto, cpu or gpu.")
    return torch.device("cpu") if name == "cpu" else host.device()


def open_any(path: str | Path) -> tuple[Checkpoint, Identity]:
    """Open a file of whatever role. Raises ValueError for one that no model is known for, or that is not whole."""
    checkpoint = open_checkpoint(path)
    if is_lora(checkpoint):
        raise ValueError(
            f"{checkpoint.path.name} is a LoRA, not a model. LoRAs are taken as they are, by the LoRA node and --lora."
        )
    identity = identify(checkpoint)
    _check_whole(checkpoint, identity)
    check_formats(checkpoint, identity.names)
    return checkpoint, identity


def _opened(path: str | Path, role: str, family: str | None = None) -> tuple[Checkpoint, Identity]:
    checkpoint = _open(path)
    identity = identify(checkpoint)
    if identity.role != role:
        raise ValueError(
            f"{checkpoint.path.name} is {ROLES[identity.role]}: {identity.family} {identity.variant}. "
            f"Expected {ROLES[role]}: choose another file, or load this one where it belongs."
        )
    if family not in (None, identity.family):
        raise ValueError(
            f"{checkpoint.path.name} belongs to {identity.family} ({identity.variant}), and this loader is for "
            f"{family}: choose another file, or use the loader of its own family."
        )
    _check_whole(checkpoint, identity)
    return checkpoint, identity


def _check_whole(checkpoint: Checkpoint, identity: Identity) -> None:
    problems = {"lacks": identity.missing, "holds, beside it,": identity.unexpected}
    listed = [f"{what} {len(names)} tensors ({_some(names)})" for what, names in problems.items() if names]
    if listed:
        raise ValueError(
            f"{checkpoint.path.name} looks like {identity.family} {identity.variant}, but {' and '.join(listed)}: it "
            "may be cut, a part of a set, or changed for other software. Download it again from where it was published."
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
