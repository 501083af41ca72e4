"""Convolutions over frames, each as few multiplications as its shape allows; the same sums in another order."""
# B batch, C O channels, T frames, H W spatial

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Sizes = tuple[int, int, int]
ONES: Sizes = (1, 1, 1)

# Found on two cores with AVX-512: with fewer channels, or fewer positions for the weights to serve, sums cost more than
# they save. Strips of a frame that stay in the cache are of about so many positions, but not of fewer rows than that.
LEAST_CHANNELS, LEAST_POSITIONS = 64, 1024
STRIP_POSITIONS, STRIP_ROWS = 2048, 4


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, *, stride: Sizes = ONES, padding: Sizes = (0, 0, 0)) -> Tensor:
    """Return the convolution of x [B, C, T, H, W] with weight [O, C, kT, kH, kW]; the same numbers as `F.conv3d`.

    For one clip in float32 on a CPU, PyTorch takes C * T * H (without W) below 20,480 for a small input and unfolds it
    into a copy for each tap of the kernel: 27 times the memory, and slower. oneDNN is asked directly instead.
    """
    if _asks_onednn(x):
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, ONES, 1)
    return F.conv3d(x, weight, bias, stride=stride, padding=padding)


def conv3d_in_pairs(x_BCTHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `conv3d(x, weight, bias, padding=(0, 1, 1))`, by four 2-D convolutions for two frames instead of six.

    Only where that pays, see `pairs_pay`. Source: Winograd's F(2, 3) over time, as in Lavin and Gray 2016, "Fast
    Algorithms for Convolutional Neural Networks", equation 5.
    """
    batch, _, frames, height, width = x_BCTHW.shape
    out = torch.empty(
        (batch, weight.shape[0], frames - 2, height, width),
        dtype=x_BCTHW.dtype, device=x_BCTHW.device, memory_format=torch.channels_last_3d,
    )  # fmt: skip
    taps, rows = _pair_kernels(weight), max(STRIP_ROWS, STRIP_POSITIONS // width)
    for frames_TCHW, out_TOHW in zip(x_BCTHW.transpose(1, 2), out.transpose(1, 2), strict=True):
        for top in range(0, height, rows):
            _strip_in_pairs(frames_TCHW, taps, bias, out_TOHW[:, :, top : top + rows], top)
    return out


def pairs_pay(x_BCTHW: Tensor, weight: Tensor) -> bool:
    """Say whether `conv3d_in_pairs` takes such tensors, and is faster: in float32 on a CPU, where arithmetic is scarce.

    Tensor cores have plenty of it, and sums of frames rounded to 16 bits would cost precision. The meta device, which
    counts memory, answers as a CPU does.
    """
    frames, height, width = x_BCTHW.shape[2] - 2, *x_BCTHW.shape[3:]
    return (
        x_BCTHW.device.type in ("cpu", "meta")
        and x_BCTHW.dtype == torch.float32
        and weight.shape[2:] == (3, 3, 3)
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and frames >= 2
        and frames % 2 == 0
        and frames // 2 * height * width >= LEAST_POSITIONS
    )


def _pair_kernels(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, middle, last = weight.unbind(2)
    half = (first + last).mul_(0.5)
    plus, minus = half.add(middle, alpha=0.5), half.sub_(middle, alpha=0.5)
    return tuple(tap.contiguous(memory_format=torch.channels_last) for tap in (first, plus, minus, last))


def _strip_in_pairs(
    frames_TCHW: Tensor, taps: tuple[Tensor, Tensor, Tensor, Tensor], bias: Tensor, out_TOHW: Tensor, top: int
) -> None:
    """Write the results' rows from `top` on, of all frames; few sums of frames and products are there at a time."""
    height, rows, pairs = frames_TCHW.shape[2], out_TOHW.shape[2], out_TOHW.shape[0] // 2
    above, below = int(top > 0), int(top + rows < height)
    d0, d1, d2, d3 = (frames_TCHW[i : i + 2 * pairs - 1 : 2, :, top - above : top + rows + below] for i in range(4))
    mixed = torch.empty(
        (pairs, frames_TCHW.shape[1], rows + 2, frames_TCHW.shape[3]),
        dtype=out_TOHW.dtype, device=out_TOHW.device, memory_format=torch.channels_last,
    )  # fmt: skip
    mixed[:, :, 0].zero_()  # beyond the frame's border; elsewhere written over
    mixed[:, :, -1].zero_()
    inside = mixed[:, :, 1 - above : rows + 1 + below]
    even, odd = out_TOHW[0::2], out_TOHW[1::2]

    torch.add(d1, d2, out=inside)
    plus = F.conv2d(mixed, taps[1], bias, padding=(0, 1))
    torch.sub(d2, d1, out=inside)
    minus = F.conv2d(mixed, taps[2], padding=(0, 1))
    torch.add(plus, minus, out=even)
    torch.sub(plus, minus, out=odd)
    del plus, minus
    torch.sub(d0, d2, out=inside)
    even.add_(F.conv2d(mixed, taps[0], padding=(0, 1)))
    torch.sub(d1, d3, out=inside)
    odd.sub_(F.conv2d(mixed, taps[3], padding=(0, 1)))


def doubled_conv2d(x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a 3 x 3 convolution (padding 1) of the frames at twice their size, each pixel repeated (nearest).

    Of 3 x 3 pixels of the large frame, at most 2 x 2 differ: those of each corner of a pixel are convolved with sums of
    the weights, and the large frame is never made. The sums are taken in float32 and rounded once.
    """
    batch, _, height, width = x_BCHW.shape
    out = torch.empty(
        (batch, weight.shape[0], 2 * height, 2 * width),
        dtype=x_BCHW.dtype, device=x_BCHW.device, memory_format=torch.channels_last,
    )  # fmt: skip
    for row, tall in enumerate(_corner_taps(weight.float(), 2)):
        for column, taps in enumerate(_corner_taps(tall, 3)):
            taps = taps.to(weight.dtype, memory_format=torch.channels_last)
            corner = F.conv2d(x_BCHW, taps, bias, padding=1)
            out[:, :, row::2, column::2] = corner[:, :, row : row + height, column : column + width]
            del corner
    return out


def _corner_taps(weight: Tensor, dim: int) -> Iterator[Tensor]:
    """Yield the two taps along a side that the first, and the second, of two equal pixels sees."""
    before, here, after = weight.unbind(dim)
    yield torch.stack((before, here + after), dim)
    yield torch.stack((before + here, after), dim)


def halved_conv2d(x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return every second pixel of a 3 x 3 convolution, with zeros beyond the right and the bottom border only.

    As with zeros all around, where the first results are dropped: no padded copy is made. The sides must be even.
    """
    return F.conv2d(x_BCHW, weight, bias, stride=2, padding=2)[:, :, 1:, 1:]


def _asks_onednn(x: Tensor) -> bool:
    is_plain_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return is_plain_cpu and torch.backends.mkldnn.is_available()
