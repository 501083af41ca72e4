"""Train the miniature text encoder and Qwen-Image transformer: both tasks together first, then a copy for each task."""
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
from ...qwen_image.tokenizer import Tokenizer
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
# Shares of words of 1, 2 and 3 glyphs, from a step on: what a glyph looks like, and where, is best learned alone.
EVENLY = (0.33, 0.33, 0.33)
LENGTHS_TOGETHER = ((0, EVENLY), (2250, (0.7, 0.2, 0.1)))
LENGTHS_ALONE = ((0, (0.6, 0.25, 0.15)), (900, EVENLY), (1500, (0.5, 0.3, 0.2)), (1900, EVENLY))
MUON = 2.0  # times the rate of AdamW
WORD_WEIGHT = 5.0  # of the loss where the word is: a tenth of the picture, and what it is all about
NUM_PAIRS = 7_000  # pictures, each with an edited twin
NEGATIVE = " "  # stands for no text at all, as in the published pipelines
CHINESE_SHARE = 0.4


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
    """The two networks that learn together."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.text_encoder = text.VisionLanguage(tokenizer)
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
    pairs: Pairs, tokenizer: Tokenizer, path: Path, schedule: Schedule, tasks: Sequence[str]
) -> TextToPicture:
    """Return the moving average of the trained pair; with one task alone the text encoder is frozen."""
    torch.manual_seed(0)
    model = TextToPicture(tokenizer)
    model.text_encoder.requires_grad_(len(tasks) > 1)

    mine = flow.share_of(tasks)
    lengths = LENGTHS_TOGETHER if len(tasks) > 1 else LENGTHS_ALONE

    def shares_at(step: int) -> tuple[float, ...]:
        return next(shares for start, shares in reversed(lengths) if step >= start)

    def errors(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        generator, rng = torch.Generator().manual_seed(step), random.Random(step)
        done = [
            ERRORS[task](model, pairs, _choose(pairs, BATCH[task], shares_at(step), generator), generator, rng)
            for task in mine
        ]
        return torch.cat([sigma for sigma, _ in done]), torch.cat([error for _, error in done])

    return flow.train(model, path, schedule, errors, MUON)


def fork(both: Path, path: Path) -> None:
    """Start the training of one task from that of both, with the moving average of the text encoder, now frozen."""
    if path.exists():
        return
    saved = torch.load(both, weights_only=True)
    names = [name for name in saved["model"] if name.startswith("1.text_encoder.")]
    saved["model"] |= {f"0{name[1:]}": saved["model"][name] for name in names}
    saved["step"] = 0
    torch.save(saved, path)


def _picture_errors(
    model: nn.Module, pairs: Pairs, chosen: Tensor, generator: torch.Generator, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Return sigmas and errors of pictures from their captions; edited pictures serve as well as sources."""
    which = torch.randint(2, chosen.shape, generator=generator)
    scenes = [
        pairs.edits[i].apply(pairs.scenes[i]) if is_edited else pairs.scenes[i]
        for i, is_edited in zip(chosen.tolist(), which.tolist(), strict=True)
    ]
    prompts = [scene.caption(rng, _is_chinese(rng)) for scene in scenes]
    noisy, sigma, wanted = flow.add_noise(pairs.latents[which, chosen].float(), generator)
    velocity = model(noisy, 1000 * sigma, _with_blanks(prompts, rng), None, ())
    return sigma, flow.squared_errors(velocity, wanted, pairs.weights[which, chosen])


def _edit_errors(
    model: nn.Module, pairs: Pairs, chosen: Tensor, generator: torch.Generator, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Return sigmas and errors of edited pictures from their sources and the instructions."""
    prompts = [pairs.edits[i].instruction(rng, _is_chinese(rng)) for i in chosen.tolist()]
    source, target = pairs.latents[:, chosen].float()
    noisy, sigma, wanted = flow.add_noise(target, generator)
    velocity = model(noisy, 1000 * sigma, _with_blanks(prompts, rng), pairs.seen[chosen], (source,))
    # Where a word was counts as much as where it shall be.
    return sigma, flow.squared_errors(velocity, wanted, pairs.weights[:, chosen].amax(dim=0))


ERRORS = {"t2i": _picture_errors, "edit": _edit_errors}


def _choose(pairs: Pairs, size: int, shares: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """Return which pairs [size] a batch is made of; `shares` are those of words of 1, 2 and 3 glyphs."""
    lengths = torch.tensor([len(scene.word) for scene in pairs.scenes])
    weights = torch.tensor(shares)[lengths - 1] / torch.bincount(lengths)[lengths]
    return torch.multinomial(weights, size, replacement=True, generator=generator)


def _is_chinese(rng: random.Random) -> bool:
    return rng.random() < CHINESE_SHARE


def _with_blanks(prompts: list[str], rng: random.Random) -> list[str]:
    return [NEGATIVE if rng.random() < flow.CAPTION_DROPOUT else prompt for prompt in prompts]


def draw_pairs(vae: WanVAE, path: Path) -> Pairs:
    """Return the training set; its latents are kept in `path` once they are there."""
    rng = random.Random(3)
    scenes = [corpus.draw_scene(rng, held_out=False) for _ in range(NUM_PAIRS)]
    edits = [corpus.draw_edit(rng, scene, held_out=False) for scene in scenes]
    settings = [corpus.draw_setting(rng) for _ in scenes]
    edited = [edit.apply(scene) for edit, scene in zip(edits, scenes, strict=True)]
    if not path.exists():
        (source, seen), (target, _) = (_encoded(vae, part, settings) for part in (scenes, edited))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((torch.stack((source, target)), seen), path)
    latents, seen = torch.load(path, weights_only=True)
    weights = torch.stack([_weights(part, settings) for part in (scenes, edited)])
    return Pairs(scenes, edits, latents, weights, seen)


def _weights(scenes: list[Scene], settings: list[corpus.Setting]) -> Tensor:
    """Return the weight [N, 1, 1, h, w] of each position of the latents."""
    size = corpus.SIZE // LATENT_FORMAT.spatial_factor
    weights = torch.ones(len(scenes), 1, 1, size, size)
    for weight, scene, setting in zip(weights, scenes, settings, strict=True):
        top, left, bottom, right = corpus.word_box(scene, setting)
        rows, columns = (
            slice(low // LATENT_FORMAT.spatial_factor, -(-high // LATENT_FORMAT.spatial_factor))
            for low, high in ((top, bottom), (left, right))
        )
        weight[..., rows, columns] = WORD_WEIGHT
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
