"""Dropdowns: what they list, what they refuse, and that a wrong file says so."""

import shutil

import pytest
import torch


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


def test_a_missing_file_says_where_it_belongs(types, models):
    assert types.check_file("vae", None) is None
    problem = types.check_file("vae", "gone.safetensors")
    assert problem.startswith("gone.safetensors was not found") and str(models / "vae") in problem


def test_validation_covers_every_fixed_list(nodes):
    assert nodes.LoadWanModel.validate_inputs("tiny.safetensors", "bf16") is True
    assert nodes.LoadWanModel.validate_inputs(None, None) is True
    assert "choose one of auto, bf16, fp16, fp32" in nodes.LoadWanModel.validate_inputs("tiny.safetensors", "fp8")
    assert "was not found" in nodes.LoadWanVAE.validate_inputs("gone.safetensors", "auto")
    assert "choose one of auto, bf16" in nodes.LoadWanImageEncoder.validate_inputs("tiny.safetensors", "fp8")
    assert "was not found" in nodes.LoadWanImageEncoder.validate_inputs("gone.safetensors", "auto")
    assert nodes.LoadWanImageEncoder.validate_inputs("tiny.safetensors", "auto") is True
    assert "choose one of auto, cpu, gpu" in nodes.LoadWanTextEncoder.validate_inputs("tiny.safetensors", "tpu", "auto")
    assert "choose one of unipc" in nodes.Sampler.validate_inputs("heun", "cpu")
    assert "choose one of none, lightning-4" in nodes.Sampler.validate_inputs("euler", "cpu", "turbo")
    assert "choose one of auto, tiled" in nodes.VAEDecode.validate_inputs("on")
    assert "choose one of clip, pictures" in nodes.VAEEncode.validate_inputs("video")
    assert "choose one of auto, bf16, fp32" in nodes.LoadQwenImageModel.validate_inputs(
        "tiny.safetensors", "auto", "fp16"
    )
    assert "choose one of auto, t2i, edit" in nodes.LoadQwenImageModel.validate_inputs(
        "tiny.safetensors", "base", "auto"
    )
    assert "choose one of auto, hub" in nodes.LoadQwenImageTextEncoder.validate_inputs("tiny.safetensors", "cpu", "own")
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
