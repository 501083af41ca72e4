"""Train the miniature text encoder to read: its rows learn to say what a caption or an instruction asks for.

The published Qwen-Image, too, takes its text from a language model that had learned to read before, and stays as it is.
"""
# B prompts, S kept text rows, E width

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...qwen_image.tokenizer import Tokenizer
from ..training import Schedule, resume, save
from . import corpus, text
from .corpus import VALUES, Scene
from .glyphs import GLYPHS

log = logging.getLogger(__name__)

BATCH = {"t2i": 64, "edit": 24}
NUM_PICTURES = 1_500
CHANGES = [(kind, value) for kind in VALUES for value in VALUES[kind]]  # what an instruction can ask for
# What the last row has to tell: how many answers there are to each question.
QUESTIONS = {
    "t2i": {**{kind: len(of) for kind, of in VALUES.items()}, "length": corpus.LONGEST}
    | {f"glyph {i}": len(GLYPHS) + 1 for i in range(corpus.LONGEST)},
    "edit": {"change": len(CHANGES), **{kind: len(of) for kind, of in VALUES.items()}, "length": corpus.LONGEST},
}


class Reader(nn.Module):
    """The text encoder with the questions it learns by, which are thrown away afterwards."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.text_encoder = text.VisionLanguage(tokenizer)
        width = text.CONFIG.hidden
        self.glyph, self.slot = nn.Linear(width, len(GLYPHS)), nn.Linear(width, corpus.LONGEST)
        self.last = nn.ModuleDict({task: nn.Linear(width, sum(of.values())) for task, of in QUESTIONS.items()})
        self.ids = [tokenizer.plain(glyph)[0] for glyph in GLYPHS]

    def forward(
        self, task: str, prompts: list[str], answers: dict[str, Tensor], seen_BHWC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and the share of right answers to each question."""
        with torch.autocast("cpu", torch.bfloat16):
            rows, valid = self.text_encoder(prompts, seen_BHWC)
        rows, last = rows.float(), valid.sum(dim=1) - 1
        told = self.last[task](rows[torch.arange(len(rows)), last]).split(list(QUESTIONS[task].values()), dim=1)
        pairs = [(logits, answers[name]) for logits, name in zip(told, QUESTIONS[task], strict=True)]
        if task == "t2i":
            where, glyphs, slots = self.glyph_rows(prompts)
            pairs += [(self.glyph(rows[where]), glyphs), (self.slot(rows[where]), slots)]
        loss = sum(F.cross_entropy(logits, answer) for logits, answer in pairs)
        right = torch.stack([(logits.argmax(dim=1) == answer).float().mean() for logits, answer in pairs])
        return loss, right

    def glyph_rows(self, prompts: list[str]) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return (prompt, row) of every glyph of the words, which glyph it is, and which of its word."""
        found = []
        for i, prompt in enumerate(prompts):
            ids = self.text_encoder.tokenizer(prompt).ids
            rows = [row for row, one in enumerate(ids) if one in self.ids]
            found += [(i, row, self.ids.index(ids[row]), slot) for slot, row in enumerate(rows)]
        prompt, row, glyph, slot = torch.tensor(found).unbind(dim=1)
        return (prompt, row), glyph, slot


def _facts(scene: Scene) -> dict[str, int]:
    facts = {kind: VALUES[kind].index(getattr(scene, kind)) for kind in VALUES} | {"length": len(scene.word) - 1}
    letters = [GLYPHS.index(glyph) + 1 for glyph in scene.word] + [0] * corpus.LONGEST
    return facts | {f"glyph {i}": letters[i] for i in range(corpus.LONGEST)}


@dataclass(frozen=True, slots=True)
class Pictures:
    """Scenes, and their pictures [N, H, W, 3] as the vision tower sees them."""

    scenes: list[Scene]
    seen: Tensor

    @classmethod
    def draw(cls) -> "Pictures":
        rng = random.Random(9)
        scenes = [corpus.draw_scene(rng, held_out=False) for _ in range(NUM_PICTURES)]
        pixels = corpus.render(scenes, [corpus.draw_setting(rng) for _ in scenes]).movedim(1, -1) / 2 + 0.5
        return cls(scenes, torch.stack([text.seen(picture) for picture in pixels]))


def train_text(tokenizer: Tokenizer, path: Path, schedule: Schedule) -> text.VisionLanguage:
    """Return the trained text encoder; resumes from `path` and saves there as it goes."""
    torch.manual_seed(0)
    reader = Reader(tokenizer)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01)
    start = resume(path, reader, [optimizer])
    pictures = Pictures.draw() if start < schedule.steps else None
    for step in range(start, schedule.steps):
        rng = random.Random(step)
        done = [reader(task, *batch(task, rng, pictures)) for task in QUESTIONS]
        schedule.apply(optimizer, step)
        optimizer.zero_grad()
        sum(loss for loss, _ in done).backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            told = [" ".join(f"{share:.2f}" for share in right.tolist()) for _, right in done]
            log.info("text step %d right: %s | %s", step + 1, *told)
        if (step + 1) % 250 == 0 or step + 1 == schedule.steps:
            save(path, reader, [optimizer], step + 1)
    return reader.text_encoder.requires_grad_(False)


def batch(
    task: str, rng: random.Random, pictures: Pictures | None
) -> tuple[list[str], dict[str, Tensor], Tensor | None]:
    """Return prompts, the answers to each question about them, and for edits the pictures that they are about."""
    prompts, facts, seen = [], [], None
    if task == "t2i":
        scenes = [corpus.draw_scene(rng, held_out=False) for _ in range(BATCH[task])]
        prompts = [scene.caption(rng, corpus.is_chinese(rng)) for scene in scenes]
        facts = [_facts(scene) for scene in scenes]
    else:
        chosen = rng.sample(range(len(pictures.scenes)), BATCH[task])
        for i in chosen:
            edit = corpus.draw_edit(rng, pictures.scenes[i], held_out=False)
            prompts.append(edit.instruction(rng, corpus.is_chinese(rng)))
            facts.append(_facts(pictures.scenes[i]) | {"change": CHANGES.index((edit.kind, edit.to))})
        seen = pictures.seen[chosen]
    answers = {name: torch.tensor([fact[name] for fact in facts]) for name in QUESTIONS[task]}
    return prompts, answers, seen
