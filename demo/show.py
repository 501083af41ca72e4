"""Draw prompts the miniature has never seen, generate their clips through the whole pipeline, judge and show them."""

import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import media
from ..core import runtime
from ..core.types import Conditioning, SampleRequest
from ..loading import DEMO_FOLDER, load_model, load_text_encoder, load_vae
from ..wan.family import LATENT_FORMAT
from . import corpus, score
from .corpus import Scene

log = logging.getLogger(__name__)

STEPS, GUIDANCE, SHIFT, FPS = 12, 2.5, 3.0, 8
LATENT_SHAPE = LATENT_FORMAT.shape(1, corpus.FRAMES, corpus.SIZE, corpus.SIZE)
SHOWN_FRAMES = (0, 4, 8)
CHINESE_FONTS = ("wqy-microhei.ttc", "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "simhei.ttf")


@dataclass(frozen=True, slots=True)
class Clip:
    """One generated clip: what was asked for, how, and the pixels [F, H, W, 3] in [0, 1]."""

    scene: Scene
    caption: str
    frames: Tensor
    seconds: float


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


def report(clips: list[Clip]) -> str:
    """Return the score of clips as a table, chance level beside it."""
    verdicts, scenes = [score.judge(clip.frames) for clip in clips], [clip.scene for clip in clips]
    reached = score.rates(verdicts, scenes)
    luck = score.chance(verdicts, scenes) if len(clips) > 1 else dict.fromkeys(reached, float("nan"))
    lines = [f"{len(clips)} unseen prompts, {sum(c.seconds for c in clips) / len(clips):.2f} s a clip"]
    lines += [f"  {name:<11}{reached[name]:6.1%}   chance {luck[name]:6.1%}" for name in (*score.ATTRIBUTES, "all")]
    return "\n".join(lines)


def write_sheet(path: Path, clips: list[Clip]) -> None:
    """Write a PNG with a row for each clip: three of its frames, its caption, and what the judge saw."""
    from PIL import Image, ImageDraw, ImageFont

    scale, margin, text_width = 2, 6, 560
    side = corpus.SIZE * scale + margin
    sheet = Image.new("RGB", (side * len(SHOWN_FRAMES) + text_width, side * len(clips) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), _font(ImageFont)
    for row, clip in enumerate(clips):
        for column, frame in enumerate(SHOWN_FRAMES):
            image = Image.fromarray(media.to_bytes(clip.frames[frame])).resize((side - margin,) * 2, Image.NEAREST)
            sheet.paste(image, (margin + side * column, margin + side * row))
        verdict = score.judge(clip.frames)
        wrong = [name for name, right in score.matches(verdict, clip.scene).items() if not right]
        caption = clip.caption if clip.caption.isascii() or font is not None else f"(in Chinese) {clip.scene}"
        left, top = side * len(SHOWN_FRAMES) + 2 * margin, margin + side * row + 40
        draw.text((left, top), caption, fill="black", font=font)
        seen = f"seen: {verdict.colour} {verdict.shape}, {verdict.background}, {verdict.direction}"
        draw.text((left, top + 26), seen + (f"   WRONG: {', '.join(wrong)}" if wrong else ""), fill="gray", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _font(fonts):
    """Return a font with Chinese glyphs, or None (Pillow's own, which has none) where the machine has no such font."""
    for name in CHINESE_FONTS:
        try:
            return fonts.truetype(name, 17)
        except OSError:
            continue
    return None


def write_video(path: Path, clips: list[Clip]) -> None:
    """Write all clips side by side as one mp4, four in a row; what is missing in the last row stays white."""
    columns = min(4, len(clips))
    frames = [clip.frames for clip in clips]
    frames += [torch.ones_like(frames[0])] * (-len(frames) % columns)
    rows = [torch.cat(frames[i : i + columns], dim=2) for i in range(0, len(frames), columns)]
    grid = torch.cat(rows, dim=1)
    media.write_mp4(path, grid, FPS, enlarge=4)
