"""Conditioning of Wan as ComfyUI passes it around: a list of [rows [B, S, E], options] per prompt."""
# B batch, S rows, E width

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.conditioning import ComfyConditioning, check_options, check_rows, valid_rows
from ..core.types import Conditioning
from .config import TEXT_LEN, WanConfig
from .controls import OPTIONS as CONTROL_OPTIONS
from .controls import controls_of

log = logging.getLogger(__name__)


def from_comfy(conditioning: ComfyConditioning, config: WanConfig) -> list[Conditioning]:
    """Return one `Conditioning` per prompt, each row of a batch being one; text [1, S, text_dim] float32 on the CPU.

    ComfyUI's Wan text nodes fill up to 512 rows with zeros (and don't cut longer prompts); zero rows are dropped here,
    since the transformer adds its own. Attention has no order among text rows, so this changes nothing, also for
    zeros in between as "ConditioningConcat" leaves them. Controls of VACE come along. Raises ValueError for rows of
    another width than the model's (4096 for umt5-xxl) and for options that we do not carry out.
    """
    check_rows(conditioning, config.text_dim, "umT5 for Wan 2.1: `Wan Text Encode`, or a CLIP Loader of type wan")
    prompts = []
    for rows_BSE, options in conditioning:
        check_options(options, carried_out=CONTROL_OPTIONS)
        controls = controls_of(options)
        mask_BS = rows_BSE.ne(0).any(-1) & valid_rows(rows_BSE, options.get("attention_mask"))
        texts = [_prompt(rows[valid]) for rows, valid in zip(rows_BSE, mask_BS, strict=True)]
        prompts += [replace(text, controls=controls) for text in texts]
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
