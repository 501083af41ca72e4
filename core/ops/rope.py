"""Rotary position embedding over several axes, adjacent-pair convention."""
# B batch, L tokens, N heads, D head width, P = D/2 rotated pairs

import torch
from torch import Tensor

from .norm import RmsConstants, rms_norm
from .sent import sent

THETA = 10000.0


def axis_angles(positions: Tensor, width: int) -> Tensor:
    """Return angles [positions, width/2]: position times `THETA ** (-2j / width)`.

    Computed in float64 where `positions` live, which should be the CPU: no float64 ever runs on the device.
    """
    frequencies = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.outer(positions.double(), frequencies)


def grid_rope(axes: list[tuple[Tensor, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return float32 (cos, sin), each [L, P], for tokens in raster order over the axes, last axis fastest.

    `axes` holds (positions, rotated width) per axis; the widths add up to the head width.
    Source: Su et al. 2021, "RoFormer", one block of frequencies per axis.
    """
    sizes = [len(positions) for positions, _ in axes]
    tables = []
    for i, (positions, width) in enumerate(axes):
        angles = axis_angles(positions, width)
        shape = [1] * len(sizes) + [angles.shape[1]]
        shape[i] = sizes[i]
        pair = sent(torch.stack((angles.cos(), angles.sin())).float(), device)
        tables.append(pair.view(2, *shape).expand(2, *sizes, -1))
    cos, sin = torch.cat(tables, dim=-1).flatten(1, -2)
    return cos, sin


def rotate(x_BLND: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate adjacent pairs (2j, 2j+1) of each head by the token's angles; computes and returns float32.

    A pair is a complex number and its rotation one product.
    """
    if torch.compiler.is_compiling():  # for complex numbers no code is made
        (even, odd), (cos, sin) = x_BLND.float().unflatten(-1, (-1, 2)).unbind(-1), (table[:, None] for table in rope)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    turn_L1P = torch.complex(*rope)[:, None]
    pairs_BLNP = torch.view_as_complex(x_BLND.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_BLNP * turn_L1P).flatten(-2)


def norm_rotate(x_BLE: Tensor, constants: RmsConstants, rope: tuple[Tensor, Tensor], out_BLND: Tensor) -> None:
    """Write rows, as `rms_norm` and then `rotate` make them, to `out`."""
    out_BLND.copy_(rotate(rms_norm(x_BLE, constants, torch.float32).view(out_BLND.shape), rope))
