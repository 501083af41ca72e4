"""Where tokens stand: multimodal scalable rotation (MSRoPE) over frame, row and column."""
# S text tokens, L image tokens, P rotated pairs of a head

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.ops.rope import axis_angles, grid_rope

Rope = tuple[Tensor, Tensor]  # (cos, sin), each [tokens, P] in float32
Grid = tuple[int, int]  # rows and columns of an image's tokens


def centred(size: int) -> Tensor:
    """Return the positions of `size` rows or columns around 0; an odd one more stands on the negative side."""
    return torch.arange(size) - (size - size // 2)


def image_frames(num_targets: int, num_references: int, layered: bool) -> list[int]:
    """Return the frame of each image: its index, and -1 for the picture that a layered model takes apart (the last)."""
    frames = list(range(num_targets + num_references))
    if layered and num_references:
        frames[-1] = -1
    return frames


def text_start(grids: Sequence[Grid], layered: bool) -> int:
    """Return the position of the first text token: just outside the largest image, references included."""
    start = max(side // 2 for grid in grids for side in grid)
    return max(start, len(grids) - 1) if layered else start


def joint_rope(
    grids: Sequence[Grid],
    frames: Sequence[int],
    text: range,
    axes: tuple[int, int, int],
    device: torch.device,
) -> tuple[Rope, Rope]:
    """Return the rotation tables of the text rows and of all image rows.

    `grids` and `frames` hold one entry per image; `text` are the positions of the text tokens, the same on all three
    axes; `axes` the widths of a head that turn with frame, row and column. Source: Qwen-Image report, section 2.4.
    """
    angles = torch.cat([axis_angles(torch.tensor(text), width) for width in axes], dim=-1)
    text_rope = (angles.cos().float().to(device), angles.sin().float().to(device))
    images = [
        grid_rope(
            list(zip((torch.tensor([frame]), centred(rows), centred(columns)), axes, strict=True)),
            device,
        )
        for (rows, columns), frame in zip(grids, frames, strict=True)
    ]
    cos, sin = (torch.cat(tables) if len(tables) > 1 else tables[0] for tables in zip(*images, strict=True))
    return text_rope, (cos, sin)
