"""Judge a clip of the corpus's kind by arithmetic alone: which colour, shape, background and direction does it show?"""
# F frames, H W pixels

from dataclasses import dataclass

import torch
from torch import Tensor

from . import corpus
from .corpus import Scene

ATTRIBUTES = ("colour", "background", "shape", "direction")
BORDER = 3  # pixels of the frame's edge that are background in most frames
OBJECT_SHARE = 0.5  # of the strongest contrast: a pixel above it belongs to the object
MIN_OBJECT_PIXELS = 60  # of 64 x 64; the smallest object of the corpus has about 300
MIN_TRAVEL = 6.0  # pixels from first to last frame; the slowest object of the corpus moves 22
MIN_OVERLAP = 0.75  # intersection over union with the nearest ideal shape; a sharp clip reaches 0.9


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a clip shows; an attribute is "" where nothing clear is seen. `overlap` is with the ideal shape, 0..1."""

    colour: str
    background: str
    shape: str
    direction: str
    overlap: float


def judge(clip_FHWC: Tensor) -> Verdict:
    """Return what a clip [F, 64, 64, 3] with values in [0, 1] shows."""
    frames = clip_FHWC.float() * 255
    paper, masks_FHW = objects(clip_FHWC)
    background = _nearest(paper, corpus.BACKGROUNDS)
    areas = masks_FHW.flatten(1).sum(dim=1)
    if areas.min() < MIN_OBJECT_PIXELS or areas.max() > 0.6 * masks_FHW[0].numel():
        return Verdict("", background, "", "", 0.0)
    colour = _nearest(_median_colour(frames[masks_FHW]), corpus.COLOURS)
    centres_F2 = centres(masks_FHW)
    shape, overlap = _shape(masks_FHW, centres_F2, areas)
    return Verdict(colour, background, shape, _direction(centres_F2), overlap)


def objects(clip_FHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the background's colour [3], 0 to 255, and where in each frame the object is [F, H, W]."""
    frames = clip_FHWC.float() * 255
    paper = _median_colour(frames[:, _border_mask(frames.shape[1])])
    contrast_FHW = (frames - paper).norm(dim=-1)
    return paper, contrast_FHW > OBJECT_SHARE * contrast_FHW.flatten(1).quantile(0.98)


def centres(masks_FHW: Tensor) -> Tensor:
    """Return the middles [F, 2] (x, y) of objects in pixels."""
    return torch.stack([torch.nonzero(mask).float().mean(dim=0).flip(0) + 0.5 for mask in masks_FHW])


def psnr(picture: Tensor, wanted: Tensor) -> float:
    """Return how alike two pictures or clips in [0, 1] are, in dB."""
    return -10 * (picture - wanted).square().mean().log10().item()


def matches(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Say for each attribute whether the clip shows what was asked for."""
    return {name: getattr(verdict, name) == getattr(scene, name) for name in ATTRIBUTES}


def rates(verdicts: list[Verdict], scenes: list[Scene]) -> dict[str, float]:
    """Return the share of clips that are right, per attribute and ("all") in every attribute."""
    rows = [matches(verdict, scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    shares = {name: sum(row[name] for row in rows) / len(rows) for name in ATTRIBUTES}
    return shares | {"all": sum(all(row.values()) for row in rows) / len(rows)}


def chance(verdicts: list[Verdict], scenes: list[Scene]) -> dict[str, float]:
    """Return the rates when every clip is judged against every other clip's prompt: what luck alone would score.

    Raises ValueError for a single clip, which has no other.
    """
    if len(verdicts) < 2:
        raise ValueError("chance needs at least 2 clips, got 1: ask for more prompts")
    shifted = [rates(verdicts, scenes[shift:] + scenes[:shift]) for shift in range(1, len(scenes))]
    return {name: sum(row[name] for row in shifted) / len(shifted) for name in (*ATTRIBUTES, "all")}


def _border_mask(size: int) -> Tensor:
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[BORDER:-BORDER, BORDER:-BORDER] = False
    return mask


def _median_colour(pixels: Tensor) -> Tensor:
    return pixels.reshape(-1, 3).median(dim=0).values


def _nearest(colour: Tensor, table: dict[str, tuple[int, int, int]]) -> str:
    return min(table, key=lambda name: (colour - torch.tensor(table[name])).norm().item())


def _direction(centres_F2: Tensor) -> str:
    travel = centres_F2[-1] - centres_F2[0]
    if travel.abs().max() < MIN_TRAVEL:
        return ""
    return max(corpus.DIRECTIONS, key=lambda name: (travel * torch.tensor(corpus.DIRECTIONS[name])).sum().item())


def _shape(masks_FHW: Tensor, centres_F2: Tensor, areas: Tensor) -> tuple[str, float]:
    """Lay every shape of the same area over the object and take the one that covers it best, over all frames."""
    overlaps = {name: _overlap(name, masks_FHW, centres_F2, areas) for name in corpus.SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return (best if overlaps[best] >= MIN_OVERLAP else ""), overlaps[best]


def _overlap(shape: str, masks_FHW: Tensor, centres_F2: Tensor, areas: Tensor) -> float:
    distance = corpus.DISTANCES[shape]
    pixel = torch.arange(masks_FHW.shape[1]) + 0.5
    x, y = torch.meshgrid(pixel, pixel, indexing="xy")
    unit = torch.tensor(100.0)
    grid = torch.linspace(-150, 150, 301)
    reference = distance(*torch.meshgrid(grid, grid, indexing="xy"), unit) < 0
    # Area and centroid of the ideal shape at radius 100 give the radius and the place of the ideal on each frame.
    rows, columns = torch.nonzero(reference, as_tuple=True)
    offset = torch.stack((grid[columns].mean(), grid[rows].mean())) / unit
    total = 0.0
    for mask, centre, area in zip(masks_FHW, centres_F2, areas, strict=True):
        radius = unit * (area / reference.sum()).sqrt()
        left, top = centre - offset * radius
        ideal = distance(x - left, y - top, radius) < 0
        total += ((mask & ideal).sum() / (mask | ideal).sum()).item()
    return total / len(masks_FHW)
