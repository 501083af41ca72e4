"""Draw prompts the miniature has never seen, generate their clips through the whole pipeline, judge and show them."""

import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ... import media
from ...core import runtime
from ...core.types import Conditioning, SampleRequest
from ...loading import DEMO_FOLDER, load_model, load_text_encoder, load_vae
from ...wan.family import LATENT_FORMAT
from .. import sheet
from . import corpus, score
from .corpus import Scene

log = logging.getLogger(__name__)

STEPS, GUIDANCE, SHIFT, FPS = 12, 2.5, 3.0, 8
LATENT_SHAPE = LATENT_FORMAT.shape(1, corpus.FRAMES, corpus.SIZE, corpus.SIZE)
SHOWN_FRAMES = (0, 4, 8)


@dataclass(frozen=True, slots=True)
class Clip:
    """One generated clip: what was asked for, how, and the pixels [F, H, W, 3] in [0, 1].

    `given` are the pictures [H, W, 3] that it was made from.
    """

    scene: Scene
    caption: str
    frames: Tensor
    seconds: float
    given: tuple[Tensor, ...] = ()


class Pipeline:
    """The three miniature checkpoints, opened as any others are."""

    def __init__(self, folder: Path = DEMO_FOLDER):
        self.model = load_model(folder / "wan_dit.safetensors")
        self.text_encoder = load_text_encoder(folder / "wan_text_encoder.safetensors")
        self.vae = load_vae(folder / "wan_vae.safetensors")

    def clip(self, scene: Scene, caption: str, seed: int, blind: bool = False) -> Clip:
        """Return the clip of a caption; `blind` takes the text away, to show that it is the text that steers."""
        started = time.perf_counter()
        positive, negative = self.text_encoder.encode([caption, ""])
        if blind:
            positive = Conditioning(text=torch.zeros_like(positive.text))
        request = SampleRequest(
            latent=torch.zeros(LATENT_SHAPE), positive=positive, negative=negative, seed=seed,
            steps=STEPS, guidance=(GUIDANCE,), shift=SHIFT,
        )  # fmt: skip
        frames = self.vae.decode(runtime.generate(self.model, request))[0]
        return Clip(scene, caption, frames, time.perf_counter() - started)


def unseen_prompts(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Return scenes held out of the training, each once until all are used, with English and Chinese captions."""
    _, held_out = corpus.scenes()
    rng, drawn = random.Random(seed), []
    while len(drawn) < count:
        drawn += rng.sample(held_out, len(held_out))
    return [(scene, scene.caption(rng, chinese=i % 3 == 2)) for i, scene in enumerate(drawn[:count])]


def generate_clips(count: int, seed: int, blind: bool = False) -> list[Clip]:
    """Return clips of `count` unseen prompts; prompts and noise follow from the seed alone."""
    pipeline = Pipeline()
    prompts = unseen_prompts(count, seed)
    return [pipeline.clip(scene, caption, seed + i, blind) for i, (scene, caption) in enumerate(prompts)]


def report(clips: list[Clip], what: str = "unseen prompts") -> str:
    """Return the score of clips as a table, chance level beside it."""
    verdicts, scenes = [score.judge(clip.frames) for clip in clips], [clip.scene for clip in clips]
    reached = score.rates(verdicts, scenes)
    luck = score.chance(verdicts, scenes) if len(clips) > 1 else dict.fromkeys(reached, float("nan"))
    lines = [f"{len(clips)} {what}, {sum(c.seconds for c in clips) / len(clips):.2f} s a clip"]
    lines += [f"  {name:<11}{reached[name]:6.1%}   chance {luck[name]:6.1%}" for name in (*score.ATTRIBUTES, "all")]
    return "\n".join(lines)


def write_sheet(path: Path, clips: list[Clip]) -> None:
    """Write a PNG with a row for each clip: what it was made from, three of its frames, what was asked for and seen."""
    rows = []
    for clip in clips:
        verdict = score.judge(clip.frames)
        wrong = tuple(name for name, right in score.matches(verdict, clip.scene).items() if not right)
        seen = f"{verdict.colour} {verdict.shape}, {verdict.background}, {verdict.direction}"
        frames = (*clip.given, *(clip.frames[i] for i in SHOWN_FRAMES))
        rows.append(
            sheet.Row(pictures=frames, asked=clip.caption, asked_in_ascii=str(clip.scene), seen=seen, wrong=wrong)
        )
    sheet.write(path, rows)


def write_video(path: Path, clips: list[Clip]) -> None:
    """Write all clips side by side as one mp4, four in a row; what is missing in the last row stays white."""
    columns = min(4, len(clips))
    frames = [clip.frames for clip in clips]
    frames += [torch.ones_like(frames[0])] * (-len(frames) % columns)
    rows = [torch.cat(frames[i : i + columns], dim=2) for i in range(0, len(frames), columns)]
    grid = torch.cat(rows, dim=1)
    media.write_mp4(path, grid, FPS, enlarge=4)


def run(count: int, seed: int, out: Path, *, blind: bool) -> str:
    """Make `count` clips, write them to `out` as one video and as a contact sheet, and return their score as text."""
    clips, video, page = generate_clips(count, seed, blind), out / "demo.mp4", out / "demo.png"
    write_video(video, clips)
    write_sheet(page, clips)
    return f"{report(clips)}\nseed {seed}\nvideo: {video.resolve()}\ncontact sheet: {page.resolve()}\n"
