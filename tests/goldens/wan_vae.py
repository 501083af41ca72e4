"""Goldens of the Wan VAE: encode and decode, whole and in chunks."""
# C channels, F pixel frames, T latent frames, H W pixels, h w latent positions

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.family import LATENT_MEAN, LATENT_STD
from wanqwen.wan.vae import WanVAE
from wanqwen.wan.vae_layers import Past

from .golden import Golden, need

# One call; the official chunks (1 frame, then 4 by 4; latents one by one); chunks of growing length. The first of the
# official chunks, and a clip of one frame, take the 2-D path.
TOLERANCE = {"whole": 1e-4, "streamed": 1e-4, "uneven": 1e-4}


def recognise(golden: Golden) -> bool:
    """Say whether a file holds a Wan VAE in official names."""
    return {"encoder.conv1.weight", "decoder.head.2.weight", "conv2.weight"} <= golden.weights.keys()


def ways(golden: Golden, key: str) -> tuple[str, ...]:
    """List how an output is checked; a single frame cannot be cut."""
    if not key.startswith("out/"):
        return ()
    *_, frames, _, _ = (1, 1, 1, *golden.tensors[key].shape)
    return tuple(TOLERANCE) if frames > 1 else ("whole",)


def run(golden: Golden, key: str, way: str) -> list[tuple[Tensor, Tensor]]:
    """Run the case of an output and return ours and the reference."""
    _, case, name = key.split("/", 2)
    if name not in OUTPUTS:
        raise ValueError(f"a VAE gives {', '.join(OUTPUTS)}, not {name}")
    reference = golden.tensors[key]
    return [(OUTPUTS[name](golden, case, way).reshape(reference.shape), reference)]


@lru_cache(maxsize=2)
def _model(golden: Golden) -> WanVAE:
    config = golden.config
    if config.get("attn_scales"):
        raise ValueError(f"{golden.path.name} has attention at scales {config['attn_scales']}, which no Wan VAE has")
    sizes = {name: config[name] for name in ("dim", "z_dim", "num_res_blocks") if name in config}
    lists = {"dim_mult": "dim_mult", "temporal_downsample": "temperal_downsample"}  # the official code spells it so
    sizes |= {ours: tuple(config[theirs]) for ours, theirs in lists.items() if theirs in config}
    vae = WanVAE(VAEConfig(**sizes))
    vae.load_state_dict(golden.weights, assign=True)
    return vae.eval()


def _statistics(golden: Golden) -> tuple[Tensor, Tensor]:
    rows = golden.config.get("mean", LATENT_MEAN), golden.config.get("std", LATENT_STD)
    mean, std = (torch.tensor(row).view(-1, 1, 1, 1) for row in rows)
    return mean, std


def _latent_raw(golden: Golden, case: str, way: str) -> Tensor:
    vae, past = _model(golden), Past()
    (pixels,) = need(golden.inputs(case), "pixels")
    factor = 2 ** sum(vae.config.temporal_downsample)
    chunks = _chunks(_with_batch(pixels), way, following=factor)
    return torch.cat([vae.encode_chunk(chunk, past)[0] for chunk in chunks], dim=2)


def _latent_normalized(golden: Golden, case: str, way: str) -> Tensor:
    mean, std = _statistics(golden)
    return (_latent_raw(golden, case, way) - mean) / std


def _decoded_unclamped(golden: Golden, case: str, way: str) -> Tensor:
    vae, past = _model(golden), Past()
    mean, std = _statistics(golden)
    (latent,) = need(golden.inputs(case), "z_normalized")
    chunks = _chunks(_with_batch(latent) * std + mean, way, following=1)
    return torch.cat([vae.decode_chunk(chunk, past) for chunk in chunks], dim=2)


def _decoded(golden: Golden, case: str, way: str) -> Tensor:
    return _decoded_unclamped(golden, case, way).clamp(-1, 1)


OUTPUTS: dict[str, Callable[[Golden, str, str], Tensor]] = {
    "latent_raw": _latent_raw,
    "latent_normalized": _latent_normalized,
    "decoded": _decoded,
    "decoded_unclamped": _decoded_unclamped,
}


def _with_batch(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 5 else tensor[None]


def _chunks(clip: Tensor, way: str, following: int) -> list[Tensor]:
    """Cut [B, C, frames, ...] after frame 1 and then every `following` frames, or at growing multiples of that."""
    frames = clip.shape[2]
    if way == "whole":
        return [clip]
    if way == "streamed":
        sizes = [1] + [following] * ((frames - 1) // following)
    else:
        sizes, step = [min(1 + following, frames)], 1
        while sum(sizes) < frames:
            step += 1
            sizes.append(min(step * following, frames - sum(sizes)))
    return list(clip.split(sizes, dim=2))
