"""What kernels share: how values are rounded, and how launchers look at tensors.

On the meta device launchers make their results and compute nothing: by that the memory of a run is planned. Triton
launches on the current card, which need not be the tensors' own, so launchers make it so.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 values in another dtype, rounded to the nearest, ties to even."""
    if ROUNDS_BY_HAND:
        # Triton's interpreter cuts bits off, or rounds by a way of its own.
        bits = x.to(tl.uint32, bitcast=True)
        if dtype == tl.bfloat16:
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
            x = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        elif dtype == tl.float8e4nv:
            bits += 0x7FFFF + ((bits >> 20) & 1)
            tiny = (x + 24576.0) - 24576.0  # 1.5 * 2**14: multiples of 2**-9, which numbers below 2**-6 are
            x = tl.where(tl.abs(x) < 0.015625, tiny, (bits & 0xFFF00000).to(tl.float32, bitcast=True))
    return x.to(dtype)


IS_INTERPRETED = not isinstance(rounded, JITFunction)  # Triton was told so by its own TRITON_INTERPRET
ROUNDS_BY_HAND = tl.constexpr(IS_INTERPRETED)


def options_for(block: int) -> dict[str, int | bool]:
    """Return how to compile a program that holds so many numbers at once: at most 32 numbers for each thread.

    No warps hold copies of what others do: one might read a row that another, further on, has written to already. A
    product and a sum are rounded one by one, as in eager code: Triton's own default differs between versions.
    """
    num_warps = max(1, min(4, block // 32)) if block <= 2048 else 8 if block <= 8192 else 16
    return {"num_warps": num_warps, "enable_fp_fusion": False}


def rows_of(x_BLE: Tensor) -> tuple[Tensor, int, int]:
    """Return a tensor [B, L, E] whose last axis is dense, and its strides from batch to batch and from row to row."""
    if x_BLE.stride(-1) != 1:
        raise ValueError(f"the numbers of a row must lie side by side; strides are {x_BLE.stride()}")
    return x_BLE, x_BLE.stride(0), x_BLE.stride(1)


def vectors_of(rows: Tensor, batch: int) -> tuple[Tensor, int]:
    """Return one vector [E], or one for each batch [B, 1, E], and its stride: 0 where all batches share one."""
    flat = rows.reshape(-1, rows.shape[-1])
    if len(flat) not in (1, batch) or flat.stride(-1) != 1:
        raise ValueError(f"a vector for all of {batch} batches or one for each was expected, not {tuple(rows.shape)}")
    return flat, 0 if len(flat) == 1 else flat.stride(0)
