"""Attention in one layout, B L N D; SDPA is the truth. Only this file knows that backends disagree on layout."""
# B batch, L query tokens, S key tokens, N heads, D head width

import torch.nn.functional as F
from torch import Tensor


def attention(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + key_bias) v as B L N D, in the dtype of q.

    `key_bias_BS` is added to every logit of a key (0 keeps it, -inf hides it). A batch of one key set serves any batch
    of queries. Source: Vaswani et al. 2017, equation 1.
    """
    batch = q_BLND.shape[0]
    q, k, v = (t.transpose(1, 2) for t in (q_BLND, k_BSND.expand(batch, -1, -1, -1), v_BSND.expand(batch, -1, -1, -1)))
    mask = None if key_bias_BS is None else key_bias_BS[:, None, None, :].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
