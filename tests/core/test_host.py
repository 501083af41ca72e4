"""The seam to ComfyUI, against stand-ins for the few modules it looks at."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from wanqwen.core import host
from wanqwen.core.types import LatentFormat

RED_GREEN = LatentFormat(
    channels=2,
    spatial_factor=8,
    temporal_factor=4,
    mean=(0, 0),
    std=(1, 1),
    rgb=((1, 0, 0), (0, 1, 0)),
    comfy_name="Two",
)
CPU = torch.device("cpu")


class Bar:
    def __init__(self, total: int):
        self.total, self.calls = total, []

    def update_absolute(self, value: int, total: int, preview: object) -> None:
        self.calls.append((value, total, preview))


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put minimal modules where ComfyUI's would be; returns what they recorded and can be set to."""
    state = SimpleNamespace(asked=[], stopped=False, preview_method="auto", bars=[])

    def throw_exception_if_processing_interrupted() -> None:
        if state.stopped:
            raise InterruptedError

    def progress_bar(total: int) -> Bar:
        state.bars.append(Bar(total))
        return state.bars[-1]

    modules = {
        "model_management": {
            "get_torch_device": lambda: torch.device("cuda", 1),
            "get_free_memory": lambda where: 123,
            "free_memory": lambda nbytes, where, keep_loaded: state.asked.append((nbytes, where)),
            "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
            "soft_empty_cache": lambda: state.asked.append("empty"),
            "should_use_bf16": lambda where: False,
        },
        "utils": {"ProgressBar": progress_bar},
        "cli_args": {"args": state, "LatentPreviewMethod": SimpleNamespace(NoPreviews="none", TAESD="taesd")},
        "latent_formats": {"Two": lambda: "the format named Two"},
    }
    for name, content in modules.items():
        module = ModuleType(f"comfy.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, f"comfy.{name}", module)
    previews = ModuleType("latent_preview")
    previews.get_previewer = lambda where, known: SimpleNamespace(
        decode_latent_to_preview=lambda frame: (known, tuple(frame.shape))
    )
    monkeypatch.setitem(sys.modules, "latent_preview", previews)
    return state


def test_comfyui_answers_when_it_is_there(comfy: SimpleNamespace) -> None:
    assert host.device() == torch.device("cuda", 1)
    assert host.free_memory(CPU) == 123
    host.make_room(77, CPU)
    host.empty_cache()
    assert comfy.asked == [(77, CPU), "empty"]
    assert not host.prefers_bfloat16(torch.device("cuda"))
    host.check_interrupt()
    comfy.stopped = True
    with pytest.raises(InterruptedError):
        host.block_gate(CPU)()


def test_plain_answers_without_comfyui() -> None:
    assert host.free_memory(CPU) > 1 << 20
    host.make_room(1 << 60, CPU)
    host.check_interrupt()
    assert not host.prefers_bfloat16(CPU)


def test_progress_shows_the_middle_frame_in_its_own_colours(comfy: SimpleNamespace) -> None:
    pytest.importorskip("PIL")
    x0 = torch.zeros(1, 2, 3, 4, 5)
    x0[:, 0, 1], x0[:, 1, 1] = 1.0, -1.0
    host.progress(9, "sampling", RED_GREEN).update(2, 9, x0)
    [(done, total, (kind, image, _))] = comfy.bars[0].calls
    assert (done, total, kind, image.size) == (2, 9, "JPEG", (5, 4))
    assert image.getpixel((0, 0)) == (255, 0, 127)


def test_progress_asks_comfyui_for_a_space_without_colours(comfy: SimpleNamespace) -> None:
    plain = LatentFormat(channels=2, spatial_factor=8, temporal_factor=4, mean=(0, 0), std=(1, 1), comfy_name="Two")
    host.progress(9, "sampling", plain).update(1, 9, torch.zeros(2, 2, 3, 4, 5))
    assert comfy.bars[0].calls[0][2][1] == ("the format named Two", (1, 2, 1, 4, 5))
    unknown = LatentFormat(
        channels=2, spatial_factor=8, temporal_factor=4, mean=(0, 0), std=(1, 1), comfy_name="Nobody"
    )
    host.progress(9, "sampling", unknown).update(1, 9, torch.zeros(1, 2, 3, 4, 5))
    assert comfy.bars[1].calls == [(1, 9, None)]


def test_a_tiny_decoder_shows_more_where_its_file_is_and_the_user_wants_it(
    comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    space = replace(RED_GREEN, rgb=(), tiny_decoders=("best", "good"))
    opened, files = [], ["other.safetensors", "good_1.safetensors"]
    folders = SimpleNamespace(get_filename_list=lambda kind: files, get_full_path=lambda kind, name: f"/{kind}/{name}")
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    show = SimpleNamespace(show=lambda latents: torch.full((8, 6, 3), float(latents[0, 0, -1, 0, 0])))
    monkeypatch.setattr(host, "open_tiny_decoder", lambda path, where, channels: opened.append(str(path)) or show)
    x0 = torch.zeros(1, 2, 3, 4, 5)
    x0[:, :, 1] = 1.0
    comfy.preview_method = "taesd"
    host.progress(9, "sampling", space).update(1, 9, x0)
    [(_, _, (_, image, _))] = comfy.bars[0].calls
    assert (
        image.size == (6, 8)
        and image.getpixel((0, 0)) == (255, 255, 255)
        and opened == ["/vae_approx/good_1.safetensors"]
    )
    files.insert(0, "best.safetensors")
    host.progress(9, "sampling", space)
    assert opened[1:] == ["/vae_approx/best.safetensors"]
    comfy.preview_method = "auto"
    host.progress(9, "sampling", space)
    assert len(opened) == 2


def test_a_card_without_memory_for_previews_goes_on_without_them(comfy: SimpleNamespace) -> None:
    told = host.progress(9, "sampling", RED_GREEN)

    def preview(latents: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    told.preview = preview
    for done in (1, 2):
        told.update(done, 9, torch.zeros(1, 2, 1, 4, 5))
    assert comfy.bars[0].calls == [(1, 9, None), (2, 9, None)]


def test_no_preview_where_the_user_wants_none(comfy: SimpleNamespace) -> None:
    comfy.preview_method = "none"
    host.progress(9, "sampling", RED_GREEN).update(1, 9, torch.zeros(1, 2, 1, 4, 5))
    assert comfy.bars[0].calls == [(1, 9, None)]


def test_the_log_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 104.0])
    monkeypatch.setattr(host.time, "monotonic", lambda: next(now))
    lines: list[str] = []
    host.LogProgress("sampling", lines.append).update(2, 10, torch.zeros(1))
    assert lines == ["sampling 2/10, 4.0 s gone, 16.0 s left"]


def test_a_container_s_limit_counts_and_its_caches_do_not(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    alone = host.total_ram()
    tmp_path.joinpath("memory.max").write_text("max\n")
    tmp_path.joinpath("memory.current").write_text("700\n")
    tmp_path.joinpath("memory.stat").write_text("anon 500\nfile 200\n")
    assert host.total_ram() == alone
    tmp_path.joinpath("memory.max").write_text("1000\n")
    assert host.total_ram() == 1000 and host.available_ram() == 500


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_a_full_card_is_known_by_whatever_is_said_of_it(said: str) -> None:
    assert host.is_out_of_memory(RuntimeError(said))


def test_other_errors_are_no_full_card() -> None:
    assert host.is_out_of_memory(torch.OutOfMemoryError())
    assert not host.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_float32_is_whole_only_while_it_is_asked_for() -> None:
    inside = []
    with pytest.raises(ValueError, match="on the way"), host.whole_float32(torch.device("cuda")):
        inside.append(torch.backends.cudnn.allow_tf32)  # others may look meanwhile
        raise ValueError("on the way")
    assert inside == [False] and torch.backends.cudnn.allow_tf32
    with host.whole_float32(CPU):
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has no such setting")
def test_float32_is_whole_where_the_newer_setting_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = conv.fp32_precision, rnn.fp32_precision
    try:
        conv.fp32_precision, rnn.fp32_precision = "tf32", "ieee"
        with host.whole_float32(torch.device("cuda")):
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision, rnn.fp32_precision = before


def test_drivers_spill_on_windows_and_in_its_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.sys, "platform", "linux")
    for release, expected in (("6.1.0-18-amd64", False), ("5.15.153.1-microsoft-standard-WSL2", True)):
        monkeypatch.setattr(host.platform, "release", lambda release=release: release)
        assert host.driver_spills() is expected
    monkeypatch.setattr(host.sys, "platform", "win32")
    assert host.driver_spills()
