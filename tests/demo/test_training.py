"""The recipe's parts that can be checked in seconds."""

from pathlib import Path

import pytest
import torch
from wanqwen.demo.training import Schedule, resume, save
from wanqwen.demo.vae import match_latent_statistics, preserve_signal
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.family import LATENT_FORMAT
from wanqwen.wan.vae import WanVAE


@pytest.fixture
def vae() -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=8, dim_mult=(1, 2, 2, 2), num_res_blocks=1))
    preserve_signal(vae)
    return vae.requires_grad_(False)


def test_matching_statistics_changes_the_latents_and_nothing_else(vae: WanVAE) -> None:
    clips = torch.rand(4, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = vae.decode_chunk(vae.encode_chunk(clips, vae.new_past())[0], vae.new_past())
    match_latent_statistics(vae, clips, torch.tensor(LATENT_FORMAT.mean), torch.tensor(LATENT_FORMAT.std))
    latents = vae.encode_chunk(clips, vae.new_past())[0]
    after = vae.decode_chunk(latents, vae.new_past())
    assert (after - before).abs().max() < 1e-3 * before.abs().max()
    assert (latents.mean(dim=(0, 2, 3, 4)) - torch.tensor(LATENT_FORMAT.mean)).abs().max() < 1e-3
    assert (latents.std(dim=(0, 2, 3, 4)) / torch.tensor(LATENT_FORMAT.std) - 1).abs().max() < 1e-3


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def model() -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
        torch.manual_seed(1)
        layer = torch.nn.Linear(3, 2)
        return layer, [torch.optim.AdamW(layer.parameters(), lr=0.1)]

    def train(layer: torch.nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
        for step in steps:
            layer(torch.full((1, 3), step + 1.0)).square().sum().backward()
            optimizers[0].step()
            layer.zero_grad()

    whole = model()
    train(*whole, range(4))
    first = model()
    train(*first, range(2))
    save(tmp_path / "state.pt", *first, 2)
    second = model()
    assert resume(tmp_path / "state.pt", *second) == 2
    train(*second, range(2, 4))
    assert torch.equal(second[0].weight, whole[0].weight)
    assert resume(tmp_path / "none.pt", *model()) == 0


def test_the_rate_warms_up_and_falls() -> None:
    schedule = Schedule(steps=1000, rate=1.0, warmup=100)
    assert schedule.factor(0) == 0.01 and schedule.factor(99) == 1.0
    assert schedule.factor(550) == pytest.approx(0.525)
    assert schedule.factor(1000) == pytest.approx(0.05)
