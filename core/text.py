"""What text encoders have in common: how weights come in, where they run, what is remembered. Knows no family."""
# L tokens, E width, V vocabulary

import json
import logging
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import formats
from .types import Checkpoint, Conditioning, Identity

log = logging.getLogger(__name__)

# On a CPU a model of up to this size is run in float32. Published encoders would take 23 or 31 GB so, and run in
# bfloat16.
FLOAT32_LIMIT_BYTES = 2 << 30
CACHE_BYTES = 64 << 20
MAX_NAMES_SHOWN = 8
CPU = torch.device("cpu")

Reader = Callable[[Checkpoint, Iterable[str]], Iterator[tuple[str, Tensor]]]  # core.weights.reader.read_tensors
Named = Iterable[tuple[str, Tensor]]
Key = tuple[str, ...]
Run = Callable[..., Tensor]  # takes the tensors that the module takes, on the device, one after the other


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A prompt for an encoder: `text` after cleaning, and the `ids` whose rows are wanted.

    `prefix` are ids that are run before them and whose rows are dropped. `notice` says what was cut, if any.
    """

    text: str
    ids: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    notice: str | None = None


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
        self._rows: OrderedDict[Key, Tensor] = OrderedDict()

    def get(self, key: Key) -> Tensor | None:
        """Return the rows of a prompt, or None."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: Key, rows: Tensor) -> None:
        """Keep the rows of a prompt and forget the longest unused ones that no longer fit."""
        self._rows[key] = rows
        self._rows.move_to_end(key)
        while num_bytes(self._rows.values()) > self.max_bytes:
            self._rows.popitem(last=False)


class TokenizerLike(Protocol):
    """What is known of every tokenizer: number of pieces, what tells it from others, where it came from."""

    size: int
    identity: str
    source: str


class PromptLike(Protocol):
    """What is known of every prompt: what tells it from others, and its tokens."""

    @property
    def key(self) -> Key: ...

    @property
    def tokens(self) -> Tokens: ...


Prompt = TypeVar("Prompt", bound=PromptLike)


