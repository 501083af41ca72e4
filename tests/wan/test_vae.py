"""The Wan VAE's promises beside the goldens (tests/goldens): chunks, stills, bounded memory."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from wanqwen.bench.measure import peak_bytes
from wanqwen.core import past as past_module
from wanqwen.core.codec import VideoCodec
from wanqwen.core.memory.trace import peak_bytes as live_bytes
from wanqwen.core.ops.norm import norm_silu_into
from wanqwen.core.past import EXACT, MODES, WHOLE, Past, VAEMode
from wanqwen.core.weights.keymap import Renamer
from wanqwen.wan import vae_layers
from wanqwen.wan.config import VAEConfig
from wanqwen.wan.family import LATENT_FORMAT
from wanqwen.wan.keymap import vae_spellings
from wanqwen.wan.vae import WanVAE, decode_bytes, encode_bytes
from wanqwen.wan.vae_layers import CausalConv3d, ChannelNorm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_in_use() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=["channels first", "channels last"])
def vae(request: pytest.FixtureRequest) -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=8)).eval().requires_grad_(False)
    return vae.channels_last() if request.param == "channels last" else vae


def error(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape
    return ((out - expected).abs().max() / expected.abs().max()).item()


def decode(vae: WanVAE, latent: Tensor, chunks: list[int]) -> Tensor:
    past = vae.new_past()
    return torch.cat([vae.decode_chunk(part, past) for part in latent.split(chunks, dim=2)], dim=2)


@pytest.mark.parametrize("chunks", [[1] * 6, [1, 5], [2, 4], [1, 2, 3], [3, 1, 2]])
def test_decoding_in_chunks_equals_the_whole(vae: WanVAE, chunks: list[int]) -> None:
    latent = torch.randn(1, 16, 6, 4, 6, generator=torch.Generator().manual_seed(1))
    assert error(decode(vae, latent, chunks), decode(vae, latent, [6])) < 1e-5


@pytest.mark.parametrize("chunks", [[1, 4, 4, 4], [1, 8, 4], [5, 8], [1, 12], [9, 4]])
def test_encoding_in_chunks_equals_the_whole(vae: WanVAE, chunks: list[int]) -> None:
    pixels = torch.rand(1, 3, 13, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    past = vae.new_past()
    parts = [vae.encode_chunk(part, past)[0] for part in pixels.split(chunks, dim=2)]
    assert error(torch.cat(parts, dim=2), vae.encode_chunk(pixels, vae.new_past())[0]) < 1e-5


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("work", ["decode", "encode"])
def test_one_frame_takes_the_2d_path_to_the_same_numbers(
    vae: WanVAE, monkeypatch: pytest.MonkeyPatch, work: str, single: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(1, 16, 1, 4, 6, generator=generator)
    pixels = torch.rand(1, 3, 1, 32, 48, generator=generator) * 2 - 1
    three_d = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor, **options: tuple[int, int, int]) -> Tensor:
        three_d.append(weight.shape[2] > 1)
        return torch.nn.functional.conv3d(x, weight, bias, **options)

    def run(past: Past) -> Tensor:
        return vae.decode_chunk(latent, past) if work == "decode" else torch.cat(vae.encode_chunk(pixels, past), dim=1)

    monkeypatch.setattr(vae_layers, "conv3d", counted)
    fast = run(vae.new_past(single=single))
    assert three_d and not any(three_d), "a still went through a convolution over time"

    def with_zeros(self: CausalConv3d, x: Tensor, past: Past, norm: ChannelNorm | None = None) -> Tensor:
        now = x if norm is None else vae_layers.norm_silu(norm, x, past)
        return torch.nn.functional.pad(now, (0, 0, 0, 0, self.kernel[0] - 1, 0))

    monkeypatch.setattr(CausalConv3d, "window", with_zeros)
    assert error(fast, run(Past())) < 1e-5
    assert any(three_d)


def test_a_whole_clip_in_one_chunk_is_the_same_without_a_past_that_keeps(vae: WanVAE) -> None:
    generator = torch.Generator().manual_seed(5)
    latent, pixels = torch.randn(1, 16, 3, 4, 4, generator=generator), torch.rand(1, 3, 9, 32, 32, generator=generator)
    assert torch.equal(vae.decode_chunk(latent, vae.new_past(single=True)), vae.decode_chunk(latent, Past()))
    assert torch.equal(vae.encode_chunk(pixels, vae.new_past(single=True))[0], vae.encode_chunk(pixels, Past())[0])


def random_config(draw: random.Random) -> VAEConfig:
    levels = draw.choice((2, 3, 4))
    return VAEConfig(
        # Of fewer channels some vector is all but zero somewhere, and its direction, which the norm takes, is noise.
        dim=draw.choice((16, 20, 24)),
        z_dim=draw.choice((2, 5, 16)),
        dim_mult=tuple(draw.choice((1, 2, 4)) for _ in range(levels)),
        num_res_blocks=draw.choice((1, 2)),
        temporal_downsample=tuple(draw.random() < 0.5 for _ in range(levels - 1)),
        channels=draw.choice((3, 4)),
    )


@pytest.mark.parametrize("frames", [1, 9])
def test_numbers_are_those_of_diffusers_qwen_image_vae(frames: int) -> None:
    """The stills that Qwen-Image makes, at sizes drawn anew in each run; and clips, at any number of channels."""
    import diffusers

    seed = random.SystemRandom().randrange(2**31)
    draw, generator = random.Random(seed), torch.manual_seed(seed)
    config = random_config(draw)
    if frames > 1:  # diffusers takes four frames after the first whatever the levels
        config = VAEConfig(dim=16, z_dim=config.z_dim, num_res_blocks=1, channels=config.channels)
    factor = 2 ** (len(config.dim_mult) - 1)
    what = f"seed {seed}, {config}"
    ours = WanVAE(config).eval()
    for name, parameter in ours.named_parameters():
        is_gamma = name.endswith("gamma")
        parameter.normal_(
            1.0 if is_gamma else 0.0, 0.1 if is_gamma else parameter[0].numel() ** -0.5, generator=generator
        )
        if name.endswith("bias"):
            parameter.mul_(0.1)
    theirs = diffusers.AutoencoderKLQwenImage(
        base_dim=config.dim, z_dim=config.z_dim, dim_mult=list(config.dim_mult), num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample), input_channels=config.channels,
    ).eval()  # fmt: skip
    rename = Renamer(vae_spellings(config.num_res_blocks)[1].table)
    theirs.load_state_dict({rename(name): tensor for name, tensor in ours.state_dict().items()})
    height, width = draw.randrange(2, 6), draw.randrange(2, 6)
    pixels = torch.rand(1, config.channels, frames, height * factor, width * factor, generator=generator) * 2 - 1
    mean, log_variance = ours.encode_chunk(pixels, ours.new_past(single=True))
    posterior = theirs.encode(pixels).latent_dist
    assert error(mean, posterior.mode()) <= 1e-4, what
    assert error(log_variance.clamp(-30, 20), posterior.logvar) <= 1e-4, what
    latent = torch.randn(mean.shape, generator=generator)
    decoded = ours.decode_chunk(latent, ours.new_past(single=True)).clamp(-1, 1)
    assert error(decoded, theirs.decode(latent).sample) <= 1e-4, what
    assert decoded.std() > 0.05, f"a blank picture proves nothing: {what}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_decodes_the_same_picture(vae: WanVAE, dtype: torch.dtype, tolerance: float) -> None:
    """The bounds are twenty roundings of the format (2^-8 and 2^-11), one for each layer on the way."""
    latent = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    exact = vae.decode_chunk(latent, Past())
    half = WanVAE(vae.config)
    half.load_state_dict(vae.state_dict())
    out = half.eval().requires_grad_(False).to(dtype).decode_chunk(latent.to(dtype), Past())
    assert out.dtype == dtype
    assert error(out.float(), exact) < tolerance


@pytest.mark.parametrize("work", ["decode", "encode"])
def test_peak_memory_does_not_grow_with_frames(work: str) -> None:
    torch.manual_seed(0)
    codec = VideoCodec(lambda: WanVAE(VAEConfig(dim=16)).channels_last(), LATENT_FORMAT, device=CPU)
    peaks = []
    for frames in (17, 81):
        pixels = torch.rand(frames, 32, 32, 3)
        latent = torch.randn(1, 16, (frames - 1) // 4 + 1, 4, 4)
        if work == "decode":
            result_bytes, call = pixels.nbytes, lambda latent=latent: codec.decode(latent)
        else:
            result_bytes, call = latent.nbytes, lambda pixels=pixels: codec.encode(pixels)
        call()  # the weights are read on first use
        peaks.append(peak_bytes(call, CPU) - result_bytes)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
    assert peaks[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_position_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    x = torch.randn(1, 8, 1, 2, 2, dtype=dtype)
    x[..., 0, 1] = 0
    out = ChannelNorm(8, 4).to(dtype)(x)
    assert out.isfinite().all() and not out[..., 0, 1].any()


def clip(vae: WanVAE, work: str, height: int, width: int, frames: int) -> list[Tensor]:
    """Return random chunks as the codec gives them, in the dtype of the network, where its weights are."""
    like, factor = vae.conv2.weight, 2 ** (len(vae.config.dim_mult) - 1)
    time = 2 ** sum(vae.config.temporal_downsample)
    if work == "decode":
        x = like.new_empty(1, vae.config.z_dim, 1 + (frames - 1) // time, height // factor, width // factor)
    else:
        x = like.new_empty(1, vae.config.channels, frames, height, width)
    rest = (frames - 1) // time
    return list(x.normal_().split([1] * x.shape[2] if work == "decode" else [1] + [time] * rest, dim=2))


def through(vae: WanVAE, work: str, chunks: list[Tensor], mode: VAEMode) -> list[Tensor]:
    past = vae.new_past(single=len(chunks) == 1, mode=mode)
    call = vae.decode_chunk if work == "decode" else lambda chunk, past: vae.encode_chunk(chunk, past)[0]
    return [call(chunk, past) for chunk in chunks]


def peak_through(vae: WanVAE, work: str, chunks: list[Tensor], mode: VAEMode) -> int:
    """Return the live bytes at the fullest moment, chunks among them as they come, results as they go."""

    def call() -> None:
        past = vae.new_past(single=len(chunks) == 1, mode=mode)
        for chunk in chunks:
            (vae.decode_chunk if work == "decode" else vae.encode_chunk)(chunk.clone(), past)

    with torch.inference_mode(False):
        return live_bytes(call)


@pytest.mark.parametrize("work", ["decode", "encode"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("frames", [1, 5, 21])
def test_every_mode_gives_the_same_numbers(vae: WanVAE, work: str, mode: VAEMode, frames: int) -> None:
    torch.manual_seed(6)
    chunks = clip(vae, work, 32, 48, frames)
    out, expected = (torch.cat(through(vae, work, chunks, each), dim=2) for each in (mode, WHOLE))
    if mode.fine_frames is None or frames == 1:
        assert torch.equal(out, expected)
    else:
        assert error(out, expected) < 1e-5


@pytest.mark.parametrize("work", ["decode", "encode"])
def test_fast_forms_of_convolutions_give_the_numbers_of_the_published_ones(
    monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    torch.manual_seed(8)
    vae, used = WanVAE(VAEConfig(dim=64, num_res_blocks=1)).eval().requires_grad_(False).channels_last(), set()
    for name in ("conv3d_in_pairs", "doubled_conv2d", "halved_conv2d"):
        fast = getattr(vae_layers, name)
        monkeypatch.setattr(
            vae_layers, name, lambda *tensors, name=name, fast=fast: used.add(name) or fast(*tensors)
        )  # fmt: skip
    monkeypatch.setattr(vae_layers, "norm_silu_on", lambda device, dtype: used.add("norm") or norm_silu_into)
    chunks = clip(vae, work, 32, 40, 9)
    exact = torch.cat(through(vae, work, chunks, EXACT), dim=2)
    assert not used
    assert error(torch.cat(through(vae, work, chunks, WHOLE), dim=2), exact) < 1e-5
    assert used == {"norm", "conv3d_in_pairs", "doubled_conv2d" if work == "decode" else "halved_conv2d"}


@pytest.mark.parametrize("work", ["decode", "encode"])
@pytest.mark.parametrize("single", [False, True])
def test_modes_and_chunks_of_any_length_go_together(vae: WanVAE, work: str, single: bool) -> None:
    torch.manual_seed(7)
    whole = torch.cat(clip(vae, work, 32, 48, 17), dim=2)
    call = vae.decode_chunk if work == "decode" else lambda chunk, past: vae.encode_chunk(chunk, past)[0]
    for mode in MODES:
        past = vae.new_past(single=single, mode=mode)
        parts = [whole] if single else whole.split([2, 3] if work == "decode" else [5, 12], dim=2)
        out = torch.cat([call(part, past) for part in parts], dim=2)
        assert error(out, call(whole, vae.new_past())) < 1e-5, mode


def test_predicted_bytes_are_those_of_a_whole_clip_on_the_meta_device() -> None:
    """At configurations, sizes, dtypes and modes drawn anew in each run."""
    seed = random.SystemRandom().randrange(2**31)
    draw = random.Random(seed)
    for _ in range(6):
        config, dtype = random_config(draw), draw.choice((torch.float32, torch.bfloat16))
        factor = 2 ** (len(config.dim_mult) - 1)
        height, width = draw.randrange(1, 30) * factor, draw.randrange(1, 30) * factor
        frames = 1 + draw.randrange(8) * 2 ** sum(config.temporal_downsample)
        mode, (work, predict) = draw.choice(MODES), draw.choice((("decode", decode_bytes), ("encode", encode_bytes)))
        with torch.device("meta"), torch.inference_mode(False):
            vae = WanVAE(config).channels_last().to(dtype)
        peak = peak_through(vae, work, clip(vae, work, height, width, frames), mode)
        predicted = predict(config, dtype, height, width, frames, mode)
        what = f"seed {seed}, {work} {mode.name} {dtype} {height} x {width} x {frames}, {config}"
        assert peak <= predicted <= 1.05 * peak, what


@pytest.mark.parametrize("work", ["decode", "encode"])
@pytest.mark.parametrize("frames", [1, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_those_of_tensors_that_hold_numbers(
    monkeypatch: pytest.MonkeyPatch, work: str, frames: int, dtype: torch.dtype
) -> None:
    words = torch.int32 if dtype.itemsize == 4 else torch.int16  # NumPy knows no bfloat16

    def room_for(tensor: Tensor) -> Tensor:
        """Return memory that isn't counted, which stands for RAM beside a device."""
        return torch.from_numpy(tensor.view(words).numpy().copy(order="K")).view(dtype)

    monkeypatch.setattr(past_module, "_room_for", room_for)
    with torch.inference_mode(False):
        vae = WanVAE(VAEConfig(dim=8)).channels_last().to(dtype).requires_grad_(False)
    for mode in MODES:
        peak = peak_through(vae, work, clip(vae, work, 32, 40, frames), mode)
        predict = vae.decode_bytes if work == "decode" else vae.encode_bytes
        assert peak <= predict(32, 40, frames, mode) <= 1.05 * peak, mode


