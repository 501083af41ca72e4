"""Weights in 8 bits to floating point numbers, to the last bit of `core.ops.eight_bits.dequantise_rows`.

One program takes a part of a row; every byte is read once, and every number written once. Float8 becomes float16 first,
which needs no card that knows it: e5m2 is the upper byte of one, and e4m3 has its bits but for the exponent's highest,
and a bias that is 8 smaller. All of that is exact, below the normal numbers too.
"""
# O rows, I numbers of a row

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options_for, rounded

CODES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}
# Numbers of a program: a thread has 8, whose 16-bit results are as many bytes as it can write at once. Rows of models
# are multiples of 512, most of them of 1024, so that little is left over.
BLOCK = 1024


def dequantise_rows(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a weight times its scale, or its rows' scales, in `dtype`; see `core.ops.eight_bits`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if not out.numel():
        return out
    codes_OI = weight.view(torch.int8).reshape(len(weight), -1)
    num_rows, length = codes_OI.shape
    scale_O = out if scale is None else scale.float().reshape(-1).expand(num_rows)
    if out.is_meta:
        return out
    parts = triton.cdiv(length, BLOCK)
    with torch.cuda.device_of(weight):
        _kernel[(num_rows * parts,)](
            codes_OI, *codes_OI.stride(), scale_O, scale_O.stride(0), out, length, parts,
            CODE=CODES[weight.dtype], HAS_SCALE=scale is not None, BLOCK=BLOCK, **options_for(BLOCK),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["scale_row", "parts"])
def _kernel(
    in_ptr, in_row, in_column,
    scale_ptr, scale_row,
    out_ptr, length, parts,
    CODE: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = program // parts, program % parts * BLOCK + tl.arange(0, BLOCK)
    inside = column < length
    code = tl.load(in_ptr + row * in_row + column * in_column, mask=inside, other=0).to(tl.int16)
    if CODE == "e4m3":
        # The sign comes to both upper bits; the lower one is the exponent's, and is taken away.
        x = ((code << 7) & -0x4001).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        x = tl.where((code & 127) == 127, float("nan"), x)
    elif CODE == "e5m2":
        x = (code << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = code.to(tl.float32)
    if HAS_SCALE:
        x *= tl.load(scale_ptr + row * scale_row)
    tl.store(out_ptr + row * length + column, rounded(x, out_ptr.dtype.element_ty), mask=inside)
