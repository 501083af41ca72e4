"""Conditioning of Wan as ComfyUI passes it around: a list of [rows [B, S, E], options] per prompt."""
# B batch, S text rows, N image rows, E width, C channels, T latent frames, h w latent positions

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.conditioning import ComfyConditioning, check_options, check_rows, valid_rows
from ..core.types import Conditioning
from .config import LATENT_CHANNELS, TEXT_LEN, WanConfig
from .controls import OPTIONS as CONTROL_OPTIONS
from .controls import controls_of
from .image_encoder import rows_of
from .pictures import LATENTS, MASK, Known

log = logging.getLogger(__name__)

SEEN = "clip_vision_output"  # ComfyUI's option for what an image encoder made of pictures
MASK_CHANNELS = 4  # pixel frames in a latent frame


def from_comfy(conditioning: ComfyConditioning, config: WanConfig) -> list[Conditioning]:
    """Return one `Conditioning` per prompt, each row of a batch being one; all float32 on the CPU.

    ComfyUI's Wan text nodes fill up to 512 rows with zeros (and don't cut longer prompts); zero rows are dropped here,
    since the transformer adds its own. Attention has no order among text rows, so this changes nothing, also for
    zeros in between as "ConditioningConcat" leaves them. What image to video nodes add, ours and ComfyUI's, becomes
    `image` and `extra`, what VACE nodes add `controls`. Raises ValueError for rows of another width than the model's
    (4096 for umt5-xxl), for pictures of another shape than those nodes give, and for options that we do not carry out.
    """
    check_rows(conditioning, config.text_dim, "umT5 for Wan 2.1: `Wan Text Encode`, or a CLIP Loader of type wan")
    prompts = []
    for rows_BSE, options in conditioning:
        check_options(options, (LATENTS, MASK, SEEN, *CONTROL_OPTIONS))
        mask_BS = rows_BSE.ne(0).any(-1) & valid_rows(rows_BSE, options.get("attention_mask"))
        texts = [_text(rows[valid]) for rows, valid in zip(rows_BSE, mask_BS, strict=True)]
        images = _for_each(len(texts), SEEN, _image_rows(options, config, len(texts)))
        extras = _for_each(len(texts), LATENTS, _known(options))
        controls = controls_of(options)
        prompts += [
            Conditioning(text=text, image=image, extra=extra, controls=controls)
            for text, image, extra in zip(texts, images, extras, strict=True)
        ]
    return prompts


def to_comfy(conditioning: Sequence[Conditioning], text_len: int = TEXT_LEN) -> ComfyConditioning:
    """Return prompts as ComfyUI's own Wan text nodes give them: [1, text_len, E], zeros last, no pooled output.

    ComfyUI's Wan does not fill up rows itself, so without the zeros a stock sampler would make another picture.
    """
    filled = []
    for prompt in conditioning:
        _, num_rows, width = prompt.text.shape
        rows = prompt.text.new_zeros(1, max(text_len, num_rows), width)
        rows[:, :num_rows] = prompt.text
        filled.append([rows, {"pooled_output": None}])
    return filled


def with_options(conditioning: ComfyConditioning, options: Mapping[str, Any]) -> ComfyConditioning:
    """Return the same prompts with more options; what was given is not changed."""
    return [[rows, {**given, **options}] for rows, given in conditioning]


def _text(rows_SE: Tensor) -> Tensor:
    if rows_SE.shape[0] > TEXT_LEN:
        cut = rows_SE.shape[0] - TEXT_LEN
        log.warning(
            "The conditioning has %d text rows, Wan reads %d: the last %d are left out.",
            *(TEXT_LEN + cut, TEXT_LEN, cut),
        )
        rows_SE = rows_SE[:TEXT_LEN]
    if not rows_SE.shape[0]:  # "ConditioningZeroOut": one zero row, which the transformer's own zeros then join
        rows_SE = rows_SE.new_zeros(1, rows_SE.shape[1])
    return rows_SE[None].to("cpu", torch.float32)


def _for_each(count: int, name: str, parts_BX: Tensor | None) -> list[Tensor | None]:
    """Return what belongs to each of so many prompts: its own, or the one of all; one prompt has all there is."""
    if parts_BX is None or 1 in (count, len(parts_BX)):
        return [parts_BX] * count
    if len(parts_BX) != count:
        raise ValueError(
            f"The conditioning's {name} is a batch of {len(parts_BX)} for {count} prompt(s): give one clip or picture. "
            "Of a batch of clips, Latent From Batch takes the one to go on with."
        )
    return list(parts_BX.split(1))


def _image_rows(options: Mapping[str, Any], config: WanConfig, count: int) -> Tensor | None:
    """Return image encoder rows [B, N, E] for so many prompts; of a batch of pictures one prompt takes what it can."""
    output = options.get(SEEN)
    if output is None:
        return None
    rows_BNE = rows_of(output)
    if len(rows_BNE) in (1, count):
        return rows_BNE
    pictures = config.image_positions // rows_BNE.shape[1] or 1
    if len(rows_BNE) > pictures:
        log.warning("clip_vision_output holds %d pictures, this model takes the first %d.", *(len(rows_BNE), pictures))
    return rows_BNE[:pictures].flatten(0, 1)[None]


def _known(options: Mapping[str, Any]) -> Tensor | None:
    """Return mask and normalised latents [B, 20, T, h, w]; a mask that is missing, or too short, gives nothing."""
    latents = options.get(LATENTS)
    if latents is None:
        return None
    if latents.dim() != 5 or latents.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"The conditioning's concat_latent_image is {list(latents.shape)}, expected [1, {LATENT_CHANNELS}, frames, "
            "height / 8, width / 8], as Wan Image to Video with the Wan 2.1 VAE gives it; other kinds of control are "
            "not carried out."
        )
    latents = latents.to("cpu", torch.float32)
    given = options.get(MASK)
    mask = latents.new_zeros(len(latents), MASK_CHANNELS, *latents.shape[2:])
    if given is None:
        return Known(latents=latents, mask=mask).channels
    if given.dim() != 5 or given.shape[3:] != latents.shape[3:] or len(given) not in (1, len(latents)):
        raise ValueError(
            f"The conditioning's concat_mask is {list(given.shape)}, its concat_latent_image {list(latents.shape)}: "
            "the same size is expected, with 1 or 4 channels. Connect Wan Image to Video instead of changing them."
        )
    if given.shape[1] != MASK_CHANNELS:
        given = given.mean(1, keepdim=True)  # as ComfyUI's own Wan
    known = min(given.shape[2], latents.shape[2])
    mask[:, :, :known] = 1 - given.to("cpu", torch.float32)[:, :, :known]
    return Known(latents=latents, mask=mask).channels
