"""Conditioning of Wan as ComfyUI passes it around: a list of [rows [B, S, E], options] per prompt."""
# B batch, S rows, E width

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.types import Conditioning
from .config import TEXT_LEN

log = logging.getLogger(__name__)

ComfyConditioning = list[list[Any]]  # [[Tensor, {str: Any}], ...]

# Options of a ComfyUI prompt that our sampler does not carry out, and their values that mean "as usual".
NOT_CARRIED_OUT: dict[str, tuple[Any, ...]] = {
    "area": (),
    "mask": (),
    "strength": (1.0,),
    "start_percent": (0.0,),
    "end_percent": (1.0,),
    "clip_start_percent": (0.0,),
    "clip_end_percent": (1.0,),
    "control": (),
    "gligen": (),
    "hooks": (),
    "concat_latent_image": (),
    "concat_mask": (),
    "clip_vision_output": (),
    "vace_frames": (),
    "vace_mask": (),
    "reference_latents": (),
    "reference_latent": (),
    "time_dim_concat": (),
    "camera_conditions": (),
    "audio_embed": (),
}
# Options that say nothing to a Wan transformer, which takes neither pooled text nor a guidance value.
WITHOUT_EFFECT = ("pooled_output", "attention_mask", "guidance", "set_area_to_bounds", "mask_strength", "default")


def from_comfy(conditioning: ComfyConditioning, text_dim: int) -> list[Conditioning]:
    """Return one `Conditioning` per prompt, each row of a batch being one; text [1, S, text_dim] float32 on the CPU.

    ComfyUI's Wan text nodes fill up to 512 rows with zeros (and don't cut longer prompts); zero rows are dropped here,
    since the transformer adds its own. Attention has no order among text rows, so this changes nothing, also for
    zeros in between as "ConditioningConcat" leaves them. Raises ValueError for rows of another width than `text_dim`
    (4096 for umt5-xxl) and for options that we do not carry out.
    """
    if not isinstance(conditioning, Sequence) or not conditioning:
        raise ValueError(
            f"Expected a CONDITIONING with at least one prompt, got {type(conditioning).__name__}:"
            f" {str(conditioning)[:80]}."
        )
    prompts = []
    for rows_BSE, options in conditioning:
        if not isinstance(rows_BSE, Tensor) or rows_BSE.dim() != 3 or rows_BSE.shape[-1] != text_dim:
            found = f"of width {rows_BSE.shape[-1]}" if isinstance(rows_BSE, Tensor) else f"a {type(rows_BSE).__name__}"
            raise ValueError(
                f"The conditioning is {found}, expected {text_dim}: encode the prompt with the text encoder that"
                " belongs to this model (umT5 for Wan 2.1: `Wan Text Encode`, or a CLIP Loader of type wan)."
            )
        _check_options(options)
        mask_BS = _valid(rows_BSE, options.get("attention_mask"))
        prompts += [_prompt(rows[valid]) for rows, valid in zip(rows_BSE, mask_BS, strict=True)]
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


def _valid(rows_BSE: Tensor, mask: Tensor | None) -> Tensor:
    valid = rows_BSE.ne(0).any(-1)
    if mask is None:
        return valid
    if mask.shape != valid.shape:
        raise ValueError(f"The attention_mask of the conditioning is {list(mask.shape)}, its rows {list(valid.shape)}.")
    return valid & mask.bool().to(valid.device)


def _prompt(rows_SE: Tensor) -> Conditioning:
    if rows_SE.shape[0] > TEXT_LEN:
        cut = rows_SE.shape[0] - TEXT_LEN
        log.warning(
            "The conditioning has %d text rows, Wan reads %d: the last %d are left out.",
            *(TEXT_LEN + cut, TEXT_LEN, cut),
        )
        rows_SE = rows_SE[:TEXT_LEN]
    if not rows_SE.shape[0]:  # "ConditioningZeroOut": one zero row, which the transformer's own zeros then join
        rows_SE = rows_SE.new_zeros(1, rows_SE.shape[1])
    return Conditioning(text=rows_SE[None].to("cpu", torch.float32))


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in WITHOUT_EFFECT or value is None:
            continue
        if name not in NOT_CARRIED_OUT:
            log.warning("The option %r of the conditioning means nothing to this sampler and has no effect.", name)
        elif isinstance(value, Tensor) or value not in NOT_CARRIED_OUT[name]:
            raise ValueError(
                f"The conditioning has the option {name!r}, which this sampler does not carry out: remove the node"
                " that sets it, or use ComfyUI's own sampler."
            )
