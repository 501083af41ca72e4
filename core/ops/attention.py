"""Attention in one layout, B L N D; SDPA is the truth. Only this file knows that backends disagree on layout."""
# B batch, L query tokens, S key tokens, N heads, D head width

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .eight_bits import quantise_rows

Attend = Callable[..., Tensor]  # takes what `attention` takes, and returns the like

BACKEND = "PyTorch (scaled_dot_product_attention)"  # as users are told

# In the order in which they are asked, and whether users have left them on.
WITHOUT_FLASH = {
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}

# Heads are divided into so many groups at most, of so many rows of all their heads at least: these keep a large card
# busy.
MOST_GROUPS = 8
GROUP_ROWS = 1 << 16


def attention(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + key_bias) v as B L N D, in the dtype of q.

    `key_bias_BS` is added to every logit of a key (0 keeps it, -inf hides it). A batch of one key set serves any batch
    of queries. Source: Vaswani et al. 2017, equation 1.
    """
    batch = q_BLND.shape[0]
    q, k, v = (t.transpose(1, 2) for t in (q_BLND, k_BSND.expand(batch, -1, -1, -1), v_BSND.expand(batch, -1, -1, -1)))
    mask = None if key_bias_BS is None else key_bias_BS[:, None, None, :].to(q.dtype)
    return fused_attention(q, k, v, mask).transpose(1, 2)


def attention_int8(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
    """Return nearly what `attention` does: rows of q, and of k less its mean over tokens, are rounded to int8.

    A part that all keys share raises all logits of a query alike, so that taking it away changes nothing but how fine
    the steps are. What multiplies v is rounded to its dtype. Holds all logits of a head: it is there to be right.
    Source: Zhang et al. 2024, "SageAttention", with a scale for each row.
    """
    batch, num_heads, width = q_BLND.shape[0], q_BLND.shape[2], q_BLND.shape[3]
    k, v = (t.expand(batch, -1, -1, -1).transpose(1, 2) for t in (k_BSND, v_BSND))
    bias = 0.0 if key_bias_BS is None else key_bias_BS.float()[:, None]
    out = torch.empty_like(q_BLND, memory_format=torch.contiguous_format)
    for head in range(num_heads):
        centred = k[:, head].float() - k[:, head].float().mean(1, keepdim=True)
        (q8, q_scale), (k8, k_scale) = (quantise_rows(t, torch.int8) for t in (q_BLND[:, :, head], centred))
        # Sums of products of int8 are whole numbers that float32 holds.
        logits = q8.float() @ k8.float().transpose(1, 2) * (q_scale / math.sqrt(width)) * k_scale.transpose(1, 2) + bias
        weights = torch.exp(logits - logits.amax(-1, keepdim=True))
        gathered = weights.to(v.dtype).float() @ v[:, head].float()
        out[:, :, head] = gathered / weights.sum(-1, keepdim=True)
    return out


def attention_in_place(
    q_BLND: Tensor,
    k_BSND: Tensor,
    v_BSND: Tensor,
    key_bias_BS: Tensor | None = None,
    attend: Attend = attention,
) -> Tensor:
    """Return what `attend` does; q is lost, as the result of many rows is written over it, some heads at a time.

    With gradients q stays.
    """
    num_heads = q_BLND.shape[2]
    num_groups = min(MOST_GROUPS, max(1, q_BLND.shape[:3].numel() // GROUP_ROWS))
    if num_groups == 1 or torch.is_grad_enabled():
        return attend(q_BLND, k_BSND, v_BSND, key_bias_BS)
    size = math.ceil(num_heads / num_groups)
    for first in range(0, num_heads, size):
        q, k, v = (t[:, :, first : first + size] for t in (q_BLND, k_BSND, v_BSND))
        q.copy_(attend(q, k, v, key_bias_BS))
    return q_BLND


def fused_attention(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return SDPA of heads [B, N, L, D]; on the meta device only the memory that it takes.

    There PyTorch spells it out, scores and all, which the kernels of real devices never hold: they keep the result and
    one number a row.
    """
    if q_BNLD.is_meta:
        row_sums = q_BNLD.new_empty(q_BNLD.shape[:-1], dtype=torch.float32)
        result = torch.empty_like(q_BNLD)
        del row_sums
        return result
    with _in_order(q_BNLD):
        return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD, attn_mask=mask)


def _in_order(q_BNLD: Tensor) -> AbstractContextManager[object]:
    """Let cuDNN's kernels be asked first where PyTorch was built without those of FlashAttention, as it is for Windows.

    Left alone it would take its memory-efficient ones there, which are slower.
    """
    if not q_BNLD.is_cuda or torch.compiler.is_compiling() or torch.backends.cuda.is_flash_attention_available():
        return nullcontext()
    allowed = [backend for backend, is_allowed in WITHOUT_FLASH.items() if is_allowed()]
    return sdpa_kernel(allowed, set_priority=True) if allowed else nullcontext()
