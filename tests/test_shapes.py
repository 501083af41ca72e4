"""Names and shapes of models' parameters, told without the modules, are those of the modules."""

from dataclasses import replace

import pytest
from wanqwen.families import FAMILIES, family
from wanqwen.qwen_image.config import QwenImageConfig
from wanqwen.tests.manifests import on_meta
from wanqwen.wan import shapes
from wanqwen.wan.config import VAEConfig, WanConfig
from wanqwen.wan.vae import WanVAE

WAN = WanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, in_dim=12, out_dim=8, freq_dim=6, text_dim=10)
CONFIGS = {
    "wan21": (
        WAN,
        replace(WAN, patch_size=(2, 1, 3), image_dim=14),
        replace(WAN, image_dim=14, image_positions=6),
        replace(WAN, vace_layers=(0, 2), vace_dim=9),
        replace(WAN, image_dim=14, vace_layers=(1,), vace_dim=9),
    ),
    "qwen-image": (
        QwenImageConfig(num_layers=2, num_heads=3, dim=24, ffn_dim=40, text_dim=10, freq_dim=6, axes=(2, 2, 4)),
        QwenImageConfig(num_layers=1, dim=3072, layered=True, latent_channels=5),
    ),
}


@pytest.mark.parametrize("files", FAMILIES, ids=lambda files: files.name)
def test_transformers(files) -> None:
    build = family(files.name).build
    for config in (*files.variants.values(), *CONFIGS[files.name]):
        assert files.parameters(config) == on_meta(lambda config=config: build(config)), config


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(),
        VAEConfig(channels=4),
        VAEConfig(dim=8, z_dim=3, dim_mult=(1, 3, 2), num_res_blocks=1, temporal_downsample=(True, False)),
        VAEConfig(dim=8, dim_mult=(2, 3, 4), num_res_blocks=3, temporal_downsample=(True, True)),
        VAEConfig(dim=6, dim_mult=(3,), temporal_downsample=()),
    ],
)
def test_vaes(config: VAEConfig) -> None:
    assert shapes.vae(config) == on_meta(lambda: WanVAE(config))
