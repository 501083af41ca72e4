"""Conditioning as ComfyUI passes it between nodes: a list of [rows [B, S, E], options] per prompt."""
# B batch, S rows, E width

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
    "concat_mask_index": (0,),
    "clip_vision_output": (),
    "vace_frames": (),
    "vace_mask": (),
    "reference_latents": (),
    "reference_latent": (),
    "time_dim_concat": (),
    "camera_conditions": (),
    "audio_embed": (),
}
# Options that say nothing to the transformers of this pack, which take neither pooled text nor a guidance value.
WITHOUT_EFFECT = ("pooled_output", "attention_mask", "guidance", "set_area_to_bounds", "mask_strength", "default")


def check_rows(conditioning: ComfyConditioning, text_dim: int, encoder: str) -> None:
    """Raise ValueError for what is no CONDITIONING, or has rows of another width than `text_dim`.

    `encoder` says in words what encodes for this model.
    """
    if not isinstance(conditioning, Sequence) or not conditioning:
        raise ValueError(
            f"Expected a CONDITIONING with at least one prompt, got {type(conditioning).__name__}:"
            f" {str(conditioning)[:80]}."
        )
    for rows_BSE, _ in conditioning:
        if not isinstance(rows_BSE, Tensor) or rows_BSE.dim() != 3 or rows_BSE.shape[-1] != text_dim:
            found = f"of width {rows_BSE.shape[-1]}" if isinstance(rows_BSE, Tensor) else f"a {type(rows_BSE).__name__}"
            raise ValueError(
                f"The conditioning is {found}, expected {text_dim}: encode the prompt with the text encoder that"
                f" belongs to this model ({encoder})."
            )


def valid_rows(rows_BSE: Tensor, mask: Tensor | None) -> Tensor:
    """Return [B, S], True where the attention mask of a prompt does not hide a row. Raises ValueError for its shape."""
    if mask is None:
        return rows_BSE.new_ones(rows_BSE.shape[:2], dtype=torch.bool)
    if mask.shape != rows_BSE.shape[:2]:
        raise ValueError(
            f"The attention_mask of the conditioning is {list(mask.shape)}, its rows {list(rows_BSE.shape[:2])}."
        )
    return mask.bool().to(rows_BSE.device)


def check_options(options: Mapping[str, Any], carried_out: Sequence[str] = ()) -> None:
    """Raise ValueError for an option that changes the picture and that the family does not carry out."""
    for name, value in options.items():
        if name in WITHOUT_EFFECT or name in carried_out or value is None:
            continue
        if name not in NOT_CARRIED_OUT:
            log.warning("The option %r of the conditioning means nothing to this sampler and has no effect.", name)
        elif isinstance(value, Tensor) or value not in NOT_CARRIED_OUT[name]:
            raise ValueError(
                f"The conditioning has the option {name!r}, which this sampler does not carry out: remove the node"
                " that sets it, or use ComfyUI's own sampler."
            )
