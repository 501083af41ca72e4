"""What code that is not ours takes in memory: counted on the meta device, though its decisions need numbers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..ops.attention import fused_attention
from .trace import LiveBytes

CPU, META = torch.device("cpu"), torch.device("meta")
MASK_ALIGNMENT = 8  # CUDA's attention takes floats whose rows are multiples of this, and copies other masks


def traced_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by a call, its result among them, ever take together.

    Nothing is computed with tensors of the meta device. The code is told that they are on the CPU, so that what it
    makes beside them, positions and masks and lengths by which it decides, are real numbers; what meets a tensor of the
    meta device goes on there. Attention holds what the kernels of real devices do. Raises what PyTorch raises where a
    decision depends on what was not computed.
    """
    with torch.no_grad(), _Beside() as counted, _Told():
        result = call()
        del result
    return counted.peak


class _Beside(LiveBytes):
    """Count everything, on both devices, and make what an operation takes from the CPU fit what it takes from meta."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(_bare, (args, kwargs))
            if kwargs.get("device") is not None:
                if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
                    return args[0]  # it is on the device where it is asked to go
                kwargs["device"] = META
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Told(TorchFunctionMode):
    """Say of all tensors that they are on the CPU, and let attention take what it takes on real devices."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # an object made anew each time
            return CPU
        if func is F.scaled_dot_product_attention:
            q, k, v, mask = (*args, kwargs.get("attn_mask"))[:4]
            if _can_fuse(q, mask):
                return _fused(q, k, v, mask)
        return func(*args, **kwargs)


def _can_fuse(q: Tensor, mask: Tensor | None) -> bool:
    """Say whether every device has a kernel that holds no scores; without a batch of heads the CPU has none."""
    return q.dim() == 4 and (mask is None or mask.dim() in (2, 4))


def _fused(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, mask: Tensor | None) -> Tensor:
    copy = None
    if mask is not None and (mask.dtype == torch.bool or mask.shape[-1] % MASK_ALIGNMENT):
        columns = -(-mask.shape[-1] // MASK_ALIGNMENT) * MASK_ALIGNMENT
        copy = torch.empty(*mask.shape[:-1], columns, dtype=q_BNLD.dtype, device=META)
    result = fused_attention(q_BNLD, k_BNSD, v_BNSD)
    del copy
    return result


def _bare(leaf: Any) -> Any:
    return torch.empty_like(leaf, device=META) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf
