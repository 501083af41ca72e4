"""Goldens of the UMT5 encoder. Every text is run with its own tokens only, as the pack does; nothing is padded."""
# L tokens, E width

import re
from dataclasses import fields
from functools import lru_cache

import torch
from torch import Tensor
from wanqwen.core.text import Part, Placement
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.wan.config import TextEncoderConfig
from wanqwen.wan.text_encoder import load

from .golden import Golden, need

TOLERANCE = {"fp32": 2e-5}


def recognise(golden: Golden) -> bool:
    """Say whether a file holds a UMT5 encoder in official names."""
    return {"token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"} <= golden.weights.keys()


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked."""
    return ("fp32",) if key.startswith("out/") else ()


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Run the case of an output and return ours and the reference, one pair per text."""
    _, case, name = key.split("/", 2)
    inputs, reference = golden.inputs(case), golden.tensors[key]
    (ids,) = need(inputs, "ids")
    lengths = inputs.get("mask", torch.ones_like(ids)).sum(1).tolist()
    if name == "full":  # rows past the mask are whatever the reference network yields
        return [(_encode(golden, row[:n]), want[:n]) for row, n, want in zip(ids, lengths, reference, strict=True)]
    index = re.fullmatch(r"trimmed(\d+)", name)
    if index is None or int(index[1]) >= len(ids):
        raise ValueError(f"an encoder gives full and trimmedN of its {len(ids)} texts, not {name}")
    i = int(index[1])
    return [(_encode(golden, ids[i, : lengths[i]]), reference)]


@lru_cache(maxsize=2)
def _part(golden: Golden) -> Part:
    if golden.config.get("shared_pos"):
        raise ValueError(f"{golden.path.name} shares one position table over its layers: that is T5, not UMT5")
    sizes = {f.name: golden.config[f.name] for f in fields(TextEncoderConfig) if f.name in golden.config}
    checkpoint = open_checkpoint(golden.path)
    names = {name: f"weights/{name}" for name in golden.weights}
    others = checkpoint.tensors.keys() - set(names.values())
    return load(TextEncoderConfig(**sizes), checkpoint, names, dtype=torch.float32, ignored=others)


def _encode(golden: Golden, ids_L: Tensor) -> Tensor:
    part = _part(golden)
    with torch.no_grad(), part.on(Placement(), lambda: 0) as run:
        return run(part.embed(ids_L.tolist()))[0]