def test_published_size_in_memory() -> None:
    """Of 81 frames of 720 x 1280 in bfloat16, in each mode, beside the weights."""
    for work, most in ((decode_bytes, (6.9e9, 5.7e9, 2.6e9, 1.4e9)), (encode_bytes, (5.2e9, 3.8e9, 2.6e9, 1.2e9))):
        needed = [work(VAEConfig(), torch.bfloat16, 720, 1280, 81, mode) for mode in MODES]
        assert needed == sorted(needed, reverse=True)
        assert all(nbytes <= bound for nbytes, bound in zip(needed, most, strict=True)), needed


@pytest.mark.parametrize("channels", [3, 4])
def test_a_still_keeps_nothing_for_later_frames(channels: int) -> None:
    vae = WanVAE(VAEConfig(dim=16, channels=channels)).channels_last()
    codec = VideoCodec(lambda: vae, LATENT_FORMAT, device=CPU)
    latent, pixels = torch.randn(1, 16, 1, 16, 16), torch.rand(1, 128, 128, channels)
    codec.decode(latent)
    peaks = peak_bytes(lambda: codec.decode(latent), CPU) - pixels.nbytes, peak_bytes(lambda: codec.encode(pixels), CPU)
    assert all(peak < 0.5 * peak_bytes(lambda: vae.decode_chunk(latent, Past()), CPU) for peak in peaks)
