"""Dropdowns: what they list, what they refuse, and that a wrong file says so."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wanqwen.tests.gguf_files import write


@pytest.fixture
def types(nodes):
    from wanqwen.nodes import types

    return types


def test_dropdowns_list_what_can_be_read_and_the_miniature(types, models, tmp_path, monkeypatch):
    monkeypatch.setattr(types, "DEMO_FOLDER", tmp_path)
    (models / "vae" / "notes.txt").write_text("no model")
    assert types.list_files("vae") == ["qwen.safetensors", "tiny.safetensors"]
    (tmp_path / "wan_vae.safetensors").touch()
    assert types.list_files("vae") == ["qwen.safetensors", "tiny.safetensors", "demo/wan_vae.safetensors"]
    (tmp_path / "qwen_edit_dit.safetensors").touch()
    assert types.list_files("diffusion_models", "wan_")[-1] != "demo/qwen_edit_dit.safetensors"
    assert types.list_files("diffusion_models", "qwen_")[-1] == "demo/qwen_edit_dit.safetensors"
    assert types.find_file("vae", "demo/wan_vae.safetensors") == tmp_path / "wan_vae.safetensors"


def test_gguf_files_are_listed_though_comfyui_leaves_them_out(nodes, types, models):
    plain = sorted(load_file(models / "diffusion_models" / "tiny.safetensors").items())
    path = models / "diffusion_models" / "inner" / "tiny.gguf"
    path.parent.mkdir()
    write(path, dict(plain), {"wanqwen": '{"num_heads": 2}'})
    try:
        assert types.list_files("diffusion_models")[:2] == [
            str(Path("inner", "tiny.gguf")),
            "qwen_edit-2509.safetensors",
        ]
        assert types.find_file("diffusion_models", "inner/tiny.gguf") == path
        [handle] = nodes.LoadWanModel.execute("inner/tiny.gguf", "auto").values
        assert handle.checkpoint.path == path
    finally:
        path.unlink()
        path.parent.rmdir()


def test_a_missing_file_says_where_it_belongs(types, models):
    assert types.check_file("vae", None) is None
    problem = types.check_file("vae", "gone.safetensors")
    assert problem.startswith("gone.safetensors was not found") and str(models / "vae") in problem


def test_loaders_look_at_the_file_beforehand_and_at_fixed_lists_when_they_run(nodes):
    assert nodes.LoadWanModel.validate_inputs("tiny.safetensors") is nodes.LoadWanModel.validate_inputs(None) is True
    assert nodes.LoadWanImageEncoder.validate_inputs("tiny.safetensors") is True
    loaders = [found for name, found in vars(nodes).items() if name.startswith("Load") and found is not nodes.load]
    assert len(loaders) == 6
    for loader in loaders:
        assert "gone.safetensors was not found" in loader.validate_inputs("gone.safetensors")
    for loader, choices, message in (
        (nodes.LoadWanModel, ("fp8",), "precision is 'fp8': choose one of auto, bf16, fp16, fp32"),
        (nodes.LoadWanVAE, ("fp8",), "choose one of auto, bf16, fp16, fp32"),
        (nodes.LoadWanImageEncoder, ("fp8",), "choose one of auto, bf16"),
        (nodes.LoadWanTextEncoder, ("tpu", 0.0, "auto"), "choose one of auto, cpu, gpu"),
        (nodes.LoadQwenImageModel, ("auto", "fp16"), "choose one of auto, bf16, fp32"),
        (nodes.LoadQwenImageModel, ("base", "auto"), "choose one of auto, t2i, edit"),
        (nodes.LoadQwenImageTextEncoder, ("cpu", 0.0, "own"), "choose one of auto, hub"),
    ):
        with pytest.raises(ValueError, match=message):
            loader.execute("tiny.safetensors", *choices)


def test_other_nodes_look_at_their_fixed_lists_beforehand(nodes):
    assert "choose one of unipc" in nodes.Sampler.validate_inputs("heun", "cpu")
    assert "choose one of none, lightx2v-4" in nodes.Sampler.validate_inputs("euler", "cpu", "turbo")
    assert "choose one of auto, tiled" in nodes.VAEDecode.validate_inputs("on")
    assert "choose one of clip, pictures" in nodes.VAEEncode.validate_inputs("video")
    assert "choose one of published, pixel_aligned" in nodes.QwenImageEditEncode.validate_inputs("large")
    assert "choose one of 1:1 (1328x1328)" in nodes.EmptyQwenImageLatent.validate_inputs("2:1")


def test_a_replaced_file_is_loaded_again(nodes, models):
    folder = models / "diffusion_models"
    shutil.copy(folder / "tiny.safetensors", folder / "other.safetensors")
    before = nodes.LoadWanModel.fingerprint_inputs("other.safetensors", "auto")
    assert before == nodes.LoadWanModel.fingerprint_inputs("other.safetensors", "auto")
    (folder / "other.safetensors").write_bytes(b"replaced")
    assert before != nodes.LoadWanModel.fingerprint_inputs("other.safetensors", "auto")


# Loader -> its folder of models, and its settings beside the file.
LOADERS = {
    "LoadWanModel": ("diffusion_models", ("auto",)),
    "LoadWanVAE": ("vae", ("auto",)),
    "LoadWanTextEncoder": ("text_encoders", ("cpu", 0.0, "auto")),
    "LoadWanImageEncoder": ("clip_vision", ("auto",)),
    "LoadQwenImageModel": ("diffusion_models", ("auto", "auto")),
    "LoadQwenImageTextEncoder": ("text_encoders", ("cpu", 0.0, "auto")),
}


@pytest.mark.parametrize(
    ("node", "file", "expected"),
    [
        ("LoadWanModel", "vae/tiny.safetensors", "is a VAE.* Expected a diffusion model"),
        ("LoadWanVAE", "text_encoders/tiny.safetensors", "is a text encoder.* Expected a VAE"),
        ("LoadWanVAE", "text_encoders/qwen.safetensors", "is a text encoder.* Expected a VAE"),
        ("LoadWanTextEncoder", "diffusion_models/tiny.safetensors", "is a diffusion model.* Expected a text encoder"),
        ("LoadWanImageEncoder", "vae/tiny.safetensors", r"is a VAE.* Expected an image encoder \(Load Wan Image"),
        ("LoadWanVAE", "clip_vision/tiny.safetensors", r"is an image encoder \(Load Wan Image.* Expected a VAE"),
        ("LoadWanModel", "diffusion_models/qwen_edit.safetensors", "belongs to qwen-image .edit.*is for wan21"),
        ("LoadQwenImageModel", "diffusion_models/tiny.safetensors", "belongs to wan21 .custom.*is for qwen-image"),
        ("LoadQwenImageModel", "vae/qwen.safetensors", "is a VAE.* Expected a diffusion model"),
        ("LoadWanTextEncoder", "text_encoders/qwen.safetensors", "belongs to qwen-image.*is for wan21"),
        ("LoadQwenImageTextEncoder", "text_encoders/tiny.safetensors", "belongs to wan21.*is for qwen-image"),
    ],
)
def test_a_file_in_the_wrong_loader_says_what_it_is(nodes, models, node, file, expected):
    folder, settings = LOADERS[node]
    shutil.copy(models / file, models / folder / "wrong.safetensors")
    try:
        with pytest.raises(ValueError, match=expected) as caught:
            getattr(nodes, node).execute("wrong.safetensors", *settings)
    finally:
        (models / folder / "wrong.safetensors").unlink()
    assert "wrong.safetensors" in str(caught.value)


def test_precision_reaches_the_model_and_the_vae(nodes):
    [handle] = nodes.LoadWanModel.execute("tiny.safetensors", "fp16").values
    [codec] = nodes.LoadWanVAE.execute("tiny.safetensors", "bf16").values
    assert (handle.dtype, codec.dtype) == (torch.float16, torch.bfloat16)
    [codec] = nodes.LoadWanVAE.execute("tiny.safetensors", "auto").values
    assert codec.dtype == torch.float32
    [encoder] = nodes.LoadWanImageEncoder.execute("tiny.safetensors", "fp16").values
    assert encoder.dtype_on(torch.device("cpu")) == torch.float16
    [encoder] = nodes.LoadWanImageEncoder.execute("tiny.safetensors", "auto").values
    assert encoder.dtype_on(torch.device("cpu")) == torch.float32


def test_a_replaced_image_encoder_is_loaded_again(nodes, models):
    before = nodes.LoadWanImageEncoder.fingerprint_inputs("tiny.safetensors", "auto")
    other = models / "clip_vision" / "other.safetensors"
    other.write_bytes(b"another")
    assert before != nodes.LoadWanImageEncoder.fingerprint_inputs("other.safetensors", "auto")
    other.unlink()
    assert nodes.LoadWanImageEncoder.fingerprint_inputs(None, "auto") == ""


def test_the_miniature_image_encoder_is_listed_with_the_files(types, tmp_path, monkeypatch):
    monkeypatch.setattr(types, "DEMO_FOLDER", tmp_path)
    assert types.list_files("clip_vision", "wan_") == ["tiny.safetensors"]
    (tmp_path / "wan_image_encoder.safetensors").touch()
    assert types.list_files("clip_vision", "wan_") == ["tiny.safetensors", "demo/wan_image_encoder.safetensors"]
