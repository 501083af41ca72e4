"""Make a module of a checkpoint, with a strict account: every parameter is filled, every tensor used or known."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import host, storage
from ..dfloat11 import PLANES
from ..ops import formats
from ..ops.linear import Linear
from ..ops.packed import Packed
from ..types import Checkpoint
from .keymap import Share
from .ranges import Range, read_ranges
from .tensors import read_tensors

SHOWN = 8  # names per list in an error
SCALE = "weight_scale"  # the buffer of a `Linear` whose weight stays in fp8 or int8
FLOATS = ("F64", "F32", "F16", "BF16")  # what a scale may be
INSTEAD = "use a file of this model in 16 bits, fp8, or GGUF (Q8_0, Q6_K, Q5_K, Q4_K, ...)"


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
        self._infos = {**checkpoint.tensors, **checkpoint.planes}

    def fill(
        self, out: Mapping[str, Tensor], go_on: Callable[[], None] = lambda: None, readers: Executor | None = None
    ) -> None:
        """Write tensors of the module into given memory: contiguous CPU tensors of their shapes and dtypes, by name.

        What the file holds as it is wanted is read in large pieces straight to its place; `go_on` is asked between
        them and stops by raising; `readers` are threads that help, see `read_ranges`. Raises ValueError for a file that
        was cut off meanwhile, OSError where it can't be read.
        """
        ranges: list[Range] = []
        converted: list[tuple[str, Tensor]] = []
        for name, target in out.items():
            recipe = self.recipes[name]
            info = self._infos[recipe.tensor]
            dtype, shape = formats.layout(info)
            stored = target
            if recipe.scale is not None or dtype != target.dtype:
                rows = recipe.rows
                stored = torch.empty((rows.stop - rows.start, *recipe.row) if rows else shape, dtype=dtype)
                converted.append((name, stored))
            if info.start is None:
                stored.copy_(recipe.part_of(self._pickled[recipe.tensor]))
            else:
                start = info.start + (recipe.rows.start * stored[:1].nbytes if recipe.rows else 0)
                file = self.checkpoint.location[recipe.tensor]
                ranges.append(Range(file=file, start=start, name=recipe.tensor, out=stored))
        read_ranges(ranges, go_on, readers)
        for name, stored in converted:
            go_on()
            recipe, target = self.recipes[name], out[name]
            is_only_cast = recipe.scale is None and self._infos[recipe.tensor].dtype not in storage.PACKINGS
            target.copy_((stored if is_only_cast else self._made(recipe, stored)).view(target.shape))

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
                _register(self.module, name, self._made(recipe, recipe.part_of(stored)))
        return self.module

    def _made(self, recipe: Recipe, stored: Tensor) -> Tensor:
        """Return what a recipe makes of its part of a tensor as the file has it; that itself where it is wanted so."""
        if recipe.scale is None and recipe.dtype == stored.dtype:
            return stored
        kind = self._infos[recipe.tensor].dtype
        return formats.dequantise(stored, recipe.part_of_scale(self._scales.get(recipe.scale)), recipe.dtype, kind)

    @cached_property
    def _scales(self) -> dict[str | None, Tensor]:
        """The scales of weights that are multiplied when they are read, by the file's name, in float32."""
        used = {recipe.scale for recipe in self.recipes.values() if recipe.scale is not None}
        return {name: tensor.to(torch.float32, copy=True) for name, tensor in read_tensors(self.checkpoint, used)}

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        """The tensors of files that must be opened as a whole, memory-mapped; DFloat11 weights outside of blocks."""
        names = {recipe.tensor for recipe in self.recipes.values()}
        return dict(read_tensors(self.checkpoint, [name for name in names if self._infos[name].start is None]))

    @property
    def converted_bytes(self) -> int:
        """How much RAM all weights take that are not stored as they are wanted; the others stay memory-mapped."""
        return sum(map(self._made_bytes, self.recipes))

    def _made_bytes(self, name: str) -> int:
        if not self._converts(name):
            return 0
        return self._shapes[name].numel() * self.recipes[name].dtype.itemsize

    def _converts(self, name: str) -> bool:
        recipe = self.recipes[name]
        stored, _ = formats.layout(self._infos[recipe.tensor])
        return name in self._shapes and (stored != recipe.dtype or recipe.scale is not None)

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.module.named_parameters()}

    def _check_ram(self, chosen: Mapping[str, Recipe]) -> None:
        converted = [r.dtype for name, r in chosen.items() if self._converts(name)]
        needed = sum(self._made_bytes(name) for name in chosen)
        if needed > (free := host.available_ram()):
            wanted = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in set(converted)))
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
    blocks: Callable[[nn.Module], Iterable[nn.Module]] = lambda module: (),
) -> Weights:
    """Return a module on the meta device and how to fill it, in eval mode and without gradients.

    `build` makes it; `names` maps its parameters, and the scales of quantised ones, to the file's names. Parameters for
    which `float32` holds are stored in float32; fp8 and int8 weights of a `Linear` stay as they are, with their scale
    in its `weight_scale`, and blocks of GGUF as bytes; all others are stored in `dtype`. `ignored` are names of the
    file that are known and not needed. `shares` names the parameters that are a part of the tensor that `names` gives
    them, and says which part. `blocks` are the modules around whose calls weights are unpacked: DFloat11 groups inside
    of one stay as they are, in a `Packed` of that block, and others are decoded when they are read.
    Raises ValueError, without reading a weight, for parameters the file lacks, tensors that nothing takes, other
    shapes, or a format that can't be read.
    """
    with torch.device("meta"):
        module = build()
    parts = dict(module.named_modules())
    parameters, shares = dict(module.named_parameters()), shares or {}
    check_formats(checkpoint, names)
    _check_account(parameters, names, checkpoint, ignored, shares)
    scales = {o.rpartition(".")[0]: file for o, file in names.items() if o.endswith(storage.WEIGHT_SCALES)}

    def is_needed(name: str) -> bool:
        return float32(name) or name in shares or name.removesuffix(".weight") in scales

    packed = _packed(module, blocks(module), parameters, names, checkpoint, is_needed)
    recipes = {
        f"{place}.{plane}": Recipe(tensor=f"{prefix}.{plane}", scale=None, dtype=torch.uint8)
        for prefix, place in packed.items()
        for plane in PLANES
    }
    kept = {weight for prefix in packed for weight in checkpoint.groups[prefix]}
    for name, parameter in parameters.items():
        if names[name] in kept:
            continue
        path, _, leaf = name.rpartition(".")
        owner, scale = parts[path], scales.get(path) if leaf == "weight" else None
        info = checkpoint.tensors[names[name]]
        as_stored, in_file = formats.layout(info)
        wanted, shape = torch.float32 if float32(name) else dtype, tuple(parameter.shape)
        is_kept = isinstance(owner, Linear) and leaf == "weight" and info.dtype in storage.SMALL and name not in shares
        if is_kept and not float32(name):
            owner.stored = info.dtype
            wanted, shape = as_stored, in_file
            if scale is not None:
                owner.weight_scale = torch.empty(checkpoint.tensors[scale].shape, device="meta")
                recipes[f"{path}.{SCALE}"] = Recipe(tensor=scale, scale=None, dtype=torch.float32)
                scale = None
        held = torch.empty(shape, dtype=wanted, device="meta")
        owner._parameters[leaf] = nn.Parameter(held, requires_grad=False)
        rows = _rows(parameter, shares.get(name))
        row = in_file[len(in_file) - parameter.dim() + 1 :] if rows else ()
        recipes[name] = Recipe(tensor=names[name], scale=scale, dtype=wanted, rows=rows, row=row)
    return Weights(module.eval(), checkpoint, recipes)


