"""Clips that go on where another one ended, in latent space: nothing is decoded and encoded again between them."""
# B clips, C channels, T latent frames, h w latent positions

import torch
from torch import Tensor

from ..core.conditioning import ComfyConditioning
from .pictures import LATENTS, MASK
from .requests import clip_size

ROUNDING = 0.1  # of raw latents, whose standard deviations are 1 to 3, where they pass through half precision


def continued(before_BCThw: Tensor, latent_frames: int, overlap: int) -> tuple[Tensor, Tensor]:
    """Return raw latents [B, C, latent_frames, h, w] that begin with the last `overlap` of a clip's, and their mask.

    The mask [1, 1, latent_frames, h, w] is 0 where the latents stay as they are and 1 where they are made anew. Raises
    ValueError if the clip is shorter than the overlap, or the new one not longer.
    """
    found = before_BCThw.shape[2]
    if not 1 <= overlap <= found or latent_frames <= overlap:
        raise ValueError(
            f"overlap is {overlap} latent frames, of a clip that has {found}, and the new one will have "
            f"{latent_frames}: give at least 1, at most what the clip has, and less than the new one has (4 frames "
            "are one latent frame)."
        )
    latents = before_BCThw.new_zeros(*before_BCThw.shape[:2], latent_frames, *before_BCThw.shape[3:])
    latents[:, :, :overlap] = before_BCThw[:, :, -overlap:]
    mask = torch.ones(1, 1, latent_frames, *before_BCThw.shape[3:])
    mask[:, :, :overlap] = 0
    return latents, mask


def starting_with(conditioning: ComfyConditioning, start_BCThw: Tensor, latent_frames: int) -> ComfyConditioning:
    """Return prompts whose pictures' first latent frames are raw latents [B, C, overlap, h, w]; those without stay.

    What is given of a clip at its end stays too. Raises ValueError for pictures of another size or length, and where
    more first frames are given than the overlap has.
    """
    return [[rows, _starting_with(options, start_BCThw, latent_frames)] for rows, options in conditioning]


def joined(before_BCThw: Tensor, after_BCThw: Tensor, overlap: int) -> Tensor:
    """Return the latents of a clip and of the one that continues it as those of one clip. Raises ValueError."""
    one, other = tuple(before_BCThw.shape), tuple(after_BCThw.shape)
    if one[:2] + one[3:] != other[:2] + other[3:] or one[2] < overlap or other[2] <= overlap:
        raise ValueError(
            f"The clips do not fit together: before is {list(one)}, after {list(other)} with an overlap of {overlap} "
            "(batch, channels, latent frames, height / 8, width / 8). Connect the clip that was given to Wan Continue "
            "Clip, and what the sampler made of its latent."
        )
    if not after_BCThw[:, :, overlap:].any():
        raise ValueError("after is empty: connect what the sampler made of Wan Continue Clip's latent, not the latent.")
    return torch.cat((before_BCThw, after_BCThw[:, :, overlap:].to(before_BCThw)), dim=2)


def is_seam(before_BCThw: Tensor, after_BCThw: Tensor, overlap: int) -> bool:
    """Say whether a clip begins with the last latents of another, up to rounding; both as `joined` takes them."""
    end, start = before_BCThw[:, :, -overlap:], after_BCThw[:, :, :overlap].to(before_BCThw)
    return torch.allclose(end, start, rtol=0, atol=ROUNDING)


def overlap_of(before_BCThw: Tensor, after_BCThw: Tensor) -> int:
    """Return how many first latent frames of a clip are another's last ones, the most if several fit; 0 if none."""
    one, other = before_BCThw.shape, after_BCThw.shape
    if one[:2] + one[3:] != other[:2] + other[3:]:
        return 0
    most = min(one[2], other[2] - 1)
    return next((count for count in range(most, 0, -1) if is_seam(before_BCThw, after_BCThw, count)), 0)


def _starting_with(options: dict, start_BCThw: Tensor, latent_frames: int) -> dict:
    latents = options.get(LATENTS)
    if latents is None:
        return options
    overlap, wanted = start_BCThw.shape[2], (latent_frames, *start_BCThw.shape[3:])
    if tuple(latents.shape[2:]) != wanted:
        raise ValueError(
            f"The conditioning's pictures were encoded for {clip_size(tuple(latents.shape))}, and the clip goes on in "
            f"{clip_size(wanted)}: give Wan Image to Video and Wan Continue Clip the same frames, and the size of the "
            "clip."
        )
    mask = options.get(MASK)
    if mask is None:  # nothing of the pictures counts as given
        mask = torch.ones(1, 4, *wanted)
    mask = mask.expand(-1, 4, -1, -1, -1).clone()
    if overlap < latent_frames - 1 and not mask[:, :, overlap].all():
        raise ValueError(
            f"The conditioning gives more first frames of its own than the overlap has ({overlap} latent frames): "
            "raise overlap, or give Wan Image to Video one image only."
        )
    mask[:, :, :overlap] = 0
    batch = max(len(latents), len(start_BCThw))
    latents = latents.expand(batch, -1, -1, -1, -1).clone()
    latents[:, :, :overlap] = start_BCThw.to(latents)
    return {**options, LATENTS: latents, MASK: mask}
