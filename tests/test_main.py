"""The commands, as a terminal would run them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wanqwen.__main__ import main

from . import loras
from .nodes import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("files"))


def generate(folder: Path, out: Path, *more: str) -> int:
    files = ("--model", folder / "model.safetensors", "--vae", folder / "vae.safetensors")
    text = ("--text-encoder", folder / "text.safetensors", "--prompt", "a red star")
    return main(["generate", *map(str, (*files, *text, "--out", out, "--size", "32x32x5", "--steps", 2, *more))])


def test_generate_writes_a_video_of_the_size_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    assert generate(folder, tmp_path / "clip.mp4", "--size", "64x32x5", "--fps", "8") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "clip.mp4")
    assert "2/2" in printed.err and "left" in printed.err
    with av.open(str(tmp_path / "clip.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert (len(frames), frames[0].shape, video.streams.video[0].average_rate) == (5, (32, 64, 3), 8)


def test_generate_writes_a_still_as_png(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    out = tmp_path / "new folder" / "still.mp4"
    assert generate(folder, out, "--size", "32x32x1", "--guidance", "3", "1", "--solver", "euler") == 0
    assert capsys.readouterr().out.strip() == str(out.with_suffix(".png"))
    assert out.with_suffix(".png").stat().st_size > 0 and not out.exists()


def test_a_missing_package_is_said_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert generate(folder, tmp_path / "clip.mp4", "--size", "64x32x5") == 2
    assert "pip install av" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--size", "100x64x80"), "try 96x64x81"),
        (("--size", "wide"), "expected WIDTHxHEIGHTxFRAMES"),
        (("--guidance", "5", "4", "3"), "guidance"),
        (("--model", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_generate_says_in_one_line_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert generate(folder, tmp_path / "clip.mp4", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("wanqwen generate:") and message in error
    assert not (tmp_path / "clip.mp4").exists()


def test_inspect_reads_the_header_only(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safetensors.safe_open", None)
    monkeypatch.setattr(torch, "load", None)
    assert main(["inspect", "--json", str(folder / "model.safetensors")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["role"], facts["missing"], facts["unexpected"]) == ("diffusion_model", [], [])
    assert main(["inspect", str(folder / "vae.safetensors")]) == 0
    assert "vae" in capsys.readouterr().out


def test_inspect_says_what_a_lora_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = "lora_unet_blocks_39_ffn_2"
    tensors = {f"{layer}.lora_down.weight": (8, 13824), f"{layer}.lora_up.weight": (5120, 8), f"{layer}.alpha": ()}
    path = tmp_path / "wan_lightx2v.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    assert main(["inspect", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["role"], facts["ranks"], facts["targets"]) == ("wan21", "lora", [8], 1)
    assert facts["dialect"] == "official names with underscores, prefix lora_unet_: lora_down, lora_up, alpha"
    assert facts["fits"] == {"t2v-14B": 3, "i2v-14B": 3, "flf2v-14B": 3} and facts["presets"] == ["lightx2v-4"]
    assert main(["inspect", str(path)]) == 0
    assert "t2v-14B" in capsys.readouterr().out


def test_generate_takes_loras_with_their_strengths(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("PIL")
    written = loras.low_rank(loras.official(folder / "model.safetensors"), loras.DIALECTS["official"])
    path = loras.write(tmp_path / "a:b" / "lora.safetensors", written)
    size, pictures = ("--size", "32x32x1"), []
    for more in ((), ("--lora", f"{path}:0"), ("--lora", path), ("--lora", path, "--lora", f"{path}:-1.0")):
        assert generate(folder, tmp_path / "still.png", *size, *map(str, more)) == 0
        pictures.append((tmp_path / "still.png").read_bytes())
    assert "lora.safetensors: " in capsys.readouterr().err
    assert pictures[0] == pictures[1] and pictures[0] != pictures[2]
    assert generate(folder, tmp_path / "still.png", *size, "--lora", f"{path}:x") == 2
    assert "lora.safetensors:x" in capsys.readouterr().err


def test_inspect_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    assert main(["inspect", str(tmp_path / "text.safetensors")]) == 2
    assert "text.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "MODEL"), "--text-encoder is missing, --vae is missing: qwen_model.safetensors needs"),
        (("--image", "PNG", "--edit-size", "pixel_aligned", "--size", "64x64"), "--size and --edit-size pixel_aligned"),
        (("--image", "PNG", "--edit-size", "custom"), "--edit-size custom needs a size"),
        (("--image", "PNG"), "Qwen-Image, which makes pictures from text alone"),
        (("--image", "TXT"), "is no image that Pillow can read"),
        (("--preset", "lightning-4", "--variant", "t2i", "--size", "64x64x5"), "try 64x64x1"),
    ],
)
def test_qwen_requests_that_can_t_be_met(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert qwen(folder, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_images_keep_their_alpha_for_whoever_must_say_that_it_is_dropped(tmp_path: Path) -> None:
    from PIL import Image
    from wanqwen.media import read_image

    for mode, channels in (("RGBA", 4), ("LA", 4), ("RGB", 3), ("L", 3), ("P", 3)):
        Image.new(mode, (6, 4)).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png").shape == (4, 6, channels)


def test_generate_writes_a_picture_of_qwen_image(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    assert qwen(folder, tmp_path, "--size", "64x32", "--preset", "lightning-4") == 0
    assert Image.open(tmp_path / "out.png").size == (64, 32)


def qwen(folder: Path, tmp_path: Path, *more: str) -> int:
    """Run `generate` with the tiny Qwen-Image; PNG and TXT stand for a picture and for another file, MODEL for none."""
    pytest.importorskip("PIL").Image.new("RGB", (40, 40)).save(tmp_path / "source.png")
    (tmp_path / "source.txt").write_text("no picture")
    words = {"PNG": tmp_path / "source.png", "TXT": tmp_path / "source.txt", "MODEL": folder / "qwen_model.safetensors"}
    files = ("--model", folder / "qwen_model.safetensors")
    if "MODEL" not in more:
        files += ("--vae", folder / "qwen_vae.safetensors", "--text-encoder", folder / "qwen_text.safetensors")
    rest = [str(words.get(word, word)) for word in more]
    return main(["generate", *map(str, files), *rest, "--prompt", "a card", "--out", str(tmp_path / "out.png")])