def _packed(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    parameters: Mapping[str, Tensor],
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    is_needed: Callable[[str], bool],
) -> dict[str, str]:
    """Put a `Packed` into each block for the groups that can stay as they are; return its path by the file's group.

    Those are the groups of layers of one block, none of which `is_needed` in another form.
    """
    paths = {part: path for path, part in module.named_modules()}
    inside = {name: block for block in blocks for name, _ in block.named_parameters(prefix=paths[block])}
    official = {names[name]: name for name in parameters}
    found: dict[str, str] = {}
    for prefix, weights in checkpoint.groups.items():
        ours = [official.get(weight, "") for weight in weights]
        [*homes] = {inside.get(name) for name in ours}
        whole = all(name.endswith(".weight") and parameters[name].dim() == 2 and not is_needed(name) for name in ours)
        if len(homes) != 1 or homes[0] is None or not whole:
            continue
        block, place = homes[0], f"dfloat11_{len(found)}"
        layers = {name.removesuffix(".weight"): tuple(parameters[name].shape) for name in ours}
        planes = {plane: checkpoint.planes[f"{prefix}.{plane}"] for plane in PLANES}
        block.add_module(place, Packed(module, layers, planes))
        found[prefix] = f"{paths[block]}.{place}"
    return found


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
        shape = owner._parameters[leaf].shape  # of which a file may leave out leading ones
        owner.register_parameter(leaf, nn.Parameter(tensor.view(shape), requires_grad=False))
    else:
        setattr(owner, leaf, tensor)


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
    known = {name for name in checkpoint.tensors if name.endswith(storage.SCALED_MARKER)} | set(ignored)
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
        stored = storage.weight_format(checkpoint.tensors)
        raise ValueError(
            f"{checkpoint.path} ({len(checkpoint.tensors)} tensors, {stored}) does not fit a model of "
            f"{len(parameters)} parameters: {'; '.join(lines)}. Is the file complete, and the one that is meant?"
        )


