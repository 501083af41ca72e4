"""A tiny decoder for previews: the last pixel frame of each latent frame, at full size.

The format, and the names of its tensors, are those of TAEHV (github.com/madebyollin/taehv; for Wan's latents taew2_1).
Its layers that grow in time are read by their last frame only, as previews show one frame of each latent frame.
"""
# B batch, C channels, T latent frames, h w latent positions, H W pixels

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMIT = 3.0  # softly, of what goes in
PREFIX = "decoder."
STAGES = 3  # each doubles height and width
BLOCKS = 3  # of a stage
SEEN = 2  # latent frames that a preview is made from: the one it shows, and the one before


class Remembering(nn.Module):
    """A residual block that sees the frame before as well; before the first frame there is nothing."""

    def __init__(self, width: int):
        super().__init__()
        layers = [nn.Conv2d(2 * width if i == 0 else width, width, 3, padding=1) for i in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x_TChw: Tensor) -> Tensor:
        before = torch.cat((torch.zeros_like(x_TChw[:1]), x_TChw[:-1]))
        return F.relu(self.conv(torch.cat((x_TChw, before), dim=1)) + x_TChw)


class Soft(nn.Module):
    """Bend values that are far out."""

    def forward(self, x: Tensor) -> Tensor:
        return LIMIT * torch.tanh(x / LIMIT)


class Last(nn.Module):
    """What the format grows in time, here the last of its frames."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x_TChw: Tensor) -> Tensor:
        return self.conv(x_TChw)


class TinyDecoder(nn.Module):
    """Latents to colours; `widths` are the channels of each stage, then those before the colours."""

    def __init__(self, channels: int, widths: tuple[int, int, int, int]):
        super().__init__()
        layers: list[nn.Module] = [Soft(), nn.Conv2d(channels, widths[0], 3, padding=1), nn.ReLU()]
        for wide, narrow in pairwise(widths):
            layers += [*(Remembering(wide) for _ in range(BLOCKS)), nn.Upsample(scale_factor=2), Last(wide)]
            layers.append(nn.Conv2d(wide, narrow, 3, padding=1, bias=False))
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def forward(self, x_TChw: Tensor) -> Tensor:
        """Return one frame [T, 3, H, W] in [0, 1] for each latent frame [T, C, h, w] of a clip, normalised."""
        return self.decoder(x_TChw).clamp(0, 1)

    def show(self, x0_BCThw: Tensor) -> Tensor:
        """Return the last frame of the first clip of normalised latents as an image [H, W, 3] on the CPU."""
        weight = self.decoder[1].weight
        seen = x0_BCThw[0, :, -SEEN:].movedim(1, 0).to(weight)
        return self(seen)[-1].movedim(0, -1).float().cpu()


def open_tiny_decoder(path: Path, device: torch.device, channels: int) -> TinyDecoder:
    """Return a decoder on a device, in float16 on a GPU. Raises ValueError for another format, or for other latents."""
    from safetensors.torch import load_file

    decoder = of_state(load_file(path), channels, str(path))
    return decoder.to(device, torch.float16 if device.type == "cuda" else torch.float32)


def of_state(state: Mapping[str, Tensor], channels: int, source: str) -> TinyDecoder:
    """Return a decoder of a file's tensors; those of the encoder that comes with it are left out."""
    held = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    step = BLOCKS + 3  # layers from one stage to the next
    firsts = [f"{PREFIX}{3 + stage * step}.conv.4.weight" for stage in range(STAGES)]
    last = f"{PREFIX}{2 + STAGES * step}.weight"
    if any(name not in held for name in (*firsts, last, f"{PREFIX}1.weight")):
        raise ValueError(
            f"{source} is no tiny decoder of the kind that previews take (TAEHV): for Wan and Qwen-Image put "
            "taew2_1.safetensors into models/vae_approx."
        )
    decoder = TinyDecoder(channels, tuple(held[name].shape[0] for name in (*firsts, last)))
    wanted = decoder.state_dict()
    for name, tensor in held.items():
        if name in wanted and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            held[name] = tensor[-wanted[name].shape[0] :]
    wrong = [name for name in wanted if name not in held or held[name].shape != wanted[name].shape]
    if wrong or held.keys() - wanted.keys():
        raise ValueError(f"{source} is a tiny decoder for other latents, or another version of it: {wrong[:3]}.")
    decoder.load_state_dict(held)
    return decoder.eval().requires_grad_(False)
