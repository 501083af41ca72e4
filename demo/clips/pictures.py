"""What the models of pictures are trained on: clips that go on from a picture, encoded once."""
# N clips, C channels, T latent frames, h w latent positions, S rows, E width

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wan.family import LATENT_FORMAT
from ...wan.vae import WanVAE
from . import corpus
from .corpus import Scene
from .train_image_encoder import rows

log = logging.getLogger(__name__)

CLIPS_PER_SCENE = 10
DRAWN = 4  # clips at once
SHOWN = (0, 4, 8)  # frames that the image encoder sees: the first, the one a clip goes on from, the last
LENGTH = 3  # latent frames of a clip that is generated
FIRST, LAST = (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 1.0)  # mask of a latent frame: pixel frames that are given


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Clips of 13 frames of every training scene. Latents are normalised.

    `latents` [N, C, 4, h, w] of the clips; `first` and `both` [N, C, 3, h, w] of nine frames that are grey but for the
    first picture, or the first and the last; `grey` [C, 3, h, w] of nine that are grey; `pictures` [N, 3, H, W, 3] the
    shown frames as bytes. `objects` [N, 1, 4, h, w] are 1 where the object is in one of the frames.
    """

    scenes: list[Scene]
    latents: Tensor
    first: Tensor
    both: Tensor
    grey: Tensor
    pictures: Tensor
    objects: Tensor


def draw_clips(vae: WanVAE, path: Path) -> Clips:
    """Return the training set; it is kept in `path` once it is there."""
    training, _ = corpus.scenes()
    scenes = training * CLIPS_PER_SCENE
    if not path.exists():
        parts = []
        for i, clips in enumerate(_drawn(scenes)):
            parts.append(_encoded(vae, clips))
            if i % 100 == 0:
                log.info("clips from pictures %d/%d", i * DRAWN, len(scenes))
        grey = _normalised(vae, torch.zeros(1, 3, corpus.FRAMES, corpus.SIZE, corpus.SIZE))[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((*(torch.cat(part) for part in zip(*parts, strict=True)), grey), path)
    latents, first, both, pictures, grey = torch.load(path, weights_only=True)
    objects = torch.cat([_objects(clips) for clips in _drawn(scenes)])
    return Clips(scenes=scenes, latents=latents, first=first, both=both, grey=grey, pictures=pictures, objects=objects)


def _drawn(scenes: list[Scene]) -> Iterator[Tensor]:
    """Give the pixels of all clips, a few at a time, the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(7)
    for begin in range(0, len(scenes), DRAWN):
        yield corpus.render_from(scenes[begin : begin + DRAWN], generator)


def _objects(clips: Tensor) -> Tensor:
    """Return 1 [B, 1, T, h, w] where something is not of the background's colour in a latent position's pixels."""
    paper = clips.flatten(2).median(dim=2).values[:, :, None, None, None]
    contrast = (clips - paper).abs().amax(dim=1, keepdim=True)
    time, space = LATENT_FORMAT.temporal_factor, LATENT_FORMAT.spatial_factor
    whole = torch.cat((contrast[:, :, :1].expand(-1, -1, time - 1, -1, -1), contrast), dim=2)
    return (F.max_pool3d(whole, (time, space, space)) > 0.1).float()


def _encoded(vae: WanVAE, clips: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = torch.zeros_like(clips[:, :, : corpus.FRAMES])
    first[:, :, 0] = clips[:, :, 0]
    both = first.clone()
    both[:, :, -1] = clips[:, :, corpus.FRAMES - 1]
    pictures = ((clips[:, :, SHOWN] + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
    return *(_normalised(vae, part) for part in (clips, first, both)), pictures


@torch.no_grad()
def _normalised(vae: WanVAE, clips: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return LATENT_FORMAT.normalise(vae.encode_chunk(clips, vae.new_past())[0].float()).half()


@torch.no_grad()
def image_rows(encoder: nn.Module, clips: Clips, path: Path) -> Tensor:
    """Return the rows [N, 3, S, E] of all shown frames; they are kept in `path` once they are there."""
    if not path.exists():
        parts = []
        for part in clips.pictures.flatten(0, 1).split(48):
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(rows(encoder, part.float() / 255).half())
        torch.save(torch.cat(parts).unflatten(0, (-1, len(SHOWN))), path)
    return torch.load(path, weights_only=True)