def _layer(official: str) -> str | None:
    """Return the weight that a companion stands beside, None for other names."""
    suffix = storage.companion(official)
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
        # Tools that write GGUF leave out leading ones ([6, E] for a modulation [1, 6, E]).
        if wanted != (1,) * (len(wanted) - len(shape)) + shape:
            yield f"{shown} is {list(stored)} instead of {list(wanted)}"


def check_formats(checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Raise ValueError if weights are stored in a way that can't be read, and name the way.

    `names` maps official names, scales and records among them, to the file's.
    """
    records = _records(checkpoint, names)
    formats_found = {layer: _format_of(record) for layer, record in records.items()}
    others = {layer: found for layer, found in formats_found.items() if found not in storage.READABLE_RECORDS}
    if others:
        layer, found = next(iter(others.items()))
        raise ValueError(
            f"{checkpoint.path} is quantised as {found!r} ({len(others)} layers, such as {layer}): of such records "
            f"only {', '.join(storage.READABLE_RECORDS)} can be read; {INSTEAD}"
        )
    whole = {layer for layer, found in formats_found.items() if found == storage.INT8_RECORD}
    if rows := [*_unreadable_weights(names, checkpoint, whole), *_unreadable_scales(names, checkpoint)]:
        raise ValueError(
            f"{checkpoint.path} has {len(rows)} kinds of weights stored in a way that can't be read: "
            f"{', '.join(rows[:SHOWN])}{', ...' * (len(rows) > SHOWN)}; {INSTEAD}"
        )


def wants_whole_products(checkpoint: Checkpoint, names: Mapping[str, str]) -> bool:
    """Say whether a quantised file asks that what is multiplied with its weights is not rounded to 8 bits.

    Format: ComfyUI's records (`full_precision_matrix_mult`); in older files a `scaled_fp8` with two numbers, not none.
    """
    markers = (info for name, info in checkpoint.tensors.items() if name.rpartition(".")[2] == storage.SCALED_MARKER)
    if any(info.shape == (2,) for info in markers):
        return True
    return any(record.get(storage.WHOLE_PRODUCTS) is True for record in _records(checkpoint, names).values())


def _records(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what the file says of how its layers are quantised, by the layers' official names where they are known.

    Raises ValueError where that can't be read.
    """
    beside = {file: o.removesuffix(storage.RECORD) for o, file in names.items() if o.endswith(storage.RECORD)}
    found = {}
    for name, tensor in read_tensors(checkpoint, beside):
        text = bytes(tensor.to(torch.uint8).flatten().tolist()).decode(errors="replace")
        found[beside[name]] = _parse(checkpoint, name, text)
    if text := checkpoint.metadata.get(storage.METADATA_RECORD):
        layers = _parse(checkpoint, storage.METADATA_RECORD, text).get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(record, dict) for record in layers.values()):
            raise ValueError(
                f"{checkpoint.path}: {storage.METADATA_RECORD} has no records of layers: download it again"
            )
        official = {file.removesuffix(".weight"): o.removesuffix(".weight") for o, file in names.items()}
        found |= {official.get(layer, layer): record for layer, record in layers.items()}
    return found


def _format_of(record: Mapping[str, Any]) -> str:
    found = str(record.get("format"))
    return f"{found} with {storage.ROTATED}" if record.get(storage.ROTATED) else found


def _unreadable_weights(names: Mapping[str, str], checkpoint: Checkpoint, whole: Collection[str]) -> list[str]:
    """Return the formats of weights that can't be read; integers can where `whole` has the layer, and it a scale."""
    found = set()
    for official, file in names.items():
        stored, layer = checkpoint.tensors[file].dtype, official.removesuffix(".weight")
        if storage.companion(official) or stored in storage.PACKINGS:
            continue
        has_scale = any(layer + suffix in names for suffix in storage.WEIGHT_SCALES)
        if stored not in storage.STORAGE or (stored == "I8" and not (layer in whole and has_scale)):
            found.add(stored)
    return sorted(found)


def _unreadable_scales(names: Mapping[str, str], checkpoint: Checkpoint) -> Iterator[str]:
    for official, file in names.items():
        if official.endswith(storage.WEIGHT_SCALES):
            scale, weight = checkpoint.tensors[file], checkpoint.tensors.get(names.get(_layer(official) or "", ""))
            per_row = weight is not None and scale.shape in ((), (1,), weight.shape[:1], (*weight.shape[:1], 1))
            if scale.dtype not in FLOATS or not per_row:
                yield f"{official} ({scale.dtype} {list(scale.shape)})"


def _parse(checkpoint: Checkpoint, name: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{checkpoint.path}: {name} is not JSON but {text[:80]!r}: download it again") from error
    if not isinstance(record, dict):
        raise ValueError(f"{checkpoint.path}: {name} is not a JSON object but {text[:80]!r}: download it again")
    return record
