"""Train the miniature Qwen-Image transformers, one that makes pictures and one that edits, on a frozen text encoder."""
# B pictures, S text rows, E text width

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.blocks import Run
from ...qwen_image.config import QwenImageConfig
from ...qwen_image.family import LATENT_FORMAT
from ...qwen_image.transformer import QwenImageTransformer
from ...wan.vae import WanVAE
from .. import flow
from ..training import Schedule
from . import corpus, text
from .corpus import Edit, Scene

log = logging.getLogger(__name__)

CONFIG = QwenImageConfig(
    dim=192, num_heads=3, axes=(8, 28, 28), num_layers=4, ffn_dim=768, text_dim=text.CONFIG.hidden, freq_dim=128
)
TASKS = ("t2i", "edit")  # also the names of their templates
BATCH = {"t2i": 48, "edit": 30}  # about the same work, as an edit has its source's tokens too
MUON = 2.0  # times the rate of AdamW
WORD_WEIGHT = 8.0  # of the loss where a word is: two tokens of 49, and what it is all about
NUM_PAIRS = 6_000  # pictures, each with an edited twin
NEGATIVE = " "  # stands for no text at all, as in the published pipelines
EDITS = ("ink", "card", "place", "place")  # kinds, the harder one more often


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the training sees, encoded once: pictures, what they show, an edit of each and the edited picture.

    `latents` [2, N, C, 1, h, w] are normalised, sources first; `weights` [2, N, 1, 1, h, w] say what counts in them;
    `seen` [N, H, W, 3] are sources for the vision tower.
    """

    scenes: list[Scene]
    edits: list[Edit]
    latents: Tensor
    weights: Tensor
    seen: Tensor


class TextToPicture(nn.Module):
    """A transformer that learns, and the frozen text encoder it listens to."""

    def __init__(self, text_encoder: text.VisionLanguage):
        super().__init__()
        self.text_encoder = text_encoder.requires_grad_(False)
        self.transformer = QwenImageTransformer(CONFIG)
        initialise(self.transformer)

    def forward(
        self, x: Tensor, timestep: Tensor, prompts: Sequence[str], pictures: Tensor | None, references: Sequence[Tensor]
    ) -> Tensor:
        """Return velocities [B, C, 1, h, w]; prompts that come with `pictures` [B, H, W, 3] are edits of them."""
        run = Run(dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            rows, valid = self.text_encoder(prompts, pictures)
        prompt = self.transformer.prompt(rows.float(), run, valid)
        return self.transformer(x, timestep, prompt, run, references)


@torch.no_grad()
def initialise(transformer: QwenImageTransformer) -> None:
    """Xavier for the products, small modulation that leaves every gate closed, and a head that starts at zero."""
    for name, parameter in transformer.named_parameters():
        if parameter.dim() >= 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            parameter.zero_()
        if "_mod.1.weight" in name or "timestep_embedder" in name:
            parameter.normal_(std=0.02) if parameter.dim() >= 2 else parameter.zero_()
    transformer.proj_out.weight.zero_()


def train_dit(
    task: str, pairs: Pairs, text_encoder: text.VisionLanguage, path: Path, schedule: Schedule
) -> QwenImageTransformer:
    """Return the moving average of the transformer trained for a task; resumes from `path` and saves there."""
    torch.manual_seed(0)

    def errors(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        generator, rng = torch.Generator().manual_seed(step), random.Random(step)
        chosen = torch.randint(len(pairs.scenes), (BATCH[task],), generator=generator)
        return ERRORS[task](model, pairs, chosen, generator, rng)

    return flow.train(TextToPicture(text_encoder), path, schedule, errors, MUON).transformer


def _picture_errors(
    model: nn.Module, pairs: Pairs, chosen: Tensor, generator: torch.Generator, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Return sigmas and errors of pictures from their captions; edited pictures serve as well as sources."""
    which = torch.randint(2, chosen.shape, generator=generator)
    scenes = [
        pairs.edits[i].apply(pairs.scenes[i]) if is_edited else pairs.scenes[i]
        for i, is_edited in zip(chosen.tolist(), which.tolist(), strict=True)
    ]
    prompts = [scene.caption(rng, corpus.is_chinese(rng)) for scene in scenes]
    noisy, sigma, wanted = flow.add_noise(pairs.latents[which, chosen].float(), generator)
    velocity = model(noisy, 1000 * sigma, _with_blanks(prompts, rng), None, ())
    return sigma, flow.squared_errors(velocity, wanted, pairs.weights[which, chosen])


