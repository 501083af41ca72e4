"""Train the miniatures that start from pictures: image to video, and first and last frame to video.

Both begin as what was trained before them, as the published ones did: the first as text to video, the second as the
first. What is new starts at zero, or small.
"""
# B clips, C channels, T latent frames, h w latent positions, S rows, E width

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.blocks import Run
from ...wan.config import IMAGE_ROWS, WanConfig
from ...wan.transformer import WanTransformer
from .. import flow
from ..training import Schedule
from .pictures import FIRST, LAST, LENGTH, Clips
from .train_dit import CONFIG, initialise, with_zeros
from .train_image_encoder import CONFIG as IMAGE_ENCODER

BATCH = 64
I2V = replace(CONFIG, in_dim=36, image_dim=IMAGE_ENCODER.dim)
FLF2V = replace(I2V, image_positions=2 * IMAGE_ROWS)
GIVEN_WEIGHT = 3.0  # of the loss where a latent frame is given: it has to be copied, not only resembled
OBJECT_WEIGHT = 4.0  # of the loss where the object is: a quarter of the frame, and the shape is decided there
MUON = 1.5  # times the rate of AdamW
MOTION_ALONE = 0.5  # share of captions that say where to and nothing else
GOING_ON = 0.3  # share of clips that go on from the last latent frame of the clip before
KEPT_ROWS = 64  # image rows of a picture that a training step attends to, drawn anew each time: a quarter of the work


class FromPictures(nn.Module):
    """A transformer that learns to go on from pictures."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.transformer = WanTransformer(config)
        initialise(self.transformer)

    @torch.no_grad()
    def start_as(self, before: WanTransformer) -> None:
        """Take over what another transformer has learned; weights of channels that it lacks become zero."""
        new, old = dict(self.transformer.named_parameters()), dict(before.named_parameters())
        if "img_emb.emb_pos" in new:
            new["img_emb.emb_pos"].normal_(std=0.02)
        for name, parameter in old.items():
            target = new[name]
            if name == "patch_embedding.weight":
                target.zero_()
                target = target[:, : parameter.shape[1]]
            target.copy_(parameter)

    def forward(self, x: Tensor, timestep: Tensor, batch: "Batch", kept: Tensor) -> Tensor:
        """Return velocities [B, C, T, h, w], attending to the `kept` image rows alone."""
        run = Run(dtype=torch.bfloat16)
        prompt = self.transformer.prompt(batch.text, run, batch.text_bias, batch.image, batch.extra)
        prompt.image_BSE = prompt.image_BSE[:, kept]
        return self.transformer(x, timestep, prompt, run)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a step learns from: clean latents and all that is given with them."""

    clean: Tensor
    text: Tensor
    text_bias: Tensor
    image: Tensor
    extra: Tensor


def train_from_pictures(
    config: WanConfig,
    before: WanTransformer,
    clips: Clips,
    image_rows: Tensor,
    encode_text: Callable[[str], Tensor],
    path: Path,
    schedule: Schedule,
) -> WanTransformer:
    """Return the trained transformer (its moving average); resumes from `path` and saves there as it goes.

    `image_rows` [N, 3, S, E] are those of each clip's shown frames, `encode_text` gives the rows [S, E] of a caption.
    """
    torch.manual_seed(0)
    model = FromPictures(config)
    model.start_as(before)
    given = _first_and_last if config.image_positions else _first
    texts: dict[str, Tensor] = {}

    def errors(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        generator, rng = torch.Generator().manual_seed(step), random.Random(step)
        chosen = torch.randint(len(clips.scenes), (BATCH,), generator=generator)
        captions = [_caption(clips, i, rng) for i in chosen.tolist()]
        for caption in captions:
            if caption not in texts:
                texts[caption] = encode_text(caption)
        text, bias = with_zeros([texts[caption] for caption in captions])
        clean, image, extra, objects = given(clips, image_rows, chosen, generator)
        noisy, sigma, wanted = flow.add_noise(clean, generator)
        kept = torch.randperm(image.shape[1], generator=generator)[: KEPT_ROWS * image.shape[1] // IMAGE_ROWS]
        batch = Batch(clean=clean, text=text, text_bias=bias, image=image, extra=extra)
        velocity = model(noisy, 1000 * sigma, batch, kept)
        is_given = extra[:, :4].amax(dim=1, keepdim=True)
        weight = 1 + (GIVEN_WEIGHT - 1) * is_given + (OBJECT_WEIGHT - 1) * objects
        return sigma, flow.squared_errors(velocity, wanted, weight)

    return flow.train(model, path, schedule, errors, MUON).transformer


def _caption(clips: Clips, i: int, rng: random.Random) -> str:
    scene, chinese = clips.scenes[i], rng.random() < 0.4
    if rng.random() < flow.CAPTION_DROPOUT:
        return ""
    return scene.motion(rng, chinese) if rng.random() < MOTION_ALONE else scene.caption(rng, chinese)


def _first(clips: Clips, rows: Tensor, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return clean latents, image rows, extra channels and where the object is, of clips from their first frame.

    Some begin one latent frame later and go on from that frame, which no picture was encoded to: their image rows are
    those of its last frame, or still those of the picture that it all began with.
    """
    goes_on = torch.rand(len(chosen), generator=generator) < GOING_ON
    shown = (goes_on & (torch.rand(len(chosen), generator=generator) < 0.5)).long()
    pick = goes_on.view(-1, 1, 1, 1, 1)
    clean, objects = (
        torch.where(pick, whole[:, :, 1:], whole[:, :, :LENGTH])
        for whole in (clips.latents[chosen].float(), clips.objects[chosen])
    )
    grey = clips.grey[:, 1:].float().expand(len(chosen), -1, -1, -1, -1)
    known = torch.where(pick, torch.cat((clean[:, :, :1], grey), dim=2), clips.first[chosen].float())
    return clean, rows[chosen, shown].float(), torch.cat((_mask(known, {0: FIRST}), known), dim=1), objects


def _first_and_last(clips: Clips, rows: Tensor, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the same of clips from their first and last frame, with the image rows of both."""
    known = clips.both[chosen].float()
    extra = torch.cat((_mask(known, {0: FIRST, LENGTH - 1: LAST}), known), dim=1)
    image = rows[chosen][:, (0, 2)].flatten(1, 2).float()
    return clips.latents[chosen, :, :LENGTH].float(), image, extra, clips.objects[chosen, :, :LENGTH]


def _mask(like: Tensor, given: dict[int, tuple[float, ...]]) -> Tensor:
    """Return the mask [B, 4, T, h, w] of latent frames that are given, each with its pixel frames."""
    mask = torch.zeros_like(like[:, :4])
    for frame, values in given.items():
        mask[:, :, frame] = torch.tensor(values).view(1, 4, 1, 1)
    return mask
