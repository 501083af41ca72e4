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
