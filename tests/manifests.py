"""Checkpoints made of the published files' names and shapes (tests/fixtures/manifests), or of a module's."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from wanqwen.core.storage import DTYPE_BYTES, companion
from wanqwen.core.types import Checkpoint, Identity, TensorInfo

MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"
Shapes = dict[str, tuple[int, ...]]


def manifest(name: str) -> dict:
    """Return a manifest's JSON."""
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


def checkpoint(name: str, path: Path | None = None) -> Checkpoint:
    """Return the published file of a manifest, as if its header had been read; it lies at `path`."""
    tensors = manifest(name)["tensors"]
    return fake({key: TensorInfo(dtype, tuple(shape)) for key, (dtype, shape) in tensors.items()}, name, path=path)


def write_sparse(path: Path, name: str) -> Path:
    """Write the published file of a manifest: its header, and nothing but holes after it."""
    return write_header(path, manifest(name)["tensors"])


def write_header(path: Path, tensors: Mapping[str, Sequence[Any]], metadata: dict[str, str] | None = None) -> Path:
    """Write a file of tensors (dtype, shape) in which every byte of them is a hole."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor, (dtype, shape) in tensors.items():
        size = DTYPE_BYTES[dtype] * prod(shape)
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def fake(
    tensors: Mapping[str, TensorInfo],
    name: str = "fake",
    metadata: dict[str, str] | None = None,
    path: Path | None = None,
) -> Checkpoint:
    """Return a checkpoint of these tensors."""
    path = path or Path(f"{name}.safetensors")
    return Checkpoint(path=path, tensors=tensors, location=dict.fromkeys(tensors, path), metadata=metadata or {})


def shapes(found: Checkpoint, identity: Identity) -> Shapes:
    """Return the official names of the weights with the shapes that the file states."""
    return {o: found.tensors[n].shape for o, n in identity.names.items() if companion(o) is None}


def on_meta(build: Callable[[], torch.nn.Module]) -> Shapes:
    """Return names and shapes of a module's state, which takes no memory."""
    import torch._dynamo

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
