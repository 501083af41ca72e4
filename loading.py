"""Open a file as the thing it is meant to be: a diffusion model, a VAE, a text encoder. Shared by nodes and commands."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .core.codec import VideoCodec
from .core.types import Checkpoint, Identity, ModelHandle
from .core.weights.assemble import assemble
from .core.weights.reader import open_checkpoint, read_tensors
from .families import FAMILIES, identify
from .wan.family import LATENT_FORMAT
from .wan.text_encoder import TextEncoder
from .wan.vae import WanVAE

DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoints"

ROLES = {
    "diffusion_model": "a diffusion model (Load Wan Model)",
    "vae": "a VAE (Load Wan VAE)",
    "text_encoder": "a text encoder (Load Wan Text Encoder)",
    "image_encoder": "an image encoder",
}
RUNNABLE = ("t2v-1.3B", "t2v-14B", "custom")


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> ModelHandle:
    """Open a diffusion model; its weights are read on the first run. Raises ValueError for any other file."""
    checkpoint, identity = _opened(path, "diffusion_model")
    if identity.variant not in RUNNABLE or identity.config.in_dim != identity.config.out_dim:
        raise ValueError(
            f"{checkpoint.path.name} is Wan 2.1 {identity.variant}, which also takes an image or a control video; this "
            "version runs text to video only. Choose a T2V file (wan2.1_t2v_1.3B or wan2.1_t2v_14B)."
        )
    family = next(family for family in FAMILIES if family.name == identity.family)
    return ModelHandle(checkpoint=checkpoint, identity=identity, family=family, dtype=dtype)


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> VideoCodec:
    """Open a VAE; its weights are read on first use. Raises ValueError for any other file."""
    checkpoint, identity = _opened(path, "vae")

    def load() -> WanVAE:
        # Inside a VAE float32 means "as computed", there is nothing to keep apart.
        return assemble(
            lambda: WanVAE(identity.config), identity.names, checkpoint, float32=lambda name: False, dtype=dtype
        )

    return VideoCodec(load, LATENT_FORMAT, dtype=dtype, device=device)


def _opened(path: str | Path, role: str) -> tuple[Checkpoint, Identity]:
    checkpoint = open_checkpoint(path)
    identity = identify(checkpoint)
    if identity.role != role:
        raise ValueError(
            f"{checkpoint.path.name} is {ROLES[identity.role]}: {identity.family} {identity.variant}. "
            f"Expected {ROLES[role]}: choose another file, or load this one where it belongs."
        )
    if identity.missing:
        listed = ", ".join(identity.missing[:5])
        raise ValueError(
            f"{checkpoint.path.name} lacks {len(identity.missing)} of the tensors of {identity.family} "
            f"{identity.variant} ({listed}...): it may be cut, or a part of a set. Download it again."
        )
    return checkpoint, identity
