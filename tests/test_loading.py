"""Files in the wrong place: one clear error each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from wanqwen.loading import load_model, load_text_encoder, load_vae

from .nodes import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("files"))


LOADERS = {"model": load_model, "vae": load_vae, "text": load_text_encoder}


@pytest.mark.parametrize("file", LOADERS)
@pytest.mark.parametrize("loader", LOADERS)
def test_each_loader_takes_its_own_file_only(folder: Path, file: str, loader: str) -> None:
    path = folder / f"{file}.safetensors"
    if file == loader:
        LOADERS[loader](path)
        return
    with pytest.raises(ValueError, match=rf"{file}.safetensors is a .*Expected a .*Load Wan"):
        LOADERS[loader](path)


def test_a_model_that_takes_an_image_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["patch_embedding.weight"]
    tensors["patch_embedding.weight"] = torch.cat((weight, weight, weight[:, :4]), dim=1)
    for path in ("k_img", "v_img"):
        for i in range(tiny.MODEL.num_layers):
            tensors[f"blocks.{i}.cross_attn.{path}.weight"] = torch.zeros(tiny.MODEL.dim, tiny.MODEL.dim)
            tensors[f"blocks.{i}.cross_attn.{path}.bias"] = torch.zeros(tiny.MODEL.dim)
            tensors[f"blocks.{i}.cross_attn.norm_k_img.weight"] = torch.ones(tiny.MODEL.dim)
    for name, shape in {"0": (32,), "1": (32, 32), "3": (tiny.MODEL.dim, 32), "4": (tiny.MODEL.dim,)}.items():
        tensors[f"img_emb.proj.{name}.weight"] = torch.zeros(shape)
        tensors[f"img_emb.proj.{name}.bias"] = torch.zeros(shape[0])
    save_file(tensors, tmp_path / "i2v.safetensors", {"wanqwen": json.dumps({"num_heads": tiny.MODEL.num_heads})})
    with pytest.raises(ValueError, match=r"i2v.safetensors is Wan 2.1 i2v.*Choose a T2V file"):
        load_model(tmp_path / "i2v.safetensors")


def test_a_file_with_a_missing_key_is_refused_before_it_is_read(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "vae.safetensors")
    del tensors["decoder.middle.1.proj.bias"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut.safetensors .* lacks 1 .*decoder.middle.1.proj.bias"):
        load_vae(tmp_path / "cut.safetensors")


def test_a_file_with_an_extra_key_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "vae.safetensors")
    save_file(tensors | {"decoder.surprise.weight": torch.zeros(3)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"holds, beside it, 1 tensors \(decoder.surprise.weight\)"):
        load_vae(tmp_path / "more.safetensors")
