"""Goldens of whole sampling loops with guidance. The model lies in another golden file of the same folder."""
# C channels, T H W latent grid, N steps

import torch
from torch import Tensor
from wanqwen.core.blocks import Run
from wanqwen.core.sampling.guidance import Guided
from wanqwen.core.sampling.sample import sample
from wanqwen.core.sampling.schedule import plan_steps
from wanqwen.core.types import Conditioning, SampleRequest, Schedule
from wanqwen.wan.family import denoiser

from . import wan_dit
from .golden import Golden, need, read
from .schedules import SOLVERS

TOLERANCE = {"fp32": 1e-3}
TEXTS = "t2v"  # the case whose texts the others take
OUR_SOLVERS = SOLVERS | {"euler": "euler"}


def recognise(golden: Golden) -> bool:
    """Say whether a file holds loops of a Wan model, which it names."""
    return not golden.weights and {"weights_file", "steps", "shift", "guide_scale"} <= golden.config.keys()


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked."""
    return ("fp32",) if key.startswith("out/") else ()


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Run the loop of an output and return its latents, before each step and at the end, beside the reference."""
    _, case, solver = key.split("/", 2)
    inputs, config = golden.inputs(case), golden.config
    (noise,) = need(inputs, "noise")
    text, empty = need({**golden.inputs(TEXTS), **inputs}, "context", "context_null")
    if unknown := inputs.keys() - {"noise", "context", "context_null", "clip_fea", "y"}:
        raise ValueError(f"a loop takes no {', '.join(sorted(unknown))}")
    if solver not in OUR_SOLVERS:
        raise ValueError(f"unknown solver {solver}; known: {', '.join(OUR_SOLVERS)}")
    image, extra = wan_dit.pictures_of(inputs)
    positive, negative = (Conditioning(text=rows[None], image=image, extra=extra) for rows in (text, empty))
    request = SampleRequest(
        latent=torch.zeros_like(noise[None]),
        positive=positive,
        negative=negative,
        steps=config["steps"],
        guidance=(config["guide_scale"],),
        solver=OUR_SOLVERS[solver],
    )
    net = wan_dit.model(_weights_file(golden, noise.shape[0] + (0 if extra is None else extra.shape[1])), torch.float32)
    denoise = denoiser(net, Run(), [positive, negative], torch.device("cpu"))
    rows = [noise]
    sample(
        noise[None],
        plan_steps(request, Schedule(shift=config["shift"])),
        request.solver,
        Guided(denoise=denoise, has_negative=True),
        lambda _: torch.zeros_like(noise[None]),
        lambda done, total, x0, x: rows.append(x[0]),
    )
    return list(zip(rows, golden.tensors[key], strict=True))


def _weights_file(golden: Golden, channels: int) -> Golden:
    """Return the one of the named files whose model takes this many channels."""
    names = [name.strip() for name in golden.config["weights_file"].split(",")]
    for name in names:
        path = golden.path.parent / name
        if path.exists() and wan_dit.recognise(other := read(path)) and other.config["in_dim"] == channels:
            return other
    raise ValueError(f"none of {names} beside {golden.path.name} is a Wan model of {channels} channels")
