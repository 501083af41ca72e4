"""What text encoders have in common: how weights come in, where they run, what is remembered. Knows no family."""
# L tokens, E width, V vocabulary

import json
import logging
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from . import host
from .memory.foreign import traced_bytes
from .memory.placement import NUM_SLOTS, Job, Machine, Plan, headroom_of, make_plan
from .memory.resident import Residency, placed
from .memory.slab import Layout, Loaded
from .memory.supply import Source
from .memory.unpack import Unpack
from .ops import formats
from .types import Checkpoint, Conditioning, Identity, MemoryOptions
from .weights.assemble import Recipe, prepare
from .weights.keymap import Share
from .weights.tensors import read_tensors

log = logging.getLogger(__name__)

# On a CPU a model of up to this size is run in float32. Published encoders would take 23 or 31 GB so, and run in
# bfloat16.
FLOAT32_LIMIT_BYTES = 2 << 30
CACHE_BYTES = 64 << 20
MAX_NAMES_SHOWN = 8
CPU, META = torch.device("cpu"), torch.device("meta")

Reader = Callable[[Checkpoint, Iterable[str]], Iterator[tuple[str, Tensor]]]  # core.weights.tensors.read_tensors
Key = tuple[str, ...]


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
    """Where to encode, and the most bytes to use there; None is whatever is free. A limit means nothing on the CPU.

    Blocks that don't fit in that together come to the device in turn. The token embedding always stays on the CPU, and
    nothing of the encoder stays on the device.
    """

    device: torch.device = CPU
    max_vram_bytes: int | None = None

    def limit(self, wanted: int) -> int:
        """Return the bytes that may be used on the device, after others were asked to make room for `wanted` ones.

        Of what is free, some headroom is left: wants are counted to the byte, and no allocator works so closely.
        """
        allowed = wanted if self.max_vram_bytes is None else self.max_vram_bytes
        headroom = headroom_of(host.driver_spills())
        host.make_room(min(wanted, allowed) + headroom, self.device)
        free = max(0, host.free_memory(self.device) - headroom)
        return free if self.max_vram_bytes is None else min(allowed, free)


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

    `dtype` None means bfloat16, but float32 for a small model on a CPU. `placement` is where to encode unless told
    otherwise. A family names its model in `title` and `examples`, and turns prompts into rows in `_compute`.
    Raises ValueError if the checkpoint is no complete text encoder, or the tokenizer is not of its vocabulary.
    """

    title: str
    examples: str

    def __init__(
        self,
        checkpoint: Checkpoint,
        identity: Identity,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | None = None,
        cache: EmbeddingCache | None = None,
        placement: Placement | None = None,
    ):
        self.checkpoint, self.identity, self.tokenizer, self.dtype = checkpoint, identity, tokenizer, dtype
        self.config = identity.config
        self.cache = EmbeddingCache() if cache is None else cache
        self.placement = placement or Placement()
        self._held: dict[tuple[str, torch.dtype], Part] = {}
        self._check()

    def release(self) -> None:
        """Drop the weights, from the device and from memory; the next new prompt reads them again."""
        self._held.clear()

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return what is computed in on a device."""
        return self.dtype or compute_dtype(num_parameters(self.checkpoint, self.identity), device)

    @abstractmethod
    def _compute(self, prompts: Sequence[Prompt], dtype: torch.dtype, placement: Placement) -> list[Tensor]:
        """Return the rows [1, S, E] of each prompt, wherever and in whatever dtype."""

    def _encode(self, prompts: Sequence[Prompt], placement: Placement | None) -> list[Conditioning]:
        """Return the float32 rows [1, S, E] of each prompt, on the CPU; run those that the cache does not have."""
        placement = placement or self.placement
        dtype = self.dtype_on(placement.device)
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
            log.info("Opening %s of %s as %s", part, self.checkpoint.path, dtype)
            self._held[part, dtype] = load()
        return self._held[part, dtype]

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


