"""Join clips of the miniature in latent space and through pixels, and measure what happens at the join.

python -m wanqwen.demo.clips.joined [--count 40] [--seed 20000]
"""
# F frames, H W pixels

import argparse
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import runtime
from ...wan.pictures import known_frames
from . import corpus, score, show_pictures
from .corpus import Scene
from .show_pictures import Pipeline, Wanted

# Frames on each side of a join that it is held against: the VAE changes most from one latent frame to the next, so that
# one such change on each side is among them.
NEAR = 5
KIND = "i2v"
ROOM = (-17.0, -14.0)  # where objects start, so that two clips later they are still there


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """What happens between two clips: mean changes from frame to frame, 0 to 255, and the background's drift.

    `change` is that at the join, `around` those of the frames before and after it. `drift` is how far the mean colour
    of the background moves from the frames before the join to those after it. `kept` is the share of second clips that
    still show the scene.
    """

    change: float
    around: tuple[float, ...]
    drift: float
    kept: float


def measure(frames_FHWC: Tensor, scene: Scene) -> Join:
    """Return what happens where the second of two clips of a scene, joined [F, H, W, 3] in [0, 1], begins."""
    first_new = corpus.FRAMES
    near = frames_FHWC[first_new - NEAR : first_new + NEAR].float() * 255
    changes = (near[1:] - near[:-1]).abs().mean(dim=(1, 2, 3)).tolist()
    at_join = changes.pop(NEAR - 1)
    is_paper = ~score.objects(frames_FHWC)[1][first_new - NEAR : first_new + NEAR].any(dim=0)
    before, after = (part[:, is_paper].mean(dim=(0, 1)) for part in near.split(NEAR))
    kept = all(score.matches(score.judge(frames_FHWC[first_new - 1 :]), scene).values())
    return Join(change=at_join, around=tuple(changes), drift=(after - before).norm().item(), kept=float(kept))


def in_latent_space(pipeline: Pipeline, wanted: Wanted, seed: int) -> Tensor:
    """Return two clips [F, H, W, 3] of which the second goes on from the last latent frame of the first.

    As Wan Continue Clip does it: that frame stands where the picture stood, and stays as it is as the others are made.
    """
    first, picture = _first(pipeline, wanted, seed), {0: wanted.frames[0]}
    known = known_frames(pipeline.vae, picture, corpus.FRAMES, corpus.SIZE, corpus.SIZE)
    known.latents[:, :, :1] = first[:, :, -1:]
    latent, is_made = torch.zeros_like(first), torch.ones_like(first[:, :1])
    latent[:, :, :1], is_made[:, :, :1] = first[:, :, -1:], 0
    request = replace(pipeline.request(KIND, wanted.caption, picture, known, seed + 1), latent=latent, mask=is_made)
    second = runtime.generate(pipeline.models[KIND], request)
    return pipeline.vae.decode(torch.cat((first, second[:, :, 1:]), dim=2))[0]


def through_pixels(pipeline: Pipeline, wanted: Wanted, seed: int) -> Tensor:
    """Return two clips [F, H, W, 3] of which the second goes on from the last picture of the first."""
    first = pipeline.vae.decode(_first(pipeline, wanted, seed))[0]
    picture = {0: first[-1]}
    known = known_frames(pipeline.vae, picture, corpus.FRAMES, corpus.SIZE, corpus.SIZE)
    request = pipeline.request(KIND, wanted.caption, picture, known, seed + 1)
    second = pipeline.vae.decode(runtime.generate(pipeline.models[KIND], request))[0]
    return torch.cat((first, second[1:]))


def unbroken(pipeline: Pipeline, wanted: Wanted, seed: int) -> Tensor:
    """Return the corpus's own clip [F, H, W, 3] as the VAE gives it back: what no join can better."""
    return pipeline.vae.decode(pipeline.vae.encode(wanted.frames))[0]


WAYS = {"in latent space": in_latent_space, "through pixels": through_pixels, "unbroken": unbroken}


def _first(pipeline: Pipeline, wanted: Wanted, seed: int) -> Tensor:
    picture = {0: wanted.frames[0]}
    known = known_frames(pipeline.vae, picture, corpus.FRAMES, corpus.SIZE, corpus.SIZE)
    return runtime.generate(pipeline.models[KIND], pipeline.request(KIND, wanted.caption, picture, known, seed))


def joins(count: int, seed: int) -> dict[str, list[Join]]:
    """Return what happens at the joins of `count` unseen scenes, each joined in every way."""
    pipeline, wanted = Pipeline(), show_pictures.unseen(count, seed, start=ROOM, frames=2 * corpus.FRAMES - 1)
    return {
        name: [measure(way(pipeline, one, seed + 2 * i), one.scene) for i, one in enumerate(wanted)]
        for name, way in WAYS.items()
    }


def averages(row: list[Join]) -> Join:
    """Return the mean of all joins, `around` being the means of the lowest and of the highest change around each."""
    extremes = tuple(sum(pick(join.around) for join in row) / len(row) for pick in (min, max))
    change, drift, kept = (sum(getattr(join, name) for join in row) / len(row) for name in ("change", "drift", "kept"))
    return Join(change=change, around=extremes, drift=drift, kept=kept)


def report(found: dict[str, list[Join]]) -> str:
    """Return how the ways to join compare, as a table."""
    lines = [f"{len(found['unbroken'])} pairs of clips joined; mean changes from frame to frame, of 255"]
    for name, row in found.items():
        mean, worst = averages(row), max(join.drift for join in row)
        lines.append(
            f"  {name:<16} at the join {mean.change:.2f}, around it {mean.around[0]:.2f} to {mean.around[1]:.2f}; "
            f"the background drifts by {mean.drift:.2f} (at worst {worst:.2f}); {mean.kept:.1%} still show their scene"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Join clips and print what happens at the joins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=20_000)
    options = parser.parse_args()
    sys.stdout.write(report(joins(options.count, options.seed)))


if __name__ == "__main__":
    main()
