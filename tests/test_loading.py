"""Files in the wrong place: one clear error each."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wanqwen.loading import load_image_encoder, load_model, load_text_encoder, load_vae

from .nodes import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("files"))


LOADERS = {"model": load_model, "vae": load_vae, "text": load_text_encoder}
FAMILIES = {"": "wan21", "qwen_": "qwen-image"}  # what precedes the names of a family's files


@pytest.mark.parametrize("of", FAMILIES)
@pytest.mark.parametrize("file", LOADERS)
@pytest.mark.parametrize("loader", LOADERS)
def test_each_loader_takes_its_own_file_only(folder: Path, loader: str, file: str, of: str) -> None:
    path = folder / f"{of}{file}.safetensors"
    if file == loader:
        LOADERS[loader](path)
        return
    with pytest.raises(ValueError, match=rf"{of}{file}.safetensors is a .*Expected a .*Load Wan"):
        LOADERS[loader](path)


@pytest.mark.parametrize("file", ["model", "vae", "text", "qwen_model", "qwen_text"])
def test_the_image_encoder_s_loader_takes_its_own_file_only(folder: Path, file: str) -> None:
    path = folder / "image.safetensors"
    assert load_image_encoder(path).identity.role == "image_encoder"
    with pytest.raises(ValueError, match=rf"{file}.safetensors is a .*Expected an image encoder .Load Wan Image Enc"):
        load_image_encoder(folder / f"{file}.safetensors")
    with pytest.raises(ValueError, match=r"image.safetensors is an image encoder .*Expected a VAE"):
        load_vae(path)
    with pytest.raises(ValueError, match="image encoder device is 'tpu': choose auto, cpu or gpu"):
        load_image_encoder(path, device="tpu")


@pytest.mark.parametrize("of", FAMILIES)
def test_a_file_of_the_other_family_is_refused_by_name(folder: Path, of: str) -> None:
    own, [other] = FAMILIES[of], [name for name in FAMILIES.values() if name != FAMILIES[of]]
    assert load_model(folder / f"{of}model.safetensors", family=own).identity.family == own
    assert (
        load_text_encoder(folder / f"{of}text.safetensors", family=own).checkpoint.path.name == f"{of}text.safetensors"
    )
    for file, load in (
        ("model", lambda path: load_model(path, family=other)),
        ("text", lambda path: load_text_encoder(path, family=other)),
    ):
        with pytest.raises(ValueError, match=rf"{of}{file}.safetensors belongs to {own} .*this loader is for {other}"):
            load(folder / f"{of}{file}.safetensors")


@pytest.mark.parametrize("of", FAMILIES)
def test_a_text_encoder_in_a_format_that_can_t_be_read_is_refused_when_opened(
    folder: Path, tmp_path: Path, of: str
) -> None:
    path = folder / f"{of}text.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = next(name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dim() == 2)
    blocks = {name.removesuffix("weight") + "weight_scale": torch.ones(tensors[name].shape[0], 2)}
    save_file(tensors | blocks, tmp_path / "blocks.safetensors", metadata)
    with pytest.raises(ValueError, match=r"blocks\.safetensors .*stored in a way that can't be read: .*weight_scale"):
        load_text_encoder(tmp_path / "blocks.safetensors")


def test_qwen_image_is_not_run_in_float16(folder: Path) -> None:
    with pytest.raises(ValueError, match="precision is float16, in which qwen-image models overflow: choose bfloat16"):
        load_model(folder / "qwen_model.safetensors", torch.float16)
    assert load_model(folder / "model.safetensors", torch.float16).dtype == torch.float16


def test_a_user_can_say_which_variant_a_file_holds(folder: Path) -> None:
    path = folder / "qwen_model.safetensors"
    assert load_model(path).identity.variant == "t2i"
    chosen = load_model(path, variant="edit-2511").identity
    assert chosen.variant == "edit-2511" and chosen.config.zero_cond_t
    with pytest.raises(ValueError, match=r"qwen_model.safetensors: .*'layered' does not fit this file"):
        load_model(path, variant="layered")


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


def test_a_missing_file_that_is_published_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exist: .* `python -m wanqwen download wan_2.1_vae.safetensors --to DIR`"):
        load_vae(tmp_path / "wan_2.1_vae.safetensors")
    with pytest.raises(ValueError, match=r"mine.safetensors does not exist: check the path$"):
        load_vae(tmp_path / "mine.safetensors")


def test_the_weights_that_a_vae_hands_out_may_be_written_to(folder: Path) -> None:
    """The pages of a file may not: the system would end the process."""
    state = load_vae(folder / "vae.safetensors").get_sd()
    assert all(not tensor.zero_().any() for tensor in state.values()) and state
