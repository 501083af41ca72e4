"""Conditioning of Qwen-Image: as ComfyUI passes it around, and what a request may ask of which variant."""
# B batch, S rows, E width

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.conditioning import ComfyConditioning, check_options, check_rows, valid_rows
from ..core.types import Conditioning, Identity, SampleRequest
from .config import LATENT_CHANNELS, PATCH, VARIANTS

log = logging.getLogger(__name__)

TEXT_ALONE = (  # what a user of the wrong file is told
    "which makes pictures from text alone: load a Qwen-Image-Edit file. If it is one under another name, choose its "
    "variant in Load Qwen-Image Model (--variant on the command line)."
)
REFERENCES = "reference_latents"  # ComfyUI's name of the option: raw latents, one per picture


def from_comfy(conditioning: ComfyConditioning, text_dim: int) -> list[Conditioning]:
    """Return one `Conditioning` per prompt, each row of a batch being one; text [1, S, text_dim] float32 on the CPU.

    Rows that an attention mask hides are dropped. Raises ValueError for rows of another width than `text_dim` (3584 for
    Qwen2.5-VL-7B), for references that are no latents, and for options that we do not carry out.
    """
    check_rows(conditioning, text_dim, "Qwen2.5-VL-7B for Qwen-Image: `Qwen-Image Text Encode` or `Edit Encode`")
    prompts = []
    for rows_BSE, options in conditioning:
        check_options(options, carried_out=(REFERENCES,))
        references = tuple(_reference(latent) for latent in options.get(REFERENCES) or ())
        valid_BS = valid_rows(rows_BSE, options.get("attention_mask"))
        prompts += [
            Conditioning(text=rows[valid][None].to("cpu", torch.float32), references=references)
            for rows, valid in zip(rows_BSE, valid_BS, strict=True)
        ]
    return prompts


def to_comfy(conditioning: Sequence[Conditioning]) -> ComfyConditioning:
    """Return prompts as ComfyUI's own Qwen-Image nodes give them; what nodes do to the rows never reaches a cache."""
    made = []
    for prompt in conditioning:
        options = {REFERENCES: list(prompt.references)} if prompt.references else {}
        made.append([prompt.text.clone(), {"pooled_output": None} | options])
    return made


def with_references(prompt: Conditioning, latents: Sequence[Tensor]) -> Conditioning:
    """Return the prompt with raw latents [1, C, 1, h, w] or [1, C, h, w] of the pictures that it is about."""
    return replace(prompt, references=tuple(_reference(latent) for latent in latents))


def prepare(identity: Identity, request: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """Return the request as it is run, and what was corrected or has no effect, in words.

    Raises ValueError for pictures that the variant can't take or make.
    """
    variant, notices = VARIANTS[identity.variant], []
    frames, num_references = request.latent.shape[2], len(request.positive.references)
    if frames > 1 and not variant.layered:
        raise ValueError(
            f"The latent has {frames} frames, and {variant.title} makes one picture: connect Empty Qwen-Image Latent, "
            "or encode a single image."
        )
    for which, prompt in (("positive", request.positive), ("negative", request.negative)):
        if prompt is not None and len(prompt.references) > variant.max_references:
            raise ValueError(_too_many(which, len(prompt.references), identity))
    if variant.layered and not num_references:
        raise ValueError(f"{variant.title} takes a picture apart, and the conditioning has none: add a reference.")
    if variant.max_references and not num_references:
        notices.append(
            f"{variant.title} is made to edit, and the conditioning has no picture: it runs from text alone."
        )
    negative = request.negative
    if negative is None and any(strength != 1 for strength in request.guidance):
        strengths = ", ".join(f"{strength:g}" for strength in request.guidance)
        notices.append(
            f"guidance {strengths} has no effect without a negative prompt: connect one (a single space is what "
            f"{variant.title} was published with), or set guidance to 1."
        )
    elif negative is not None and len(negative.references) != num_references:
        notices.append(
            "The negative prompt has other reference pictures than the positive one, whose are used for both."
        )
        request = replace(request, negative=replace(negative, references=request.positive.references))
    return request, notices


def _too_many(which: str, found: int, identity: Identity) -> str:
    variant = VARIANTS[identity.variant]
    if variant.max_references:
        return (
            f"The {which} conditioning has {found} reference pictures, and {variant.title} takes "
            f"{variant.max_references}: connect fewer, or use Qwen-Image-Edit-2509 or 2511, which take 3."
        )
    return f"The {which} conditioning has {found} reference picture(s), and this model is {variant.title}, {TEXT_ALONE}"


def _reference(latent: Tensor) -> Tensor:
    """Return a reference as [1, C, 1, h, w] with even sizes; a row or column that is missing repeats the edge."""
    if not isinstance(latent, Tensor) or latent.dim() not in (4, 5):
        found = tuple(latent.shape) if isinstance(latent, Tensor) else type(latent).__name__
        raise ValueError(f"A reference latent of the conditioning is {found}, expected [1, channels, 1, h, w].")
    latent = latent[:, :, None] if latent.dim() == 4 else latent
    if latent.shape[0] != 1 or latent.shape[2] != 1:
        raise ValueError(
            f"A reference latent of the conditioning is {tuple(latent.shape)}: each reference is one picture, "
            "[1, channels, 1, h, w]. Encode the pictures one by one."
        )
    if latent.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"A reference latent of the conditioning has {latent.shape[1]} channels, and Qwen-Image takes "
            f"{LATENT_CHANNELS}: encode the picture with the VAE of Qwen-Image."
        )
    height, width = latent.shape[-2:]
    if height % PATCH or width % PATCH:
        log.warning("A reference latent of %d x %d was made even by repeating its edge.", width, height)
        latent = F.pad(latent, (0, width % PATCH, 0, height % PATCH, 0, 0), mode="replicate")
    return latent.to("cpu", torch.float32)
