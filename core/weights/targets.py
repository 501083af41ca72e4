"""The formats that weights can be written in: what a layer becomes, and how large, which its shape alone tells.

A new format is a row in TARGETS.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .. import storage
from ..ops import formats
from ..ops.gguf_blocks import ELEMENTS_AT_ONCE
from ..storage import PACKINGS
from ..types import TensorInfo
from . import dfloat11_target
from .dfloat11 import CONFIG_KEY
from .write import GGUF, SAFETENSORS, Container

Shape = tuple[int, ...]

FP8, INT8 = "F8_E4M3", "I8"
FP8_MAX, INT8_MAX = 448.0, 127.0  # the largest number of either; int8 is used evenly on both sides of zero
LEAST_SCALE = torch.finfo(torch.float32).tiny  # smaller ones lose bits of their own
# ComfyUI's marker, by its shape [2], says that matrix products are not to be taken in fp8: there are no input scales.
FP8_MARKER_SHAPE = (2,)
INT8_RECORD = b'{"format": "int8_tensorwise"}'
RECORD_ALIGNMENT = 8  # so that what follows a record in the file begins at a place that readers can map
# ggml's numbers for what most of a file is stored as, which readers show and do not need.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its file has it, with its scale if any; `kind` is the checkpoint's name of its format."""

    tensor: Tensor
    scale: Tensor | None
    kind: str

    def at(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers in `dtype`, made in float32 and rounded once."""
        return formats.dequantise(self.tensor, self.scale, dtype, self.kind)

    def rows(self, chosen: slice) -> Tensor:
        """Return some of the rows in float32."""
        per_row = self.scale is not None and self.scale.numel() > 1
        scale = self.scale.reshape(-1)[chosen] if per_row else self.scale
        return formats.dequantise(self.tensor[chosen], scale, torch.float32, self.kind)


class Layer:
    """A weight of the source that is about to be written: `shape`, and its numbers, asked for as they are wanted."""

    def __init__(self, name: str, shape: Shape, parts: Sequence[Stored]):
        self.name, self.shape, self.parts = name, shape, parts

    def at(self, dtype: torch.dtype) -> Tensor:
        """Return all numbers in `dtype`. Raises ValueError where float16 is too narrow for them."""
        found = [part.at(dtype) for part in self.parts]
        out = (found[0] if len(found) == 1 else torch.cat(found)).reshape(self.shape)
        if dtype == torch.float16 and any(part.kind != "F16" for part in self.parts) and not _is_finite(out):
            raise ValueError(
                f"{self.name} has numbers beyond 65504, the largest of fp16: choose bf16, or give --keep {self.name}"
            )
        return out

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of a matrix's rows with their numbers in float32, a few million at a time."""
        assert len(self.parts) == 1, "a tensor put together is not quantised"
        size = max(1, ELEMENTS_AT_ONCE // max(1, prod(self.shape[1:])))
        for first in range(0, self.shape[0], size):
            chosen = slice(first, min(first + size, self.shape[0]))
            numbers = self.parts[0].rows(chosen)
            if not _is_finite(numbers):
                raise ValueError(
                    f"{self.name} holds infinite numbers or NaN, for which there is no scale. Is the file damaged? "
                    f"--keep {self.name} leaves this one as it is."
                )
            yield chosen, numbers


def _is_finite(numbers: Tensor) -> bool:
    """Say whether none is infinite or NaN, in a single pass: the least and the largest are NaN if one is."""
    return not numbers.numel() or all(end.isfinite().item() for end in numbers.aminmax())


Planes = Callable[[Mapping[str, Shape]], dict[str, TensorInfo]]
Pack = Callable[[Mapping[str, Layer]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A format to write in.

    `planes` says which tensors some layers become and `pack` makes them, in that order; both take the layers by their
    path in the new file (`blocks.0.self_attn.q`). A tensor may turn out smaller than planned, as compressed ones do,
    never larger. Without them no layer is quantised. `takes` says whether a weight of a shape can be in this format,
    and `unit` which layers, by path, are made together: those for which it returns the same.
    `dtype` is what every other tensor of floating point numbers is stored as; None leaves them what they are but for
    float32, of which only what is computed in it remains. `marks` are tensors that tell of the format, once per file,
    and `facts` go into the metadata of its `container`.
    `all_linears` is whether it is for readers that keep no linear layer precise beside those that are quantised.
    `is_narrow` is whether a number has 8 bits or fewer; `check` raises ValueError for what is not installed.
    `is_for` says which weights, by official name; None are those that published quantised files round. `tells` makes
    metadata of the layers that are packed, of which official loaders look for `beside` in a config.json. Where
    `is_exact`, also what is in float32 stays so. `readers` says who reads the file, where that is not all who read
    files of its container.
    """

    title: str
    container: Container = SAFETENSORS
    dtype: str | None = None
    planes: Planes | None = None
    pack: Pack | None = None
    takes: Callable[[Shape], bool] = lambda shape: len(shape) == 2
    unit: Callable[[str], str] = lambda layer: layer
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, str | int] = field(default_factory=dict)
    all_linears: bool = False
    is_narrow: bool = False
    check: Callable[[], object] = lambda: None
    is_for: Callable[[str], bool] | None = None
    tells: Callable[[Mapping[str, Shape]], Mapping[str, str]] = lambda layers: {}
    beside: str | None = None
    is_exact: bool = False
    readers: str | None = None


def _each(pack: Callable[[Layer], Mapping[str, Tensor]]) -> Pack:
    """Return the function that packs layers of a format in which each is on its own."""

    def packed(layers: Mapping[str, Layer]) -> Iterator[tuple[str, Tensor]]:
        for path, layer in layers.items():
            yield from ((path + suffix, tensor) for suffix, tensor in pack(layer).items())

    return packed


def _fp8_planes(scale_shape: Callable[[Shape], Shape]) -> Planes:
    def planes(layers: Mapping[str, Shape]) -> dict[str, TensorInfo]:
        found = {}
        for path, shape in layers.items():
            found[f"{path}.weight"] = TensorInfo(FP8, shape)
            found[f"{path}.scale_weight"] = TensorInfo("F32", scale_shape(shape))
        return found

    return planes


def _fp8_by_row(layer: Layer) -> dict[str, Tensor]:
    weight, scale = _by_row(layer, FP8_MAX, torch.float8_e4m3fn, lambda scaled: scaled)
    return {".weight": weight, ".scale_weight": scale}


def _fp8_whole(layer: Layer) -> dict[str, Tensor]:
    peak = torch.zeros(())
    for _, numbers in layer.chunks():
        peak = torch.maximum(peak, numbers.abs().amax())
    scale, weight = _scale(peak, FP8_MAX), torch.empty(layer.shape, dtype=torch.float8_e4m3fn)
    for chosen, numbers in layer.chunks():
        weight[chosen] = (numbers / scale).clamp_(-FP8_MAX, FP8_MAX).to(weight.dtype)
    return {".weight": weight, ".scale_weight": scale}


def _int8_planes(layers: Mapping[str, Shape]) -> dict[str, TensorInfo]:
    found = {}
    for path, shape in layers.items():
        found[f"{path}.weight"] = TensorInfo(INT8, shape)
        found[f"{path}.weight_scale"] = TensorInfo("F32", (shape[0], 1))
        found[f"{path}{storage.RECORD}"] = TensorInfo("U8", (len(_record()),))
    return found


def _int8(layer: Layer) -> dict[str, Tensor]:
    weight, scale = _by_row(layer, INT8_MAX, torch.int8, torch.round)
    return {".weight": weight, ".weight_scale": scale, storage.RECORD: _record()}


def _dfloat11(layers: Mapping[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    return dfloat11_target.pack({path: layer.at(torch.bfloat16) for path, layer in layers.items()})


def _record() -> Tensor:
    text = INT8_RECORD.ljust(-(-len(INT8_RECORD) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _by_row(
    layer: Layer, limit: float, dtype: torch.dtype, finish: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a matrix [out, in] in a narrow dtype, and the scales [out, 1] by which its rows fill the range of it."""
    weight, scales = torch.empty(layer.shape, dtype=dtype), torch.empty(layer.shape[0], 1)
    for chosen, numbers in layer.chunks():
        scales[chosen] = scale = _scale(numbers.abs().amax(1, keepdim=True), limit)
        weight[chosen] = finish(numbers / scale).clamp_(-limit, limit).to(dtype)
    return weight, scales


def _scale(peak: Tensor, limit: float) -> Tensor:
    """Return what the numbers are divided by; 1 where all of them are zero."""
    return torch.where(peak > 0, (peak / limit).clamp_min(LEAST_SCALE), 1.0)


def _gguf(kind: str, title: str) -> Target:
    """Return a GGUF format: blocks, which the `gguf` package makes, or plain numbers."""

    def planes(layers: Mapping[str, Shape]) -> dict[str, TensorInfo]:
        return {f"{path}.weight": TensorInfo(kind, shape) for path, shape in layers.items()}

    def pack(layer: Layer) -> dict[str, Tensor]:
        if kind in formats.DTYPES:
            return {".weight": layer.at(formats.DTYPES[kind])}
        package = _package()
        _, in_file = formats.layout(TensorInfo(kind, layer.shape))
        blocks = torch.empty(in_file, dtype=torch.uint8)
        for chosen, numbers in layer.chunks():
            with np.errstate(all="ignore"):  # of numbers so small that their scale is 0 in its 16 bits, and so they are
                made = package.quants.quantize(numbers.numpy(), package.GGMLQuantizationType[kind])
            blocks[chosen] = torch.from_numpy(made)
        return {".weight": blocks}

    packing = PACKINGS.get(kind)
    return Target(
        title=title,
        container=GGUF,
        planes=planes,
        pack=_each(pack),
        takes=lambda shape: len(shape) == 2 and shape[-1] % (packing.numbers if packing else 1) == 0,
        facts={"general.quantization_version": 2, "general.file_type": FILE_TYPES[kind]},
        is_narrow=packing is not None,
        check=_package if packing else lambda: None,
    )


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"Blocks of GGUF are made by the package gguf, which can't be imported ({error}): pip install gguf, or "
            "choose fp8_scaled, int8 or a 16-bit format, which need nothing else."
        ) from error
    return gguf


SAME = "same"
TARGETS = {
    SAME: Target(title="every tensor stored as it is: another spelling, or one file of several"),
    "fp32": Target(title="float32", dtype="F32"),
    "bf16": Target(title="bfloat16", dtype="BF16"),
    "fp16": Target(title="float16", dtype="F16"),
    "fp8_scaled": Target(
        title="fp8 (e4m3fn) with a scale for every output row; ComfyUI's own loader wants fp8_scaled_tensor",
        readers="this pack reads it. ComfyUI's own loader does not: for that one choose fp8_scaled_tensor",
        planes=_fp8_planes(lambda shape: (shape[0], 1)),
        pack=_each(_fp8_by_row),
        marks={storage.SCALED_MARKER: torch.zeros(FP8_MARKER_SHAPE, dtype=torch.float8_e4m3fn)},
        is_narrow=True,
    ),
    "fp8_scaled_tensor": Target(
        title="fp8 with one scale for every weight, in all linear layers: what ComfyUI's own loader takes",
        planes=_fp8_planes(lambda shape: ()),
        pack=_each(_fp8_whole),
        # ComfyUI 0.3.64 rounds linear layers without a scale to fp8 as they are.
        all_linears=True,
        marks={storage.SCALED_MARKER: torch.zeros(FP8_MARKER_SHAPE, dtype=torch.float8_e4m3fn)},
        is_narrow=True,
    ),
    "int8": Target(
        title="ComfyUI's int8_tensorwise: a scale for every row; old versions of ComfyUI misread it",
        # Tried with 0.33.0, which has the format, and 0.3.64, which takes the integers for the weights themselves.
        readers="this pack and new versions of ComfyUI read it (0.33.0 does). Old ones, such as 0.3.64, leave the "
        "scales out, and make noise: for those choose fp8_scaled_tensor",
        planes=_int8_planes,
        pack=_each(_int8),
        is_narrow=True,
    ),
    "dfloat11": Target(
        title="bf16 without loss in 11 bits (DFloat11), which the official loader reads too",
        planes=dfloat11_target.planes_of,
        pack=_dfloat11,
        unit=dfloat11_target.block_of,
        is_for=dfloat11_target.is_in_block,
        tells=dfloat11_target.facts_of,
        beside=CONFIG_KEY,
        is_exact=True,
    ),
    "gguf_q8_0": _gguf("Q8_0", "GGUF, 8.5 bits a number"),
    "gguf_q5_1": _gguf("Q5_1", "GGUF, 6 bits"),
    "gguf_q5_0": _gguf("Q5_0", "GGUF, 5.5 bits"),
    "gguf_q4_1": _gguf("Q4_1", "GGUF, 5 bits"),
    "gguf_q4_0": _gguf("Q4_0", "GGUF, 4.5 bits"),
    "gguf_bf16": _gguf("BF16", "GGUF, bfloat16"),
    "gguf_fp16": _gguf("F16", "GGUF, float16: what other tools quantise further"),
}
