"""Attention in one layout, B L N D; SDPA is the truth. Only this file knows that backends disagree on layout."""
# B batch, L query tokens, S key tokens, N heads, D head width

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BACKEND = "PyTorch (scaled_dot_product_attention)"  # as users are told

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


def attention_in_place(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
    """Return what `attention` does; q is lost, as the result of many rows is written over it, some heads at a time.

    With gradients q stays.
    """
    num_heads = q_BLND.shape[2]
    num_groups = min(MOST_GROUPS, max(1, q_BLND.shape[:3].numel() // GROUP_ROWS))
    if num_groups == 1 or torch.is_grad_enabled():
        return attention(q_BLND, k_BSND, v_BSND, key_bias_BS)
    size = math.ceil(num_heads / num_groups)
    for first in range(0, num_heads, size):
        q, k, v = (t[:, :, first : first + size] for t in (q_BLND, k_BSND, v_BSND))
        q.copy_(attention(q, k, v, key_bias_BS))
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
    return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD, attn_mask=mask)
