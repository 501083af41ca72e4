"""Goldens of whole Qwen-Image sampling loops. The model lies in another golden file of the same folder."""
# N steps, L tokens, h w token grid

import re

import torch
from einops import rearrange
from torch import Tensor
from wanqwen.core.blocks import Run
from wanqwen.core.sampling.guidance import Guided, combination
from wanqwen.core.sampling.sample import sample
from wanqwen.core.sampling.schedule import StepPlan, plan_steps
from wanqwen.core.types import Conditioning, SampleRequest
from wanqwen.qwen_image.family import FAMILY

from . import qwen_mmdit
from .golden import Golden, need, read

TOLERANCE = {"fp32": 1e-3, "schedule": 1e-5}
GRID = re.compile(r"\(1, ?(\d+), ?(\d+)\)")
TABLES = ("sigmas", "timesteps")


def recognise(golden: Golden) -> bool:
    """Say whether a file holds loops of a Qwen-Image model, which it names."""
    return not golden.weights and {"weights_file", "steps", "true_cfg_scale"} <= golden.config.keys()


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked."""
    if not key.startswith("out/"):
        return ()
    return ("schedule",) if key.endswith(TABLES) else ("fp32",)


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Run the loop of an output: its latents after each step or its tables, beside the reference."""
    _, case, name = key.split("/", 2)
    # A case that changes one thing takes the rest from the first one.
    inputs = golden.inputs("t2i") | golden.inputs(case)
    noise, text, negative_text = need(inputs, "noise", "context", "context_neg")
    grid = _grid(golden, "t2i")
    references = (_unpack(inputs["ref"], *_grid(golden, case)),) if "ref" in inputs else ()
    positive, negative = (
        Conditioning(text=rows, references=tuple(FAMILY.latent_format.denormalise(x) for x in references))
        for rows in (text, negative_text)
    )
    start = _unpack(noise, *grid)
    request = SampleRequest(
        latent=torch.zeros_like(start),
        positive=positive,
        negative=negative,
        steps=golden.config["steps"],
        guidance=(golden.config["true_cfg_scale"],),
        solver="euler",
    )
    net = qwen_mmdit.model(read(golden.path.parent / golden.config["weights_file"]), torch.float32, False)
    plan = plan_steps(request, FAMILY.schedule(net.config, tuple(start.shape)))
    reference = golden.tensors[key]
    if name in TABLES:
        return [(_table(plan, name), reference)]
    with torch.no_grad():
        denoise = FAMILY.denoiser(net, Run(), [positive, negative], torch.device("cpu"))
    combine = combination(FAMILY.guidance_patch(net.config))
    rows: list[Tensor] = [start]
    guided = Guided(denoise=denoise, has_negative=True, combine=combine)
    sample(start, plan, "euler", guided, torch.zeros_like, lambda done, total, x0, x: rows.append(x))
    return [(_pack(x), theirs) for x, theirs in zip(rows, reference, strict=True)]


def _table(plan: StepPlan, name: str) -> Tensor:
    return torch.tensor(plan.sigmas if name == "sigmas" else plan.timesteps)


def _grid(golden: Golden, case: str) -> tuple[int, int]:
    """Return the token grid that the text of a case names."""
    if found := GRID.search(str(golden.cases.get(case, ""))):
        return int(found[1]), int(found[2])
    raise ValueError(f"{golden.path.name}: the text of case {case} names no grid (1, h, w)")


def _unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    return rearrange(tokens, "b (h w) (c p q) -> b c 1 (h p) (w q)", h=h, w=w, p=2, q=2)


def _pack(latent: Tensor) -> Tensor:
    return rearrange(latent, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
