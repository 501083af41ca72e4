"""How one weight may be stored, and how it becomes a tensor to compute with."""

from collections import Counter
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ..types import TensorInfo

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# The dtypes a weight may be stored in: safetensors name -> (PyTorch's, the name that users know it by).
STORAGE = {
    "F64": (torch.float64, "fp64"),
    "F32": (torch.float32, "fp32"),
    "F16": (torch.float16, "fp16"),
    "BF16": (torch.bfloat16, "bf16"),
    "F8_E4M3": (torch.float8_e4m3fn, "fp8_e4m3fn"),
    "F8_E5M2": (torch.float8_e5m2, "fp8_e5m2"),
}

# Tensors that stand beside a layer's weight in quantised files. The two scales multiply the weight; the input scales
# serve fp8 matrix products, which we don't do; the record names the layer's format.
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
RECORD = ".comfy_quant"
COMPANIONS = (*WEIGHT_SCALES, *INPUT_SCALES, RECORD)
SCALED_MARKER = "scaled_fp8"  # says that the file has scales, and which products to take in fp8; carries no weight
METADATA_RECORD = "_quantization_metadata"  # metadata key with the records of all layers
READABLE_RECORDS = ("float8_e4m3fn", "float8_e5m2")

ELEMENTS_AT_ONCE = 1 << 22  # of a scaled weight that are in float32

MIXED_SHARE = (
    0.1  # of the elements in a second dtype: above this a file is "mixed" (official VACE: fp32 base, bf16 rest)
)


def dequantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `weight` ready to compute with in `dtype`; no copy when it is stored that way already.

    `scale` is None, one number, or one number per output row ([out] or [out, 1]); the product is taken in float32
    so that a 16-bit result is rounded once, and of a part of the rows at a time, so that it is small beside the result.
    Format: ComfyUI's scaled fp8 files (`scale_weight`, `weight_scale`).
    """
    if scale is None:
        return weight.to(dtype)
    scales = scale.float().reshape(-1, *[1] * (weight.dim() - 1)).expand(weight.shape[0], *[1] * (weight.dim() - 1))
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size = max(1, ELEMENTS_AT_ONCE // prod(weight.shape[1:]))
    for first in range(0, weight.shape[0], size):
        rows = slice(first, first + size)
        out[rows] = weight[rows].float() * scales[rows]
    return out


def companion(name: str) -> str | None:
    """Return the suffix that makes a name a companion of a layer's weight, None for a weight of the model."""
    return next((suffix for suffix in COMPANIONS if name.endswith(suffix)), None)


def weight_format(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the users' name of how a model is stored: fp32, bf16, fp16, fp8_e4m3fn, fp8_scaled, dfloat11, mixed..."""
    if any(name.endswith(".encoded_exponent") for name in tensors):
        return "dfloat11"
    sizes: Counter[str] = Counter()
    for name, info in tensors.items():
        if companion(name) is None:
            sizes[info.dtype] += prod(info.shape)
    (first, _), *others = sizes.most_common(2)
    if any(name.endswith(WEIGHT_SCALES) for name in tensors):
        return "fp8_scaled" if first.startswith("F8") else f"{first.lower()}_scaled"
    if others and others[0][1] > MIXED_SHARE * sizes.total():
        return "mixed"
    return STORAGE[first][1] if first in STORAGE else first.lower()
