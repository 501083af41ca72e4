"""What CUDA makes is what the CPU makes: models in float32, and the VAE in each of its modes."""

from dataclasses import replace

import pytest
import torch
from wanqwen.core import host, runtime
from wanqwen.core.codec import VideoCodec
from wanqwen.core.past import MODES, VAEMode
from wanqwen.core.types import Conditioning, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model
from wanqwen.tests.card.card import CardInRam
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.vae import LATENT_FORMAT, WanVAE

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", ["wan_dit", "qwen_dit", "qwen_edit_dit"])
def test_a_run_in_float32_is_that_of_the_cpu(card: CardInRam, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    handle = replace(load_model(DEMO_FOLDER / f"{name}.safetensors"), dtype=torch.float32)
    width, launches = handle.identity.config.text_dim, card.count("launches")
    positive, negative = (
        Conditioning(text=torch.randn(1, n, width, generator=torch.Generator().manual_seed(n))) for n in (7, 4)
    )
    if "edit" in name:
        reference = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        positive, negative = (replace(c, references=(reference,)) for c in (positive, negative))
    request = SampleRequest(
        latent=torch.zeros(1, 16, 1, 8, 8), positive=positive, negative=negative, steps=3, guidance=(3.0,)
    )
    found = runtime.generate(handle, request)
    assert card.count("launches") > launches + 100
    monkeypatch.setattr(host, "device", lambda: CPU)
    assert error(found, runtime.generate(handle, request)) < 1e-4


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("frames", [1, 13])
def test_the_vae_is_that_of_the_cpu(card: CardInRam, frames: int, mode: VAEMode) -> None:
    torch.manual_seed(0)
    network = WanVAE(VAEConfig(dim=16)).channels_last()
    there, here = (VideoCodec(lambda: network, LATENT_FORMAT, device=device) for device in (CUDA, CPU))
    pixels, launches = torch.rand(frames, 48, 64, 3), card.count("launches")
    latent = torch.randn(1, 16, (frames + 3) // 4, 6, 8)
    encoded, decoded = there.encode(pixels, mode=mode), there.decode(latent, mode=mode)
    assert card.count("launches") > launches + 100
    assert error(encoded, here.encode(pixels)) < 1e-4
    assert error(decoded, here.decode(latent)) < 1e-4
