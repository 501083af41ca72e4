"""Classifier-free guidance: how the prompt's velocity and the negative prompt's become one."""
# B batch, C channels, T h w latent grid

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..types import Combine, Denoiser


def per_step(values: Sequence[float], steps: int) -> tuple[float, ...]:
    """Return one guidance value per step, from one for all or one each; raises ValueError for any other number."""
    if len(values) not in (1, steps):
        raise ValueError(f"guidance holds {len(values)} values for {steps} steps: give one, or one per step.")
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"guidance[{i}] is {value}: it must be a finite number (1 switches guidance off).")
    return tuple(float(value) for value in values) * (steps if len(values) == 1 else 1)


def classifier_free(positive: Tensor, negative: Tensor, strength: float) -> Tensor:
    """Return `negative + strength * (positive - negative)`. Source: Ho and Salimans 2022, equation 6."""
    return negative + strength * (positive - negative)


def norm_preserving(positive: Tensor, negative: Tensor, strength: float) -> Tensor:
    """Return the guided velocity of tokens [..., C] with every token scaled to the length it has in `positive`.

    A vector of zeros stays zero.
    Source: the published pipelines of models with "true CFG"; the length is that of the velocity with the prompt.
    """
    guided = classifier_free(positive, negative, strength)
    length = torch.linalg.vector_norm(guided, dim=-1, keepdim=True)
    wanted = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    return guided * (wanted / length.masked_fill(length == 0, 1.0))


def combination(patch: int | None) -> Combine:
    """Return how two velocities [B, C, T, h, w] become one: plainly, or keeping the length of each token.

    A token is `patch` x `patch` latent positions with all channels. Raises ValueError for sizes that don't divide into
    tokens.
    """
    if patch is None:
        return classifier_free

    def combine(positive: Tensor, negative: Tensor, strength: float) -> Tensor:
        height, width = positive.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} don't divide into tokens of {patch} x {patch}")
        pattern = "b c t (h ph) (w pw) -> b t h w (c ph pw)"
        tokens = (rearrange(v, pattern, ph=patch, pw=patch) for v in (positive, negative))
        guided = norm_preserving(*tokens, strength)
        return rearrange(guided, "b t h w (c ph pw) -> b c t (h ph) (w pw)", ph=patch, pw=patch)

    return combine


@dataclass(frozen=True, kw_only=True, slots=True)
class Guided:
    """The velocity that the solver follows: the prompt's, steered away from the negative prompt's.

    `denoise` knows the prompt as conditioning 0 and, with `has_negative`, the negative prompt as 1. With `interleaved`
    both pass each block of the model before the next block comes, which takes memory for both at once; the result has
    the same bits.
    """

    denoise: Denoiser
    has_negative: bool = False
    interleaved: bool = False
    combine: Combine = classifier_free

    def __call__(self, x: Tensor, timestep_B: Tensor, strength: float) -> Tensor:
        """Return the velocity at `x` [B, C, T, h, w] in float32, combined in float32.

        A strength of exactly 1 equals the prompt's own velocity, so the negative pass is left out (half the time); so
        it is without a negative.
        """
        if not self.has_negative or strength == 1:
            return self.denoise(x, timestep_B, (0,))[0].float()
        walks = ((0, 1),) if self.interleaved else ((0,), (1,))
        positive, negative = (v.float() for which in walks for v in self.denoise(x, timestep_B, which))
        return self.combine(positive, negative, strength)
