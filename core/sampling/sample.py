"""The one loop over sampling steps, and the noise that it starts from."""
# B batch, C channels, T h w latent grid, N steps

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import host
from .guidance import Guided
from .schedule import StepPlan
from .solvers import Memory, find_solver

OnStep = Callable[[int, int, Tensor, Tensor], None]  # (steps done, of how many, x0 estimate, x) -> None


class SampleError(ValueError):
    """A run that went wrong half way: `latent` is the last good one, noisy as it is, after `steps_done` steps."""

    def __init__(self, message: str, latent: Tensor, steps_done: int):
        super().__init__(message)
        self.latent, self.steps_done = latent, steps_done


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """A part of the picture that stays: `mask` is 1 where sampling is free and 0 where `clean` (normalised) is kept.

    Both broadcast to x [B, C, T, h, w]. What is kept travels on the straight line from its noise to itself, so that the
    model sees it at every noise level, and any solver brings it back.
    """

    mask: Tensor
    clean: Tensor

    def velocity(self, x: Tensor, v: Tensor, sigma: float) -> Tensor:
        """Return `v` where sampling is free, and the velocity that leads to `clean` elsewhere."""
        return torch.lerp((x - self.clean) / sigma, v, self.mask)

    def settle(self, x: Tensor) -> Tensor:
        """Return finished latents with what is kept exactly as it was, without the rounding of the way."""
        return torch.where(self.mask == 0, self.clean, x)


@torch.no_grad()
def sample(
    x: Tensor,
    plan: StepPlan,
    solver: str,
    velocity: Guided,
    noise: Callable[[int], Tensor],
    on_step: OnStep | None = None,
    hold: Hold | None = None,
) -> Tensor:
    """Take every step of `plan` from normalised latents `x` [B, C, T, h, w] and return those at its end, in float32.

    `noise(step)` is asked by solvers that add noise (see `StepNoise`). `on_step` is told of every finished step, with
    what the picture would be and the latents as they are. `hold` keeps a part of the picture as it is. A run in two
    parts, cut anywhere, equals the whole with euler and lcm; unipc and dpm++2m begin each part without history, at
    first order.
    Raises SampleError when a step gives NaN or infinity or runs out of memory, ValueError when `x` holds NaN already.
    """
    if not torch.isfinite(x).all():
        raise ValueError("The latent given to the sampler holds NaN or infinity: look at the node that made it.")
    step, memory = find_solver(solver).step, Memory(noise=noise)
    x, total = x.float(), len(plan.timesteps)
    for i, timestep in enumerate(plan.timesteps):
        sigma, sigma_next, memory.step = plan.sigmas[i], plan.sigmas[i + 1], plan.start + i
        timestep_B = torch.full((x.shape[0],), timestep, dtype=torch.float32)  # on the CPU: its angles are formed there
        try:
            v = velocity(x, timestep_B, plan.guidance[i])
        except RuntimeError as error:
            if not host.is_out_of_memory(error):
                raise
            raise SampleError(_out_of_memory(x, i, total), x, i) from error
        v = v if hold is None else hold.velocity(x, v, sigma)
        following = step(x, v, sigma, sigma_next, memory)
        if not torch.isfinite(following).all():
            raise SampleError(_diagnosis(v, i, plan), x, i)
        if on_step is not None:
            on_step(i + 1, total, x - sigma * v, following)
        x = following
    return x if hold is None or plan.sigmas[-1] > 0 else hold.settle(x)


def draw_noise(shape: tuple[int, ...], seed: int, noise_device: str, device: torch.device) -> Tensor:
    """Return normal noise [B, ...] in float32 on `device`; item 0 is the same for every batch size.

    "cpu" draws on the CPU: one seed is one picture on every machine. "gpu" draws on `device`, as official code does.
    """
    if noise_device not in ("cpu", "gpu"):
        raise ValueError(f"noise_device is {noise_device!r}: choose cpu or gpu.")
    where = torch.device("cpu") if noise_device == "cpu" else device
    generator = torch.Generator(where).manual_seed(seed)
    items = [torch.randn(shape[1:], generator=generator, device=where) for _ in range(shape[0])]
    return torch.stack(items).to(device)


class StepNoise:
    """Fresh noise for each step of a run, decided by seed and step alone: call it with the step's index."""

    def __init__(self, shape: tuple[int, ...], seed: int, noise_device: str, device: torch.device):
        self.shape, self.seed, self.noise_device, self.device = shape, seed, noise_device, device

    def __call__(self, step: int) -> Tensor:
        # Hashed, so that no step meets the starting noise of this seed or of one nearby.
        digest = hashlib.sha256(f"{self.seed} {step}".encode()).digest()
        return draw_noise(self.shape, int.from_bytes(digest[:8], "big"), self.noise_device, self.device)


def noised(latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return `(1 - sigma) * latent + sigma * noise`, a picture at noise level `sigma`."""
    return (1 - sigma) * latent + sigma * noise


def start_of(plan: StepPlan, latent: Tensor, noise: Tensor) -> Tensor:
    """Return what a run starts from: the noise alone, unscaled, or the latent noised to the plan's first sigma."""
    return noise if plan.from_noise else noised(latent, noise, plan.sigmas[0])


def _out_of_memory(x: Tensor, i: int, total: int) -> str:
    batch, _, frames, height, width = x.shape
    size = f"{batch} x {frames} x {height} x {width} latent positions (batch, frames, height, width)"
    return (
        f"Sampling stopped at step {i + 1} of {total}: {x.device} is out of memory with {size}. Make the picture "
        "smaller, take fewer frames or a smaller batch, or close what else uses the card."
    )


def _diagnosis(v: Tensor, i: int, plan: StepPlan) -> str:
    bad = int((~torch.isfinite(v)).sum())
    found = f"{bad} of {v.numel()} velocities are NaN or infinite" if bad else "the latent left the range of float32"
    return (
        f"Sampling stopped at step {i + 1} of {len(plan.timesteps)} (timestep {plan.timesteps[i]:g}, "
        f"guidance {plan.guidance[i]:g}): {found}. Try bfloat16 or float32 for the model, or less guidance; "
        "if the first step fails, a weight file or the prompt's embeddings may be damaged."
    )
