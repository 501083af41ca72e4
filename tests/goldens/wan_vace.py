"""Goldens of the Wan diffusion transformer with a VACE control, whose strength a case states in words."""
# B batch, C channels, T H W latent grid, S text rows, E width

import re

import torch
from torch import Tensor
from wanqwen.core.blocks import Run
from wanqwen.core.types import Control

from . import wan_dit
from .golden import Golden, need

TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
STRENGTH = re.compile(r"vace_context_scale\D*([\d.]*\d)")
SAME_INPUTS = re.compile(r"same inputs as (\w+)")


def recognise(golden: Golden) -> bool:
    """Say whether a file holds a VACE transformer in official names."""
    return {"blocks.0.self_attn.q.weight", "vace_patch_embedding.weight"} <= golden.weights.keys()


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked."""
    return tuple(TOLERANCE) if key.startswith("out/") else ()


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Run the case of an output and return ours and the reference."""
    _, case, name = key.split("/", 2)
    if name != "out":
        raise ValueError(f"a case of VACE gives out, not {name}")
    reference, dtype = golden.tensors[key], torch.bfloat16 if way == "bf16" else torch.float32
    inputs = zip(need(_inputs(golden, case), "x", "t", "context", "vace_context"), (5, 1, 3, 5), strict=True)
    x, t, text, context = (tensor if tensor.dim() == dims else tensor[None] for tensor, dims in inputs)
    net, run = wan_dit.model(golden, dtype), Run(dtype=dtype)
    control = Control(context=context, strength=_strength(golden, case))
    prompt = net.prompt(text, run, controls=[control])
    return [(net(x, t, prompt, run).reshape(reference.shape), reference)]


def _inputs(golden: Golden, case: str) -> dict[str, Tensor]:
    """Return the inputs of a case; what it does not hold itself is that of the case which it names."""
    other = SAME_INPUTS.search(str(golden.cases.get(case, "")))
    return (golden.inputs(other[1]) if other else {}) | golden.inputs(case)


def _strength(golden: Golden, case: str) -> float:
    found = STRENGTH.search(str(golden.cases.get(case, "")))
    if found is None:
        raise ValueError(f"{golden.path.name} does not say the vace_context_scale of {case}: {golden.cases}")
    return float(found[1])
