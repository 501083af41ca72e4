"""The float32 islands: norms, modulation and gates are computed in float32 whatever the weights are stored in."""
# B batch, L tokens, E width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LayerConstants = tuple[Tensor, Tensor, float]  # weight and bias, [E] or [B or 1, 1, E], and epsilon
RmsConstants = tuple[Tensor, float]  # weight, of a row [E] or of each head [D], and epsilon


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

    @property
    def constants(self) -> RmsConstants:
        """What `rms_norm` and `rope.norm_rotate` take of the layer."""
        return self.weight, self.eps


class LayerNorm(nn.Module):
    """Affine LayerNorm over the last axis, computed and returned in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.constants, torch.float32)

    @property
    def constants(self) -> LayerConstants:
        """What `layer_norm` and `rows.add_norm` take of the layer."""
        return self.weight, self.bias, self.eps


def layer_norm(x_BLE: Tensor, constants: LayerConstants, dtype: torch.dtype) -> Tensor:
    """Return `LN(x) * weight + bias`, computed in float32, in `dtype`."""
    weight, bias, eps = constants
    width = x_BLE.shape[-1:]
    if weight.numel() == bias.numel() == width[0]:
        # One vector for all rows is what PyTorch's own takes.
        normed = F.layer_norm(x_BLE.float(), width, weight.float().flatten(), bias.float().flatten(), eps)
    else:
        normed = torch.addcmul(bias.float(), F.layer_norm(x_BLE.float(), width, eps=eps), weight.float())
    return normed.to(dtype)


def rms_norm(x_BLE: Tensor, constants: RmsConstants, dtype: torch.dtype) -> Tensor:
    """Return `x / rms(x) * weight`, computed in float32, in `dtype`; the norm is over as many numbers as weights."""
    weight, eps = constants
    parts = x_BLE.float().unflatten(-1, (-1, len(weight)))
    return F.rms_norm(parts, weight.shape, weight.float(), eps).flatten(-2).to(dtype)


def modulated_by(shift_B1E: Tensor, scale_B1E: Tensor, eps: float) -> LayerConstants:
    """Return the constants by which `layer_norm` is `LN(x) * (1 + scale) + shift`.

    Source: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers" (adaLN).
    """
    return 1 + scale_B1E.float(), shift_B1E, eps


def modulate(x_BLE: Tensor, shift_B1E: Tensor, scale_B1E: Tensor, eps: float) -> Tensor:
    """Return `LN(x) * (1 + scale) + shift` in float32; the LayerNorm has no weights of its own."""
    return layer_norm(x_BLE, modulated_by(shift_B1E, scale_B1E, eps), torch.float32)


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
