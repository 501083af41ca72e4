"""Make a module of a checkpoint, with a strict account: every parameter is filled, every tensor used or known."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..ops import formats
from ..ops.linear import Linear
from ..types import Checkpoint, TensorInfo
from .reader import read_tensors

SHOWN = 8  # names per list in an error


def assemble(
    build: Callable[[], nn.Module],
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    *,
    float32: Callable[[str], bool],
    dtype: torch.dtype,
    ignored: Collection[str] = (),
) -> nn.Module:
    """Return the module with the checkpoint's weights, in eval mode and without gradients.

    `build` makes it; `names` maps its parameters, and the scales of quantised ones, to the file's names. Parameters for
    which `float32` holds are stored in float32; fp8 weights of a `Linear` stay as they are, with their scale in its
    `weight_scale`; all others are stored in `dtype`. `ignored` are names of the file that are known and not needed.
    Raises ValueError, before any weight is read, for parameters the file lacks, tensors that nothing takes, other
    shapes, a format that can't be read, or if there is not the RAM for weights in another dtype than the file's.
    """
    with torch.device("meta"):
        module = build()
    parameters = dict(module.named_parameters())
    check_formats(checkpoint, names)
    _check_account(parameters, names, checkpoint, ignored)
    _check_ram(module, names, checkpoint, float32, dtype)
    companions = {official: file for official, file in names.items() if formats.companion(official)}
    scales = _read_scales(checkpoint, companions)
    weights = {file: official for official, file in names.items() if official not in companions}
    for file, tensor in read_tensors(checkpoint, weights):
        official = weights[file]
        path, _, leaf = official.rpartition(".")
        owner, scale = module.get_submodule(path), scales.get(path) if leaf == "weight" else None
        if _stays(owner, leaf, tensor.dtype, float32(official)):
            stored = tensor
            owner.weight_scale = None if scale is None else scale
        else:
            stored = formats.dequantise(tensor, scale, torch.float32 if float32(official) else dtype)
        owner.register_parameter(leaf, nn.Parameter(stored, requires_grad=False))
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers())), "a module may not make buffers itself"
    return module.eval()


def _stays(owner: nn.Module, leaf: str, stored: torch.dtype, float32: bool) -> bool:
    return isinstance(owner, Linear) and leaf == "weight" and stored in formats.FLOAT8 and not float32


def _check_ram(
    module: nn.Module,
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    float32: Callable[[str], bool],
    dtype: torch.dtype,
) -> None:
    needed = 0
    for official, parameter in module.named_parameters():
        path, _, leaf = official.rpartition(".")
        stored, _ = formats.STORAGE[checkpoint.tensors[names[official]].dtype]
        wanted = torch.float32 if float32(official) else dtype
        if stored != wanted and not _stays(module.get_submodule(path), leaf, stored, float32(official)):
            needed += parameter.numel() * wanted.itemsize
    if needed > (free := host.available_ram()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{checkpoint.path} stores its weights in another way than {name}, in which they take "
            f"{needed / 1e9:.1f} GB of RAM, and {free / 1e9:.1f} GB are free: choose the precision that the file has, "
            "or close other programs"
        )


def _check_account(
    parameters: Mapping[str, Tensor], names: Mapping[str, str], checkpoint: Checkpoint, ignored: Collection[str]
) -> None:
    used = {file for official, file in names.items() if official in parameters or _layer(official) in parameters}
    known = {name for name in checkpoint.tensors if name.endswith(formats.SCALED_MARKER)} | set(ignored)
    found = {official: checkpoint.tensors[names[official]] for official in parameters if official in names}
    problems = [
        ("missing", [name for name in parameters if name not in names]),
        ("not part of this model", [name for name in checkpoint.tensors if name not in used and name not in known]),
        ("of another shape", list(_other_shapes(parameters, found))),
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


def _other_shapes(parameters: Mapping[str, Tensor], found: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name, info in found.items():
        if tuple(parameters[name].shape) != info.shape:
            yield f"{name} is {list(info.shape)} instead of {list(parameters[name].shape)}"


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


def _read_scales(checkpoint: Checkpoint, companions: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the weight scale of each layer, by the layer's path, in float32."""
    files = {file: official for official, file in companions.items() if official.endswith(formats.WEIGHT_SCALES)}
    return {
        files[file].rpartition(".")[0]: tensor.to(torch.float32, copy=True)
        for file, tensor in read_tensors(checkpoint, files)
    }