def _edit_errors(
    model: nn.Module, pairs: Pairs, chosen: Tensor, generator: torch.Generator, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Return sigmas and errors of edited pictures from their sources and the instructions."""
    prompts = [pairs.edits[i].instruction(rng, corpus.is_chinese(rng)) for i in chosen.tolist()]
    source, target = pairs.latents[:, chosen].float()
    noisy, sigma, wanted = flow.add_noise(target, generator)
    velocity = model(noisy, 1000 * sigma, _with_blanks(prompts, rng), pairs.seen[chosen], (source,))
    # Where a word was counts as much as where it shall be.
    return sigma, flow.squared_errors(velocity, wanted, pairs.weights[:, chosen].amax(dim=0))


ERRORS = {"t2i": _picture_errors, "edit": _edit_errors}


def _with_blanks(prompts: list[str], rng: random.Random) -> list[str]:
    return [NEGATIVE if rng.random() < flow.CAPTION_DROPOUT else prompt for prompt in prompts]


def draw_pairs(vae: WanVAE, path: Path) -> Pairs:
    """Return the training set; its latents are kept in `path` once they are there."""
    rng = random.Random(3)
    scenes = [corpus.draw_scene(rng, held_out=False) for _ in range(NUM_PAIRS)]
    edits = [corpus.draw_edit(rng, scene, held_out=False, kind=rng.choice(EDITS)) for scene in scenes]
    settings = [corpus.draw_setting(rng) for _ in scenes]
    edited = [edit.apply(scene) for edit, scene in zip(edits, scenes, strict=True)]
    if not path.exists():
        (source, seen), (target, _) = (_encoded(vae, part, settings) for part in (scenes, edited))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((torch.stack((source, target)), seen), path)
    latents, seen = torch.load(path, weights_only=True)
    weights = torch.stack([_weights(part) for part in (scenes, edited)])
    return Pairs(scenes, edits, latents, weights, seen)


def _weights(scenes: list[Scene]) -> Tensor:
    """Return the weight [N, 1, 1, h, w] of each position of the latents."""
    factor = LATENT_FORMAT.spatial_factor
    weights = torch.ones(len(scenes), 1, 1, corpus.SIZE // factor, corpus.SIZE // factor)
    for weight, scene in zip(weights, scenes, strict=True):
        top, left, bottom, right = (edge // factor for edge in corpus.word_box(scene))
        weight[..., top:bottom, left:right] = WORD_WEIGHT
    return weights


@torch.no_grad()
def _encoded(vae: WanVAE, scenes: list[Scene], settings: list[corpus.Setting]) -> tuple[Tensor, Tensor]:
    latents, seen = [], []
    for first in range(0, len(scenes), 16):
        pictures = in_8_bits(corpus.render(scenes[first : first + 16], settings[first : first + 16]))
        with torch.autocast("cpu", torch.bfloat16):
            mean, _ = vae.encode_chunk(pictures[:, :, None], vae.new_past())
        latents.append(LATENT_FORMAT.normalise(mean.float()).half())
        seen.append(torch.stack([text.seen(picture) for picture in pictures.movedim(1, -1) / 2 + 0.5]))
        if first % 2000 == 0:
            log.info("pictures %d/%d", first, len(scenes))
    return torch.cat(latents), torch.cat(seen)


def in_8_bits(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] rounded as a saved picture is."""
    return ((pixels + 1) * 127.5).round() / 127.5 - 1
