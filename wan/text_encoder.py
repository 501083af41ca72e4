"""UMT5, the text encoder of Wan 2.1: from a prompt to one row per token. Built by transformers, loaded by us."""
# L tokens, E width, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..core.text import Encoder, Key, Named, Part, Placement, Tokens, load_state
from ..core.types import Conditioning
from ..core.weights import keymap
from .config import TEXT_LEN, TextEncoderConfig
from .keymap import TEXT_ENCODER
from .tokenizer import text_cleaner

MAX_DISTANCE = 128  # beyond it all relative positions share a bucket; the same in every UMT5, not in the checkpoint
EPS = 1e-6
# The embedding is tied: some versions of transformers hold it in one module, some in two.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt of Wan: nothing but its tokens."""

    tokens: Tokens

    @property
    def key(self) -> Key:
        """What tells it from other prompts."""
        return (self.tokens.text,)


class TextEncoder(Encoder[Prompt]):
    """Turn prompts into `Conditioning`; see `core.text.Encoder`."""

    title = "the UMT5 encoder of Wan 2.1"
    examples = "umt5_xxl_fp16.safetensors or models_t5_umt5-xxl-enc-bf16.pth"

    @cached_property
    def _clean(self) -> Callable[[str], str]:
        return text_cleaner()  # kept, so that a missing ftfy is reported once per encoder

    def tokenise(self, text: str) -> Tokens:
        """Return the cleaned text, its ids, and what to tell the user if it was too long."""
        return self.tokenizer(self._clean(text))

    def encode(self, texts: Sequence[str], placement: Placement | None = None) -> list[Conditioning]:
        """Encode each text on its own; rows [1, L, E] of its L tokens, float32 on the CPU, never padded.

        A text of more than 512 tokens is cut, and the log says so. Raises ValueError if `max_vram_bytes` is too little.
        """
        return self._encode([Prompt(tokens=self.tokenise(text)) for text in texts], placement)

    def _compute(self, prompts: Sequence[Prompt], dtype: torch.dtype, placement: Placement) -> list[Tensor]:
        weights = self._hold("the text encoder", dtype, lambda: self._load(dtype))
        longest = max(len(prompt.tokens.ids) for prompt in prompts)
        with weights.on(placement, activation_bytes(self.config, longest)) as run:
            return [run(weights.embed(prompt.tokens.ids).to(placement.device)).cpu() for prompt in prompts]

    def _load(self, dtype: torch.dtype) -> "Weights":
        return load_weights(self.config, *self._weights(), dtype=dtype)


class Weights(Part):
    """A loaded encoder: the token embedding, and transformers' stack of blocks."""

    @property
    def stack(self) -> nn.Module:
        """The stack as transformers knows it."""
        return self.module.stack


class _Rows(nn.Module):
    """A stack that takes embedded tokens [1, L, E] and gives the encoded rows [1, L, E]; no token is masked."""

    def __init__(self, stack: nn.Module):
        super().__init__()
        self.stack = stack

    def forward(self, embedded_1LE: Tensor) -> Tensor:
        return self.stack(inputs_embeds=embedded_1LE).last_hidden_state


def build(config: TextEncoderConfig) -> nn.Module:
    """Return transformers' `UMT5EncoderModel` of this size, with its own random weights, in float32."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.dim_attn // config.num_heads,
            d_ff=config.dim_ffn,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=MAX_DISTANCE,
            layer_norm_epsilon=EPS,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    ).eval()


def load_weights(config: TextEncoderConfig, scales: Named, weights: Named, *, dtype: torch.dtype) -> Weights:
    """Return the encoder with these weights (official names) in `dtype`; `scales` multiply those of scaled fp8 files.

    Raises ValueError for missing, unexpected or misshapen weights.
    """
    with torch.device("meta"):
        model = build(config)
    rename = keymap.Renamer(keymap.table(TEXT_ENCODER))
    load_state(model, rename, scales, weights, dtype=dtype, title=f"a UMT5 encoder of {config}", tied=TIED)
    table_VE, stack = model.shared.weight.detach(), model.encoder
    del stack.embed_tokens  # what comes in is embedded already
    return Weights(name="text encoder", module=_Rows(stack), blocks=stack.block, table_VE=table_VE)


def activation_bytes(config: TextEncoderConfig, num_tokens: int = TEXT_LEN) -> int:
    """Return an upper estimate of the work space of one block: scores, bias and probabilities, then the widest rows."""
    scores = 3 * config.num_heads * num_tokens
    rows = 4 * config.dim_ffn + 8 * config.dim
    return 4 * num_tokens * (scores + rows)
