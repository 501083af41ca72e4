"""UMT5, the text encoder of Wan 2.1: from a prompt to one row per token. Built by transformers, loaded by us."""
# L tokens, E width, V vocabulary

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.ops import formats
from ..core.types import Checkpoint, Conditioning, Identity
from ..core.weights import keymap
from .config import TEXT_LEN, TextEncoderConfig
from .keymap import TEXT_ENCODER
from .tokenizer import Reader, Tokenizer, Tokens, text_cleaner

log = logging.getLogger(__name__)

MAX_DISTANCE = 128  # beyond it all relative positions share a bucket; the same in every UMT5, not in the checkpoint
EPS = 1e-6
# On a CPU a model of up to this size is run in float32; umt5-xxl would take 23 GB so, and runs in bfloat16.
FLOAT32_LIMIT_BYTES = 2 << 30
CACHE_BYTES = 64 << 20
MAX_NAMES_SHOWN = 8
EMBEDDING = "embed_tokens"
CPU = torch.device("cpu")

Run = Callable[[Tensor], Tensor]  # embedded tokens [1, L, E] -> encoded rows [1, L, E], both on the device


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where to encode. With `max_vram_bytes` the blocks go to the device one by one if they don't fit in that together.

    `make_room(bytes)` asks others to leave the device and returns the bytes that are free then; blocks are streamed as
    well where all of them don't fit in that. The token embedding always stays on the CPU, and nothing of the encoder
    stays on the device.
    """

    device: torch.device = CPU
    max_vram_bytes: int | None = None
    make_room: Callable[[int], int] | None = None

    def limit(self, needed: int) -> int | None:
        """Return the bytes that may be used on the device, of `needed` ones; None is no limit."""
        limits = [self.max_vram_bytes, None if self.make_room is None else self.make_room(needed)]
        return min((limit for limit in limits if limit is not None), default=None)


class EmbeddingCache:
    """The encoded prompts used last, together at most `max_bytes`; several encoders may share one."""

    def __init__(self, max_bytes: int = CACHE_BYTES):
        self.max_bytes = max_bytes
        self._rows: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    def get(self, key: tuple[str, ...]) -> Tensor | None:
        """Return the rows of a prompt, or None."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: tuple[str, ...], rows: Tensor) -> None:
        """Keep the rows of a prompt and forget the longest unused ones that no longer fit."""
        self._rows[key] = rows
        self._rows.move_to_end(key)
        while _num_bytes(self._rows.values()) > self.max_bytes:
            self._rows.popitem(last=False)