class Encoder(ABC, Generic[Prompt]):
    """A text encoder that reads its weights at the first prompt that is not in the cache, not before.

    `read` is `core.weights.reader.read_tensors`. `dtype` None means bfloat16, but float32 for a small model on a CPU.
    `placement` is where to encode unless told otherwise. A family names its model in `title` and `examples`, and turns
    prompts into rows in `_compute`.
    Raises ValueError if the checkpoint is no complete text encoder, or the tokenizer is not of its vocabulary.
    """

    title: str
    examples: str

    def __init__(
        self,
        checkpoint: Checkpoint,
        identity: Identity,
        tokenizer: TokenizerLike,
        read: Reader,
        *,
        dtype: torch.dtype | None = None,
        cache: EmbeddingCache | None = None,
        placement: Placement | None = None,
    ):
        self.checkpoint, self.identity, self.tokenizer, self.dtype = checkpoint, identity, tokenizer, dtype
        self.config = identity.config
        self.cache = EmbeddingCache() if cache is None else cache
        self.placement = placement or Placement()
        self._read = read
        self._held: dict[tuple[str, torch.dtype], Any] = {}
        self._check()

    def release(self) -> None:
        """Drop the weights, from the device and from memory; the next new prompt reads them again."""
        self._held.clear()

    @abstractmethod
    def _compute(self, prompts: Sequence[Prompt], dtype: torch.dtype, placement: Placement) -> list[Tensor]:
        """Return the rows [1, S, E] of each prompt, wherever and in whatever dtype."""

    def _encode(self, prompts: Sequence[Prompt], placement: Placement | None) -> list[Conditioning]:
        """Return the float32 rows [1, S, E] of each prompt, on the CPU; run those that the cache does not have."""
        placement = placement or self.placement
        dtype = self.dtype or compute_dtype(num_parameters(self.checkpoint, self.identity), placement.device)
        for notice in filter(None, (prompt.tokens.notice for prompt in prompts)):
            log.warning(notice)
        keys = [self._key(prompt, dtype) for prompt in prompts]
        rows = {key: self.cache.get(key) for key in keys}
        fresh = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if rows[key] is None}
        if fresh:
            with torch.no_grad():
                computed = self._compute(list(fresh.values()), dtype, placement)
            for key, found in zip(fresh, computed, strict=True):
                rows[key] = found.float().cpu()
                self.cache.put(key, rows[key])
        return [Conditioning(text=rows[key]) for key in keys]

    def _key(self, prompt: Prompt, dtype: torch.dtype) -> Key:
        file = self.checkpoint.identity or str(self.checkpoint.path)
        return *prompt.key, file, self.tokenizer.identity, str(dtype)

    def _hold(self, part: str, dtype: torch.dtype, load: Callable[[], "Part"]) -> "Part":
        """Return a part of the model in this dtype; load it where it is not there, and drop what is in another one."""
        if (part, dtype) not in self._held:
            for other in [held for held in self._held if held[1] != dtype]:
                del self._held[other]
            log.info("Reading %s of %s as %s", part, self.checkpoint.path, dtype)
            try:
                self._held[part, dtype] = load()
            except ValueError as error:
                raise ValueError(f"{self.checkpoint.path}: {error}") from error
        return self._held[part, dtype]

    def _weights(self, belongs: Callable[[str], bool] = lambda name: True) -> tuple[Named, Named]:
        """Return the scales and the weights of the file under their official names, those that belong to a part.

        Scales first: files are read in their own order, and a weight can't wait for its scale in memory.
        """
        official = {name: ours for ours, name in self.identity.names.items() if belongs(ours)}
        suffixes = {name: formats.companion(ours) for name, ours in official.items()}
        scales = [name for name, suffix in suffixes.items() if suffix in formats.WEIGHT_SCALES]
        weights = [name for name, suffix in suffixes.items() if suffix is None]
        read = (self._read(self.checkpoint, names) for names in (scales, weights))
        scales, weights = (((official[name], tensor) for name, tensor in tensors) for tensors in read)
        return scales, weights

    def _check(self) -> None:
        path, identity = self.checkpoint.path, self.identity
        if identity.role != "text_encoder":
            raise ValueError(
                f"{path} is a {identity.role} ({identity.variant}), expected a text encoder: {self.title}, such as"
                f" {self.examples}."
            )
        if identity.missing or identity.unexpected:
            raise ValueError(
                f"{path} is not complete as {self.title}. Missing: {some(identity.missing)}. Unexpected:"
                f" {some(identity.unexpected)}. Download the file again, or choose another."
            )
        size, vocab_size = self.tokenizer.size, self.config.vocab_size
        # The embedding has more rows than there are pieces, for round sizes and extra ids, but never twice as many.
        if not vocab_size // 2 <= size <= vocab_size:
            raise ValueError(
                f"The tokenizer in {self.tokenizer.source} has {size} pieces, the text encoder {path} knows"
                f" {vocab_size}: they don't belong together."
            )


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module whose weights stay in RAM and visit the device while it runs, together or block by block.

    `module` takes tensors and gives one tensor; most of its weights are in `blocks`, modules of one class. `table_VE`
    is the token embedding of a language model: it is no part of the module and never leaves the CPU.
    """

    name: str
    module: nn.Module
    blocks: nn.ModuleList
    table_VE: Tensor | None = None

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all that runs on the device."""
        return num_bytes(self.module.parameters())

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of the most that comes to the device at once when blocks are streamed."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        others = [module for module in self.module.modules() if id(module) not in inside]
        return max(
            *(num_bytes(block.parameters()) for block in self.blocks),
            *(num_bytes(module.parameters(recurse=False)) for module in others),
        )

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the embedded tokens [1, L, E], on the CPU."""
        return F.embedding(torch.tensor([ids]), self.table_VE)

    @contextmanager
    def on(self, placement: Placement, work_bytes: int) -> Iterator[Run]:
        """Provide the function that runs the module where `placement` says; on exit the device is as it was.

        `work_bytes` is what it needs beside its weights. Raises ValueError if the device has too little for one block.
        """
        needed = self.num_bytes + work_bytes
        limit = placement.limit(needed)
        if limit is not None and needed > limit:
            if self.block_bytes + work_bytes > limit:
                raise ValueError(
                    f"The {self.name} can't run in {limit} bytes ({limit / 2**20:.1f} MiB), which is the limit given"
                    " or what is free: one of its blocks and the work space take"
                    f" {(self.block_bytes + work_bytes) / 2**20:.1f} MiB. Allow that much, or run it on the CPU."
                )
            with streamed(self.module, self.blocks, placement.device) as run:
                yield run
        elif placement.device.type == "cpu":
            yield self.module
        else:
            yield run_on(self.module, placement.device)


def run_on(module: nn.Module, device: torch.device) -> Run:
    """Return a module's call with copies of its weights on a device, which are gone when the function is."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    copies = {name: tensor.detach().to(device) for name, tensor in tensors}
    return lambda *inputs: torch.func.functional_call(module, copies, inputs)


