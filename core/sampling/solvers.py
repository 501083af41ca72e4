"""ODE solvers for flow models. A solver is one step, `(x, v, sigma, sigma_next, memory) -> x`; `sample` has the loop.

All of them work on float32 latents and on `x0 = x - sigma * v`, the picture that a velocity points at. Coefficients are
Python floats (double precision, no device traffic). lambda = ln((1 - sigma) / sigma) is -inf at sigma 1 and +inf at 0;
the formulas hold there as limits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Memory:
    """What a solver remembers within one run; made anew for each run and for each part of a run.

    `noise(step)` gives fresh noise in the shape of x; `step`, set by the loop, counts in the whole schedule.
    The rest belongs to the multistep solvers: the last two steps (latest last), the sample that the last one started
    from and the order that it was taken with.
    """

    noise: Callable[[int], Tensor]
    step: int = 0
    lambdas: list[float] = field(default_factory=list)
    x0s: list[Tensor] = field(default_factory=list)
    sigma: float = 1.0
    x: Tensor | None = None
    order: int = 0

    def keep(self, sigma: float, x0: Tensor) -> None:
        """Remember where a step was taken and what it predicted."""
        self.lambdas = [*self.lambdas[-1:], _lambda(sigma)]
        self.x0s = [*self.x0s[-1:], x0]
        self.sigma = sigma


Step = Callable[[Tensor, Tensor, float, float, Memory], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """One row of SOLVERS.

    `grid_start` is the level, before the shift, at which its schedule begins; `kept_latents` what it remembers of
    earlier steps.
    """

    step: Step
    grid_start: float = 1.0
    kept_latents: int = 0


def find_solver(name: str) -> Solver:
    """Return a row of SOLVERS; raises ValueError with the known names."""
    if name not in SOLVERS:
        raise ValueError(f"Unknown solver {name!r}: choose one of {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def euler(x: Tensor, v: Tensor, sigma: float, sigma_next: float, memory: Memory) -> Tensor:
    """Follow the velocity in a straight line. First order; the solver of most distilled models."""
    return x + (sigma_next - sigma) * v


def lcm(x: Tensor, v: Tensor, sigma: float, sigma_next: float, memory: Memory) -> Tensor:
    """Jump to the predicted picture and add fresh noise up to `sigma_next`.

    Source: Song et al. 2023, "Consistency Models", algorithm 1; Luo et al. 2023, "Latent Consistency Models".
    """
    x0 = x - sigma * v
    return x0 if sigma_next == 0 else (1 - sigma_next) * x0 + sigma_next * memory.noise(memory.step)


def dpm_2m(x: Tensor, v: Tensor, sigma: float, sigma_next: float, memory: Memory) -> Tensor:
    """Take a DPM-Solver++ (2M, midpoint) step; the first step of a run and the one to sigma 0 are of first order.

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    x0 = x - sigma * v
    memory.keep(sigma, x0)
    if sigma_next == 0:
        return x0
    out, weight = _first_order(x, x0, sigma, sigma_next)
    if len(memory.x0s) == 1:
        return out
    ratio = _ratio(memory.lambdas, sigma_next)
    return out + 0.5 * weight / ratio * (x0 - memory.x0s[0])


def unipc(x: Tensor, v: Tensor, sigma: float, sigma_next: float, memory: Memory) -> Tensor:
    """Take a UniPC step (B2(h), order 2, data prediction): correct `x` with what was seen at it, then predict the next.

    One velocity per step: x0 is of the uncorrected `x`. Order 1 at the start of a run; a step to sigma 0 is x0 itself.
    A long step after a much shorter one (in lambda) magnifies what the corrector changed; so custom sigmas should not.
    Source: Zhao et al. 2023, "UniPC", algorithms 1, 2 (UniC, UniP) and section 3.
    """
    x0 = x - sigma * v
    if sigma_next == 0:
        return x0
    if memory.x is not None:
        x = _corrected(x0, sigma, memory)
    memory.keep(sigma, x0)
    memory.x, memory.order = x, len(memory.x0s)
    out, weight = _first_order(x, x0, sigma, sigma_next)
    if memory.order == 1:
        return out
    return out + 0.5 * weight / _ratio(memory.lambdas, sigma_next) * (x0 - memory.x0s[0])


def _corrected(x0: Tensor, sigma: float, memory: Memory) -> Tensor:
    """Redo the last step with x0 of its end known, one order higher than it was predicted with."""
    last = memory.x0s[-1]
    base, weight = _first_order(memory.x, last, memory.sigma, sigma)
    if memory.order == 1:
        return base + 0.5 * weight * (x0 - last)
    h = _lambda(sigma) - memory.lambdas[-1]
    ratio = -_ratio(memory.lambdas, sigma)
    decay = math.expm1(-h)
    phi_1 = -decay / h - 1
    phi_2 = -phi_1 / h - 0.5
    # Solves [[1, 1], [ratio, 1]] rho = [phi_1, 2 phi_2] / decay: exact for x0 quadratic in lambda.
    b_1, b_2 = phi_1 / decay, 2 * phi_2 / decay
    rho_1 = (b_2 - b_1) / (ratio - 1)
    return base + weight * (rho_1 / ratio * (memory.x0s[0] - last) + (b_1 - rho_1) * (x0 - last))


def _first_order(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
    """Return the exact step for a constant x0, and its weight `(1 - sigma_next) (1 - e^-h)`."""
    weight = -(1 - sigma_next) * math.expm1(_lambda(sigma) - _lambda(sigma_next))
    return (sigma_next / sigma) * x + weight * x0, weight


def _ratio(lambdas: list[float], sigma_next: float) -> float:
    """Return the length in lambda of the step before over that of this one; inf after a start at sigma 1."""
    return (lambdas[1] - lambdas[0]) / (_lambda(sigma_next) - lambdas[1])


def _lambda(sigma: float) -> float:
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log((1 - sigma) / sigma)


# The noisiest of 1000 training levels, 0.999, as the official schedule stores it: in float32. Written as 0.999, some
# timesteps come out one lower.
HIGHEST_TRAINED = 0.9990000128746033

SOLVERS = {
    "unipc": Solver(step=unipc, grid_start=HIGHEST_TRAINED, kept_latents=3),
    "dpm++2m": Solver(step=dpm_2m, kept_latents=2),
    "euler": Solver(step=euler),
    "lcm": Solver(step=lcm),
}