class TokenTable:
    """The token embedding [V, E] of a language model, left in its file; looked up on the CPU, where it stays.

    It takes no RAM: the file is memory-mapped, and only the rows that are looked up are made what `recipe` wants.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe):
        self.checkpoint, self.recipe = checkpoint, recipe

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Return the embedded tokens [1, L, E]."""
        chosen, stored, scale = torch.tensor(ids), self._stored[self.recipe.tensor], self._stored.get(self.recipe.scale)
        if scale is not None and scale.numel() > 1:
            scale = scale.reshape(-1)[chosen]
        # As bytes: not every version of PyTorch looks rows of fp8 up.
        rows = stored.view(torch.uint8)[chosen].view(stored.dtype)
        kind = self.checkpoint.tensors[self.recipe.tensor].dtype
        return formats.dequantise(rows, scale, self.recipe.dtype, kind)[None]

    @cached_property
    def _stored(self) -> dict[str | None, Tensor]:
        return dict(read_tensors(self.checkpoint, filter(None, (self.recipe.tensor, self.recipe.scale))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """The bytes that a part of an encoder takes on a device: weights of each block, all others, and its work space."""

    blocks: tuple[int, ...]
    others: int
    working: int

    @property
    def whole(self) -> int:
        """All that it takes with every block there."""
        return sum(self.blocks) + self.others + self.working

    def streamed(self, num_slots: int) -> int:
        """Return what it takes with all blocks passing through so many slots."""
        return self.others + num_slots * max(self.blocks) + self.working


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """How a family builds a part of an encoder: `build` makes the module, most of whose weights are in `blocks`.

    `blocks` is the path of a list of modules; `table` the path of the token embedding, of which a part has none if its
    rows come from elsewhere.
    """

    name: str
    build: Callable[[], nn.Module]
    blocks: str
    table: str | None = None

    def __post_init__(self) -> None:
        # Whatever builds modules brings this in, and PyTorch 2.7 can't import it where modules are built on META.
        import torch._dynamo  # noqa: F401

    def open(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        *,
        dtype: torch.dtype,
        ignored: Collection[str] = (),
        shares: Mapping[str, Share] | None = None,
    ) -> "Part":
        """Return the part with the weights of a checkpoint, in `dtype`; none of them is read.

        `names` maps the names of the module's parameters to the file's, `ignored` are names of the file that belong
        elsewhere, `shares` parameters that are a part of a tensor. Raises ValueError for missing, unexpected or
        misshapen weights.
        """
        weights = prepare(
            self.build,
            names,
            checkpoint,
            float32=lambda name: False,
            dtype=dtype,
            ignored=ignored,
            shares=shares,
            blocks=lambda module: module.get_submodule(self.blocks),
        )
        table = TokenTable(checkpoint, weights.recipes.pop(f"{self.table}.weight")) if self.table else None
        self._without_table(weights.module)
        loaded = Loaded(weights, weights.module.get_submodule(self.blocks))
        return Part(name=self.name, loaded=loaded, dtype=dtype, table=table)

    def twin(self, dtype: torch.dtype) -> nn.Module:
        """Return the module on the meta device, in `dtype`; buffers that no file carries are real."""
        with META:
            module = self._without_table(self.build())
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        return module.requires_grad_(False).eval()

    def working_bytes(self, dtype: torch.dtype, *inputs: Tensor) -> int:
        """Return the most bytes beside the weights that a run of this module takes, its inputs among them.

        Those of the meta device are not computed with; the others decide what is done.
        """
        twin = self.twin(dtype)
        return traced_bytes(lambda: twin(*(tensor.clone() for tensor in inputs)))

    def footprint(self, dtype: torch.dtype, num_blocks: int, working: int) -> Footprint:
        """Return what a part takes that has so many blocks like the first of this one."""
        twin = self.twin(dtype)
        blocks = twin.get_submodule(self.blocks)
        others = Layout(twin, "", blocks).nbytes
        return Footprint(blocks=(Layout(blocks[0], "").nbytes,) * num_blocks, others=others, working=working)

    def _without_table(self, module: nn.Module) -> nn.Module:
        if self.table:
            parent, _, last = self.table.rpartition(".")
            delattr(module.get_submodule(parent), last)
        return module


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A module whose weights are in RAM or in their file, and visit the device while it runs, together or in turn.

    `loaded.module` takes tensors and gives one tensor, and computes in `dtype`; most of its weights are in
    `loaded.blocks`. `table` is the token embedding of a language model, which is no part of the module.
    """

    name: str
    loaded: Loaded
    dtype: torch.dtype = torch.bfloat16
    table: TokenTable | None = None

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the embedded tokens [1, L, E], on the CPU."""
        assert self.table is not None, f"the {self.name} reads no tokens"
        return self.table.rows(ids)

    @contextmanager
    def on(self, placement: Placement, work_bytes: Callable[[], int]) -> Iterator[nn.Module]:
        """Provide the module where `placement` says; on exit, also by an exception, the device is as it was.

        `work_bytes` is what it needs beside its weights, asked for if anything has to move. Raises ValueError if the
        device has too little for one block.
        """
        loaded, device = self.loaded, placement.device
        unpack = Unpack(loaded.blocks, device, self.dtype)

        def plan(at_least: int) -> Plan:
            return self._plan(placement, work_bytes() + unpack.nbytes, at_least)

        with (
            placed(loaded, device, plan) as residency,
            closing(unpack),
            _hooked(loaded.blocks, (residency, unpack), host.block_gate(device)),
        ):
            if line := residency.describe():
                log.info("The %s runs on %s: %s", self.name, device, line)
            yield loaded.module

    def _plan(self, placement: Placement, work_bytes: int, at_least: int) -> Plan:
        """Return where the blocks are, at least so many of them streaming; nothing is taken yet."""
        *blocks, others = (layout.nbytes for layout in self.loaded.layouts())
        footprint = Footprint(blocks=tuple(blocks), others=others, working=work_bytes)
        limit = placement.limit(footprint.whole)
        if footprint.streamed(1) > limit:
            raise ValueError(
                f"The {self.name} can't run in {limit} bytes ({limit / 2**20:.1f} MiB), which is the limit given"
                " or what is free: one of its blocks and the work space take"
                f" {footprint.streamed(1) / 2**20:.1f} MiB. Allow that much, or run it on the CPU."
            )
        return plan_of(footprint, limit, at_least)


def plan_of(footprint: Footprint, limit: int, at_least: int = 0) -> Plan:
    """Return how a part runs in so many bytes of a device: what does not fit is read from its file layer by layer.

    Raises ValueError if not even one block fits beside the rest.
    """
    machine = Machine(vram=limit, ram=0, total_ram=0)
    job = Job(blocks=footprint.blocks, others=footprint.others, working=footprint.working, passes=1)
    slots = NUM_SLOTS if footprint.streamed(NUM_SLOTS) <= limit else 1
    return make_plan(job, machine, MemoryOptions(slots=slots, source=Source.DISK.value, headroom=0), at_least)


@contextmanager
def _hooked(
    blocks: Sequence[nn.Module], hooks: Sequence[Residency | Unpack], gate: Callable[[], None]
) -> Iterator[None]:
    """Have each block's weights there when it runs, `hooks` being what `run_blocks` takes, and `gate` asked before.

    By hooks, which are refused elsewhere: the loop over the blocks is not ours but transformers'.
    """

    def hook(call: Callable[[int], None], i: int) -> Callable[..., None]:
        return lambda *_: call(i)

    def before(i: int) -> None:
        gate()
        for one in hooks:
            one.before(i)

    def after(i: int) -> None:
        for one in reversed(hooks):
            one.after(i)

    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(hook(before, i)).remove)
            stack.callback(block.register_forward_hook(hook(after, i)).remove)
        yield


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
