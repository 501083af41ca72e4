"""What each operation is, in float64 and in the plainest words."""

import torch
from torch import Tensor
from wanqwen.core.dfloat11 import PLANES
from wanqwen.tests import dfloat11_reference

Reference = tuple[Tensor, ...]


def layer_norm(x: Tensor, constants: tuple[Tensor, Tensor, float], dtype: torch.dtype) -> Reference:
    weight, bias, eps = constants
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double(),)


def add_to_rows(x: Tensor, rows: slice, branch: Tensor, gate: Tensor | None) -> Reference:
    x = x.double().clone()
    x[:, rows] += branch.double() * (1.0 if gate is None else gate.double())
    return (x,)


def add_norm(x: Tensor, rows: slice, branch: Tensor, gate: Tensor | None, constants, dtype: torch.dtype) -> Reference:
    (x,) = add_to_rows(x, rows, branch, gate)
    return x, *layer_norm(x[:, rows], constants, dtype)


def rms_norm(x: Tensor, constants: tuple[Tensor, float], dtype: torch.dtype) -> Reference:
    weight, eps = constants
    x = x.double().unflatten(-1, (-1, len(weight)))
    return ((x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).flatten(-2),)


def norm_rotate(x: Tensor, constants: tuple[Tensor, float], rope: tuple[Tensor, Tensor], out: Tensor) -> Reference:
    (normed,) = rms_norm(x, constants, torch.float64)
    pairs = normed.view(*out.shape[:-1], -1, 2)
    cos, sin = (table.double()[:, None] for table in rope)
    even, odd = pairs.unbind(-1)
    return (torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2),)


def dfloat11_decode(*planes_and_out: Tensor) -> Reference:
    planes = dict(zip(PLANES, planes_and_out, strict=False))
    return (dfloat11_reference.decode(planes).double(),)


def norm_silu_into(x: Tensor, weight: Tensor, out: Tensor) -> Reference:
    x = x.double()
    normed = x / x.square().sum(1, keepdim=True).sqrt() * len(weight) ** 0.5 * weight.double()
    return ((normed * normed.sigmoid()).movedim(1, -1),)
