"""Changes of a weight that live beside it, such as a LoRA's: the stored weight is read and never written to."""
# O rows of a weight (its outputs), I its inputs, R rank, n some of the rows

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_SHARE = 4  # work of a product for each unit of work beside it
ELEMENTS_AT_ONCE = 1 << 22  # of a weight that are in float32 while it is changed


class Difference(Protocol):
    """What is added to a weight [O, I], in whichever form it is stored."""

    def of(self, rows: slice) -> Tensor:
        """Return the difference of some rows, [n, I] in float32."""

    def times(self, factor: float) -> "Difference":
        """Return the difference times a number, in the same dtypes."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`up @ down`: [O, R] and [R, I]. Source: Hu et al. 2021, "LoRA"."""

    down: Tensor
    up: Tensor

    def of(self, rows: slice) -> Tensor:
        return self.up[rows].float() @ self.down.float()

    def times(self, factor: float) -> "LowRank":
        return LowRank(self.down, _times(self.up, factor))


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """The product, element by element, of two low-rank matrices. Source: Hyeon-Woo et al. 2021, "FedPara" (LoHa)."""

    first: LowRank
    second: LowRank

    def of(self, rows: slice) -> Tensor:
        return self.first.of(rows) * self.second.of(rows)

    def times(self, factor: float) -> "Hadamard":
        return Hadamard(self.first.times(factor), self.second)


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """The Kronecker product of two matrices, each whole or low-rank. Source: Yeh et al. 2023, "LyCORIS" (LoKr)."""

    outer: "LowRank | Dense"
    inner: "LowRank | Dense"

    def of(self, rows: slice) -> Tensor:
        outer, inner = self.outer.of(slice(None)), self.inner.of(slice(None))
        index = torch.arange(len(outer) * len(inner), device=outer.device)[rows]
        far, near = outer[index // len(inner)], inner[index % len(inner)]
        return (far[:, :, None] * near[:, None, :]).flatten(1)

    def times(self, factor: float) -> "Kronecker":
        return Kronecker(self.outer.times(factor), self.inner)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """The difference itself, [O, I]."""

    values: Tensor

    def of(self, rows: slice) -> Tensor:
        return self.values[rows].float()

    def times(self, factor: float) -> "Dense":
        return Dense(_times(self.values, factor))


def _times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.float() * factor).to(tensor.dtype)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Change:
    """One change of a weight: `scale` is its maker's, `strength` its user's.

    With `magnitude`, one number per row [O, 1] or per input [1, I], the changed weight's rows or columns are given
    that length. Source: Liu et al. 2024, "DoRA", equation 5.
    """

    difference: Difference
    scale: float = 1.0
    strength: float = 1.0
    magnitude: Tensor | None = None

    @property
    def factor(self) -> float:
        """What the difference is multiplied by, where there is no magnitude."""
        return self.scale * self.strength

    @property
    def folded(self) -> "Change":
        """The same change, its numbers as far as can be in its tensors: with a magnitude the strength is none of those.

        For who takes each number for another program, as torch.compile does.
        """
        if self.magnitude is not None:
            return replace(self, difference=self.difference.times(self.scale), scale=1.0)
        return Change(difference=self.difference.times(self.factor))

    @property
    def needs_all_rows(self) -> bool:
        """Say whether rows can't be changed one without the others."""
        return self.magnitude is not None and self.magnitude.shape[0] == 1

    def on(self, part: Tensor, rows: slice) -> Tensor:
        """Return some rows [n, I] of a weight, in float32, with the change: always a new tensor."""
        if self.magnitude is None:
            return torch.add(part, self.difference.of(rows), alpha=self.factor)
        whole = torch.add(part, self.difference.of(rows), alpha=self.scale)
        if self.needs_all_rows:
            length, wanted = torch.linalg.vector_norm(whole, dim=0, keepdim=True), self.magnitude
        else:
            length, wanted = torch.linalg.vector_norm(whole, dim=1, keepdim=True), self.magnitude[rows]
        whole *= wanted / length.masked_fill(length == 0, 1.0)
        return torch.lerp(part, whole, self.strength)


def changed(weight: Tensor, changes: Sequence[Change], out: Tensor) -> Tensor:
    """Return a weight with changes, one after the other, written into `out`: of its shape, perhaps the weight itself.

    Sums are taken in float32, so that the result is rounded once: pairs in one product with the weight, all else in
    PyTorch's own float32, of a part of the rows at a time.
    """
    if weight.dim() == 2 and weight.dtype == out.dtype and _are_pairs(changes):
        down, up, factor = _joined(changes, weight.dtype)
        return torch.addmm(weight, up, down, alpha=factor, out=out)
    source, target = (tensor.view(tensor.shape[0], -1) for tensor in (weight, out))
    total, in_one_go = len(source), any(change.needs_all_rows for change in changes)
    size = total if in_one_go else max(1, ELEMENTS_AT_ONCE // prod(weight.shape[1:]))
    for first in range(0, total, size):
        rows = slice(first, min(first + size, total))
        part = source[rows].float()
        for change in changes:
            part = change.on(part, rows)
        target[rows] = part
    return out


def is_cheaper_beside(changes: Sequence[Change], weight_shape: Sequence[int], num_rows: int) -> bool:
    """Say whether taking so many rows through low-rank pairs is less work than adding those to the weight.

    Per unit of rank the pair costs num_rows * (I + O) multiplications, the sum I * O.
    """
    outputs, inputs = weight_shape
    return _are_pairs(changes) and num_rows * (inputs + outputs) <= inputs * outputs


def are_small_beside(changes: Sequence[Change], weight_shape: Sequence[int]) -> bool:
    """Say whether all changes are low-rank pairs that take little work beside a weight's own product, as most do."""
    outputs, inputs = weight_shape
    ranks = sum(len(change.difference.down) for change in changes) if _are_pairs(changes) else inputs
    return SMALL_SHARE * ranks * (inputs + outputs) <= inputs * outputs


def beside(changes: Sequence[Change], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what adds low-rank changes to a layer's result: a function of that, which is overwritten, and of x."""
    down, up, factor = _joined(changes, dtype)

    def add(y: Tensor, x: Tensor) -> Tensor:
        y.view(-1, y.shape[-1]).addmm_(F.linear(x.reshape(-1, x.shape[-1]), down), up.t(), alpha=factor)
        return y

    return add


def _are_pairs(changes: Sequence[Change]) -> bool:
    return all(isinstance(change.difference, LowRank) and change.magnitude is None for change in changes)


def _joined(changes: Sequence[Change], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return one pair that does what several do, and its factor."""
    pairs = [change.difference for change in changes]
    if len(pairs) == 1:
        return pairs[0].down.to(dtype), pairs[0].up.to(dtype), changes[0].factor
    ups = [(change.difference.up.float() * change.factor).to(dtype) for change in changes]
    return torch.cat([pair.down.to(dtype) for pair in pairs]), torch.cat(ups, dim=1), 1.0
