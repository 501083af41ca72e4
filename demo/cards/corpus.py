"""The procedural corpus of the miniature Qwen-Image: a word of 1 to 3 glyphs on a card, and edits of such pictures."""
# B pictures, H W pixels; pixels are RGB in [-1, 1]

import random
import zlib
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from .glyphs import CELL, GLYPHS, bitmaps

SIZE = 112  # pixels, both sides: 7 x 7 tokens
CARD = 96  # pixels, both sides
EDGE = (SIZE - CARD) // 2  # pixels of backdrop around the card
MARGIN = 8  # pixels between the edge of the card and a word in its corner: words stand on the grid of the tokens
LONGEST = 3  # glyphs of a word

# Ink and card colours are two disjoint lists, so that a caption never names one colour in two roles.
INKS = {
    "red": (215, 25, 30),
    "green": (20, 160, 55),
    "blue": (30, 65, 225),
    "yellow": (250, 220, 30),
    "purple": (150, 30, 190),
    "orange": (250, 130, 15),
}
CARDS = {
    "white": (245, 245, 245),
    "black": (15, 15, 18),
    "gray": (128, 128, 128),
    "pink": (250, 190, 205),
    "brown": (105, 65, 35),
}
# Where the free space between word and card goes: (share on the left, share above).
PLACES = {
    "top left": (0.0, 0.0),
    "top right": (1.0, 0.0),
    "bottom left": (0.0, 1.0),
    "bottom right": (1.0, 1.0),
    "centre": (0.5, 0.5),
}
TINTS = ((60, 150, 160), (110, 160, 215), (140, 175, 110), (205, 180, 110), (160, 145, 215))  # of the backdrop
TINT_SPREAD = 14  # of 255, around a tint

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "white": "白色", "black": "黑色", "gray": "灰色", "pink": "粉色", "brown": "棕色",
    "top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角", "centre": "中间",
}  # fmt: skip
TEMPLATES = (
    "the word {word} in {ink}, {place}, on a {card} card",
    "{card} card, {ink} text {word}, {place}",
)
CHINESE_TEMPLATES = (
    "{card}卡片的{place}写着{ink}的{word}",
    "{card}卡片,{place},{ink}文字{word}",
)
INSTRUCTIONS = {
    "ink": ("make the text {to}", "change the text to {to}", "turn the word {to}"),
    "card": ("make the card {to}", "change the card to {to}", "turn the card {to}"),
    "place": ("move it to the {to}", "move the text to the {to}", "put the word at the {to}"),
}
CHINESE_INSTRUCTIONS = {
    "ink": ("把文字改成{to}", "让文字变成{to}"),
    "card": ("把卡片改成{to}", "让卡片变成{to}"),
    "place": ("把文字移到{to}", "将它移到{to}"),
}
VALUES = {"ink": tuple(INKS), "card": tuple(CARDS), "place": tuple(PLACES)}
CHINESE_SHARE = 0.4
HELD_OUT_SHARE = 8  # one word in so many, and one combination of ink, card and place in so many


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows."""

    word: str
    ink: str
    card: str
    place: str

    def caption(self, rng: random.Random, chinese: bool) -> str:
        """Return one of the ways to say it."""
        names = {field: getattr(self, field) for field in self.__slots__}
        if chinese:
            return rng.choice(CHINESE_TEMPLATES).format(**{f: CHINESE.get(name, name) for f, name in names.items()})
        return rng.choice(TEMPLATES).format(**names)

    @property
    def is_held_out(self) -> bool:
        """Whether nothing of this kind is ever trained on: the word is not, or the combination of the rest is not."""
        return is_held_out_word(self.word) or is_held_out_look(self)


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of a scene: `kind` ink, card or place becomes `to`."""

    kind: str
    to: str

    def apply(self, scene: Scene) -> Scene:
        """Return the scene afterwards; all the rest stays."""
        return replace(scene, **{self.kind: self.to})

    def instruction(self, rng: random.Random, chinese: bool) -> str:
        """Return one of the ways to say it."""
        if chinese:
            return rng.choice(CHINESE_INSTRUCTIONS[self.kind]).format(to=CHINESE[self.to])
        return rng.choice(INSTRUCTIONS[self.kind]).format(to=self.to)


