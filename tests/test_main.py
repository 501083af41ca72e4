"""The commands, as a terminal would run them."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wanqwen.__main__ import main
from wanqwen.core import runtime
from wanqwen.media import write_mp4

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


@pytest.fixture(scope="module")
def pictures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of an I2V, an FLF2V and a VACE model, pictures and a video."""
    image = pytest.importorskip("PIL").Image
    home = tmp_path_factory.mktemp("pictures")
    i2v = replace(tiny.MODEL, in_dim=36, image_dim=tiny.IMAGE.dim)
    tiny.write_model(home / "i2v.safetensors", i2v)
    tiny.write_model(home / "vace.safetensors", tiny.VACE)
    tiny.write_model(home / "flf2v.safetensors", replace(i2v, image_positions=2 * tiny.IMAGE.num_positions))
    image.new("RGB", (60, 40), "red").save(home / "red.png")
    image.new("RGBA", (32, 32), "blue").save(home / "blue.png")
    (home / "text.mp4").write_text("no video")
    pytest.importorskip("av")
    write_mp4(home / "video.mp4", torch.rand(7, 40, 60, 3), 16)
    return home


def frames_of(path: Path) -> tuple[int, ...]:
    from wanqwen.media import read_video

    return tuple(read_video(path).shape)


def from_pictures(folder: Path, pictures: Path, out: Path, line: str) -> int:
    """Run `generate` with the words of a line, names of files standing for their paths."""
    words = [str(pictures / word) if "." in word and (pictures / word).exists() else word for word in line.split()]
    return generate(folder, out, *("--image-encoder", str(folder / "image.safetensors")), *words)


@pytest.mark.parametrize(
    ("line", "shape"),
    [
        ("--model i2v.safetensors --image red.png", (5, 32, 32, 3)),
        ("--model i2v.safetensors --image red.png --last-image blue.png", (5, 32, 32, 3)),
        ("--model flf2v.safetensors --image red.png --last-image blue.png --fit official", (5, 32, 32, 3)),
        ("--model flf2v.safetensors --last-image blue.png --size 48x32x1", (1, 32, 48, 3)),
        ("--video video.mp4 --denoise 0.5", (5, 32, 32, 3)),
        ("--model i2v.safetensors --image red.png --size 48x32", (81, 32, 48, 3)),
        ("--video video.mp4 --size 48x32", (5, 32, 48, 3)),
        ("--video red.png", (1, 32, 32, 3)),
    ],
)
def test_generate_starts_from_pictures(folder: Path, pictures: Path, tmp_path: Path, line: str, shape: tuple) -> None:
    assert from_pictures(folder, pictures, tmp_path / "out.mp4", line) == 0
    [made] = tmp_path.iterdir()
    assert frames_of(made) == shape


def test_the_pictures_reach_both_prompts_and_the_video_the_latent(
    folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    generate_for_real = runtime.generate
    monkeypatch.setattr(runtime, "generate", lambda *a: requests.append(a[1]) or generate_for_real(*a))
    for line in ("--image red.png", "--image blue.png"):
        assert from_pictures(folder, pictures, tmp_path / "out.mp4", f"--model i2v.safetensors {line}") == 0
    red, blue = requests
    assert not red.latent.any() and red.denoise == 1
    for part in ("extra", "image"):
        assert torch.equal(getattr(red.positive, part), getattr(red.negative, part))
        assert not torch.equal(getattr(red.positive, part), getattr(blue.positive, part))
    assert from_pictures(folder, pictures, tmp_path / "out.mp4", "--video video.mp4 --denoise 0.3") == 0
    assert requests[2].latent.any() and requests[2].denoise == 0.3 and requests[2].positive.extra is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--image red.png", "which takes no --image: choose an I2V file"),
        ("--model i2v.safetensors", "which starts from a picture: give --image"),
        ("--model i2v.safetensors --image red.png --image blue.png", "--image is given 2 times"),
        ("--model i2v.safetensors --image red.png --video video.mp4", "exclude each other"),
        ("--denoise 0.5", "give --video too"),
        ("--video text.mp4", "is no video that PyAV can read"),
        ("--video video.mp4 --denoise 2", "denoise"),
        ("--video video.mp4 --denoise 0", "denoise is 0.0: it must be above 0"),
        ("--model vace.safetensors", "use the node Wan VACE in ComfyUI, or a T2V file"),
    ],
)
def test_pictures_that_can_t_be_used_are_said_in_one_line(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    assert from_pictures(folder, pictures, tmp_path / "out.mp4", line) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_missing_image_encoder_is_said(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--model", str(pictures / "i2v.safetensors"), "--image", str(pictures / "red.png"))
    assert generate(folder, tmp_path / "clip.mp4", *files) == 2
    assert "--image-encoder is missing: i2v.safetensors needs CLIP" in capsys.readouterr().err


def test_a_video_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from wanqwen.media import read_video

    levels = torch.linspace(0.1, 0.9, 6)[:, None, None, None].expand(6, 32, 48, 3)
    write_mp4(tmp_path / "levels.mp4", levels, 16)
    assert torch.allclose(read_video(tmp_path / "levels.mp4"), levels, atol=0.02)
    assert torch.equal(read_video(tmp_path / "levels.mp4", 4), read_video(tmp_path / "levels.mp4")[:4])


def test_plain_pytorch_can_be_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    models, generate_for_real = [], runtime.generate
    monkeypatch.setattr(runtime, "generate", lambda *a: models.append(a[0]) or generate_for_real(*a))
    for more in ((), ("--kernels", "exact")):
        assert generate(folder, tmp_path / "still.png", "--size", "32x32x1", *more) == 0
    assert [model.fast.kernels for model in models] == ["auto", "exact"]


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


def test_an_output_that_lacks_the_letters_of_a_name_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = tiny.write_vae(tmp_path / "猫.safetensors"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True))
    assert main(["inspect", str(path)]) == 0 and rb"\u732b.safetensors" in written.getvalue()
    written.seek(0)
    written.truncate()
    assert main(["inspect", "--json", str(path)]) == 0
    assert json.loads(written.getvalue())["path"] == str(path)


def test_inspect_says_what_a_lora_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = "lora_unet_blocks_39_ffn_2"
    tensors = {f"{layer}.lora_down.weight": (8, 13824), f"{layer}.lora_up.weight": (5120, 8), f"{layer}.alpha": ()}
    path = tmp_path / "wan_lightx2v.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    assert main(["inspect", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["role"], facts["ranks"], facts["targets"]) == ("wan21", "lora", [8], 1)
    assert facts["dialect"] == "official names with underscores, prefix lora_unet_: lora_down, lora_up, alpha"
    assert facts["fits"] == {"t2v-14B": 3, "i2v-14B": 3, "flf2v-14B": 3, "vace-14B": 3} and facts["presets"] == [
        "lightx2v-4"
    ]
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
