"""What the training scripts share: a learning-rate schedule, checkpoints to resume from, and files to publish."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Linear warm-up, then a cosine to a twentieth of `rate`."""

    steps: int
    rate: float
    warmup: int = 100

    def factor(self, step: int) -> float:
        """Return the share of the full rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set every group's rate; a group's own `initial_lr` stands for the full rate."""
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.factor(step)


def save(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write a checkpoint to resume from; a cut write leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, part)
    part.replace(path)


def resume(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load what `save` wrote, if it is there, and return the step to go on with."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"]


def in_fp8(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """Return a matrix as a file holds it in fp8: its values, and a scale for each of its rows."""
    scale = (matrix.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max).clamp_min(1e-12)
    return {name: (matrix / scale[:, None]).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a checkpoint to publish, with `facts` as its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt", **facts})
    log.info("%s: %.2f MB", path, path.stat().st_size / 1e6)
