"""Latents and pictures through our VAE and through ComfyUI's own of the same weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import comfy.ldm.wan.vae
import comfy.sd
import torch
from safetensors.torch import save_file
from wanqwen.loading import load_vae
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.vae import WanVAE

NARROW = 16  # channels, of the published 96: all else is as ComfyUI expects it


def pair() -> tuple[Callable, Callable, Callable, Callable]:
    """Return our decode and encode, and ComfyUI's, of one random network."""
    generator = torch.Generator().manual_seed(0)
    network = WanVAE(VAEConfig(dim=NARROW)).requires_grad_(False)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / 8
        parameter.copy_(torch.ones_like(noise) if name.endswith("gamma") else noise)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    with TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "vae.safetensors")
        ours = load_vae(Path(folder) / "vae.safetensors")
        _ = ours.first_stage_model
    original = comfy.ldm.wan.vae.WanVAE
    comfy.ldm.wan.vae.WanVAE = lambda **sizes: original(**sizes | {"dim": NARROW})
    try:
        theirs = comfy.sd.VAE(sd=dict(state), dtype=torch.float32)
    finally:
        comfy.ldm.wan.vae.WanVAE = original
    return ours.decode, ours.encode, theirs.decode, partial(theirs.encode)


def test_latents_and_pictures_mean_the_same_in_both() -> None:
    decode, encode, their_decode, their_encode = pair()
    latent = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    mine, theirs = decode(latent), their_decode(latent)
    assert mine.shape == theirs.shape == (1, 5, 32, 48, 3) and mine.std() > 0.05
    assert (mine - theirs).abs().max() < 1e-4
    clip = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(2))
    mine, theirs = encode(clip), their_encode(clip)
    assert mine.shape == theirs.shape == latent.shape
    assert (mine - theirs).abs().max() < 1e-4 * mine.std()