def is_chinese(rng: random.Random) -> bool:
    """Draw the language of a caption or an instruction to train on."""
    return rng.random() < CHINESE_SHARE


def is_held_out_word(word: str) -> bool:
    """Say whether a word is kept from training, by its checksum alone."""
    return zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0


def is_held_out_look(scene: Scene) -> bool:
    """Say whether a combination of ink, card and place is kept from training."""
    looks = sorted(product(INKS, CARDS, PLACES))
    random.Random(0).shuffle(looks)
    return (scene.ink, scene.card, scene.place) in looks[: len(looks) // HELD_OUT_SHARE]


def draw_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Return a random scene: with `held_out` both its word and its look are new, else neither is."""
    while True:
        word = "".join(rng.choices(GLYPHS, k=rng.randint(1, LONGEST)))
        if is_held_out_word(word) == held_out:
            break
    while True:
        scene = Scene(word, *(rng.choice(VALUES[kind]) for kind in VALUES))
        if is_held_out_look(scene) == held_out:
            return scene


def draw_edit(rng: random.Random, scene: Scene, *, held_out: bool, kind: str | None = None) -> Edit:
    """Return a random edit that changes something; without `held_out` it leads to no look kept from training."""
    while True:
        drawn = kind or rng.choice(tuple(VALUES))
        edit = Edit(drawn, rng.choice([value for value in VALUES[drawn] if value != getattr(scene, drawn)]))
        if held_out or not is_held_out_look(edit.apply(scene)):
            return edit


@dataclass(frozen=True, slots=True)
class Setting:
    """What no caption tells and no edit changes: the backdrop, which goes from one tint to another."""

    tints: tuple[tuple[float, float, float], tuple[float, float, float]]
    direction: tuple[float, float]


def draw_setting(rng: random.Random) -> Setting:
    """Return a random setting."""
    first, second = (tuple(c + rng.uniform(-TINT_SPREAD, TINT_SPREAD) for c in rng.choice(TINTS)) for _ in range(2))
    return Setting((first, second), (rng.uniform(-1, 1), rng.uniform(-1, 1)))


def word_corner(num_glyphs: int, place: str) -> tuple[int, int]:
    """Return (top, left) of a word in pixels from the card's corner; two glyphs stand left of the middle."""
    left, above = PLACES[place]
    free = ((CARD - 2 * MARGIN) // CELL - 1, (CARD - 2 * MARGIN) // CELL - num_glyphs)  # cells, down and across
    return MARGIN + int(above * free[0]) * CELL, MARGIN + int(left * free[1]) * CELL


def word_box(scene: Scene) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of the word's cells in pixels of the picture."""
    top, left = (EDGE + corner for corner in word_corner(len(scene.word), scene.place))
    return top, left, top + CELL, left + len(scene.word) * CELL


def render(scenes: list[Scene], settings: list[Setting]) -> Tensor:
    """Return pictures [B, 3, H, W] in [-1, 1]."""
    glyphs = bitmaps()
    return torch.stack([_picture(*pair, glyphs) for pair in zip(scenes, settings, strict=True)]) / 127.5 - 1


def _picture(scene: Scene, setting: Setting, glyphs: Tensor) -> Tensor:
    """Return one picture [3, H, W] in 0..255."""
    axis = torch.linspace(-0.5, 0.5, SIZE)
    share = 0.5 + (setting.direction[0] * axis + setting.direction[1] * axis[:, None]) / 2
    start, end = (torch.tensor(tint)[:, None, None] for tint in setting.tints)
    picture = start + (end - start) * share
    picture[:, EDGE:-EDGE, EDGE:-EDGE] = torch.tensor(CARDS[scene.card])[:, None, None]
    top, left, bottom, _ = word_box(scene)
    ink = torch.tensor(INKS[scene.ink])[:, None, None]
    for i, glyph in enumerate(scene.word):
        cell = picture[:, top:bottom, left + i * CELL : left + (i + 1) * CELL]
        cell += (ink - cell) * glyphs[GLYPHS.index(glyph)]
    return picture
