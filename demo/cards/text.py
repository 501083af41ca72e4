"""The miniature Qwen2.5-VL: its tokenizer, its shape, and the rows of text that a batch in training gets."""
# B prompts, S kept text rows, E width

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...qwen_image.images import MEAN, STD, bicubic, cut, lanczos, shown_size
from ...qwen_image.text_encoder import VISION_THETA, build_language, build_vision, fill_rotation, positions
from ...qwen_image.tokenizer import IMAGE_PAD, SPECIAL, TEMPLATES, WORDS, Tokenizer
from ...qwen_image.vl_config import VisionConfig, VLConfig
from . import corpus
from .glyphs import GLYPHS

VOCABULARY = 700  # before glyphs and special tokens
END = "<|endoftext|>"
CONFIG = VLConfig(
    hidden=128, intermediate=256, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=VOCABULARY,
    mrope_section=(8, 12, 12), max_pixels=corpus.SIZE**2,
    vision=VisionConfig(
        depth=2, hidden=64, intermediate=128, num_heads=2, out_hidden=128, full_attention=(1,), window=112
    ),
)  # fmt: skip
CELLS = corpus.SIZE // (CONFIG.vision.patch_size * CONFIG.vision.merge)  # of a picture, in rows and in columns
INITIAL_SPREAD = 0.05
EMBEDDING_SPREAD = 0.6  # more, so that a token stays audible under what the layers add


def train_tokenizer() -> bytes:
    """Return a tokenizer.json of Qwen2's kind for the captions, the instructions and the templates around them.

    Words never enter it, only their glyphs: each is one token, and none ever fuses with its neighbours.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    around = [f"{role}\n" for role in ("system", "user", "assistant")]
    around += [TEMPLATES[name].system for name in ("t2i", "edit")]
    tokenizer.train_from_iterator([*_lines(), *around * 50], trainer)
    content = json.loads(tokenizer.to_str())
    _add_glyphs(content["model"])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (END, *SPECIAL)])
    return tokenizer.to_str().encode()


def _lines() -> list[str]:
    rng, lines = random.Random(0), []
    for _ in range(300):
        scene = corpus.draw_scene(rng, held_out=False)
        edit = corpus.draw_edit(rng, scene, held_out=False)
        blank = corpus.Scene("0", scene.ink, scene.card, scene.place)
        for chinese in (False, True):
            lines += [blank.caption(rng, chinese), edit.instruction(rng, chinese)]
    return lines


def _add_glyphs(model: dict) -> None:
    """Add the merges that make one token of each glyph of several bytes, after all that was learned."""
    from tokenizers import pre_tokenizers

    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for glyph in GLYPHS:
        letters = spell.pre_tokenize_str(glyph)[0][0]
        for end in range(2, len(letters) + 1):
            if letters[:end] not in model["vocab"]:
                model["merges"].append([letters[: end - 1], letters[end - 1]])
                model["vocab"][letters[:end]] = len(model["vocab"])


def seen(picture_HWC: Tensor) -> Tensor:
    """Return a picture in [0, 1] as the vision tower sees it, in 8 bits."""
    first, second = shown_size(corpus.SIZE, corpus.SIZE, TEMPLATES["edit"].area, CONFIG)
    return (bicubic(lanczos(picture_HWC, *first), *second) * 255).round().byte()


def patches(seen_BHWC: Tensor) -> Tensor:
    """Return the rows of patches of pictures that `seen` gave, one picture after another."""
    pictures = (seen_BHWC.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return torch.cat([cut(picture, CONFIG.vision) for picture in pictures])


class VisionLanguage(nn.Module):
    """Qwen2.5-VL without its output layer, to be trained; parameter names are those of the published files."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        config = replace(CONFIG, vocab_size=tokenizer.size)
        self.model = build_language(config).to_empty(device="cpu")
        self.visual = build_vision(config.vision).to_empty(device="cpu")
        fill_rotation(self.model, config.rope_theta, config.head_width)
        fill_rotation(self.visual, VISION_THETA, config.vision.hidden // config.vision.num_heads // 2)
        initialise(self)

    def forward(self, prompts: Sequence[str], seen_BHWC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the kept rows [B, S, E] of prompts, and which are no padding [B, S]; with pictures they are edits."""
        template, shown = ("t2i", ()) if seen_BHWC is None else ("edit", (CELLS**2,))
        tokens = [self.tokenizer(prompt, template, shown) for prompt in prompts]
        lengths = torch.tensor([len(one.ids) for one in tokens])
        ids = torch.tensor([one.ids + (0,) * (int(lengths.max()) - len(one.ids)) for one in tokens])
        prefix = tokens[0].prefix
        pad = self.tokenizer.special[IMAGE_PAD]
        where = positions((*prefix, *ids[0].tolist()), pad, [(CELLS, CELLS)])[:, None]
        # All prompts start with the same words, whose keys and values are computed once. The model is causal, so
        # nothing sees what is padded on the right.
        past = self._run(self.model.embed_tokens(torch.tensor([prefix])), where[..., : len(prefix)]).past_key_values
        past.batch_repeat_interleave(len(prompts))
        embedded = self.model.embed_tokens(ids)
        if seen_BHWC is not None:
            side = CELLS * CONFIG.vision.merge
            grids = torch.tensor([[1, side, side]]).expand(len(seen_BHWC), -1)
            rows = self.visual(patches(seen_BHWC), grid_thw=grids).pooler_output
            embedded = embedded.masked_scatter((ids == pad)[..., None], rows.to(embedded.dtype))
        rest = where[..., len(prefix) :].expand(-1, len(prompts), -1)
        rows = self._run(embedded, rest, past).last_hidden_state
        return rows, torch.arange(ids.shape[1]) < lengths[:, None]

    def _run(self, embedded: Tensor, where: Tensor, past=None):
        return self.model(inputs_embeds=embedded, position_ids=where, past_key_values=past, use_cache=True)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Small matrices but for the embeddings, norms at one, no bias."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=EMBEDDING_SPREAD if "embed_tokens" in name else INITIAL_SPREAD)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
