"""The one 3-D convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

Sizes = tuple[int, int, int]
ONES: Sizes = (1, 1, 1)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, *, stride: Sizes = ONES, padding: Sizes = (0, 0, 0)) -> Tensor:
    """Return the convolution of x [B, C, T, H, W] with weight [O, C, kT, kH, kW]; the same numbers as `F.conv3d`.

    For one clip in float32 on a CPU, PyTorch takes C * T * H (without W) below 20,480 for a small input and unfolds it
    into a copy for each tap of the kernel: 27 times the memory, and slower. oneDNN is asked directly instead.
    """
    is_plain_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if is_plain_cpu and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, ONES, 1)
    return F.conv3d(x, weight, bias, stride=stride, padding=padding)
