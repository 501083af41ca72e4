"""Our nodes, imported with a stand-in for ComfyUI, and tiny checkpoints in its model folders."""

import importlib
import sys
from pathlib import Path

import pytest

from . import comfy_double, tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of models: one tiny file of each kind and family."""
    root = tmp_path_factory.mktemp("models")
    tiny.write_model(root / "diffusion_models" / "tiny.safetensors")
    tiny.write_vae(root / "vae" / "tiny.safetensors")
    tiny.write_text_encoder(root / "text_encoders" / "tiny.safetensors")
    tiny.write_image_encoder(root / "clip_vision" / "tiny.safetensors")
    for variant in ("t2i", "edit", "edit-2509", "edit-2511"):
        tiny.write_qwen_model(root / "diffusion_models" / f"qwen_{variant}.safetensors", variant)
    tiny.write_qwen_vae(root / "vae" / "qwen.safetensors")
    tiny.write_qwen_text_encoder(root / "text_encoders" / "qwen.safetensors")
    return root


@pytest.fixture
def nodes(models: Path, monkeypatch: pytest.MonkeyPatch):
    """The package `wanqwen.nodes`, fresh."""
    for name, module in comfy_double.modules(models).items():
        monkeypatch.setitem(sys.modules, name, module)
    comfy_double.forget_nodes()
    yield importlib.import_module("wanqwen.nodes")
    comfy_double.forget_nodes()
