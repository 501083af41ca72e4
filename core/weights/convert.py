"""Plan how a checkpoint becomes another one, from its header alone; carry it out with one layer in memory at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import storage
from ..ops import formats
from ..types import Checkpoint, Identity, Spelling, TensorInfo
from .dfloat11 import seen_through
from .export import Export, Piece, fits
from .identity import METADATA_KEY, own_metadata
from .keymap import Share
from .ranges import Range, read_ranges
from .reader import check_unchanged
from .targets import SAME, TARGETS, Layer, Stored, Target
from .tensors import read_tensors
from .write import GGUF, Container, write_file

CONVERTED_KEY = "wanqwen_converted"  # JSON in the metadata: a list of what was made of what, the last one last
FLOATS = ("F64", "F32", "F16", "BF16")
WIDE = ("F64", "F32")
ARCHITECTURE_KEY = "general.architecture"
FORMAT = {"format": "pt"}  # without which Hugging Face's libraries refuse a safetensors file
# Facts of a file that are no longer true of what it is turned into: how it is stored, and digests of its bytes.
OUTDATED = (
    *(storage.METADATA_RECORD, METADATA_KEY, CONVERTED_KEY, "format", "*hash*", "*sha256*"),
    *("general.architecture", "general.file_type", "general.quantization_version", "general.alignment", "general.type"),
    *("comfy.gguf.*", "tokenizer.*", "GGUF.*", "dfloat11_*"),
)
SMALLEST = 1024  # numbers of a GGUF matrix; what is less is stored in float32, as the tools for these files do
SHOWN = 6  # names in an error


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a checkpoint is to become: a name of TARGETS, and of the export's spellings (None is the file's own).

    `prefix` None is the spelling's. `keep` are patterns of names, official or the file's, of weights that stay as
    precise as they are. `requantise` allows to round what was rounded to 8 bits or fewer already.
    """

    target: str = SAME
    spelling: str | None = None
    prefix: str | None = None
    keep: tuple[str, ...] = ()
    requantise: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Some tensors of the new file, in its order, and how they are made."""

    outputs: Mapping[str, TensorInfo]
    make: Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A file that is to be written: all that its header says, and the steps that make its tensors.

    `num_quantised` counts the layers that are not stored as plain numbers, `dropped` are names of the `source` that
    nothing is made of.
    """

    source: Checkpoint
    container: Container
    facts: Mapping[str, str | int]
    steps: tuple[Step, ...]
    num_quantised: int
    dropped: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors in their order. What is compressed may turn out smaller."""
        return {name: info for step in self.steps for name, info in step.outputs.items()}

    @property
    def size(self) -> int:
        """Bytes of the file, at most."""
        return self.container.size(self.tensors, self.facts)

    def checkpoint(self, path: Path) -> Checkpoint:
        """Return the new file as if it lay there and its header had been read."""
        tensors, metadata = self.tensors, {key: str(value) for key, value in self.facts.items()}
        location = dict.fromkeys(tensors, path)
        return seen_through(Checkpoint(path=path, tensors=tensors, location=location, metadata=metadata))

    def write(self, path: Path, advance: Callable[[int], None] = lambda count: None) -> None:
        """Write the file; `advance` is told of bytes as they are written. See `write.write_file`.

        Raises ValueError for numbers that the format has no place for, or a source that was written to meanwhile.
        """
        write_file(path, self.container, self.tensors, self.facts, self._content(), advance)

    def _content(self) -> Iterator[tuple[str, Tensor]]:
        for step in self.steps:
            yield from step.make()
        check_unchanged(self.source)  # a download that was not at its end, say


def make_plan(checkpoint: Checkpoint, identity: Identity, export: Export, wish: Wish) -> Plan:
    """Return how a checkpoint becomes what is wished; nothing but its header is read.

    Raises ValueError for what can't be: an unknown format or spelling, a model that has none of the layers that the
    format is for, weights that would be rounded a second time.
    """
    if wish.target not in TARGETS:
        raise ValueError(f"there is no format {wish.target!r}: choose one of {', '.join(TARGETS)}")
    target = TARGETS[wish.target]
    target.check()
    stored = {checkpoint.tensors[name].dtype for name in identity.names.values()}
    container = GGUF if wish.target == SAME and stored & storage.PACKINGS.keys() else target.container
    return _Planner(checkpoint, identity, export, wish, replace(target, container=container)).plan()


class _Planner:
    """The making of one plan."""

    def __init__(self, checkpoint: Checkpoint, identity: Identity, export: Export, wish: Wish, target: Target):
        self.checkpoint, self.identity, self.export, self.wish = checkpoint, identity, export, wish
        self.target, self.is_gguf = target, target.container is GGUF
        self.source = _Source(checkpoint, identity)
        self.spelling = self._spelling()
        self.prefix = self._prefix()
        self.pieces = self._pieces()
        inside = {name.removeprefix(identity.prefix) for name in identity.names.values()}
        self.is_respelled = any(piece.name not in inside for piece in self.pieces)
        self.quantised = {piece.name: piece for piece in self.pieces if self._is_quantised(piece)}
        self._check()

    def plan(self) -> Plan:
        units: dict[str, list[Piece]] = {}
        for piece in self.quantised.values():
            units.setdefault(self.target.unit(_path(self.prefix + piece.name)), []).append(piece)
        steps: list[Step] = []
        for piece in self.pieces:
            if self.wish.target == SAME:
                steps.append(self._as_stored(piece))
            elif piece.name not in self.quantised:
                steps.append(self._plain(piece))
            elif members := units.pop(self.target.unit(_path(self.prefix + piece.name)), None):
                steps.append(self._packed(members))
        extra, dropped = self._others()
        return Plan(
            source=self.checkpoint,
            container=self.target.container,
            facts={**self._facts(), **self.target.tells(self._packed_shapes())},
            steps=(*steps, *extra),
            num_quantised=len(self.quantised),
            dropped=dropped,
        )

    def _packed_shapes(self) -> dict[str, tuple[int, ...]]:
        return {_path(self.prefix + piece.name): piece.shape for piece in self.quantised.values()}

    def _spelling(self) -> Spelling | None:
        """Return the spelling to write, None for the file's own."""
        wish, export, title = self.wish.spelling, self.export, f"{self.identity.family} {self.identity.variant}"
        if wish is not None and wish not in export.spellings:
            raise ValueError(f"{title} has no spelling {wish!r}: choose one of {', '.join(export.spellings)}")
        if not self.is_gguf:
            is_foreign = export.gguf_spelling is not None and self.identity.spelling == export.gguf_spelling.name
            default = next(iter(export.spellings.values())) if is_foreign else None
            return export.spellings[wish] if wish else default
        if export.gguf is None or export.gguf_spelling is None:
            reason = "hold the language model alone" if export.gguf_spelling else "are not in use"
            raise ValueError(
                f"GGUF files of {title} ({self.identity.role}) {reason}: choose bf16 or fp16"
                + (", or fp8_scaled" if export.quantised else "")
            )
        if wish is not None and export.spellings[wish].table != export.gguf_spelling.table:
            raise ValueError(
                f"GGUF files of {title} have names of their own ({export.gguf_spelling.name}): leave the spelling out"
            )
        return export.gguf_spelling

    def _prefix(self) -> str:
        if self.wish.prefix is not None:
            return self.wish.prefix
        return self.identity.prefix if self.spelling is None else self.spelling.prefix

    def _pieces(self) -> tuple[Piece, ...]:
        if self.spelling is not None:
            return self.export.respell(self.spelling)
        names, prefix = self.identity.names, self.identity.prefix
        return tuple(
            Piece(name=names[official].removeprefix(prefix), shape=shape, parts=((official, Share()),))
            for official, shape in ((name, self.export.shapes[name]) for name in names if name in self.export.shapes)
        )

    def _is_quantised(self, piece: Piece) -> bool:
        return (
            self.target.planes is not None
            and self._is_meant(piece.official)
            and self.target.takes(piece.shape)
            and not self._is_kept(piece)
        )

    def _is_meant(self, official: str) -> bool:
        if self.target.is_for is not None:
            return self.target.is_for(official)
        return self.export.is_quantised(official, self.target.all_linears)

    def _is_kept(self, piece: Piece) -> bool:
        names = (piece.official, self.identity.names[piece.official])
        return any(fits(name, self.wish.keep) for name in names)

    def _check(self) -> None:
        where, file = f"{self.identity.family} {self.identity.variant}", self.checkpoint.path.name
        known = list(dict.fromkeys(name for pair in self.identity.names.items() for name in pair))
        if unused := [pattern for pattern in self.wish.keep if not any(fits(name, (pattern,)) for name in known)]:
            raise ValueError(
                f"{file} has no tensor that fits --keep {' '.join(unused)}: names are such as {', '.join(known[:4])}"
            )
        if self.wish.target == SAME and any(self._stored(piece) == storage.DFLOAT11 for piece in self.pieces):
            raise ValueError(
                f"{file} is DFloat11, whose groups are made anew where names change: choose dfloat11, or bf16, which "
                "it holds without loss"
            )
        if self.target.planes is not None and not self.quantised:
            raise ValueError(
                f"{file} ({where}) has no layers that {self.wish.target} would be used for: choose bf16 or fp16"
            )
        narrow = [piece for piece in self.quantised.values() if self._stored(piece) in storage.SMALL]
        if narrow and self.target.is_narrow and not self.wish.requantise:
            found = ", ".join(sorted({self._stored(piece) for piece in narrow}))
            raise ValueError(
                f"{file} is quantised already ({len(narrow)} layers in {found}), and would lose precision a second "
                f"time as {self.wish.target}: take a file of this model in 16 or 32 bits, or give --requantise to do "
                "it nevertheless"
            )

    def _stored(self, piece: Piece) -> str:
        return self.checkpoint.tensors[self.identity.names[piece.official]].dtype

    def _plain_dtype(self, piece: Piece) -> str:
        """Return what a tensor that is not quantised is stored as."""
        stored = self._stored(piece)
        if self.target.dtype and not (self._is_kept(piece) and stored in FLOATS):
            return self.target.dtype
        is_matrix = len(piece.shape) == 2 and torch.Size(piece.shape).numel() > SMALLEST
        if self.is_gguf and not is_matrix:
            return "F32"  # tools read vectors, modulations and convolutions so only
        if stored in WIDE and not self._is_kept(piece) and not self.target.is_exact:
            return "F32" if self.export.float32(piece.official) else "BF16"
        return "F32" if stored == "F64" else stored if stored in FLOATS else "BF16"

    def _plain(self, piece: Piece) -> Step:
        name, dtype = self.prefix + piece.name, self._plain_dtype(piece)

        def make() -> Iterator[tuple[str, Tensor]]:
            yield name, self.source.layer(piece).at(formats.DTYPES[dtype])

        return Step(outputs={name: TensorInfo(dtype, piece.shape)}, make=make)

    def _packed(self, pieces: Sequence[Piece]) -> Step:
        by_path = {_path(self.prefix + piece.name): piece for piece in pieces}
        assert self.target.planes is not None and self.target.pack is not None
        outputs, pack = self.target.planes({path: piece.shape for path, piece in by_path.items()}), self.target.pack

        def make() -> Iterator[tuple[str, Tensor]]:
            return pack({path: self.source.layer(piece) for path, piece in by_path.items()})

        return Step(outputs=outputs, make=make)

    def _as_stored(self, piece: Piece) -> Step:
        """Return the step that writes a tensor as it is, with what stands beside it."""
        name = self.prefix + piece.name
        dtype, kinds = self._stored(piece), {self.identity.names[official] for official, _ in piece.parts}
        if {self.checkpoint.tensors[file].dtype for file in kinds} != {dtype}:
            raise ValueError(f"{name} would be made of tensors of several formats: choose one, such as bf16")
        beside = {_path(name) + suffix: file for suffix, file in self.source.beside.get(_path(piece.official), ())}
        is_whole = len(piece.parts) == 1 and piece.parts[0][1].count == 1
        if beside and not is_whole:
            raise ValueError(f"{name} would be made of a part of a quantised tensor: choose a format, such as bf16")
        outputs = {name: TensorInfo(dtype, piece.shape)}
        outputs |= {other: self.checkpoint.tensors[file] for other, file in beside.items()}

        def make() -> Iterator[tuple[str, Tensor]]:
            layer = self.source.layer(piece)
            found = [part.tensor for part in layer.parts]
            whole = found[0] if len(found) == 1 else torch.cat(found)
            yield name, whole if dtype in storage.PACKINGS else whole.reshape(piece.shape)
            yield from ((other, self.source.read(file)) for other, file in beside.items())

        return Step(outputs=outputs, make=make)

    def _others(self) -> tuple[list[Step], tuple[str, ...]]:
        """Return steps for what are no weights: what the file has besides, and marks; and names of what is left out."""
        outputs: dict[str, TensorInfo] = {}
        made: dict[str, Tensor] = {}
        files: dict[str, str] = {}
        dropped = []
        for file in self.identity.ignored:
            inner, info = file.removeprefix(self.identity.prefix), self.checkpoint.tensors[file]
            is_marker, holds = inner == storage.SCALED_MARKER, FLOATS if self.is_gguf else formats.DTYPES
            is_own = not self.is_respelled or fits(inner, (*self.export.carried, *self.export.marks))
            if inner in self.export.marks and self.wish.spelling is not None:
                is_own = self._wants(self.export.marks[inner])
            if info.dtype in holds and (self.wish.target == SAME if is_marker else is_own):
                as_float = self.target.dtype if info.dtype in FLOATS else None
                name = (self.prefix if file.startswith(self.identity.prefix) else "") + inner
                files[name], outputs[name] = file, TensorInfo(as_float or info.dtype, info.shape)
            elif not is_marker:
                dropped.append(file)
        marks = {mark: torch.zeros(0) for mark, spellings in self.export.marks.items() if self._wants(spellings)}
        for mark, tensor in {**marks, **self.target.marks}.items():
            if self.prefix + mark not in outputs:
                made[self.prefix + mark] = tensor
                outputs[self.prefix + mark] = TensorInfo(_name_of(tensor.dtype), tuple(tensor.shape))

        def make() -> Iterator[tuple[str, Tensor]]:
            for name, info in outputs.items():
                yield name, made[name] if name in made else self.source.read(files[name]).to(formats.DTYPES[info.dtype])

        return [Step(outputs=outputs, make=make)] if outputs else [], tuple(dropped)

    def _wants(self, spellings: Sequence[str]) -> bool:
        """Say whether the file is in one of these spellings; one whose spelling is its own has its marks already."""
        return self.wish.spelling in spellings or self.is_gguf

    def _facts(self) -> dict[str, str | int]:
        metadata = self.checkpoint.metadata
        facts: dict[str, str | int] = {} if self.is_gguf else dict(FORMAT)
        if self.is_gguf:
            assert self.export.gguf is not None
            facts = {ARCHITECTURE_KEY: self.export.gguf} | dict(self.target.facts)
        facts |= {key: value for key, value in metadata.items() if not fits(key, OUTDATED)}
        if own := own_metadata(self.checkpoint) | dict(self.export.told):
            facts[METADATA_KEY] = json.dumps(own)
        if self.wish.target == SAME and storage.METADATA_RECORD in metadata:
            facts[storage.METADATA_RECORD] = self._records(metadata[storage.METADATA_RECORD])
        facts[CONVERTED_KEY] = json.dumps([*_history(metadata), self._came_from()])
        return facts

    def _records(self, text: str) -> str:
        """Return the records of quantised layers by the layers' new names."""
        record: dict[str, Any] = json.loads(text)
        names = self.identity.names
        new = {_path(names[piece.official]): _path(self.prefix + piece.name) for piece in self.pieces}
        layers = {new.get(layer, layer): said for layer, said in record.get("layers", {}).items()}
        return json.dumps(record | {"layers": layers})

    def _came_from(self) -> dict[str, Any]:
        files = sorted(set(self.checkpoint.location.values()))
        wish = self.wish
        return {
            "source": self.checkpoint.path.name,
            "bytes": sum(file.stat().st_size for file in files if file.is_file()),
            "header_sha256": _digest(self.checkpoint.tensors),
            "format": self.identity.weight_format,
            "spelling": self.identity.spelling,
            "to": wish.target,
            **({"to_spelling": wish.spelling} if wish.spelling else {}),
            **({"keep": list(wish.keep)} if wish.keep else {}),
        }


