"""Prompts and edits that the miniature Qwen-Image has never seen, run through the whole pipeline and judged."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core import runtime
from ...core.types import Conditioning, SampleRequest
from ...loading import DEMO_FOLDER, load_model, load_text_encoder, load_vae
from ...qwen_image.config import VARIANTS
from ...qwen_image.editing import ALIGNED, lay_out
from ...qwen_image.family import LATENT_FORMAT
from .. import sheet
from . import corpus, score
from .corpus import Edit, Scene

STEPS, GUIDANCE, EDIT_GUIDANCE, NEGATIVE = 12, 3.0, 1.5, " "
LATENT_SHAPE = LATENT_FORMAT.shape(1, 1, corpus.SIZE, corpus.SIZE)
KINDS = tuple(corpus.VALUES)


@dataclass(frozen=True, slots=True)
class Wish:
    """What to make: `scene` is what the picture shall show in the end; an edit starts from `source` [H, W, 3]."""

    scene: Scene
    words: str
    edit: Edit | None = None
    source: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """One wish come true: pixels [H, W, 3] in [0, 1]."""

    wish: Wish
    pixels: Tensor
    seconds: float


class Pipeline:
    """The miniature checkpoints, opened as any others are."""

    def __init__(self, folder: Path = DEMO_FOLDER):
        self.writer = load_model(folder / "qwen_dit.safetensors")
        self.editor = load_model(folder / "qwen_edit_dit.safetensors")
        self.text_encoder = load_text_encoder(folder / "qwen_text_encoder.safetensors")
        self.vae = load_vae(folder / "qwen_vae.safetensors")

    def picture(self, wish: Wish, seed: int, blind: bool = False) -> Picture:
        """Return the picture of a wish; `blind` takes the text away, to show that it is the text that steers."""
        started = time.perf_counter()
        model, guidance = (self.writer, GUIDANCE) if wish.source is None else (self.editor, EDIT_GUIDANCE)
        positive, negative = self._conditionings(wish)
        if blind:
            positive = Conditioning(text=torch.zeros_like(positive.text), references=positive.references)
        request = SampleRequest(
            latent=torch.zeros(LATENT_SHAPE), positive=positive, negative=negative, seed=seed,
            steps=STEPS, guidance=(guidance,), solver="euler",
        )  # fmt: skip
        pixels = self.vae.decode(runtime.generate(model, request))[0, 0]
        return Picture(wish, pixels, time.perf_counter() - started)

    def _conditionings(self, wish: Wish) -> list[Conditioning]:
        words = [wish.words, NEGATIVE]
        if wish.source is None:
            return self.text_encoder.encode(words)
        return lay_out([wish.source], VARIANTS["edit"], ALIGNED).encode(words, self.text_encoder, self.vae)


def unseen_prompts(count: int, seed: int) -> list[Wish]:
    """Return scenes held out of the training, words and looks, with English and Chinese captions."""
    rng = random.Random(seed)
    scenes = [corpus.draw_scene(rng, held_out=True) for _ in range(count)]
    return [Wish(scene, scene.caption(rng, chinese=i % 3 == 2)) for i, scene in enumerate(scenes)]


def unseen_edits(count: int, seed: int) -> list[Wish]:
    """Return edits of pictures held out of the training, each kind of edit as often as the others."""
    rng, wishes = random.Random(seed), []
    for i in range(count):
        scene = corpus.draw_scene(rng, held_out=True)
        edit = corpus.draw_edit(rng, scene, held_out=True, kind=KINDS[i % len(KINDS)])
        [source] = corpus.render([scene], [corpus.draw_setting(rng)])
        words = edit.instruction(rng, chinese=i // len(KINDS) % 3 == 2)
        wishes.append(Wish(edit.apply(scene), words, edit, source.movedim(0, -1) / 2 + 0.5))
    return wishes


def generate(wishes: list[Wish], seed: int, blind: bool = False) -> list[Picture]:
    """Return the pictures of wishes; the noise follows from the seed alone."""
    pipeline = Pipeline()
    return [pipeline.picture(wish, seed + i, blind) for i, wish in enumerate(wishes)]


def report(pictures: list[Picture]) -> str:
    """Return the score of pictures written from text as a table, chance level beside it."""
    verdicts, scenes = [score.judge(p.pixels) for p in pictures], [p.wish.scene for p in pictures]
    reached = score.rates(verdicts, scenes)
    luck = score.chance(verdicts, scenes) if len(pictures) > 1 else dict.fromkeys(reached, float("nan"))
    lines = [f"{len(pictures)} unseen prompts, {sum(p.seconds for p in pictures) / len(pictures):.2f} s a picture"]
    return "\n".join(lines + [f"  {name:<11}{rate:6.1%}   chance {luck[name]:6.1%}" for name, rate in reached.items()])


@dataclass(frozen=True, slots=True)
class EditRates:
    """Shares of edits: `done` per kind and over all, `kept` where nothing else changed; and the pixels around the card.

    `outside` is the mean absolute difference from the source outside its card, in 255ths.
    """

    done: dict[str, float]
    kept: float
    outside: float


def edit_rates(pictures: list[Picture]) -> EditRates:
    """Return how well edits went."""
    rows = [
        (p.wish.edit.kind, score.carried_out(score.judge(p.pixels), p.wish.scene, p.wish.edit.kind)) for p in pictures
    ]
    of_kind = {kind: [row["done"] for k, row in rows if k == kind] for kind in KINDS}
    done = {kind: sum(of) / len(of) for kind, of in of_kind.items() if of}
    outside = [score.outside_card(p.pixels, p.wish.source) for p in pictures]
    return EditRates(
        done | {"all": sum(row["done"] for _, row in rows) / len(rows)},
        sum(row["kept"] for _, row in rows) / len(rows),
        sum(outside) / len(outside),
    )


def edit_report(pictures: list[Picture]) -> str:
    """Return the score of edits as a table."""
    rates = edit_rates(pictures)
    lines = [f"{len(pictures)} unseen edits, {sum(p.seconds for p in pictures) / len(pictures):.2f} s an edit"]
    lines += [f"  {kind:<11}{rate:6.1%} carried out" for kind, rate in rates.done.items()]
    lines += [
        f"  {'the rest':<11}{rates.kept:6.1%} kept",
        f"  {'around':<11}{rates.outside:6.2f} / 255 from the source",
    ]
    return "\n".join(lines)


def write_sheet(path: Path, pictures: list[Picture]) -> None:
    """Write a PNG with a row for each picture: its source if it has one, the words, and what the judge saw."""
    rows = []
    for picture in pictures:
        verdict, wish = score.judge(picture.pixels), picture.wish
        wrong = tuple(name for name, right in score.matches(verdict, wish.scene).items() if not right)
        seen = f"{verdict.word or 'nothing'} in {verdict.ink}, {verdict.place}, on {verdict.card}"
        shown = (picture.pixels,) if wish.source is None else (wish.source, picture.pixels)
        rows.append(
            sheet.Row(pictures=shown, asked=wish.words, asked_in_ascii=ascii(wish.scene), seen=seen, wrong=wrong)
        )
    sheet.write(path, rows)


def run(count: int, seed: int, out: Path, *, blind: bool) -> str:
    """Make `count` pictures and `count` edits, write contact sheets to `out`, and return the scores as text."""
    pictures = generate(unseen_prompts(count, seed), seed, blind)
    edits = generate(unseen_edits(count, seed), seed, blind)
    pages = (out / "demo_cards.png", out / "demo_edits.png")
    for page, made in zip(pages, (pictures, edits), strict=True):
        write_sheet(page, made)
    listed = "".join(f"contact sheet: {page.resolve()}\n" for page in pages)
    return f"{report(pictures)}\n{edit_report(edits)}\nseed {seed}\n{listed}"
