"""How weights are stored in files, by the names that headers have for it: dtypes, blocks, companions of a weight.

Nothing here computes, and nothing needs PyTorch: what a file is can be said before that is there. How stored weights
become tensors is in `core.ops.formats`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from .types import TensorInfo

# The dtypes that PyTorch has too, by their names in headers -> its name.
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packing:
    """A block format: how many numbers become how many bytes together."""

    numbers: int
    num_bytes: int

    def row_bytes(self, numbers: int) -> int:
        """Return the bytes of a row of so many numbers, which is made of whole blocks."""
        return numbers // self.numbers * self.num_bytes


SUPER = 256  # numbers of a block of the formats that have scales for parts of a block, "K" in their names
# GGUF's name of a format -> how large its blocks are. Source: the public format (ggml-common.h of llama.cpp).
PACKINGS = {
    "Q4_0": Packing(32, 18),
    "Q4_1": Packing(32, 20),
    "Q5_0": Packing(32, 22),
    "Q5_1": Packing(32, 24),
    "Q8_0": Packing(32, 34),
    "Q2_K": Packing(SUPER, 84),
    "Q3_K": Packing(SUPER, 110),
    "Q4_K": Packing(SUPER, 144),
    "Q5_K": Packing(SUPER, 176),
    "Q6_K": Packing(SUPER, 210),
    "IQ4_NL": Packing(32, 18),
    "IQ4_XS": Packing(SUPER, 136),
}

# The dtypes a weight may be stored in -> the name that users know it by; integers only with a scale and a record.
STORAGE = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8_e4m3fn",
    "F8_E5M2": "fp8_e5m2",
    "I8": "int8",
    "DF11": "dfloat11",  # bf16 weights in groups, see `core.dfloat11`; no dtype of any file
}
DFLOAT11 = "DF11"
SMALL = ("F8_E4M3", "F8_E5M2", "I8", *PACKINGS)  # what a `Linear` keeps and makes ready per call

# Tensors that stand beside a layer's weight in quantised files. The first two scales multiply the weight; the input
# scales are for rounding what is multiplied with it, see `core.ops.products`; the record names the layer's format. The
# others belong to formats that are not read, and are known so that these can be refused by name.
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

MAX_ELEMENTS, MAX_SIDES = 1 << 59, 64  # of a tensor: PyTorch counts bytes in 63 bits
MIXED_SHARE = 0.1  # of the elements in a second dtype: above this it is named too (official VACE: fp32 base, bf16 rest)


def is_countable(shape: Sequence[int]) -> bool:
    """Say whether a tensor of a shape can be, so that also one without numbers may not have sides without end."""
    elements = 1
    for side in shape:
        elements *= max(1, side)
        if elements >= MAX_ELEMENTS:
            return False
    return len(shape) <= MAX_SIDES


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
