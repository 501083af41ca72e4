"""Make a module of a checkpoint, with a strict account: every parameter is filled, every tensor used or known."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..ops import formats
from ..ops.linear import Linear
from ..types import Checkpoint
from .keymap import Share
from .ranges import Range, read_ranges
from .reader import read_tensors

SHOWN = 8  # names per list in an error
SCALE = "weight_scale"  # the buffer of a `Linear` whose weight stays in fp8


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one parameter comes about: the file's tensor, times the file's `scale` if any, in `dtype`.

    Where `rows` are given, it is those of the tensor, each of the shape `row`.
    """

    tensor: str
    scale: str | None
    dtype: torch.dtype
    rows: slice | None = None
    row: tuple[int, ...] = ()

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the parameter's part of the file's tensor, which shares its memory."""
        return tensor if self.rows is None else tensor.reshape(-1, *self.row)[self.rows]

    def part_of_scale(self, scale: Tensor | None) -> Tensor | None:
        """Return the scales of the rows that the parameter has; one number is that of all rows."""
        whole = self.rows is None or scale is None or scale.numel() == 1
        return scale if whole else scale.reshape(-1)[self.rows]


class Weights:
    """A module on the meta device, and how each of its tensors is made of a checkpoint's bytes.

    Made by `prepare`, which has checked the whole account; the bytes are read by `fill` or `materialise`.
    """

    def __init__(self, module: nn.Module, checkpoint: Checkpoint, recipes: Mapping[str, Recipe]):
        self.module, self.checkpoint, self.recipes = module, checkpoint, dict(recipes)

    def fill(self, out: Mapping[str, Tensor], go_on: Callable[[], None] = lambda: None) -> None:
        """Write tensors of the module into given memory: contiguous CPU tensors of their shapes and dtypes, by name.

        What the file holds as it is wanted is read in large pieces straight to its place; `go_on` is asked between
        them and stops by raising. Raises ValueError for a file that was cut off meanwhile, OSError where it can't be
        read.
        """
        ranges: list[Range] = []
        converted: list[tuple[str, Tensor]] = []
        for name, target in out.items():
            recipe = self.recipes[name]
            info = self.checkpoint.tensors[recipe.tensor]
            stored = target
            if recipe.scale is not None or formats.STORAGE[info.dtype][0] != target.dtype:
                stored = torch.empty(target.shape, dtype=formats.STORAGE[info.dtype][0])
                converted.append((name, stored))
            if info.start is None:
                stored.copy_(recipe.part_of(self._pickled[recipe.tensor]))
            else:
                start = info.start + (recipe.rows.start * stored[:1].nbytes if recipe.rows else 0)
                file = self.checkpoint.location[recipe.tensor]
                ranges.append(Range(file=file, start=start, name=recipe.tensor, out=stored))
        read_ranges(ranges, go_on)
        for name, stored in converted:
            go_on()
            recipe, target = self.recipes[name], out[name]
            scale = recipe.part_of_scale(self._scales.get(recipe.scale))
            target.copy_(stored if scale is None else formats.dequantise(stored, scale, target.dtype))

    def materialise(self, names: Collection[str] | None = None) -> nn.Module:
        """Give the module, or its tensors of these names, real memory on the CPU; return the module.

        What is stored as it is wanted stays memory-mapped: its bytes are read when they are first used. Raises
        ValueError if there is not the RAM for what has to be converted.
        """
        chosen = {name: self.recipes[name] for name in (self.recipes if names is None else names)}
        self._check_ram(chosen)
        wanted: dict[str, list[str]] = {}
        for name, recipe in chosen.items():
            wanted.setdefault(recipe.tensor, []).append(name)
        for tensor_name, stored in read_tensors(self.checkpoint, wanted):
            for name in wanted[tensor_name]:
                recipe = self.recipes[name]
                scale = recipe.part_of_scale(self._scales.get(recipe.scale))
                _register(self.module, name, formats.dequantise(recipe.part_of(stored), scale, recipe.dtype))
        return self.module

    @cached_property
    def _scales(self) -> dict[str | None, Tensor]:
        """The scales of weights that are multiplied when they are read, by the file's name, in float32."""
        used = {recipe.scale for recipe in self.recipes.values() if recipe.scale is not None}
        return {name: tensor.to(torch.float32, copy=True) for name, tensor in read_tensors(self.checkpoint, used)}

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        """The tensors of files that must be opened as a whole, memory-mapped."""
        names = {recipe.tensor for recipe in self.recipes.values()}
        return dict(
            read_tensors(self.checkpoint, [name for name in names if self.checkpoint.tensors[name].start is None])
        )

    def _check_ram(self, chosen: Mapping[str, Recipe]) -> None:
        parameters = dict(self.module.named_parameters())
        needed, dtypes = 0, set()
        for name, recipe in chosen.items():
            stored, _ = formats.STORAGE[self.checkpoint.tensors[recipe.tensor].dtype]
            if name in parameters and (stored != recipe.dtype or recipe.scale is not None):
                needed += parameters[name].numel() * recipe.dtype.itemsize
                dtypes.add(recipe.dtype)
        if needed > (free := host.available_ram()):
            wanted = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(
                f"{self.checkpoint.path} stores its weights in another way than {wanted}, in which they take "
                f"{needed / 1e9:.1f} GB of RAM, and {free / 1e9:.1f} GB are free: choose the precision that the file "
                "has, or close other programs"
            )


