"""Goldens of the VAE of Wan and Qwen-Image, in official and diffusers names: encode and decode, whole and in chunks."""
# C channels, F pixel frames, T latent frames, H W pixels, h w latent positions

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from wanqwen.core.weights.keymap import Renamer, inverse
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.keymap import vae_spellings
from wanqwen.wan.vae import LATENT_FORMAT, WanVAE
from wanqwen.wan.vae_layers import Past

from .golden import Golden, need

# One call; the official chunks (1 frame, then 4 by 4; latents one by one); chunks of growing length. The first of the
# official chunks, and a clip of one frame, take the 2-D path.
TOLERANCE = {"whole": 1e-4, "streamed": 1e-4, "uneven": 1e-4}

OFFICIAL = {"encoder.conv1.weight", "decoder.head.2.weight", "conv2.weight"}
DIFFUSERS = {"encoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight"}
LOG_VARIANCE = (-30.0, 20.0)  # where diffusers clamps it

# What the official code and diffusers call the sizes, and the statistics of the latents.
SIZES = {
    "dim": ("dim", "base_dim"),
    "z_dim": ("z_dim",),
    "num_res_blocks": ("num_res_blocks",),
    "channels": ("input_channels",),
}
LISTS = {"dim_mult": "dim_mult", "temporal_downsample": "temperal_downsample"}  # sic


def recognise(golden: Golden) -> bool:
    """Say whether a file holds a Wan VAE in official or diffusers names."""
    return any(telling <= golden.weights.keys() for telling in (OFFICIAL, DIFFUSERS))


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
    sizes = {ours: config[name] for ours, names in SIZES.items() for name in names if name in config}
    sizes |= {ours: tuple(config[theirs]) for ours, theirs in LISTS.items() if theirs in config}
    vae = WanVAE(VAEConfig(**sizes))
    weights = golden.weights
    if weights.keys() >= DIFFUSERS:
        rename = Renamer(inverse(vae_spellings(vae.config.num_res_blocks)[1].table))
        weights = {rename(name): tensor for name, tensor in weights.items()}
    vae.load_state_dict(weights, assign=True)
    return vae.eval()


def _statistics(golden: Golden) -> tuple[Tensor, Tensor]:
    rows = {"mean": LATENT_FORMAT.mean, "std": LATENT_FORMAT.std}
    for name in rows:
        rows[name] = golden.config.get(name, golden.config.get(f"latents_{name}", rows[name]))
    mean, std = (torch.tensor(row).view(-1, 1, 1, 1) for row in rows.values())
    return mean, std


def _encoded(golden: Golden, case: str, way: str) -> tuple[Tensor, Tensor]:
    vae, past = _model(golden), Past()
    (pixels,) = need(golden.inputs(case), "pixels")
    factor = 2 ** sum(vae.config.temporal_downsample)
    chunks = _chunks(_with_batch(pixels), way, following=factor)
    parts = [vae.encode_chunk(chunk, past) for chunk in chunks]
    mean, log_variance = (torch.cat(both, dim=2) for both in zip(*parts, strict=True))
    return mean, log_variance


def _latent_raw(golden: Golden, case: str, way: str) -> Tensor:
    return _encoded(golden, case, way)[0]


def _log_variance(golden: Golden, case: str, way: str) -> Tensor:
    return _encoded(golden, case, way)[1].clamp(*LOG_VARIANCE)


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
    "latent_mode_raw": _latent_raw,  # diffusers' word: the mode of the posterior is its mean
    "logvar": _log_variance,
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
