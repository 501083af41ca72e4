"""The codec's promises: shapes, tiles, refusals, the names ComfyUI's nodes call, and recovery from short memory."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from wanqwen.core import codec as codec_module
from wanqwen.core.codec import VideoCodec
from wanqwen.core.memory.placement import HEADROOM
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.past import MODES, OFFLOADED, SMALLEST, SPLIT, WHOLE, Past, VAEMode, modes_on
from wanqwen.core.tiles import TileSize
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.family import LATENT_FORMAT
from wanqwen.wan.vae import WanVAE


@pytest.fixture
def codec() -> VideoCodec:
    return tiny(channels=3)


def tiny(channels: int) -> VideoCodec:
    def load() -> WanVAE:
        torch.manual_seed(0)
        vae = WanVAE(VAEConfig(dim=4, num_res_blocks=1, channels=channels))
        for name, parameter in vae.named_parameters():
            if name.startswith("decoder.head.2"):
                parameter.data *= 0.2  # random weights would paint everything black or white
        return vae

    return VideoCodec(load, LATENT_FORMAT, device=torch.device("cpu"))


def latent(frames: int = 3, height: int = 8, width: int = 12, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(1))


def test_shapes_and_range(codec: VideoCodec) -> None:
    pixels = codec.decode(latent(batch=2))
    assert pixels.shape == (2, 9, 64, 96, 3)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert codec.encode(pixels[0]).shape == (1, 16, 3, 8, 12)
    assert codec.encode(pixels).shape == (2, 16, 3, 8, 12)
    assert codec.decode(latent()[:, :, 0]).shape == (1, 64, 96, 3), "an image latent is a picture"


def test_decode_is_the_network_alone(codec: VideoCodec) -> None:
    """The pixels are those of the network fed with the whole clip, clamped, and moved to [0, 1]."""
    network = codec.first_stage_model
    expected = network.decode_chunk(latent(), network.new_past()).clamp(-1, 1)[0].movedim(0, -1) / 2 + 0.5
    assert (codec.decode(latent())[0] - expected).abs().max() < 1e-5
    for mode in MODES:
        assert (codec.decode(latent(), mode=mode)[0] - expected).abs().max() < 1e-5


def test_a_tile_that_covers_all_changes_nothing(codec: VideoCodec) -> None:
    assert torch.equal(codec.decode(latent(), tile=TileSize(8, 12, 2)), codec.decode(latent()))


def test_tiles_leave_no_seam_and_never_cut_time(codec: VideoCodec) -> None:
    """At the borders of tiles the picture steps little more than the whole one does there; hard cuts do."""
    x = torch.linspace(0, 3, 40).sin()
    smooth = (torch.linspace(-2, 2, 16)[:, None, None, None] * x).expand(16, 3, 8, 40)[None].contiguous()
    whole = codec.decode(smooth)
    extra = []
    for overlap in (8, 0):
        tiled = codec.decode(smooth, tile=TileSize(8, 20, overlap))
        steps, plain = ((p[:, :, :, 1:] - p[:, :, :, :-1]).abs().mean(dim=(0, 1, 2, 4)) for p in (tiled, whole))
        extra.append((steps - plain).max().item() / plain.mean().item())
    assert extra[0] < 0.25 * extra[1], f"blended {extra[0]:.3f}, cut {extra[1]:.3f}"
    changing = latent(frames=3, height=8, width=40)
    jumps, expected = (
        (p[:, 1:] - p[:, :-1]).abs().mean(dim=(0, 2, 3, 4))
        for p in (codec.decode(changing, tile=TileSize(8, 20, 8)), codec.decode(changing))
    )
    assert torch.allclose(jumps, expected, rtol=0.1), "time flows otherwise in tiles"


def test_stock_names(codec: VideoCodec) -> None:
    pixels = codec.decode(latent())
    assert torch.equal(codec.decode_tiled(latent(), tile_x=6, tile_y=4, overlap=1, tile_t=2, overlap_t=1),
                       codec.decode(latent(), tile=TileSize(4, 6, 1)))  # fmt: skip
    assert torch.equal(codec.encode_tiled(pixels[0], tile_x=48, tile_y=32, overlap=8),
                       codec.encode(pixels[0], tile=TileSize(4, 6, 1)))  # fmt: skip
    assert (codec.spacial_compression_decode(), codec.spacial_compression_encode()) == (8, 8)
    assert (codec.temporal_compression_decode(), codec.latent_channels, codec.output_channels) == (4, 16, 3)
    assert (codec.upscale_ratio[0](3), codec.downscale_ratio[0](9)) == (9, 3)
    assert "decoder.conv1.weight" in codec.get_sd()
    codec.throw_exception_if_invalid()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_and_the_next_run_works(codec: VideoCodec, bad: float) -> None:
    broken = latent()
    broken[0, 3, 1, 2, 2] = bad
    with pytest.raises(ValueError, match=r"NaN or infinite.*sampler"):
        codec.decode(broken)
    assert codec.decode(latent()).isfinite().all()


def test_latents_of_another_model_are_refused(codec: VideoCodec) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\).*another model"):
        codec.decode(torch.zeros(1, 4, 8, 8))


def test_pixels_that_do_not_fit_are_cut_with_a_message(codec: VideoCodec, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert codec.encode(torch.rand(7, 45, 83, 3)).shape == (1, 16, 2, 5, 10)
    assert "7 frames of 83 x 45 cut to 5 of 80 x 40" in caplog.text
    assert "alpha" not in caplog.text
    with pytest.raises(ValueError, match="smaller than one latent position"):
        codec.encode(torch.rand(1, 4, 80, 3))


def test_alpha_that_the_vae_does_not_take_is_dropped_and_said(
    codec: VideoCodec, caplog: pytest.LogCaptureFixture
) -> None:
    image = torch.rand(1, 16, 24, 4, generator=torch.Generator().manual_seed(2))
    with caplog.at_level(logging.WARNING):
        encoded = codec.encode(image)
    assert torch.equal(encoded, codec.encode(image[..., :3]))
    assert caplog.text.count("alpha") == 1


def test_vae_with_alpha_takes_and_gives_four_channels(caplog: pytest.LogCaptureFixture) -> None:
    codec = tiny(channels=4)
    assert codec.output_channels == 4
    pixels = codec.decode(latent(frames=1, batch=2))
    assert pixels.shape == (2, 1, 64, 96, 4)
    assert 0 <= pixels[..., 3].min() < pixels[..., 3].max() <= 1
    network = codec.first_stage_model
    expected = network.decode_chunk(latent(frames=1), network.new_past()).clamp(-1, 1)[0].movedim(0, -1) / 2 + 0.5
    assert (codec.decode(latent(frames=1))[0] - expected).abs().max() < 1e-5
    tiled = codec.decode(latent(frames=1), tile=TileSize(8, 12, 2))
    assert torch.equal(tiled[0], codec.decode(latent(frames=1))[0])

    image = torch.rand(1, 16, 24, 4, generator=torch.Generator().manual_seed(2))
    opaque = torch.cat((image[..., :3], torch.ones(1, 16, 24, 1)), dim=-1)
    assert torch.equal(codec.encode(image[..., :3]), codec.encode(opaque)), "RGB is opaque"
    assert (codec.encode(image) - codec.encode(opaque)).abs().max() > 1e-4, "alpha counts"
    assert "alpha" not in caplog.text


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_other_channels_are_refused(codec: VideoCodec, channels: int) -> None:
    with pytest.raises(ValueError, match="3 or 4"):
        codec.encode(torch.zeros(1, 16, 16, channels))


@pytest.fixture
def modes_tried(monkeypatch: pytest.MonkeyPatch) -> list[VAEMode]:
    """The modes in which clips began, on what passes for a device with memory of its own."""
    tried: list[VAEMode] = []

    def spied(name: str) -> Callable[[WanVAE, Tensor, Past], Any]:
        original, known = getattr(WanVAE, name), []

        def call(self: WanVAE, chunk: Tensor, past: Past) -> Any:
            if not chunk.is_meta and not any(past is other for other in known):  # predictions are on the meta device
                known.append(past)
                tried.append(past.mode)
            return original(self, chunk, past)

        return call

    monkeypatch.setattr(codec_module, "modes_on", lambda device: MODES)
    for name in ("decode_chunk", "encode_chunk"):
        monkeypatch.setattr(WanVAE, name, spied(name))
    return tried


@pytest.mark.parametrize("work", ["decode", "encode"])
@pytest.mark.parametrize("fitting", MODES, ids=lambda mode: mode.name)
def test_the_first_mode_that_fits_is_taken(
    codec: VideoCodec,
    modes_tried: list[VAEMode],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    work: str,
    fitting: VAEMode,
) -> None:
    network = codec.first_stage_model
    predict, given = (
        (network.decode_bytes, latent(frames=4))
        if work == "decode"
        else (network.encode_bytes, torch.rand(13, 64, 96, 3, generator=torch.Generator().manual_seed(3)))
    )
    expected, asked = getattr(codec, work)(given, mode=WHOLE), []
    monkeypatch.setattr(codec_module.host, "free_memory", lambda device: predict(64, 96, 13, fitting) + HEADROOM)
    monkeypatch.setattr(codec_module.host, "make_room", lambda nbytes, device: asked.append(nbytes))
    with caplog.at_level(logging.INFO):
        out = getattr(codec, work)(given)
    # Of so small an encoder another mode takes less than the offloaded one.
    first = next(mode for mode in MODES if predict(64, 96, 13, mode) <= predict(64, 96, 13, fitting))
    assert modes_tried == [WHOLE, first] and (first == fitting or work == "encode")
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert asked == [predict(64, 96, 13, WHOLE) + HEADROOM], "room is asked for the mode that is the fastest"
    assert (f"mode {first.name}" in caplog.text) == (first is not WHOLE)
    assert "tiles" not in caplog.text


def test_a_mode_asked_for_is_taken_whatever_is_free(
    codec: VideoCodec, modes_tried: list[VAEMode], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = VAEMode(name="pairs", fine_frames=2)
    for free in (1, 1 << 40):
        monkeypatch.setattr(codec_module.host, "free_memory", lambda device, free=free: free)
        for mode in (*MODES, own):
            codec.decode(latent(), mode=mode)
            assert modes_tried.pop() == mode and not modes_tried


def test_nothing_is_offloaded_to_ram_that_is_not_there(
    codec: VideoCodec, modes_tried: list[VAEMode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_module, "DEFAULT_TILE", TileSize(8, 16, 4))
    network, wide = codec.first_stage_model, latent(width=40)
    most, offloaded = (network.decode_bytes(64, 320, 9, mode) for mode in (WHOLE, OFFLOADED))
    monkeypatch.setattr(codec_module.host, "free_memory", lambda device: offloaded + HEADROOM)
    for ram, expected in ((most, {OFFLOADED}), (most - 1, {WHOLE})):
        monkeypatch.setattr(codec_module.host, "available_ram", lambda ram=ram: ram)
        codec.decode(wide)
        assert set(modes_tried) == expected
        modes_tried.clear()


def test_what_is_in_ram_anyway_is_not_offloaded(codec: VideoCodec) -> None:
    assert modes_on(codec.device) == (WHOLE, SPLIT)
    assert modes_on(torch.device("cuda")) == MODES


def test_peak_is_as_predicted() -> None:
    network = WanVAE(VAEConfig(dim=16, num_res_blocks=1)).channels_last()
    codec = VideoCodec(lambda: network, LATENT_FORMAT, device=torch.device("cpu"))
    for frames in (1, 4):
        clip = latent(frames=frames)
        pixels = torch.zeros(codec.upscale_ratio[0](frames), 64, 96, 3)
        kept = pixels.nbytes + 4 * 64 * 96  # and what each position weighs
        for mode in (WHOLE, SPLIT):
            predicted = network.decode_bytes(64, 96, pixels.shape[0], mode)
            peak = peak_bytes(lambda clip=clip, mode=mode: codec.decode(clip, mode=mode)) - kept
            # A few copies of what is shown are in RAM too, which is the device here.
            assert peak / 1.05 <= predicted <= 1.05 * peak


def test_short_memory_before_decoding_means_tiles(
    codec: VideoCodec, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_module, "DEFAULT_TILE", TileSize(8, 16, 4))
    monkeypatch.setattr(codec_module.host, "free_memory", lambda device: 1)
    wide = latent(width=40)
    assert torch.equal(codec.decode(wide), codec.decode(wide, tile=TileSize(8, 16, 4), mode=WHOLE))
    assert "using tiles" in caplog.text


@pytest.mark.parametrize("side", [1, 8, 32])
def test_short_memory_leaves_a_frame_no_larger_than_a_tile_whole(
    codec: VideoCodec, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    small = latent(frames=1, height=side, width=side)
    expected = codec.decode(small)
    monkeypatch.setattr(codec_module.host, "free_memory", lambda device: 1)
    assert torch.equal(codec.decode(small), expected)


def test_tiles_asked_for_are_tried_whatever_is_free(codec: VideoCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, tile = latent(width=40), TileSize(8, 16, 4)
    expected = codec.decode(wide, tile=tile)
    monkeypatch.setattr(codec_module.host, "free_memory", lambda device: 1)
    assert (codec.decode(wide, tile=tile) - expected).abs().max() < 1e-5


def test_out_of_memory_is_answered_with_the_next_mode_and_then_with_smaller_tiles(
    codec: VideoCodec, modes_tried: list[VAEMode], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = WanVAE.decode_chunk, []

    def decode_chunk(self: WanVAE, part: Tensor, past: Past) -> Tensor:
        if part.is_meta:
            return original(self, part, past)
        seen.append((part.shape[4], past.mode))
        if part.shape[4] > 16:
            raise torch.OutOfMemoryError
        return original(self, part, past)

    monkeypatch.setattr(WanVAE, "decode_chunk", decode_chunk)
    wide = latent(width=40)
    pixels = codec.decode(wide)
    assert seen[:5] == [*((40, mode) for mode in MODES), (32, WHOLE)] and seen[-1] == (16, WHOLE)
    assert torch.equal(pixels, codec.decode(wide, tile=TileSize(16, 16, 4)))
    assert caplog.text.count("out of memory") == 5

    seen.clear()
    codec.decode(latent(frames=1, width=40))
    assert [width for width, _ in seen[:2]] == [40, 32], "to a still the modes are one"

    seen.clear()
    codec.decode(wide, mode=OFFLOADED)
    assert seen[:3] == [(40, OFFLOADED), (40, SMALLEST), (32, OFFLOADED)] and seen[-1] == (16, OFFLOADED)


def test_memory_that_never_suffices_is_an_error(codec: VideoCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_chunk(self: WanVAE, part: Tensor, past: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(WanVAE, "decode_chunk", decode_chunk)
    with pytest.raises(torch.OutOfMemoryError):
        codec.decode(latent())
    monkeypatch.undo()
    assert codec.decode(latent()).isfinite().all()


def test_layers_are_pictures_of_their_own() -> None:
    codec = tiny(channels=4)
    latent = torch.randn(1, 16, 3, 4, 6)
    layers = codec.decode(latent)
    assert layers.shape == (1, 3, 32, 48, 4)
    for i in range(3):
        assert torch.equal(layers[:, i], codec.decode(latent[:, :, i : i + 1])[:, 0])
