"""What both trainings of a diffusion transformer share: noise, optimisers, and the loop with its moving average."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .training import Schedule, resume, save

log = logging.getLogger(__name__)

SIGMA_MEAN, SIGMA_SPREAD = 0.5, 1.2  # of the logit: more noise than not, where the layout is decided
EMA_DECAY = 0.998
CAPTION_DROPOUT = 0.1
TELLING = 0.8  # sigma above which the loss tells how well a prompt is followed


def add_noise(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents, their sigmas [B] and the velocities to learn, for clean latents [B, ...]."""
    sigma = torch.sigmoid(SIGMA_MEAN + SIGMA_SPREAD * torch.randn(len(clean), generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    share = sigma.view(-1, *[1] * (clean.dim() - 1))
    return (1 - share) * clean + share * noise, sigma, noise - clean


def squared_errors(velocity: Tensor, wanted: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Return the mean squared error [B] of each velocity, its positions weighted."""
    return ((velocity - wanted).square() * weight).flatten(1).mean(dim=1)


def train(
    model: nn.Module,
    path: Path,
    schedule: Schedule,
    errors: Callable[[nn.Module, int], tuple[Tensor, Tensor]],
    muon: float = 1.0,
) -> nn.Module:
    """Train and return the moving average; resumes from `path` and saves there as it goes.

    `errors(model, step)` gives the sigmas [B] and squared errors [B] of one batch. The diffusion transformer is
    `model.transformer`; what else the model has learns with it. The matrices of its blocks learn by Muon, at `muon`
    times the rate of the rest.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    both = nn.ModuleList([model, average])
    optimizers = _optimizers(model)
    losses: list[tuple[float, float]] = []
    start = resume(path, both, optimizers)
    for optimizer, share in zip(optimizers, (muon, 1.0), strict=True):
        optimizer.param_groups[0]["initial_lr"] = share * schedule.rate  # a run may go on at another rate than it had
    for step in range(start, schedule.steps):
        with sdpa_kernel(SDPBackend.MATH):  # for so few tokens on a CPU the plain spelling is the faster one
            sigma, error = errors(model, step)
            model.zero_grad()
            error.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            schedule.apply(optimizer, step)
            optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses += [(s, e) for s, e in zip(sigma.tolist(), error.tolist(), strict=True) if s > TELLING]
        if (step + 1) % 100 == 0:
            noisy = sum(e for _, e in losses) / max(1, len(losses))
            log.info("%s step %d loss %.4f, noisy %.4f", path.stem, step + 1, error.mean().item(), noisy)
            losses = []
        if (step + 1) % 250 == 0 or step + 1 == schedule.steps:
            save(path, both, optimizers, step + 1)
    return average


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for the rest."""
    matrices = [
        p
        for name, p in model.named_parameters()
        if name.startswith("transformer.") and "blocks." in name and p.dim() == 2
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
    ]
