"""Classifier-free guidance: how the prompt's velocity and the negative prompt's become one."""
# B batch, C channels, T h w latent grid

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..types import Combine, Velocity


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
    """The velocity that the solver follows: the prompt's, steered away from the negative prompt's."""

    positive: Velocity
    negative: Velocity | None = None
    combine: Combine = classifier_free

    def __call__(self, x: Tensor, timestep_B: Tensor, strength: float) -> Tensor:
        """Return the velocity at `x` [B, C, T, h, w] in float32, combined in float32.

        A strength of exactly 1 equals the prompt's own velocity, so the negative pass is left out (half the time); so
        it is without a negative.
        """
        v = self.positive(x, timestep_B).float()
        if self.negative is None or strength == 1:
            return v
        return self.combine(v, self.negative(x, timestep_B).float(), strength)
