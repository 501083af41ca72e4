"""Goldens of DFloat11: groups that the official tool wrote, with the weights that it made them of."""

from collections.abc import Callable

import torch
from torch import Tensor
from wanqwen import kernels
from wanqwen.core.dfloat11 import PLANES
from wanqwen.core.ops.dfloat11 import decode
from wanqwen.core.ops.dfloat11_encoder import encode
from wanqwen.tests import dfloat11_reference

from .golden import Golden

TOLERANCE = {"torch": 0.0, "kernel": 0.0, "encoder": 0.0, "description": 0.0}  # bit for bit
EXPECTED = ".expected."


def recognise(golden: Golden) -> bool:
    """Say whether a file holds groups."""
    return any(key.endswith(".encoded_exponent") for key in golden.tensors)


def outputs(golden: Golden) -> list[str]:
    """Return the keys of the weights."""
    return sorted(key for key in golden.tensors if EXPECTED in key)


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how a weight is checked; the kernel too where there is Triton, and the encoder once for each group."""
    kernel = ("kernel",) if kernels.triton_version() and kernels.is_interpreted() else ()
    return ("torch", *kernel, *(("encoder", "description") if key.endswith(f"{EXPECTED}0") else ()))


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Decode the group of a weight and return ours and the reference, as 16-bit words; or encode it again."""
    group, _, number = key.partition(EXPECTED)
    planes = {name: golden.tensors[f"{group}.{name}"] for name in PLANES}
    splits = golden.tensors[f"{group}.split_positions"].tolist()
    weights = [golden.tensors[f"{group}{EXPECTED}{i}"] for i in range(len(splits) + 1)]
    if way == "encoder":
        ours = encode(weights)
        return [(ours[name].short(), planes[name].short()) for name in PLANES]
    if way == "description":
        return [(dfloat11_reference.decode(planes).view(torch.int16), torch.cat([_words(w) for w in weights]))]
    ends = [*splits, len(planes["sign_mantissa"])]
    begins = [0, *ends[:-1]]
    found = _decoder(way)(*planes.values(), torch.empty(ends[-1], dtype=torch.bfloat16))
    i = int(number)
    return [(_words(found[begins[i] : ends[i]].view(weights[i].shape)), _words(weights[i]))]


def _decoder(way: str) -> Callable[..., Tensor]:
    return decode if way == "torch" else kernels.KERNELS["dfloat11_decode"].load("dfloat11_decode")


def _words(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int16).flatten()