def prepare(
    build: Callable[[], nn.Module],
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    *,
    float32: Callable[[str], bool],
    dtype: torch.dtype,
    ignored: Collection[str] = (),
    shares: Mapping[str, Share] | None = None,
) -> Weights:
    """Return a module on the meta device and how to fill it, in eval mode and without gradients.

    `build` makes it; `names` maps its parameters, and the scales of quantised ones, to the file's names. Parameters for
    which `float32` holds are stored in float32; fp8 weights of a `Linear` stay as they are, with their scale in its
    `weight_scale`; all others are stored in `dtype`. `ignored` are names of the file that are known and not needed.
    `shares` names the parameters that are a part of the tensor that `names` gives them, and says which part.
    Raises ValueError, without reading a weight, for parameters the file lacks, tensors that nothing takes, other
    shapes, or a format that can't be read.
    """
    with torch.device("meta"):
        module = build()
    parameters, shares = dict(module.named_parameters()), shares or {}
    check_formats(checkpoint, names)
    _check_account(parameters, names, checkpoint, ignored, shares)
    scales = {o.rpartition(".")[0]: file for o, file in names.items() if o.endswith(formats.WEIGHT_SCALES)}
    recipes: dict[str, Recipe] = {}
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        owner, scale = module.get_submodule(path), scales.get(path) if leaf == "weight" else None
        stored, _ = formats.STORAGE[checkpoint.tensors[names[name]].dtype]
        wanted = torch.float32 if float32(name) else dtype
        is_kept = isinstance(owner, Linear) and leaf == "weight" and stored in formats.FLOAT8 and name not in shares
        if is_kept and not float32(name):
            wanted = stored
            if scale is not None:
                owner.weight_scale = torch.empty(checkpoint.tensors[scale].shape, device="meta")
                recipes[f"{path}.{SCALE}"] = Recipe(tensor=scale, scale=None, dtype=torch.float32)
                scale = None
        owner.register_parameter(leaf, nn.Parameter(parameter.to(wanted), requires_grad=False))
        rows = _rows(parameter, shares.get(name))
        recipes[name] = Recipe(
            tensor=names[name], scale=scale, dtype=wanted, rows=rows, row=tuple(parameter.shape[1:]) if rows else ()
        )
    return Weights(module.eval(), checkpoint, recipes)


def assemble(
    build: Callable[[], nn.Module],
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    *,
    float32: Callable[[str], bool],
    dtype: torch.dtype,
    ignored: Collection[str] = (),
) -> nn.Module:
    """Return the module with the checkpoint's weights on the CPU; see `prepare`, and `Weights.materialise`."""
    weights = prepare(build, names, checkpoint, float32=float32, dtype=dtype, ignored=ignored)
    module = weights.materialise()
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers())), "a module may not make buffers itself"
    return module


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(owner, leaf, tensor.clone())


def _rows(parameter: Tensor, share: Share | None) -> slice | None:
    count = parameter.shape[0] if share else 0
    return slice(share.index * count, (share.index + 1) * count) if share else None


