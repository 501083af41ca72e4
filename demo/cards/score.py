"""Read a picture of the corpus's kind by arithmetic alone: which card, which word, in which ink, at which place?"""
# H W pixels, N glyphs, K number of glyphs of a word

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import corpus
from .corpus import CARD, LONGEST, Scene
from .glyphs import CELL, GLYPHS, bitmaps

ATTRIBUTES = ("word", "ink", "card", "place")
CARD_TOLERANCE = 45  # of 255: a pixel this near a card colour may belong to the card
MIN_CARD_SHARE = 0.5  # of the card's area that must have its colour; the longest word covers a twelfth of it
MIN_CONTRAST = 60  # of 255: the weakest ink, purple on gray, differs by 118
MIN_LIKENESS = 0.8  # correlation of a glyph with its bitmap; what the VAE alone does to a picture leaves 0.87
MAX_PLACE_ERROR = 6  # pixels between the word and where the place has it; two places are 16 apart at least
RIM = 2  # pixels around the card that count as its edge, neither card nor backdrop


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a picture shows; an attribute is "" where nothing clear is seen, a glyph "?" that is like none.

    `likeness` is the lowest correlation of a glyph with its bitmap; `corner` (top, left) of the card in pixels.
    """

    word: str
    ink: str
    card: str
    place: str
    likeness: float
    corner: tuple[int, int]


def judge(picture_HWC: Tensor) -> Verdict:
    """Return what a picture [112, 112, 3] with values in [0, 1] shows."""
    pixels = picture_HWC.float() * 255
    card, (top, left), is_clear = _find_card(pixels)
    if not is_clear:
        return Verdict("", "", "", "", 0.0, (top, left))
    on_card = pixels[top : top + CARD, left : left + CARD]
    paper = _middle(on_card[(on_card - torch.tensor(corpus.CARDS[card])).norm(dim=-1) < CARD_TOLERANCE])
    contrast = (on_card[RIM:-RIM, RIM:-RIM] - paper).norm(dim=-1)
    strongest = contrast.flatten().topk(15).values.min()  # the thinnest glyph, 1, has about 46 pixels
    if strongest < MIN_CONTRAST:
        return Verdict("", "", card, "", 0.0, (top, left))
    ink = _nearest(_middle(on_card[RIM:-RIM, RIM:-RIM][contrast > 0.7 * strongest]), corpus.INKS)
    towards = torch.tensor(corpus.INKS[ink]) - paper
    cover = ((on_card - paper) @ towards / towards.square().sum()).clamp(-0.2, 1.2)
    word, likeness, corner = _read(cover)
    return Verdict(word, ink, card, _place(len(word), corner), likeness, (top, left))


def matches(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Say for each attribute whether the picture shows what was asked for."""
    return {name: getattr(verdict, name) == getattr(scene, name) for name in ATTRIBUTES}


def glyphs_right(verdict: Verdict, scene: Scene) -> float:
    """Return the share of glyphs that stand where they were asked for; missing and superfluous ones are wrong."""
    right = sum(a == b for a, b in zip(verdict.word, scene.word, strict=False))
    return right / max(len(verdict.word), len(scene.word))


