"""Train the miniature CLIP image encoder: its rows learn to tell what a picture shows and where.

The published models, too, take theirs from an encoder that had learned to see before, and stays as it is.
"""
# N pictures, H W pixels, S rows, E width

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wan.config import ImageEncoderConfig
from ...wan.image_encoder import build, preprocess
from ..training import Schedule, resume, save
from . import corpus
from .corpus import Scene

log = logging.getLogger(__name__)

CONFIG = ImageEncoderConfig(dim=96, dim_ffn=192, num_heads=3, num_layers=4)  # of which Wan uses all layers but the last
PATCHES = CONFIG.image_size // CONFIG.patch_size  # along a side
BATCH = 32
# What the class row and the mean of the others have to tell: how many answers there are to each question.
QUESTIONS = {
    "colour": list(corpus.COLOURS),
    "shape": list(corpus.SHAPES),
    "background": list(corpus.BACKGROUNDS),
}


def untrained() -> nn.Module:
    """Return the encoder with weights to be trained."""
    encoder = build(CONFIG).train()
    # From small noise, the usual start, it takes long until positions are heard beside what the patches show.
    name = next(name for name, _ in encoder.named_parameters() if "position_embedding" in name)
    encoder.get_parameter(name).data[1:] = _waves()
    return encoder


def _waves() -> Tensor:
    """Return places of patches [256, E] as sines and cosines of x and y, as loud as the patches themselves."""
    angles = torch.pi / 3 * torch.outer(torch.arange(PATCHES) / PATCHES, torch.arange(1, CONFIG.dim // 4 + 1))
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.cat((axis.repeat(PATCHES, 1), axis.repeat_interleave(PATCHES, dim=0)), dim=1) / 2


def rows(encoder: nn.Module, pictures_NHWC: Tensor) -> Tensor:
    """Return the rows [N, 257, E] that Wan takes: what comes out of all blocks but the last."""
    seen = torch.cat([preprocess(picture, CONFIG.image_size, "official") for picture in pictures_NHWC])
    return encoder(pixel_values=seen, output_hidden_states=True).hidden_states[-2].float()


class Witness(nn.Module):
    """The encoder with the questions it learns by, which are thrown away afterwards.

    The class row and the mean of the others are asked about the whole picture, each patch about its mean colour.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = untrained()
        answers = sum(len(of) for of in QUESTIONS.values()) + 2
        self.whole = nn.ModuleList(nn.Linear(CONFIG.dim, answers) for _ in range(2))
        self.patch = nn.Linear(CONFIG.dim, 3)

    def forward(self, pictures_NHWC: Tensor, scenes: list[Scene], places_N2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, and what the class row and the mean tell: shares of right answers, then the error in place.

        `places` are the middles of the objects, 0 to 1.
        """
        with torch.autocast("cpu", torch.bfloat16):
            seen_NSE = rows(self.encoder, pictures_NHWC)
        loss, told = torch.zeros(()), []
        for probe, row in zip(self.whole, (seen_NSE[:, 0], seen_NSE[:, 1:].mean(dim=1)), strict=True):
            *answers, place = probe(row).split([*(len(of) for of in QUESTIONS.values()), 2], dim=1)
            for (name, of), logits in zip(QUESTIONS.items(), answers, strict=True):
                wanted = torch.tensor([of.index(getattr(scene, name)) for scene in scenes])
                loss = loss + F.cross_entropy(logits, wanted)
                told.append((logits.argmax(dim=1) == wanted).float().mean())
            off = (place - places_N2).norm(dim=1)
            loss = loss + 10 * off.square().mean()
            told.append(off.mean())
        colours = F.adaptive_avg_pool2d(pictures_NHWC.movedim(-1, 1), PATCHES).flatten(2).mT
        return loss + 10 * F.mse_loss(self.patch(seen_NSE[:, 1:]), colours), torch.stack(told)


def places(pictures_NHWC: Tensor) -> Tensor:
    """Return the middles [N, 2] of the objects, 0 to 1: of what differs from the corner that differs least."""
    corners = pictures_NHWC[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    paper = corners.median(dim=1).values[:, None, None]
    share = (pictures_NHWC - paper).norm(dim=-1)
    share = share / share.sum(dim=(1, 2), keepdim=True)
    axis = (torch.arange(pictures_NHWC.shape[1]) + 0.5) / pictures_NHWC.shape[1]
    return torch.stack(((share.sum(dim=1) * axis).sum(dim=1), (share.sum(dim=2) * axis).sum(dim=1)), dim=1)


def train_image_encoder(pictures: Tensor, scenes: list[Scene], path: Path, schedule: Schedule) -> nn.Module:
    """Return the encoder, trained on pictures [N, H, W, 3] of bytes; resumes from `path` and saves there as it goes."""
    torch.manual_seed(0)
    witness = Witness()
    optimizer = torch.optim.AdamW(witness.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(resume(path, witness, [optimizer]), schedule.steps):
        chosen = torch.randint(len(pictures), (BATCH,), generator=torch.Generator().manual_seed(step))
        batch = pictures[chosen].float() / 255
        loss, told = witness(batch, [scenes[i] for i in chosen.tolist()], places(batch))
        schedule.apply(optimizer, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(witness.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            log.info("image encoder step %d told: %s", step + 1, " ".join(f"{share:.2f}" for share in told.tolist()))
        if (step + 1) % 250 == 0 or step + 1 == schedule.steps:
            save(path, witness, [optimizer], step + 1)
    return witness.encoder.requires_grad_(False).eval()
