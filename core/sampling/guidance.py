"""Classifier-free guidance: how the prompt's velocity and the negative prompt's become one."""
# B batch, C channels, T h w latent grid

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..types import Velocity

Combine = Callable[[Tensor, Tensor, float], Tensor]  # (with the prompt, without it, strength) -> velocity


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


def norm_preserving(positive: Tensor, negative: Tensor, strength: float, axis: int | tuple[int, ...] = -1) -> Tensor:
    """Return the guided velocity with every vector along `axis` scaled to the length it has in `positive`.

    `axis` is what makes one token: -1 for tokens [B, L, C], 1 for [B, C, ...]. A vector of zeros stays zero.
    Source: the "true CFG" of the Qwen-Image pipeline.
    """
    guided = classifier_free(positive, negative, strength)
    length = torch.linalg.vector_norm(guided, dim=axis, keepdim=True)
    wanted = torch.linalg.vector_norm(positive, dim=axis, keepdim=True)
    return guided * (wanted / length.masked_fill(length == 0, 1.0))


def guided_velocity(
    x: Tensor,
    timestep_B: Tensor,
    strength: float,
    positive: Velocity,
    negative: Velocity | None,
    combine: Combine = classifier_free,
) -> Tensor:
    """Return the velocity at `x` [B, C, T, h, w] in float32, combined in float32.

    A strength of exactly 1 equals the prompt's own velocity, so the negative pass is left out (half the time); so it is
    without a negative.
    """
    v = positive(x, timestep_B).float()
    if negative is None or strength == 1:
        return v
    return combine(v, negative(x, timestep_B).float(), strength)