def rates(verdicts: list[Verdict], scenes: list[Scene]) -> dict[str, float]:
    """Return the share that is right per attribute, per glyph, and ("all") of pictures right in every attribute."""
    rows = [matches(verdict, scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    shares = {name: sum(row[name] for row in rows) / len(rows) for name in ATTRIBUTES}
    glyphs = [glyphs_right(verdict, scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    weights = [len(scene.word) for scene in scenes]
    shares["glyphs"] = sum(g * w for g, w in zip(glyphs, weights, strict=True)) / sum(weights)
    return shares | {"all": sum(all(row.values()) for row in rows) / len(rows)}


def chance(verdicts: list[Verdict], scenes: list[Scene]) -> dict[str, float]:
    """Return the rates when every picture is judged against every other picture's prompt: what luck would score.

    Raises ValueError for a single picture, which has no other.
    """
    if len(verdicts) < 2:
        raise ValueError("chance needs at least 2 pictures, got 1: ask for more prompts")
    shifted = [rates(verdicts, scenes[shift:] + scenes[:shift]) for shift in range(1, len(scenes))]
    return {name: sum(row[name] for row in shifted) / len(shifted) for name in shifted[0]}


def carried_out(verdict: Verdict, edited: Scene, kind: str) -> dict[str, bool]:
    """Say whether an edit of `kind` was done with the word still right, and whether all the rest stayed too."""
    right = matches(verdict, edited)
    return {"done": right[kind] and right["word"], "kept": all(ok for name, ok in right.items() if name != kind)}


def outside_card(picture_HWC: Tensor, source_HWC: Tensor) -> float:
    """Return the mean absolute difference, in 255ths, between two pictures where neither shows the source's card."""
    _, (top, left), _ = _find_card(source_HWC.float() * 255)
    outside = torch.ones(source_HWC.shape[:2], dtype=torch.bool)
    outside[max(0, top - RIM) : top + CARD + RIM, max(0, left - RIM) : left + CARD + RIM] = False
    return (picture_HWC - source_HWC)[outside].abs().mean().item() * 255


def _find_card(pixels: Tensor) -> tuple[str, tuple[int, int], bool]:
    """Return the colour of the card, its (top, left), and whether it is really there."""
    colours = torch.tensor(list(corpus.CARDS.values()), dtype=torch.float32)
    # A colour counts the more the nearer it is: some backdrops come within the tolerance of a gray card.
    near = (1 - (pixels[None] - colours[:, None, None]).norm(dim=-1) / CARD_TOLERANCE).clamp_min(0)
    size = (CARD, CARD)
    shares = F.avg_pool2d(near[:, None], size, stride=1)[:, 0]
    best = int(shares.flatten(1).amax(dim=1).argmax())
    share = shares[best]
    # Ink may leave several boxes equally full: the middle of the best ones is the card.
    tied = torch.nonzero(share > share.max() - 0.5 / (CARD**2))
    top, left = tied.float().mean(dim=0).round().int().tolist()
    return list(corpus.CARDS)[best], (top, left), bool(share.max() > MIN_CARD_SHARE)


def _read(cover_HW: Tensor) -> tuple[str, float, tuple[int, int]]:
    """Return the word, its worst glyph's likeness and its (top, left) on the card.

    Of all words of 1 to 3 cells at all places the one is taken that leaves the least squares unexplained.
    """
    glyphs = bitmaps()
    cells = F.unfold(cover_HW[None, None], CELL)[0]  # [256, positions]
    size = (cover_HW.shape[0] - CELL + 1, cover_HW.shape[1] - CELL + 1)
    energy = cells.square().sum(dim=0).view(size)
    products = (glyphs.flatten(1) @ cells).view(-1, *size)
    misfit, chosen = (glyphs.square().sum(dim=(1, 2))[:, None, None] - 2 * products).min(dim=0)
    best = (float("inf"), 0, 0, 0)
    for count in range(1, LONGEST + 1):
        width = energy.shape[1] - (count - 1) * CELL
        total = sum(misfit[:, i * CELL : i * CELL + width] for i in range(count))
        y, x = divmod(int(total.argmin()), width)
        best = min(best, (total[y, x].item(), count, y, x))
    _, count, y, x = best
    word, likenesses = "", []
    for column in range(x, x + count * CELL, CELL):
        index = int(chosen[y, column])
        length = (energy[y, column] * glyphs[index].square().sum()).sqrt().clamp_min(1e-6)
        likenesses.append((products[index, y, column] / length).item())
        word += GLYPHS[index] if likenesses[-1] >= MIN_LIKENESS else "?"
    return word, min(likenesses), (y, x)


def _place(num_glyphs: int, corner: tuple[int, int]) -> str:
    def error(place: str) -> float:
        ideal = corpus.word_corner(num_glyphs, place)
        return max(abs(a - b) for a, b in zip(corner, ideal, strict=True))

    best = min(corpus.PLACES, key=error)
    return best if error(best) <= MAX_PLACE_ERROR else ""


def _middle(pixels: Tensor) -> Tensor:
    return pixels.reshape(-1, 3).median(dim=0).values


def _nearest(colour: Tensor, table: dict[str, tuple[int, int, int]]) -> str:
    return min(table, key=lambda name: (colour - torch.tensor(table[name])).norm().item())
