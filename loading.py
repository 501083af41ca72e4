"""Open a file as what it is meant to be: diffusion model, VAE or text encoder. Shared by nodes and commands."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from .core import host
from .core.codec import VideoCodec
from .core.types import Checkpoint, Identity, ModelHandle
from .core.weights.assemble import assemble
from .core.weights.reader import open_checkpoint, read_tensors
from .families import family, identify
from .wan.family import LATENT_FORMAT
from .wan.identify import METADATA_KEY
from .wan.text_encoder import Placement, TextEncoder
from .wan.tokenizer import Tokenizer
from .wan.vae import WanVAE

DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoints"

ROLES = {
    "diffusion_model": "a diffusion model (Load Wan Model)",
    "vae": "a VAE (Load Wan VAE)",
    "text_encoder": "a text encoder (Load Wan Text Encoder)",
    "image_encoder": "an image encoder",
}
HUB = "hub"
SHOWN = 5  # names in an error
RUNNABLE = ("t2v-1.3B", "t2v-14B", "custom")


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> ModelHandle:
    """Open a diffusion model; its weights are read on the first run. Raises ValueError for any other file."""
    checkpoint, identity = _opened(path, "diffusion_model")
    if identity.variant not in RUNNABLE or identity.config.in_dim != identity.config.out_dim:
        raise ValueError(
            f"{checkpoint.path.name} is Wan 2.1 {identity.variant}, which also takes an image or a control video; this "
            "version runs text to video only. Choose a T2V file (wan2.1_t2v_1.3B or wan2.1_t2v_14B)."
        )
    known = family(identity.family)
    # A model trained on another VAE than Wan's, such as the miniature, brings the colours of its own latent space.
    own = json.loads(checkpoint.metadata.get(METADATA_KEY, "{}"))
    if "rgb" in own:
        rgb, bias = tuple(tuple(row) for row in own["rgb"]), tuple(own["rgb_bias"])
        known = replace(known, latent_format=replace(known.latent_format, rgb=rgb, rgb_bias=bias))
    return ModelHandle(checkpoint=checkpoint, identity=identity, family=known, dtype=dtype)


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
    dtype: torch.dtype | None = None,
    device: str = "auto",
    max_vram_bytes: int | None = None,
    tokenizer: Path | str | None = None,
) -> TextEncoder:
    """Open a text encoder; its weights are read at the first new prompt. Raises ValueError for any other file.

    `device` is cpu, gpu, or auto (the device the models run on). `tokenizer` is a folder, a
    `spiece.model`, or "hub" to download the published one; None takes the one that came with the file.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"text encoder device is {device!r}: choose auto, cpu or gpu.")
    checkpoint, identity = _opened(path, "text_encoder")
    if tokenizer is None:
        pieces = Tokenizer.find(checkpoint, read_tensors)
    elif tokenizer == HUB:
        pieces = Tokenizer.from_hub()
    elif Path(tokenizer).is_dir():
        pieces = Tokenizer.from_folder(Path(tokenizer))
    else:
        pieces = Tokenizer.from_spiece(Path(tokenizer).read_bytes(), str(tokenizer))
    where = torch.device("cpu") if device == "cpu" else host.device()

    def make_room(nbytes: int) -> int:
        host.make_room(nbytes, where)
        return host.free_memory(where)

    # On the CPU there is nothing to move and no VRAM to limit.
    placement = Placement()
    if where.type != "cpu":
        placement = Placement(device=where, max_vram_bytes=max_vram_bytes, make_room=make_room)
    return TextEncoder(checkpoint, identity, pieces, read_tensors, dtype=dtype, placement=placement)


def _opened(path: str | Path, role: str) -> tuple[Checkpoint, Identity]:
    checkpoint = open_checkpoint(path)
    identity = identify(checkpoint)
    if identity.role != role:
        raise ValueError(
            f"{checkpoint.path.name} is {ROLES[identity.role]}: {identity.family} {identity.variant}. "
            f"Expected {ROLES[role]}: choose another file, or load this one where it belongs."
        )
    problems = {"lacks": identity.missing, "holds, beside it,": identity.unexpected}
    listed = [f"{what} {len(names)} tensors ({_some(names)})" for what, names in problems.items() if names]
    if listed:
        raise ValueError(
            f"{checkpoint.path.name} looks like {identity.family} {identity.variant}, but {' and '.join(listed)}: it "
            "may be cut, a part of a set, or changed for other software. Download it again from where it was published."
        )
    return checkpoint, identity


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