class TextEncoder:
    """Turn prompts into `Conditioning`. Weights are read at the first prompt that is not in the cache, not before.

    `read` is `core.weights.reader.read_tensors`. `dtype` None means bfloat16, but float32 for a small model on a CPU.
    `placement` is where to encode unless `encode` is told otherwise.
    Raises ValueError if the checkpoint is no complete UMT5 encoder, or the tokenizer is not of its vocabulary.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        identity: Identity,
        tokenizer: Tokenizer,
        read: Reader,
        *,
        dtype: torch.dtype | None = None,
        cache: EmbeddingCache | None = None,
        placement: Placement | None = None,
    ):
        _check(checkpoint, identity, tokenizer)
        self.checkpoint, self.identity, self.tokenizer, self.dtype = checkpoint, identity, tokenizer, dtype
        self.config: TextEncoderConfig = identity.config
        self.cache = EmbeddingCache() if cache is None else cache
        self.placement = placement or Placement()
        self._read = read
        self._weights: Weights | None = None

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
        placement = placement or self.placement
        dtype = self.dtype or compute_dtype(self.config, placement.device)
        prompts = [self.tokenise(text) for text in texts]
        for notice in filter(None, (prompt.notice for prompt in prompts)):
            log.warning(notice)
        rows = {prompt: self.cache.get(self._key(prompt, dtype)) for prompt in prompts}
        fresh = [prompt for prompt, found in rows.items() if found is None]
        if fresh:
            with torch.no_grad(), self._open(dtype, placement, max(len(prompt.ids) for prompt in fresh)) as run:
                for prompt in fresh:
                    rows[prompt] = run(self._weights.embed(prompt.ids).to(placement.device)).float().cpu()
                    self.cache.put(self._key(prompt, dtype), rows[prompt])
        return [Conditioning(text=rows[prompt]) for prompt in prompts]

    def release(self) -> None:
        """Drop the weights, from the device and from memory; the next new prompt reads them again."""
        self._weights = None

    def _key(self, prompt: Tokens, dtype: torch.dtype) -> tuple[str, ...]:
        file = self.checkpoint.identity or str(self.checkpoint.path)
        return prompt.text, file, self.tokenizer.identity, str(dtype)

    @contextmanager
    def _open(self, dtype: torch.dtype, placement: Placement, num_tokens: int) -> Iterator[Run]:
        """Provide the function that runs the blocks where `placement` says; on exit the device is as it was."""
        if self._weights is None or self._weights.table_VE.dtype != dtype:
            self.release()
            self._weights = self._load(dtype)
        weights, work = self._weights, activation_bytes(self.config, num_tokens)
        limit = placement.limit(weights.num_bytes + work)
        if limit is not None and weights.num_bytes + work > limit:
            if weights.block_bytes + work > limit:
                raise ValueError(
                    f"The text encoder can't run in {limit} bytes ({limit / 2**20:.1f} MiB), which is the limit given"
                    " or what is free: one of its blocks and the work space take"
                    f" {(weights.block_bytes + work) / 2**20:.1f} MiB. Allow that much, or run it on the CPU."
                )
            with streamed(weights.stack, placement.device) as run:
                yield run
        elif placement.device.type == "cpu":
            yield weights.run
        else:
            yield weights.run_on(placement.device)

    def _load(self, dtype: torch.dtype) -> "Weights":
        log.info("Reading the text encoder %s (%s) as %s", self.checkpoint.path, self.identity.weight_format, dtype)
        official = {name: ours for ours, name in self.identity.names.items()}
        is_scale = {name: ours.endswith(formats.WEIGHT_SCALES) for name, ours in official.items()}
        # Scales first: files are read in their own order, and a weight can't wait for its scale in memory.
        scales = self._read(self.checkpoint, [name for name in official if is_scale[name]])
        weights = self._read(self.checkpoint, [n for n, ours in official.items() if formats.companion(ours) is None])
        named = [((official[name], tensor) for name, tensor in tensors) for tensors in (scales, weights)]
        try:
            return load_weights(self.config, *named, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"{self.checkpoint.path}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A loaded encoder: the token embedding, which never leaves the CPU, and transformers' stack of blocks."""

    table_VE: Tensor
    stack: nn.Module

    @property
    def num_bytes(self) -> int:
        """Bytes of all that runs on the device."""
        return _num_bytes(tensor for _, tensor in self._parameters())

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block."""
        return max(_num_bytes(block.parameters()) for block in self.stack.block)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the embedded tokens [1, L, E], on the CPU."""
        return F.embedding(torch.tensor([ids]), self.table_VE)

    def run(self, embedded_1LE: Tensor) -> Tensor:
        """Return the encoded rows [1, L, E] of embedded tokens; no token is masked."""
        return self.stack(inputs_embeds=embedded_1LE).last_hidden_state

    def run_on(self, device: torch.device) -> Run:
        """Return `run` with copies of the weights on a device, which are gone when the function is."""
        copies = {name: tensor.to(device) for name, tensor in self._parameters()}
        return lambda x: torch.func.functional_call(self.stack, copies, (), {"inputs_embeds": x}).last_hidden_state

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in self.stack.named_parameters() if not name.startswith(EMBEDDING))


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


