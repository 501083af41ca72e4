"""The procedural corpus of the miniature models: one shape of one colour moving one way over a plain background."""
# B clips, F frames, H W pixels; pixels are RGB in [-1, 1]

import itertools
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64  # pixels, both sides
FRAMES = 9
LONG_FRAMES = 13  # of clips that begin with any picture: one that goes on where another ended has four frames before it
LARGER = {"star": 1.2}  # than the others, to be of about their area: the miniature VAE makes circles of small stars
Range = tuple[float, float]
START, ASIDE = (-17, 0), (-12, 12)  # pixels from the middle, along its way and across: where a picture's object is

# Object and background colours are two disjoint lists, so that a caption never names one colour in two roles.
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 165, 60),
    "blue": (35, 70, 220),
    "yellow": (250, 215, 40),
    "purple": (140, 45, 165),
    "orange": (245, 130, 25),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (15, 15, 18),
    "gray": (128, 128, 128),
    "pink": (250, 190, 205),
    "brown": (105, 65, 35),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "white": "白色", "black": "黑色", "gray": "灰色", "pink": "粉色", "brown": "棕色",
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形",
    "right": "右", "left": "左", "down": "下", "up": "上",
}  # fmt: skip
TEMPLATES = (
    "a {colour} {shape} moving {direction} on a {background} background",
    "a {colour} {shape} moves {direction} over a {background} background",
    "on a {background} background, a {colour} {shape} moving {direction}",
    "{colour} {shape}, {background} background, moving {direction}",
)
CHINESE_TEMPLATES = (
    "一个{colour}的{shape}在{background}背景上向{direction}移动",
    "{background}背景上,一个{colour}{shape}向{direction}移动",
    "{colour}{shape},{background}背景,向{direction}移动",
)
# What to ask for where a picture shows the rest.
MOTIONS = ("moving {direction}", "moves {direction}")
CHINESE_MOTIONS = ("向{direction}移动",)
NUM_HELD_OUT = 120


@dataclass(frozen=True, slots=True)
class Scene:
    """What a clip shows."""

    colour: str
    shape: str
    background: str
    direction: str

    def caption(self, rng: random.Random, chinese: bool) -> str:
        """Return one of the ways to say it."""
        return self._said(rng.choice(CHINESE_TEMPLATES if chinese else TEMPLATES), chinese)

    def motion(self, rng: random.Random, chinese: bool) -> str:
        """Return one of the ways to say where it moves, and nothing else."""
        return self._said(rng.choice(CHINESE_MOTIONS if chinese else MOTIONS), chinese)

    def _said(self, template: str, chinese: bool) -> str:
        names = {field: getattr(self, field) for field in self.__slots__}
        return template.format(**{field: CHINESE[name] if chinese else name for field, name in names.items()})


def scenes() -> tuple[list[Scene], list[Scene]]:
    """Return (training, held out): every combination is in one of the two, whatever its caption."""
    every = [Scene(*names) for names in itertools.product(COLOURS, SHAPES, BACKGROUNDS, DIRECTIONS)]
    random.Random(0).shuffle(every)
    return every[NUM_HELD_OUT:], every[:NUM_HELD_OUT]


def render(batch: list[Scene], generator: torch.Generator) -> Tensor:
    """Return clips [B, 3, F, H, W] in [-1, 1]; size, path and speed vary with the generator."""
    radius, aside, travel = _draw(len(batch), ((13, 16), (-7, 7), (22, 28)), generator)
    progress = torch.linspace(-0.5, 0.5, FRAMES)[None, :, None]
    return _paint(batch, radius, _path(batch, travel[:, None] * progress, aside))


def render_from(
    batch: list[Scene],
    generator: torch.Generator,
    frames: int = LONG_FRAMES,
    start: Range = START,
    aside: Range = ASIDE,
) -> Tensor:
    """Return clips [B, 3, F, H, W] in [-1, 1] whose first picture leaves open where its object goes.

    It begins `start` pixels from the middle along its way and `aside` across it, moves 14 to 18 in 8 frames, and is
    whole on most frames.
    """
    radius, aside_B1, travel, begin = _draw(len(batch), ((11, 14), aside, (14, 18), start), generator)
    radius = radius * torch.tensor([[LARGER.get(scene.shape, 1.0)] for scene in batch])
    progress = torch.arange(frames)[None, :, None] / (FRAMES - 1)
    return _paint(batch, radius, _path(batch, begin[:, None] + travel[:, None] * progress, aside_B1))


def _draw(count: int, ranges: tuple[Range, ...], generator: torch.Generator) -> list[Tensor]:
    """Return a number [B, 1] in each of the ranges for each clip."""
    return [low + (high - low) * torch.rand(count, 1, generator=generator) for low, high in ranges]


def _path(batch: list[Scene], along_BF1: Tensor, aside_B1: Tensor) -> Tensor:
    """Return centres [B, F, 2], `along` the scene's direction and `aside` of it from the middle."""
    heading = torch.tensor([DIRECTIONS[scene.direction] for scene in batch], dtype=torch.float32)
    across = heading.flip(1).abs()
    return SIZE / 2 + heading[:, None] * along_BF1 + (across * aside_B1)[:, None]


def _paint(batch: list[Scene], radius: Tensor, centre_BF2: Tensor) -> Tensor:
    """Return clips [B, 3, F, H, W] in [-1, 1] of objects of a radius [B, 1] at centres."""
    pixel = torch.arange(SIZE) + 0.5
    x_BFHW = pixel - centre_BF2[..., 0, None, None]
    y_BFHW = pixel[:, None] - centre_BF2[..., 1, None, None]
    x_BFHW, y_BFHW = torch.broadcast_tensors(x_BFHW, y_BFHW)
    cover_BFHW = torch.stack(
        [(0.5 - DISTANCES[scene.shape](x_BFHW[i], y_BFHW[i], radius[i])).clamp(0, 1) for i, scene in enumerate(batch)]
    )
    ink, paper = (
        torch.tensor([table[name] for name in names], dtype=torch.float32)[:, :, None, None, None] / 127.5 - 1
        for table, names in ((COLOURS, [s.colour for s in batch]), (BACKGROUNDS, [s.background for s in batch]))
    )
    return paper + (ink - paper) * cover_BFHW[:, None]


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(x, y) - radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.86 * radius


def _polygon(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Signed distance (negative inside) to a closed polygon."""
    nearest = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, torch.hypot(x - ax - along * ex, y - ay - along * ey))
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < ax + (y - ay) * ex / (ey if ey else 1e-9))
    return torch.where(inside, -nearest, nearest)


def _regular(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star with its first point up, unit circumradius; `inner` is the radius of the dents."""
    turns = [math.pi * i / points for i in range(2 * points)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(2 * points)]
    return [(r * math.sin(turn), -r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)]


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    size = 1.15 * float(radius)
    return _polygon(x, y, [(size * cx, size * cy) for cx, cy in _regular(3, 0.5)])


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    size = 1.2 * float(radius)
    return _polygon(x, y, [(size * cx, size * cy) for cx, cy in _regular(5, 0.42)])


DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}
