"""Overlapping spatial tiles whose blended weights add up to one everywhere."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileSize:
    """Height, width and overlap of tiles, in latent positions."""

    height: int
    width: int
    overlap: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 2 or self.overlap < 0:
            raise ValueError(f"a tile needs at least 2 x 2 latent positions and an overlap >= 0, got {self}")

    def halved(self) -> "TileSize":
        """Return the next smaller tile to try when memory is short."""
        height, width = max(8, self.height // 2), max(8, self.width // 2)
        return TileSize(height, width, min(height, width) // 4)


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile: slices of the latent, and what its pixels weigh along y and x."""

    rows: slice
    columns: slice
    weight_y: Tensor
    weight_x: Tensor


def cut(height: int, width: int, size: TileSize, factor: float) -> Iterator[Tile]:
    """Yield tiles that cover a grid of latent positions; `factor` results per position (8 decoding, 1 on latents).

    Over all tiles, `weight_y[:, None] * weight_x` adds up to one at every result position.
    """
    rows, columns = _spans(height, size.height, size.overlap), _spans(width, size.width, size.overlap)
    weights_y, weights_x = _weights(rows, height, factor), _weights(columns, width, factor)
    for row, weight_y in zip(rows, weights_y, strict=True):
        for column, weight_x in zip(columns, weights_x, strict=True):
            yield Tile(slice(*row), slice(*column), weight_y, weight_x)


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Evenly spread spans of one size; each shares `overlap` or more with the next, or half a tile if that is less."""
    if tile >= length:
        return [(0, length)]
    overlap = min(overlap, tile // 2)  # beyond that the number of tiles explodes and no seam gets better
    count = -(-(length - overlap) // (tile - overlap))
    return [(start, start + tile) for start in (round(i * (length - tile) / (count - 1)) for i in range(count))]


def _weights(spans: list[tuple[int, int]], length: int, factor: float) -> list[Tensor]:
    """Raised-cosine ramps over what neighbours share, divided by their sum."""
    scaled = [(round(start * factor), round(end * factor)) for start, end in spans]
    total = torch.zeros(round(length * factor))
    ramps = []
    for i, (start, end) in enumerate(scaled):
        ramp = torch.ones(end - start)
        if i > 0:
            shared = scaled[i - 1][1] - start
            ramp[:shared] *= _rise(shared)
        if i < len(scaled) - 1:
            shared = end - scaled[i + 1][0]
            ramp[end - start - shared :] *= _rise(shared).flip(0)
        total[start:end] += ramp
        ramps.append(ramp)
    return [ramp / total[start:end] for ramp, (start, end) in zip(ramps, scaled, strict=True)]


def _rise(length: int) -> Tensor:
    return 0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(length) + 0.5) / max(1, length))