def _check_account(
    parameters: Mapping[str, Tensor],
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    ignored: Collection[str],
    shares: Mapping[str, Share],
) -> None:
    used = {file for official, file in names.items() if official in parameters or _layer(official) in parameters}
    known = {name for name in checkpoint.tensors if name.endswith(formats.SCALED_MARKER)} | set(ignored)
    problems = [
        ("missing", [name for name in parameters if name not in names]),
        ("not part of this model", [name for name in checkpoint.tensors if name not in used and name not in known]),
        ("of another shape", list(dict.fromkeys(_other_shapes(parameters, names, checkpoint, shares)))),
    ]
    lines = [
        f"{len(rows)} {what}: {', '.join(rows[:SHOWN])}{', ...' * (len(rows) > SHOWN)}"
        for what, rows in problems
        if rows
    ]
    if lines:
        stored = formats.weight_format(checkpoint.tensors)
        raise ValueError(
            f"{checkpoint.path} ({len(checkpoint.tensors)} tensors, {stored}) does not fit a model of "
            f"{len(parameters)} parameters: {'; '.join(lines)}. Is the file complete, and the one that is meant?"
        )


def _layer(official: str) -> str | None:
    """Return the weight that a companion stands beside, None for other names."""
    suffix = formats.companion(official)
    return official.removesuffix(suffix) + ".weight" if suffix else None


def _other_shapes(
    parameters: Mapping[str, Tensor], names: Mapping[str, str], checkpoint: Checkpoint, shares: Mapping[str, Share]
) -> Iterator[str]:
    for name, parameter in parameters.items():
        if name not in names:
            continue
        stored, wanted = checkpoint.tensors[names[name]].shape, tuple(parameter.shape)
        shape, shown = stored, name
        if share := shares.get(name):
            wanted, shown = (wanted[0] * share.count, *wanted[1:]), names[name]
            more = len(stored) - len(wanted)
            shape = stored[more:] if more > 0 and set(stored[:more]) == {1} else stored
        if shape != wanted:
            yield f"{shown} is {list(stored)} instead of {list(wanted)}"


def _unreadable(names: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    found = (checkpoint.tensors[file] for official, file in names.items() if not formats.companion(official))
    dtypes = sorted({info.dtype for info in found} - formats.STORAGE.keys())
    scales = {o: checkpoint.tensors[f] for o, f in names.items() if o.endswith(formats.WEIGHT_SCALES)}
    for official, scale in scales.items():
        weight = checkpoint.tensors.get(names.get(_layer(official) or "", ""))
        per_row = weight is not None and scale.shape in ((), (1,), weight.shape[:1], (*weight.shape[:1], 1))
        if scale.dtype not in formats.STORAGE or not per_row:
            dtypes.append(f"{official} ({scale.dtype} {list(scale.shape)})")
    return dtypes


def check_formats(checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Raise ValueError if weights are stored in a way that can't be read: anything but plain floats and scaled fp8.

    `names` maps official names, scales and records among them, to the file's.
    """
    record_names = [file for official, file in names.items() if official.endswith(formats.RECORD)]
    texts = {
        name: bytes(tensor.to(torch.uint8).tolist()).decode(errors="replace")
        for name, tensor in read_tensors(checkpoint, record_names)
    }
    records = {name: _parse(checkpoint, name, text) for name, text in texts.items()}
    if text := checkpoint.metadata.get(formats.METADATA_RECORD):
        records |= _parse(checkpoint, formats.METADATA_RECORD, text).get("layers", {})
    others = {name: record.get("format") for name, record in records.items()}
    others = {name: found for name, found in others.items() if found not in formats.READABLE_RECORDS}
    if others:
        name, found = next(iter(others.items()))
        raise ValueError(
            f"{checkpoint.path} is quantised as {found!r} ({len(others)} layers, such as {name}): only "
            f"{' and '.join(formats.READABLE_RECORDS)} can be read; use an fp8 or 16-bit file of this model"
        )
    if rows := _unreadable(names, checkpoint):
        raise ValueError(
            f"{checkpoint.path} has {len(rows)} kinds of weights stored in a way that can't be read: "
            f"{', '.join(rows[:SHOWN])}{', ...' * (len(rows) > SHOWN)}; use an fp8 or 16-bit file of this model"
        )


def _parse(checkpoint: Checkpoint, name: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{checkpoint.path}: {name} is not JSON but {text[:80]!r}: download it again") from error
    if not isinstance(record, dict):
        raise ValueError(f"{checkpoint.path}: {name} is not a JSON object but {text[:80]!r}: download it again")
    return record