def load_weights(
    config: TextEncoderConfig,
    scales: Iterable[tuple[str, Tensor]],
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
) -> Weights:
    """Return the encoder with these weights (official names) in `dtype`; `scales` multiply those of scaled fp8 files.

    Each weight is converted as it comes, so that no second copy of the file is ever in memory; one that is stored in
    `dtype` is used as it is, memory-mapped or not. Raises ValueError for missing, unexpected or misshapen weights.
    """
    with torch.device("meta"):
        model = build(config)
    rename = keymap.Renamer(keymap.table(TEXT_ENCODER))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if EMBEDDING not in name}
    factors = {name.rpartition(".")[0]: scale for name, scale in scales}
    state, wrong, problems = {}, set(), []
    for name, tensor in weights:
        ours = rename(name)
        if ours not in expected:
            problems.append(f"{name} is unknown")
        elif tensor.shape != expected[ours] or not tensor.is_floating_point():
            wrong.add(ours)
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            problems.append(f"{name} is {found}, expected floats {list(expected[ours])}")
        else:
            state[ours] = formats.dequantise(tensor, factors.pop(name.removesuffix(".weight"), None), dtype)
    problems += [f"{name} is missing" for name in sorted(expected.keys() - state.keys() - wrong)]
    problems += [f"the scale of {name} has no weight" for name in factors]
    if problems:
        raise ValueError(f"these weights don't make a UMT5 encoder of {config}: {_some(problems)}")
    # The embedding is tied: some versions of transformers hold it in one module, some in two.
    state[f"encoder.{EMBEDDING}.weight"] = state["shared.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)
    return Weights(table_VE=model.shared.weight.detach(), stack=model.encoder)


@contextmanager
def streamed(stack: nn.Module, device: torch.device) -> Iterator[Run]:
    """Provide the function that runs a stack whose blocks come to the device one at a time, by accelerate.

    On exit, also by an exception, the stack has its weights on the CPU again: the very same ones, not copies.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    block = type(stack.block[0]).__name__
    cpu_offload(stack, device, preload_module_classes=[block])
    try:
        yield lambda x: stack(inputs_embeds=x).last_hidden_state
    finally:
        remove_hook_from_submodules(stack)


def compute_dtype(config: TextEncoderConfig, device: torch.device) -> torch.dtype:
    """Return what to encode in where nobody chose: bfloat16 (as the official code), float32 if small and on a CPU."""
    table = config.vocab_size * config.dim
    layer = 4 * config.dim * config.dim_attn + 3 * config.dim * config.dim_ffn
    is_small = 4 * (table + config.num_layers * layer) <= FLOAT32_LIMIT_BYTES
    return torch.float32 if device.type == "cpu" and is_small else torch.bfloat16


def activation_bytes(config: TextEncoderConfig, num_tokens: int = TEXT_LEN) -> int:
    """Return an upper estimate of the work space of one block: scores, bias and probabilities, then the widest rows."""
    scores = 3 * config.num_heads * num_tokens
    rows = 4 * config.dim_ffn + 8 * config.dim
    return 4 * num_tokens * (scores + rows)


def _check(checkpoint: Checkpoint, identity: Identity, tokenizer: Tokenizer) -> None:
    path = checkpoint.path
    if identity.role != "text_encoder":
        raise ValueError(
            f"{path} is a {identity.role} ({identity.variant}), expected a text encoder: the UMT5 encoder of Wan 2.1,"
            " such as umt5_xxl_fp16.safetensors or models_t5_umt5-xxl-enc-bf16.pth."
        )
    if identity.missing or identity.unexpected:
        raise ValueError(
            f"{path} is not a complete UMT5 encoder. Missing: {_some(identity.missing)}. Unexpected:"
            f" {_some(identity.unexpected)}. Download the file again, or choose another."
        )
    size, vocab_size = tokenizer.size, identity.config.vocab_size
    # The embedding has more rows than there are pieces, for round sizes and extra ids, but never twice as many.
    if not vocab_size // 2 <= size <= vocab_size:
        raise ValueError(
            f"The tokenizer in {tokenizer.source} has {size} pieces, the text encoder {path} knows {vocab_size}:"
            " they don't belong together."
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN]) or "none"
    return f"{shown} and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else shown


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
