"""UMT5, the text encoder of Wan 2.1: from a prompt to one row per token. Built by transformers, loaded by us."""
# L tokens, E width, V vocabulary

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from ..core.text import META, Design, Encoder, Footprint, Key, Part, Placement, Tokens
from ..core.types import Checkpoint, Conditioning
from ..core.weights import keymap
from .config import TEXT_LEN, TextEncoderConfig
from .keymap import TEXT_ENCODER
from .tokenizer import text_cleaner

MAX_DISTANCE = 128  # beyond it all relative positions share a bucket; the same in every UMT5, not in the checkpoint
EPS = 1e-6
SHALLOW = 2  # blocks of the twin whose memory is counted: all are alike


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

    def footprints(self, num_tokens: int = TEXT_LEN) -> tuple[Footprint, ...]:
        """Return what a text of so many tokens takes on the device, in one part; no weight is read for it."""
        return (needed(self.config, self.dtype_on(self.placement.device), num_tokens),)

    def _compute(self, prompts: Sequence[Prompt], dtype: torch.dtype, placement: Placement) -> list[Tensor]:
        part = self._hold("the text encoder", dtype, lambda: self._load(dtype))
        longest = max(len(prompt.tokens.ids) for prompt in prompts)
        with part.on(placement, lambda: working_bytes(self.config, dtype, longest)) as run:
            return [run(part.embed(prompt.tokens.ids).to(placement.device)).cpu() for prompt in prompts]

    def _load(self, dtype: torch.dtype) -> Part:
        return load(self.config, self.checkpoint, self.identity.names, dtype=dtype, ignored=self.identity.ignored)


class _Rows(nn.Module):
    """A stack that takes embedded tokens [1, L, E] and gives the encoded rows [1, L, E]; no token is masked."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        model = build(config)
        self.shared, self.encoder = model.shared, model.encoder
        del self.encoder.embed_tokens  # the same table once more, in some versions of transformers as a copy

    def forward(self, embedded_1LE: Tensor) -> Tensor:
        return self.encoder(inputs_embeds=embedded_1LE).last_hidden_state


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


def load(
    config: TextEncoderConfig,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    ignored: Collection[str] = (),
) -> Part:
    """Return the encoder of a checkpoint in `dtype`; `names` maps official names to the file's. No weight is read.

    Raises ValueError for missing, unexpected or misshapen weights.
    """
    rename = keymap.Renamer(keymap.table(TEXT_ENCODER))
    inner = {ours: name for official, name in names.items() if (ours := rename(official)) is not None}
    return design(config).open(checkpoint, inner, dtype=dtype, ignored=ignored)


def design(config: TextEncoderConfig) -> Design:
    """Return how an encoder of this size is built; its parameters are called as transformers calls them."""
    return Design(name="text encoder", build=lambda: _Rows(config), blocks="encoder.block", table="shared")


def needed(config: TextEncoderConfig, dtype: torch.dtype, num_tokens: int = TEXT_LEN) -> Footprint:
    """Return what an encoder of this size takes on a device for a text of so many tokens."""
    working = working_bytes(config, dtype, num_tokens)
    return _shallow(config).footprint(dtype, config.num_layers, working)


@lru_cache(maxsize=64)
def working_bytes(config: TextEncoderConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """Return the work space beside the weights, counted on the meta device."""
    rows_1LE = torch.empty(1, num_tokens, config.dim, dtype=dtype, device=META)
    return _shallow(config).working_bytes(dtype, rows_1LE)


def _shallow(config: TextEncoderConfig) -> Design:
    return design(replace(config, num_layers=min(config.num_layers, SHALLOW)))
