"""Goldens of the CLIP visual tower, in official names: its rows before the last block, and what is shown to it."""
# B pictures, H W pixels, P positions, E width

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import Tensor
from wanqwen.core.text import Part, Placement
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.wan.config import ImageEncoderConfig
from wanqwen.wan.image_encoder import EPS, load, preprocess
from wanqwen.wan.keymap import IMAGE_ENCODER_IGNORED

from .golden import Golden, need

TOLERANCE = {"fp32": 2e-5}

# What every CLIP of Wan's kind has, as the official code calls it.
KIND = {"pool_type": "token", "pre_norm": True, "post_norm": False, "activation": "gelu", "norm_eps": EPS}


def recognise(golden: Golden) -> bool:
    """Say whether a file holds a CLIP visual tower in official names."""
    return {"visual.cls_embedding", "visual.patch_embedding.weight"} <= golden.weights.keys()


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked; of those in between, the pixels."""
    return ("fp32",) if key.startswith("out/") or key.endswith("/pixels_normalized") else ()


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Run the case of an output and return ours and the reference."""
    _, case, name = key.split("/", 2)
    if name not in OUTPUTS:
        raise ValueError(f"an image encoder gives {', '.join(OUTPUTS)}, not {name}")
    return [(OUTPUTS[name](golden, case), golden.tensors[key])]


def _pixels(golden: Golden, case: str) -> Tensor:
    """Return what a case shows to the tower [B, 3, S, S]: its own pixels, or a picture in [-1, 1] made into some."""
    inputs = golden.inputs(case)
    if "pixels_normalized" in inputs:
        return inputs["pixels_normalized"]
    (picture,) = need(inputs, "image_m1_1")
    frames_3BHW = picture if picture.dim() == 4 else picture[:, None]
    images_BHWC = (frames_3BHW.permute(1, 2, 3, 0) + 1) / 2
    return torch.cat([preprocess(image, _config(golden).image_size, "official") for image in images_BHWC])


def _rows(golden: Golden, case: str, whole: bool = False) -> Tensor:
    pixels, size = _pixels(golden, case), _config(golden).image_size
    with torch.no_grad(), _part(golden, whole).on(Placement(), lambda: 0) as run:
        if pixels.shape[-2:] == (size, size):
            return run(pixels)
        # A larger picture, which Wan never shows: transformers widens the positions as the official code can.
        embedded = run.embeddings(pixels, interpolate_pos_encoding=True)
        return run.encoder(inputs_embeds=run.pre_layrnorm(embedded)).last_hidden_state


OUTPUTS: dict[str, Callable[[Golden, str], Tensor]] = {
    "penultimate": _rows,
    "last_block": lambda golden, case: _rows(golden, case, whole=True),
    "pixels_normalized": _pixels,
}


def _config(golden: Golden, more: int = 0) -> ImageEncoderConfig:
    stated = golden.config
    if others := {name: stated[name] for name, wanted in KIND.items() if stated.get(name, wanted) != wanted}:
        raise ValueError(f"{golden.path.name} has {others}, which no image encoder of Wan has: {KIND}")
    return ImageEncoderConfig(
        dim=stated["dim"],
        dim_ffn=stated["dim"] * stated["mlp_ratio"],
        num_layers=stated["num_layers"] + more,
        num_heads=stated["num_heads"],
        patch_size=stated["patch_size"],
        num_positions=golden.weights["visual.pos_embedding"].shape[-2],
    )


@lru_cache(maxsize=4)
def _part(golden: Golden, whole: bool) -> Part:
    """Return the tower without its last block, or with one block after it that is left out instead."""
    checkpoint = open_checkpoint(golden.path)
    known = [name for name in golden.weights if not any(fnmatchcase(name, rule) for rule in IMAGE_ENCODER_IGNORED)]
    names = {name: f"weights/{name}" for name in known}
    others = checkpoint.tensors.keys() - set(names.values())
    return load(_config(golden, int(whole)), checkpoint, names, dtype=torch.float32, ignored=others)
