"""Embeddings of the diffusion time."""

import torch
from torch import Tensor

MAX_PERIOD = 10000.0


def timestep_embedding(timestep_B: Tensor, width: int) -> Tensor:
    """Return the sinusoidal embedding [B, width] in float32, cosine half first.

    `timestep_B` is in [0, 1000]. Angles are formed in float64 on the CPU, so that every device sees the same numbers.
    Source: Vaswani et al. 2017, section 3.5, with the halves as in Dhariwal and Nichol 2021.
    """
    half = width // 2
    frequencies = MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(timestep_B.detach().cpu().double(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float().to(timestep_B.device)
