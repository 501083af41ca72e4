"""How one weight may be stored, and how it becomes a tensor to compute with."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ...kernels import BLOCK_FORMATS
from ..types import TensorInfo
from .gguf_blocks import PACKINGS, in_parts, unpack_blocks
from .proof import PROBE, verdict

# What the names in headers mean; of GGUF's those that are no blocks.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

# The dtypes a weight may be stored in -> the name that users know it by; integers only with a scale and a record.
STORAGE = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8_e4m3fn",
    "F8_E5M2": "fp8_e5m2",
    "I8": "int8",
    "DF11": "dfloat11",  # bf16 weights in groups, see `dfloat11`; no dtype of any file
}
DFLOAT11 = "DF11"
SMALL = ("F8_E4M3", "F8_E5M2", "I8", *PACKINGS)  # what a `Linear` keeps and makes ready per call

# Tensors that stand beside a layer's weight in quantised files. The first two scales multiply the weight; the input
# scales are for rounding what is multiplied with it, see `products`; the record names the layer's format. The others
# belong to formats that are not read, and are known so that these can be refused by name.
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
RECORD = ".comfy_quant"
COMPANIONS = (*WEIGHT_SCALES, *INPUT_SCALES, RECORD, ".weight_scale_2", ".pre_quant_scale")
SCALED_MARKER = "scaled_fp8"  # says that the file has scales, and which products to take in fp8; carries no weight
METADATA_RECORD = "_quantization_metadata"  # metadata key with the records of all layers
INT8_RECORD = "int8_tensorwise"
READABLE_RECORDS = ("float8_e4m3fn", "float8_e5m2", INT8_RECORD)
WHOLE_PRODUCTS = "full_precision_matrix_mult"  # key of a record: what is multiplied with the weight is not rounded
ROTATED = "convrot"  # key of an int8 record: the weight's inputs were rotated before it was rounded

MAX_ELEMENTS = 1 << 59  # of a tensor: PyTorch counts bytes in 63 bits
MIXED_SHARE = 0.1  # of the elements in a second dtype: above this it is named too (official VACE: fp32 base, bf16 rest)


def dequantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, stored: str | None = None) -> Tensor:
    """Return `weight` ready to compute with in `dtype`; no copy when it is stored that way already.

    `scale` is None, one number, or one number per output row ([out] or [out, 1]); the product is taken in float32
    so that a 16-bit result is rounded once, and of a part of the rows at a time, so that it is small beside the result.
    Format: ComfyUI's scaled fp8 and int8 files (`scale_weight`, `weight_scale`). `stored` is the name of a block format
    of GGUF where `weight` is blocks, [..., bytes of a row]; any other name means nothing here.
    """
    if stored in PACKINGS:
        return _unpacker(stored, dtype, weight.device)(weight, stored, dtype)
    if scale is None:
        return weight.to(dtype)
    ones = [1] * (weight.dim() - 1)
    scales = scale.float().reshape(-1, *ones).expand(weight.shape[0], *ones)
    return in_parts(lambda rows: weight[rows].float() * scales[rows], tuple(weight.shape), dtype, weight.device)


def _unpacker(stored: str, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, str, torch.dtype], Tensor]:
    """Return what unpacks blocks on a device: plain PyTorch, or on CUDA a kernel that gives the same bits."""
    if device.type != "cuda" or stored not in BLOCK_FORMATS or torch.compiler.is_compiling():
        return unpack_blocks
    return verdict("unpack_blocks", PROBE, dtype, device).kernel or unpack_blocks


def layout(info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of a tensor as its bytes lie in a file: of blocks those of the bytes, of DFloat11 bf16's.

    Raises ValueError for a dtype that PyTorch does not have.
    """
    if packing := PACKINGS.get(info.dtype):
        return torch.uint8, (*info.shape[:-1], packing.row_bytes(info.shape[-1]))
    if info.dtype == DFLOAT11:
        return torch.bfloat16, info.shape
    if info.dtype not in DTYPES:
        raise ValueError(f"tensors of {info.dtype} can't be read")
    return DTYPES[info.dtype], info.shape


def is_countable(shape: Sequence[int]) -> bool:
    """Say whether a tensor of a shape can be, so that also one without numbers may not have sides without end."""
    return prod(max(1, side) for side in shape) < MAX_ELEMENTS


def companion(name: str) -> str | None:
    """Return the suffix that makes a name a companion of a layer's weight, None for a weight of the model."""
    return next((suffix for suffix in COMPANIONS if name.endswith(suffix)), None)


def weight_format(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the users' name of how a model is stored: bf16, fp8_scaled, gguf Q4_K, "fp32 and bf16" (more fp32)..."""
    if any(info.dtype == DFLOAT11 for info in tensors.values()):
        return STORAGE[DFLOAT11]
    sizes: Counter[str] = Counter()
    for name, info in tensors.items():
        if companion(name) is None:
            sizes[info.dtype] += prod(info.shape)
    (first, _), *others = sizes.most_common(2)
    users_name = STORAGE.get(first, first.lower())
    if first in PACKINGS:  # mixtures such as Q4_K_M are called after what most of them is
        return f"gguf {first}"
    if any(name.endswith(WEIGHT_SCALES) for name in tensors):
        return "fp8_scaled" if first.startswith("F8") else f"{users_name}_scaled"
    if others and others[0][1] > MIXED_SHARE * sizes.total():
        second = others[0][0]
        return f"{users_name} and {STORAGE.get(second, second.lower())}"
    return users_name
