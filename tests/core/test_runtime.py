"""Handle and request to latents, over a tiny random model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wanqwen.core import host, runtime
from wanqwen.core.sampling.sample import SampleError
from wanqwen.core.types import Conditioning, Control, ModelHandle, SampleRequest
from wanqwen.loading import load_model
from wanqwen.wan.transformer import WanTransformer

from ..nodes import tiny


class Steps:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def update(self, done: int, total: int, x0: Tensor) -> None:
        assert x0.isfinite().all()
        self.seen.append((done, total))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def handle(path: Path) -> ModelHandle:
    return load_model(path)


@pytest.fixture
def request_() -> SampleRequest:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (Conditioning(text=torch.randn(1, n, tiny.TEXT.dim, generator=generator)) for n in (5, 3))
    return SampleRequest(latent=torch.zeros(1, 16, 2, 4, 6), positive=positive, negative=negative, steps=4, seed=7)


def test_a_run_gives_raw_latents_and_reports_each_step(handle: ModelHandle, request_: SampleRequest) -> None:
    steps = Steps()
    out = runtime.generate(handle, request_, steps)
    assert out.shape == request_.latent.shape and out.dtype == torch.float32 and out.isfinite().all()
    assert steps.seen == [(i, 4) for i in (1, 2, 3, 4)]
    assert torch.equal(out, runtime.generate(handle, request_, steps))
    assert not torch.equal(out, runtime.generate(handle, replace(request_, seed=8), steps))


def test_weights_are_assembled_once_for_all_copies_of_a_handle(
    handle: ModelHandle, request_: SampleRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original: Callable = runtime.prepare
    monkeypatch.setattr(runtime, "prepare", lambda *a, **k: calls.append(1) or original(*a, **k))
    for copy in (handle, handle, replace(handle)):
        runtime.generate(copy, request_, Steps())
    assert len(calls) == 1
    runtime.generate(replace(handle, dtype=torch.bfloat16), request_, Steps())
    assert len(calls) == 2


def test_equal_prompts_share_their_keys_and_values(
    handle: ModelHandle, request_: SampleRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = []
    original = WanTransformer.prompt
    monkeypatch.setattr(WanTransformer, "prompt", lambda self, *a, **k: prompts.append(1) or original(self, *a, **k))
    runtime.generate(handle, request_, Steps())
    assert len(prompts) == 2
    runtime.generate(handle, replace(request_, negative=replace(request_.positive)), Steps())
    assert len(prompts) == 3


@pytest.fixture
def led(tmp_path: Path, request_: SampleRequest) -> tuple[ModelHandle, SampleRequest]:
    """A VACE model, and a request for two frames with two reference frames before them."""
    context = torch.randn(1, tiny.VACE.vace_dim, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    positive = replace(request_.positive, controls=(Control(context=context, lead=2),))
    asked = replace(request_, positive=positive, latent=torch.zeros(1, 16, 4, 4, 6), solver="euler")
    return load_model(tiny.write_model(tmp_path / "vace.safetensors", tiny.VACE)), asked


def test_finished_latents_have_no_lead_and_unfinished_ones_keep_it(led: tuple[ModelHandle, SampleRequest]) -> None:
    handle, asked = led
    whole = runtime.generate(handle, asked, Steps())
    assert whole.shape == (1, 16, 2, 4, 6)
    first = runtime.generate(handle, replace(asked, end_step=2), Steps())
    assert first.shape == (1, 16, 4, 4, 6)
    second = runtime.generate(handle, replace(asked, latent=first, start_step=2, add_noise=False), Steps())
    assert second.shape == whole.shape and (second - whole).abs().max() < 1e-5 * whole.abs().max()
    # Of a latent without the lead the noise is the same, as it is drawn for the whole.
    alone = runtime.generate(handle, replace(asked, latent=asked.latent[:, :, 2:]), Steps())
    assert torch.equal(alone, whole)


def test_a_clip_is_changed_in_part_with_references_beside_it(led: tuple[ModelHandle, SampleRequest]) -> None:
    handle, asked = led
    clip, mask = torch.randn(1, 16, 2, 4, 6), torch.zeros(1, 1, 1, 4, 6)
    mask[..., 3:] = 1
    out = runtime.generate(handle, replace(asked, latent=clip, mask=mask), Steps())
    assert out.shape == clip.shape and torch.allclose(out[..., :3], clip[..., :3], atol=1e-5)
    assert (out[..., 3:] - clip[..., 3:]).abs().max() > 0.1
    near = runtime.generate(handle, replace(asked, latent=clip, denoise=0.1, shift=1.0, steps=8), Steps())
    far = runtime.generate(handle, replace(asked, latent=clip, denoise=0.9, shift=1.0, steps=8), Steps())
    assert near.shape == clip.shape and (near - clip).abs().mean() < (far - clip).abs().mean() / 2


def test_a_model_with_controls_is_not_run_without(led: tuple[ModelHandle, SampleRequest]) -> None:
    handle, asked = led
    with pytest.raises(ValueError, match=r"^vace\.safetensors: Wan 2\.1 vace-custom takes at least one control"):
        runtime.generate(handle, replace(asked, positive=replace(asked.positive, controls=())))


def test_two_halves_equal_the_whole(handle: ModelHandle, request_: SampleRequest) -> None:
    whole = replace(request_, solver="euler")
    first = runtime.generate(handle, replace(whole, end_step=2), Steps())
    second = replace(whole, latent=first, start_step=2, add_noise=False)
    out, expected = runtime.generate(handle, second, Steps()), runtime.generate(handle, whole, Steps())
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


def test_denoise_keeps_what_it_does_not_redo(handle: ModelHandle, request_: SampleRequest) -> None:
    clip = torch.randn(1, 16, 2, 4, 6)
    distances = []
    for denoise in (0.1, 0.9):
        out = runtime.generate(handle, replace(request_, latent=clip, steps=8, denoise=denoise, shift=1.0), Steps())
        distances.append((out - clip).abs().mean())
    assert distances[0] < distances[1] / 2


def test_interruption_ends_the_run_and_the_next_one_works(
    handle: ModelHandle, request_: SampleRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def interrupt() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise InterruptedError

    monkeypatch.setattr(host, "check_interrupt", interrupt)
    with pytest.raises(InterruptedError):
        runtime.generate(handle, request_, Steps())
    assert len(asked) == 3, "went on after the interruption"
    monkeypatch.undo()
    assert runtime.generate(handle, request_, Steps()).isfinite().all()


def test_numbers_that_break_down_keep_the_last_good_latent(
    handle: ModelHandle, request_: SampleRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = WanTransformer.velocities, []

    def velocities(self: WanTransformer, *arguments: object) -> list[Tensor]:
        calls.append(1)
        return [v * (float("nan") if len(calls) > 4 else 1) for v in original(self, *arguments)]

    monkeypatch.setattr(WanTransformer, "velocities", velocities)
    with pytest.raises(SampleError, match="step 3 of 4") as caught:
        runtime.generate(handle, request_, Steps())
    assert caught.value.steps_done == 2 and caught.value.latent.isfinite().all()
    monkeypatch.undo()
    assert torch.equal(caught.value.latent, runtime.generate(handle, replace(request_, end_step=2), Steps()))


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (torch.zeros(1, 4, 1, 4, 6), "takes .batch, 16"),
        (torch.zeros(1, 16, 1, 5, 6), "multiples of 16"),
        (torch.full((1, 16, 1, 4, 6), float("nan")), "NaN"),
    ],
)
def test_latents_that_cannot_run_are_refused_before_loading(
    handle: ModelHandle, request_: SampleRequest, monkeypatch: pytest.MonkeyPatch, latent: Tensor, message: str
) -> None:
    monkeypatch.setattr(runtime, "prepare", None)
    with pytest.raises(ValueError, match=message):
        runtime.generate(handle, replace(request_, latent=latent), Steps())


def test_text_of_another_encoder_is_refused(handle: ModelHandle, request_: SampleRequest) -> None:
    clip_l = Conditioning(text=torch.zeros(1, 77, 768))
    with pytest.raises(ValueError, match=r"tiny.safetensors: .* positive input has text rows of width 768, where 32"):
        runtime.generate(handle, replace(request_, positive=clip_l), Steps())
