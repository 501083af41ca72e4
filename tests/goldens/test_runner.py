"""The golden runner itself: it takes other sizes and shapes than the fixtures have, and it can fail."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wanqwen.core.blocks import Run
from wanqwen.tests.goldens.golden import Golden, read
from wanqwen.tests.goldens.runner import UNREADABLE, checks, verify
from wanqwen.wan.config import VAEConfig, WanConfig
from wanqwen.wan.transformer import WanTransformer
from wanqwen.wan.vae import WanVAE

FIXTURES = Path(__file__).parents[1] / "fixtures" / "goldens"
DIT = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 1, "freq_dim": 16, "text_dim": 8, "text_len": 5}


def write(path: Path, tensors: dict[str, Tensor], config: dict, weights: dict[str, Tensor] | None = None) -> Path:
    below = {f"weights/{name}": tensor for name, tensor in (weights or {}).items()}
    whole = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in (below | tensors).items()}
    save_file(whole, path, {"config": json.dumps(config), "cases": "{}"})
    return path


def randomise(net: torch.nn.Module) -> dict[str, Tensor]:
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.state_dict()


@torch.no_grad()
def dit_file(path: Path, error: float = 0.0) -> Path:
    """Write three samples of three sizes and two in a batch, with one context for both."""
    torch.manual_seed(0)
    net, run = WanTransformer(WanConfig(**DIT)), Run()
    weights, tensors = randomise(net), {}
    texts = [torch.randn(n, 8) for n in (1, 5, 2)]
    grids = [(1, 2, 2), (2, 2, 4), (1, 6, 2)]
    tensors["in/many/t"] = torch.tensor([3.5, 500.0, 999.0])
    for i, (text, grid) in enumerate(zip(texts, grids, strict=True)):
        x = torch.randn(16, *grid)
        tensors |= {f"in/many/x{i}": x, f"in/many/context{i}": text}
        tensors[f"out/many/out{i}"] = net(x[None], tensors["in/many/t"][i : i + 1], net.prompt(text[None], run), run)[0]
    tensors |= {"in/pair/x": torch.randn(2, 16, 1, 2, 4), "in/pair/t": torch.tensor([7.0]), "in/pair/context": texts[0]}
    tensors["out/pair/out"] = net(tensors["in/pair/x"], torch.full((2,), 7.0), net.prompt(texts[0][None], run), run)
    tensors["out/pair/out"] += error * tensors["out/pair/out"].abs().max()
    return write(path, tensors, DIT, weights)


def test_transformer_of_another_size_with_other_cases(tmp_path: Path) -> None:
    path = dit_file(tmp_path / "any_name.safetensors")
    found = checks(path)
    assert len(found) == 3 * 2 + 3
    for check in found:
        verify(path, *check)


def test_result_out_of_tolerance_fails(tmp_path: Path) -> None:
    path = dit_file(tmp_path / "a.safetensors", error=3e-5)
    with pytest.raises(AssertionError, match=r"out/pair/out, batch, part 0: off by 3\.0"):
        verify(path, "out/pair/out", "batch")


@torch.no_grad()
def test_vae_of_another_shape(tmp_path: Path) -> None:
    config = VAEConfig(dim=4, z_dim=6, dim_mult=(1, 2, 3), num_res_blocks=1, temporal_downsample=(True, False))
    torch.manual_seed(0)
    vae = WanVAE(config)
    weights = randomise(vae)
    pixels, latent = torch.rand(2, 3, 7, 8, 12) * 2 - 1, torch.randn(2, 6, 4, 2, 3)
    mean, std = torch.arange(6.0), torch.arange(1.0, 7.0)
    raw = latent * std.view(6, 1, 1, 1) + mean.view(6, 1, 1, 1)
    tensors = {
        "in/clip/pixels": pixels,
        "in/clip/z_normalized": latent,
        "out/clip/latent_raw": vae.encode_chunk(pixels, vae.new_past())[0].contiguous(),
        "out/clip/decoded": vae.decode_chunk(raw, vae.new_past()).clamp(-1, 1),
    }
    sizes = {"dim": 4, "z_dim": 6, "dim_mult": [1, 2, 3], "num_res_blocks": 1, "temperal_downsample": [True, False]}
    path = write(tmp_path / "a.safetensors", tensors, sizes | {"mean": mean.tolist(), "std": std.tolist()}, weights)
    found = checks(path)
    assert len(found) == 2 * 3
    for check in found:
        verify(path, *check)


def rewritten(source: str, target: Path, change: dict[str, Tensor]) -> Path:
    golden: Golden = read(FIXTURES / f"{source}.safetensors")
    metadata = {"config": json.dumps(golden.config), "cases": json.dumps(golden.cases)}
    save_file(golden.tensors | change, target, metadata)
    return target


@pytest.mark.parametrize(
    ("source", "key", "way"),
    [
        ("umt5_encoder_tiny", "out/padded/trimmed1", "fp32"),
        ("umt5_encoder_tiny", "out/padded/full", "fp32"),
        ("clip_visual_tiny", "out/plain/penultimate", "fp32"),
        ("clip_visual_tiny", "out/interp/penultimate", "fp32"),
        ("clip_visual_tiny", "mid/wrapper/pixels_normalized", "fp32"),
        ("schedulers", "out/table_unipc_n6_shift5/timesteps", "fp32"),
        ("schedulers", "out/trajectory20/dpmpp", "fp32"),
        ("wan_dit_t2v_tiny", "mid/single/time_projection", "single"),
        ("wan_dit_t2v_tiny", "out/ragged/out1", "bf16"),
        ("wan_vae_tiny", "out/video/latent_normalized", "streamed"),
    ],
)
def test_changed_reference_fails(tmp_path: Path, source: str, key: str, way: str) -> None:
    original = load_file(FIXTURES / f"{source}.safetensors")[key]
    changed = original.clone()
    changed.view(-1)[3] += 1 if changed.dtype == torch.int64 else 0.05 * changed.abs().max()
    path = rewritten(source, tmp_path / "a.safetensors", {key: changed})
    assert (key, way) in checks(path)
    with pytest.raises(AssertionError, match="off by"):
        verify(path, key, way)


def test_loop_with_a_late_error_fails_and_missing_weights_are_named(tmp_path: Path) -> None:
    rows = read(FIXTURES / "wan_cfg_loop_tiny.safetensors").tensors["out/t2v/unipc"].clone()
    rows[6] *= 1.01
    path = rewritten("wan_cfg_loop_tiny", tmp_path / "loop.safetensors", {"out/t2v/unipc": rows})
    with pytest.raises(ValueError, match=r"none of \['wan_dit_t2v_tiny.safetensors', 'wan_dit_i2v_tiny.safetensors'\]"):
        verify(path, "out/t2v/unipc", "fp32")
    rewritten("wan_dit_t2v_tiny", tmp_path / "wan_dit_t2v_tiny.safetensors", {})
    with pytest.raises(AssertionError, match="part 6: off by"):
        verify(path, "out/t2v/unipc", "fp32")


def test_files_that_cannot_be_run_fail(tmp_path: Path) -> None:
    number = torch.ones(1)
    (tmp_path / "cut.safetensors").write_bytes((FIXTURES / "schedulers.safetensors").read_bytes()[:-8])
    write(tmp_path / "unknown.safetensors", {"out/case/out": number}, {}, {"strange.weight": number})
    write(tmp_path / "table.safetensors", {"in/case/x": number}, {})
    for path in tmp_path.iterdir():
        assert checks(path) == [UNREADABLE]
        with pytest.raises(Exception, match=r"incomplete|fits none of the kinds"):
            verify(path, *UNREADABLE)


def test_outputs_that_nobody_knows_fail(tmp_path: Path) -> None:
    path = rewritten("wan_vae_tiny", tmp_path / "a.safetensors", {"out/image/histogram": torch.ones(4)})
    assert ("out/image/histogram", "whole") in checks(path)
    with pytest.raises(ValueError, match="not histogram"):
        verify(path, "out/image/histogram", "whole")
