"""One ComfyUI server for all tests here, with our pack, tiny checkpoints and some bad files in its folders."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from wanqwen.media import write_mp4
from wanqwen.tests import loras
from wanqwen.tests.downloads.hub_double import Hub
from wanqwen.tests.nodes import tiny as checkpoints

from .convert import MODEL, SAMPLER, SIZE, TEXT_ENCODER, TINY, VAE, read_workflow, to_prompt
from .server import Server, find_comfyui

ROOT = Path(__file__).resolve().parents[2]
DEEP = replace(checkpoints.MODEL, num_layers=16)
I2V = replace(checkpoints.MODEL, in_dim=36, image_dim=checkpoints.IMAGE.dim)


@pytest.fixture(scope="session")
def comfyui() -> tuple[Path, Path]:
    """ComfyUI's folder and its Python; the tests are skipped where there is none."""
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """What the server takes for the mirror that its user set."""
    with closing(Hub()) as double:
        yield double


@pytest.fixture(scope="session")
def server(comfyui: tuple[Path, Path], hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "wanqwen").symlink_to(ROOT)
    (base / "custom_nodes" / "small_encoders.py").symlink_to(Path(__file__).with_name("small_encoders.py"))
    write_files(base)
    with patch.dict(os.environ, HF_ENDPOINT=hub.endpoint):
        server = Server(*comfyui, base)
    yield server
    server.close()


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    return server.get("/object_info")


@pytest.fixture
def demo(object_info: dict[str, Any]) -> dict[str, Any]:
    """The demo workflow as the server takes it."""
    return to_prompt(read_workflow("demo_text_to_video"), object_info)


@pytest.fixture
def tiny(demo: dict[str, Any]) -> dict[str, Any]:
    """The demo workflow with random checkpoints, two steps and a smaller clip."""
    for loader in (MODEL, TEXT_ENCODER, VAE):
        demo[loader]["inputs"]["file"] = TINY
    demo[SAMPLER]["inputs"]["steps"] = 2
    demo[SIZE]["inputs"] |= {"width": 32, "height": 32, "frames": 5}
    return demo


def write_files(base: Path) -> None:
    """Write good models and bad ones, pictures, and a video, and a latent of NaN."""
    for folder in ("input", "output", "models/unet"):
        (base / folder).mkdir(parents=True)
    models = base / "models"
    good = checkpoints.write_model(models / "diffusion_models" / "tiny.safetensors")
    checkpoints.write_model(models / "diffusion_models" / "deep.safetensors", DEEP)
    checkpoints.write_model(models / "diffusion_models" / "tiny_vace.safetensors", checkpoints.VACE)
    vae = checkpoints.write_vae(models / "vae" / "tiny.safetensors")
    encoder = checkpoints.write_text_encoder(models / "text_encoders" / "tiny.safetensors")
    two = replace(I2V, image_positions=2 * checkpoints.IMAGE.num_positions)
    checkpoints.write_model(models / "diffusion_models" / "tiny_flf2v.safetensors", two)
    checkpoints.write_image_encoder(models / "clip_vision" / "tiny.safetensors")
    for variant in ("t2i", "edit", "edit-2509", "edit-2511"):
        checkpoints.write_qwen_model(models / "diffusion_models" / f"qwen_{variant}.safetensors", variant)
    checkpoints.write_model(models / "diffusion_models" / "tiny_i2v.safetensors", I2V)
    two = replace(I2V, image_positions=2 * checkpoints.IMAGE.num_positions)
    checkpoints.write_model(models / "diffusion_models" / "tiny_flf2v.safetensors", two)
    checkpoints.write_image_encoder(models / "clip_vision" / TINY)
    checkpoints.write_qwen_vae(models / "vae" / "qwen.safetensors")
    checkpoints.write_qwen_text_encoder(models / "text_encoders" / "qwen.safetensors")
    painted_picture().save(base / "input" / "example.png")  # the name in our workflows
    write_mp4(base / "input" / "input.mp4", torch.rand(7, 48, 64, 3), 16)
    painted_picture().convert("RGB").crop((0, 0, 32, 32)).save(base / "input" / "square.png")

    lora = loras.low_rank(loras.official(good), loras.DIALECTS["kohya"])
    loras.write(models / "loras" / "style.safetensors", lora)

    bad = good.parent
    (bad / "truncated.safetensors").write_bytes(good.read_bytes()[:-1000])
    (bad / "a_vae.safetensors").write_bytes(vae.read_bytes())
    (models / "vae" / "an_encoder.safetensors").write_bytes(encoder.read_bytes())
    torch.save({"weight": Touch(base / "code_ran")}, bad / "code.pth")
    tensors = load_file(good)
    metadata = {"wanqwen": '{"num_heads": 2}'}
    save_file(
        {name: t for name, t in tensors.items() if name != "blocks.1.ffn.2.weight"},
        bad / "missing.safetensors",
        metadata,
    )
    save_file(tensors | {"blocks.1.surprise.weight": torch.zeros(3)}, bad / "extra.safetensors", metadata)
    save_file(
        {"latent_tensor": torch.full((1, 16, 2, 4, 4), torch.nan), "latent_format_version_0": torch.tensor([])},
        base / "input" / "nan.latent",
    )


def painted_picture() -> Image.Image:
    """A picture of 56 x 44 pixels, on no grid, with a mask painted into its alpha channel as the mask editor does."""
    pixels = torch.randint(256, (44, 56, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[..., 3] = 255
    pixels[12:28, 16:40, 3] = 0
    return Image.fromarray(pixels.numpy(), "RGBA")


class Touch:
    """Unpickled, it makes a file: the sign that a checkpoint ran code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)
