"""The float32 islands: norms, modulation and gates are computed in float32 whatever the weights are stored in."""
# B batch, L tokens, E width

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale each row to unit root mean square: `x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class LayerNorm(nn.Module):
    """Affine LayerNorm over the last axis, computed and returned in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)


def modulate(x_BLE: Tensor, shift_B1E: Tensor, scale_B1E: Tensor, eps: float) -> Tensor:
    """Return `LN(x) * (1 + scale) + shift` in float32; the LayerNorm has no weights of its own.

    Source: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers" (adaLN).
    """
    width = x_BLE.shape[-1:]
    if shift_B1E.numel() == scale_B1E.numel() == width[0]:
        # One modulation for all rows is what LayerNorm takes for its own weights.
        return F.layer_norm(x_BLE.float(), width, 1 + scale_B1E.float().flatten(), shift_B1E.float().flatten(), eps)
    normed = F.layer_norm(x_BLE.float(), width, eps=eps)
    return torch.addcmul(shift_B1E, normed, 1 + scale_B1E)


def gated_add(x_BLE: Tensor, branch_BLE: Tensor, gate_B1E: Tensor) -> Tensor:
    """Return `x + branch * gate` in float32, the dtype of the residual stream."""
    return torch.addcmul(x_BLE.float(), branch_BLE, gate_B1E)


def channel_norm(x_BCTHW: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Scale the channel vector of each position (dimension 1) to length sqrt(C), times the weight [C, 1, ...].

    Where no gradient is needed, in one tensor: `out`, or a new one. In the dtype of x.
    """
    smallest = max(1e-12, torch.finfo(x_BCTHW.dtype).tiny)  # 1e-12 is zero in float16
    length = torch.linalg.vector_norm(x_BCTHW, dim=1, keepdim=True).clamp_min(smallest)
    scale = weight * weight.shape[0] ** 0.5
    return (x_BCTHW / length) * scale if torch.is_grad_enabled() else torch.div(x_BCTHW, length, out=out).mul_(scale)


def norm_silu_into(x_BCTHW: Tensor, weight: Tensor, out_BCTHW: Tensor) -> Tensor:
    """Write `silu(channel_norm(x, weight))` into a tensor of x's shape, of any strides, and return it; no gradients."""
    return F.silu(channel_norm(x_BCTHW, weight, out_BCTHW), inplace=True)
