"""Make clips from pictures that the miniatures have never seen, through the whole pipeline, judge and show them."""
# H W pixels

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...core import runtime
from ...core.types import SampleRequest
from ...loading import DEMO_FOLDER, load_image_encoder, load_model, load_text_encoder, load_vae
from ...wan.pictures import Known, known_frames
from . import corpus, score, show
from .corpus import Scene
from .show import Clip

GUIDANCE = {"i2v": 4.0, "flf2v": 2.5}
LAST = corpus.FRAMES - 1
LATER = 4  # clips are judged once more from this frame on: shapes are lost there first
KINDS = {"i2v": (0,), "flf2v": (0, LAST)}  # the frames that are given
TITLES = {"i2v": "from a first frame", "flf2v": "from a first and a last frame"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A clip that a picture is taken from: what it shows, its pixels [F, H, W, 3] in [0, 1], and what is asked for."""

    scene: Scene
    caption: str
    frames: Tensor


class Pipeline:
    """The miniature checkpoints that make clips from pictures, opened as any others are."""

    def __init__(self, folder: Path = DEMO_FOLDER):
        self.models = {kind: load_model(folder / f"wan_{kind}_dit.safetensors") for kind in KINDS}
        self.text_encoder = load_text_encoder(folder / "wan_text_encoder.safetensors")
        self.image_encoder = load_image_encoder(folder / "wan_image_encoder.safetensors")
        self.vae = load_vae(folder / "wan_vae.safetensors")

    def clip(self, kind: str, wanted: Wanted, seed: int, blind: bool = False) -> Clip:
        """Return a clip of what is wanted, given frames of it; `blind` takes the prompt away, the pictures stay."""
        started = time.perf_counter()
        given = {i: wanted.frames[i] for i in KINDS[kind]}
        known = known_frames(self.vae, given, corpus.FRAMES, corpus.SIZE, corpus.SIZE)
        request = self.request(kind, "" if blind else wanted.caption, given, known, seed)
        frames = self.vae.decode(runtime.generate(self.models[kind], request))[0]
        return Clip(wanted.scene, wanted.caption, frames, time.perf_counter() - started, tuple(given.values()))

    def request(self, kind: str, caption: str, given: Mapping[int, Tensor], known: Known, seed: int) -> SampleRequest:
        """Return what to sample for a caption, pictures, and what they are in the model's own terms."""
        rows = self.image_encoder.encode(torch.stack(list(given.values()))).flatten(0, 1)[None]
        positive, negative = (
            replace(prompt, image=rows, extra=known.channels) for prompt in self.text_encoder.encode([caption, ""])
        )
        return SampleRequest(
            latent=torch.zeros(show.LATENT_SHAPE), positive=positive, negative=negative, seed=seed,
            steps=show.STEPS, guidance=(GUIDANCE[kind],), shift=show.SHIFT,
        )  # fmt: skip


def unseen(
    count: int,
    seed: int,
    *,
    start: corpus.Range = corpus.START,
    aside: corpus.Range = corpus.ASIDE,
    frames: int = corpus.FRAMES,
) -> list[Wanted]:
    """Return clips of scenes held out of the training; every other caption says where to and nothing else.

    Objects begin within `start` and `aside` of the middle, in pixels along their way and across it.
    """
    prompts, rng, wanted = show.unseen_prompts(count, seed), random.Random(seed), []
    generator, scenes = torch.Generator().manual_seed(seed), [scene for scene, _ in prompts]
    clips = corpus.render_from(scenes, generator, frames, start, aside).movedim(1, -1) / 2 + 0.5
    for i, (scene, caption) in enumerate(prompts):
        motion = scene.motion(rng, chinese=i % 3 == 2)
        wanted.append(Wanted(scene=scene, caption=caption if i % 2 else motion, frames=clips[i]))
    return wanted


def generate_clips(kind: str, wanted: list[Wanted], seed: int, blind: bool = False) -> list[Clip]:
    """Return a clip of each that is wanted; the noise follows from the seed alone."""
    pipeline = Pipeline()
    return [pipeline.clip(kind, one, seed + i, blind) for i, one in enumerate(wanted)]


def losses(clips: list[Clip], wanted: list[Wanted], frame: int) -> list[float]:
    """Return by how many dB PSNR each clip has a given frame worse than the VAE has it that encodes the whole clip."""
    vae = load_vae(DEMO_FOLDER / "wan_vae.safetensors")
    found = []
    for clip, one in zip(clips, wanted, strict=True):
        given_back = vae.decode(vae.encode(one.frames))[0]
        found.append(_likeness(given_back, one, frame) - _likeness(clip.frames, one, frame))
    return found


def misses(clips: list[Clip], wanted: list[Wanted]) -> list[float]:
    """Return how many pixels from its place in the wanted last frame each clip's object ends."""
    ends = [[_end(frames) for frames in (clip.frames, one.frames)] for clip, one in zip(clips, wanted, strict=True)]
    return [(there - wished).norm().item() for there, wished in ends]


def _likeness(frames: Tensor, wanted: Wanted, frame: int) -> float:
    return score.psnr(frames[frame], wanted.frames[frame])


def _end(frames: Tensor) -> Tensor:
    return score.centres(score.objects(frames)[1])[-1]


def report(kind: str, clips: list[Clip], wanted: list[Wanted]) -> str:
    """Return the score of clips as a table, and how well they keep what was given."""
    later = score.rates([score.judge(clip.frames[LATER:]) for clip in clips], [clip.scene for clip in clips])
    alone = f"  all of the last {corpus.FRAMES - LATER} frames alone: {later['all']:.1%}"
    lines = [show.report(clips, f"clips {TITLES[kind]}"), alone]
    for frame in KINDS[kind]:
        lost = losses(clips, wanted, frame)
        reached = sum(_likeness(clip.frames, one, frame) for clip, one in zip(clips, wanted, strict=True)) / len(clips)
        lines.append(
            f"  frame {frame + 1}: {reached:.1f} dB PSNR to the picture, {sum(lost) / len(lost):+.2f} dB below the VAE "
            f"alone (at worst {max(lost):+.2f})"
        )
    if LAST in KINDS[kind]:
        away = misses(clips, wanted)
        lines.append(f"  the object ends {sum(away) / len(away):.1f} pixels from its place (at worst {max(away):.1f})")
    return "\n".join(lines)


def run(count: int, seed: int, out: Path, *, blind: bool) -> str:
    """Make `count` clips of each kind, write them to `out` as videos and contact sheets, and return their scores."""
    parts, wanted = [], unseen(count, seed)
    for kind in KINDS:
        clips, video, page = (
            generate_clips(kind, wanted, seed, blind),
            out / f"demo_{kind}.mp4",
            out / f"demo_{kind}.png",
        )
        show.write_video(video, clips)
        show.write_sheet(page, clips)
        parts.append(f"{report(kind, clips, wanted)}\nvideo: {video.resolve()}\ncontact sheet: {page.resolve()}\n")
    return "".join(parts)