def _path(name: str) -> str:
    return name.removesuffix(".weight")


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in formats.DTYPES.items() if known == dtype)


def _history(metadata: Mapping[str, str]) -> list[Any]:
    try:
        found = json.loads(metadata.get(CONVERTED_KEY, "[]"))
    except json.JSONDecodeError:
        return []
    return found if isinstance(found, list) else []


def _digest(tensors: Mapping[str, TensorInfo]) -> str:
    """Return a digest of what a header says of the tensors: names, formats, shapes, places."""
    said = [(name, info.dtype, info.shape, info.start) for name, info in sorted(tensors.items())]
    return hashlib.sha256(repr(said).encode()).hexdigest()


class _Source:
    """The tensors of the checkpoint that is converted, each read when it is asked for and then forgotten."""

    def __init__(self, checkpoint: Checkpoint, identity: Identity):
        self.checkpoint, self.names = checkpoint, identity.names
        self._group: dict[str, Tensor] = {}
        self.beside: dict[str, list[tuple[str, str]]] = {}  # path of a layer -> suffix and name of each companion
        for official, file in identity.names.items():
            if suffix := storage.companion(official):
                self.beside.setdefault(official.removesuffix(suffix), []).append((suffix, file))

    def layer(self, piece: Piece) -> Layer:
        """Return what a piece is made of, read."""
        return Layer(piece.official, piece.shape, [self._part(official, share) for official, share in piece.parts])

    def read(self, file: str) -> Tensor:
        """Return a tensor as it is, by its name in the file."""
        return self._rows(file, Share())

    def _part(self, official: str, share: Share) -> Stored:
        file, beside = self.names[official], dict(self.beside.get(_path(official), ()))
        named = next((beside[suffix] for suffix in storage.WEIGHT_SCALES if suffix in beside), None)
        scale = None if named is None else self.read(named).float()
        if scale is not None and scale.numel() > 1:
            count = scale.numel() // share.count
            scale = scale.reshape(-1)[share.index * count : (share.index + 1) * count]
        return Stored(self._rows(file, share), scale, self.checkpoint.tensors[file].dtype)

    def _rows(self, file: str, share: Share) -> Tensor:
        """Return a part of a tensor's rows; one of several parts must be of rows without dimensions before them."""
        info = self.checkpoint.tensors[file]
        dtype, shape = formats.layout(info)
        if share.count > 1:
            shape = (shape[0] // share.count, *shape[1:])
        out = torch.empty(shape, dtype=dtype)
        if info.start is None:
            first = share.index * len(out) if share.count > 1 else 0
            stored = self._decoded(file) if info.dtype == storage.DFLOAT11 else self._pickled[file]
            return stored[first : first + len(out)] if share.count > 1 else stored
        start = info.start + share.index * out.nbytes
        read_ranges([Range(file=self.checkpoint.location[file], start=start, name=file, out=out)])
        return out

    def _decoded(self, file: str) -> Tensor:
        """Return a weight of a DFloat11 group. Its whole group is decoded, and kept until another one is needed."""
        if file not in self._group:
            self._group = {}
            weights = next(weights for weights in self.checkpoint.groups.values() if file in weights)
            self._group = dict(read_tensors(self.checkpoint, weights))
        return self._group[file]

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        """The tensors of files that must be opened as a whole, memory-mapped."""
        tensors = self.checkpoint.tensors
        names = [name for name in tensors if tensors[name].start is None and tensors[name].dtype != storage.DFLOAT11]
        return dict(read_tensors(self.checkpoint, names))