@contextmanager
def streamed(module: nn.Module, blocks: nn.ModuleList, device: torch.device) -> Iterator[Run]:
    """Provide a module's call, with its blocks coming to the device one at a time, by accelerate.

    On exit, also by an exception, the module has its weights on the CPU again: the very same ones, not copies.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    cpu_offload(module, device, preload_module_classes=[type(blocks[0]).__name__])
    try:
        yield module
    finally:
        remove_hook_from_submodules(module)


def load_state(
    module: nn.Module,
    rename: Callable[[str], str | None],
    scales: Named,
    weights: Named,
    *,
    dtype: torch.dtype,
    title: str,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Put weights under their official names into a module on the meta device, in `dtype`; `rename` gives its names.

    `scales` multiply the weights of scaled fp8 files. Each weight is converted as it comes, so that no second copy of
    the file is ever in memory; one that is stored in `dtype` is used as it is, memory-mapped or not. `tied` gives
    names of the module that share the weight of another. Raises ValueError for missing, unexpected or misshapen ones.
    """
    tied = tied or {}
    expected = {name: tensor.shape for name, tensor in module.state_dict().items() if name not in tied}
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
        raise ValueError(f"these weights don't make {title}: {some(problems)}")
    state |= {name: state[other] for name, other in tied.items()}
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def compute_dtype(parameters: int, device: torch.device) -> torch.dtype:
    """Return what to encode in where nobody chose: bfloat16 (as the official code), float32 if small and on a CPU."""
    return torch.float32 if device.type == "cpu" and 4 * parameters <= FLOAT32_LIMIT_BYTES else torch.bfloat16


def num_parameters(checkpoint: Checkpoint, identity: Identity) -> int:
    """Return how many numbers a model has, from the header of its file."""
    return sum(prod(checkpoint.tensors[name].shape) for name in identity.names.values())


def fast_tokenizer(content: Mapping[str, Any]) -> Any:
    """Return the `tokenizers.Tokenizer` of a tokenizer.json's content, which neither cuts nor pads."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(json.dumps(content))
    fast.no_truncation()
    fast.no_padding()
    return fast


def read_tokenizer_json(content: bytes, source: str) -> dict[str, Any]:
    """Return what a tokenizer.json says. Raises ValueError if it is none."""
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "model" not in found:
        raise ValueError(f"{source} is no tokenizer file: expected JSON with a `model`. Download it again.")
    return found


def download(repository: str, name: str, revision: str) -> Path:
    """Download one file from the Hugging Face hub; call it only when the user asked for a download.

    `revision` is the full commit hash, so that the file can't change under us. Raises ValueError if it is not, or if
    the download fails.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"The revision of {repository} must be a full commit hash (40 hex digits), got {revision!r}.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except OSError as error:
        raise ValueError(
            f"Could not download {name} of {repository}: {error}. Put that file next to the text encoder instead."
        ) from error


def some(names: Sequence[str]) -> str:
    """Return the first of many names, and how many more there are."""
    shown = ", ".join(names[:MAX_NAMES_SHOWN]) or "none"
    return f"{shown} and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else shown


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
