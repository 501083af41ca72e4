"""Read the tensors of checkpoints that have been opened."""

import mmap
import os
import pickle
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..dfloat11 import PLANES
from ..ops import dfloat11, formats
from ..storage import DFLOAT11
from ..types import Checkpoint, TensorInfo
from .mapping import mapped
from .reader import AGAIN, NESTED_UNDER


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) on the CPU, file by file, memory-mapped: bytes are read when the tensor is first used.

    Weights of DFloat11 groups are decoded, the group at a time, and come last. The others may not be written to, which
    PyTorch does not know: the system ends the process. A file is open until the last of its tensors is gone, and of
    their views; Windows lets nobody replace or delete it before.
    """
    by_file: dict[Path, list[str]] = {}
    names, infos = list(names), {**checkpoint.tensors, **checkpoint.planes}
    packed = {name for name in names if (info := checkpoint.tensors.get(name)) and info.dtype == DFLOAT11}
    for name in names:
        if name not in packed:
            by_file.setdefault(checkpoint.location[name], []).append(name)
    for file, inside in by_file.items():
        if any(infos[name].start is None for name in inside):
            state = load_pickle(file)
            yield from ((name, state[name]) for name in inside)
        else:
            mapped = _mapped_bytes(file)
            yield from ((name, _mapped(file, name, infos[name], mapped)) for name in inside)
    for prefix, weights in checkpoint.groups.items():
        if not packed.isdisjoint(weights):
            decoded = _decoded(checkpoint, prefix)
            yield from ((name, decoded[name]) for name in weights if name in packed)


def _decoded(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Return the weights of a DFloat11 group in bf16."""
    planes = dict(read_tensors(checkpoint, [f"{prefix}.{kind}" for kind in PLANES]))
    shapes = {name: checkpoint.tensors[name].shape for name in checkpoint.groups[prefix]}
    out = torch.empty(sum(map(prod, shapes.values())), dtype=torch.bfloat16)
    try:
        dfloat11.decode(*(planes[f"{prefix}.{kind}"] for kind in PLANES), out)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {prefix}: {error}") from error
    parts = out.split([prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _mapped_bytes(file: Path) -> Tensor:
    with open(file, "rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            return torch.empty(0, dtype=torch.uint8)  # of nothing there is no map
        content = mapped(opened, file)
    return torch.from_numpy(np.asarray(_Content(content)))


class _Content:
    """Mapped bytes as numpy takes them; what is made of them holds this object, and with it the map.

    They are said to be writable, as PyTorch has no other tensors: it would warn, once, and make the same of them.
    """

    def __init__(self, content: mmap.mmap):
        start, _ = np.frombuffer(content, np.uint8).__array_interface__["data"]
        self.content = content
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (len(content),), "data": (start, False)}


def _mapped(file: Path, name: str, info: TensorInfo, content: Tensor) -> Tensor:
    """Return a tensor of a file that is mapped as bytes. Blocks of GGUF stay bytes, [..., bytes of a row]."""
    dtype, shape = formats.layout(info)
    stop = info.start + prod(shape) * dtype.itemsize
    if stop > len(content):
        raise ValueError(f"{file} ends before {name} does: it was cut off since it was opened. {AGAIN.capitalize()}.")
    found = content[info.start : stop]
    if info.start % dtype.itemsize:
        found = found.clone()  # PyTorch's views begin at multiples of their elements
    return found.view(dtype).view(shape)


def load_pickle(file: Path) -> dict[str, Tensor]:
    """Return the state dict of a .pth file, as PyTorch maps it: as memory in use (see `mapping.READ_ONLY`).

    Anything in it that is not plain data is refused unrun.
    """
    try:
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors: reading it would run code, so it was not read. Only plain state dicts "
            f"are accepted; get the model as .safetensors. ({str(error).splitlines()[0][:120]})"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError, OSError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{file} is not a whole PyTorch checkpoint ({reason}): {AGAIN} or use .safetensors") from error
    for key in NESTED_UNDER:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file}: expected a state dict (names and tensors), found {type(state).__name__}")
    others = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise ValueError(f"{file}: expected tensors only, found other things under {', '.join(others[:8])}")
    return state


def infos_of_pickle(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a .pth file as PyTorch reads them. Raises ValueError if it holds anything else."""
    return {
        name: TensorInfo(formats.NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in load_pickle(file).items()
    }
