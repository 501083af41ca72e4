"""Pictures brought to Wan's sizes, and the channels of a clip of which frames are given."""

import pytest
import torch
from wanqwen.core.codec import VideoCodec
from wanqwen.tests.nodes import tiny
from wanqwen.wan.pictures import AREAS, FITS, known_frames, size_for
from wanqwen.wan.vae import LATENT_FORMAT, WanVAE

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module")
def vae() -> VideoCodec:
    return VideoCodec(lambda: tiny.filled(WanVAE(tiny.VAE)), LATENT_FORMAT, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("picture", "area", "size"),
    [
        ((720, 1280), "480p", (832, 464)),
        ((1024, 1024), "480p", (624, 624)),
        ((1024, 1024), "720p", (960, 960)),
        ((600, 800), "480p", (720, 544)),
        ((600, 800), "720p", (1104, 816)),
        ((720, 1280), "720p", (1280, 720)),
    ],
)
def test_the_size_is_the_official_one(picture, area, size):
    assert size_for(*picture, AREAS[area]) == size
    assert size_for(*reversed(picture), AREAS[area]) == size[::-1]


def test_even_a_thread_of_a_picture_gets_a_size():
    assert size_for(1, 100_000, AREAS["480p"])[1] == 16


def ramp(height: int, width: int) -> torch.Tensor:
    """A picture that rises to the right in red and downwards in green."""
    red = ((torch.arange(width) + 0.5) / width).expand(height, width)
    green = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    return torch.stack((red, green, torch.full_like(red, 0.5)), dim=-1)[None]


@pytest.mark.parametrize("given", [(64, 96), (64, 64), (20, 200), (7, 5), (300, 32)])
def test_cover_keeps_the_middle_and_the_shape_of_what_is_shown(given):
    found = FITS["cover"](ramp(*given), WIDTH, HEIGHT)[0]
    assert found.shape == (HEIGHT, WIDTH, 3)
    scale = max(HEIGHT / given[0], WIDTH / given[1])  # of the picture, the same in both directions
    inner = found[4:-4, 4:-4]
    assert torch.allclose(inner.mean((0, 1)), torch.tensor(0.5), atol=0.6 / scale / min(given))
    assert (inner[:, 1:, 0] - inner[:, :-1, 0]).mean() == pytest.approx(1 / (scale * given[1]), rel=0.1)
    assert (inner[1:, :, 1] - inner[:-1, :, 1]).mean() == pytest.approx(1 / (scale * given[0]), rel=0.1)


def test_cover_leaves_a_picture_of_the_size_as_it_is():
    picture = torch.rand(2, HEIGHT, WIDTH, 3)
    assert FITS["cover"](picture, WIDTH, HEIGHT) is picture


def test_cover_smooths_a_pattern_too_fine_for_the_size_and_official_does_not():
    stripes = (torch.arange(4 * WIDTH) % 3 == 0).float().expand(1, 4 * HEIGHT, -1)[..., None].expand(-1, -1, -1, 3)
    found = {name: fit(stripes, WIDTH, HEIGHT)[:, :, 4:-4].std() for name, fit in FITS.items()}
    assert found["cover"] < 0.02 < 0.2 < found["official"]


def test_official_stretches_as_torch_does_by_default():
    picture = torch.rand(1, 40, 40, 3)
    wanted = torch.nn.functional.interpolate(picture.movedim(-1, 1), (HEIGHT, WIDTH), mode="bicubic")
    assert torch.equal(FITS["official"](picture, WIDTH, HEIGHT), wanted.movedim(1, -1))


def straight(vae: VideoCodec, given: dict[int, torch.Tensor], frames: int) -> torch.Tensor:
    """Compute the channels from their description: video in [-1, 1] through the network, mask frame by frame."""
    video = torch.zeros(1, 3, frames, HEIGHT, WIDTH)
    for i, frame in given.items():
        video[0, :, i] = frame.movedim(-1, 0) * 2 - 1
    network, latents = vae.first_stage_model, []
    past = network.new_past(single=frames == 1)
    with torch.inference_mode():
        for chunk in video.split([1] + [4] * ((frames - 1) // 4), dim=2):
            latents.append(network.encode_chunk(chunk, past)[0])
    raw = torch.cat(latents, dim=2)
    mask = torch.zeros(1, 4, raw.shape[2], HEIGHT // 8, WIDTH // 8)
    for i in given:
        if i == 0:
            mask[:, :, 0] = 1
        else:
            mask[:, (i - 1) % 4, (i - 1) // 4 + 1] = 1
    return torch.cat((mask, LATENT_FORMAT.normalise(raw)), dim=1)


@pytest.mark.parametrize(
    ("given", "frames"),
    [((0,), 1), ((0,), 9), ((0, 8), 9), ((8,), 9), ((0, 1, 2, 3, 4), 9), ((0, 1, 2), 9), ((5,), 9), ((0, 6, 12), 13)],
)
def test_the_channels_of_given_frames_are_those_of_their_description(vae, given, frames):
    pictures = {i: torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(i)) for i in given}
    found = known_frames(vae, pictures, frames, HEIGHT, WIDTH)
    wanted = straight(vae, pictures, frames)
    assert found.channels.shape == (1, 20, (frames - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    assert torch.equal(found.channels[:, :4], wanted[:, :4])
    assert torch.allclose(found.channels, wanted, atol=1e-6)


def test_the_mask_of_first_and_last_frame_is_the_published_one(vae):
    pictures = {0: torch.rand(HEIGHT, WIDTH, 3), 80: torch.rand(HEIGHT, WIDTH, 3)}
    mask = known_frames(vae, pictures, 81, HEIGHT, WIDTH).mask[0, :, :, 0, 0]
    assert mask[:, 0].tolist() == [1, 1, 1, 1] and mask[:, -1].tolist() == [0, 0, 0, 1]
    assert not mask[:, 1:-1].any()


def test_alpha_of_a_given_frame_is_not_seen(vae):
    picture = torch.rand(HEIGHT, WIDTH, 4)
    found, wanted = (known_frames(vae, {0: p}, 5, HEIGHT, WIDTH).channels for p in (picture, picture[..., :3]))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("given", "frames", "said"),
    [
        ({9: (HEIGHT, WIDTH)}, 9, "Frame 9 is given, and the clip has the frames 0 to 8"),
        ({-1: (HEIGHT, WIDTH)}, 9, "Frame -1 is given"),
        ({0: (WIDTH, HEIGHT)}, 9, "Frame 0 is 32 x 48, the clip 48 x 32 pixels"),
        ({0: (HEIGHT, WIDTH)}, 8, "4n . 1 frames .1, 5, 9...., and 8 were asked for"),
    ],
)
def test_frames_that_have_no_place_in_the_clip_are_refused(vae, given, frames, said):
    with pytest.raises(ValueError, match=said):
        known_frames(vae, {i: torch.zeros(*size, 3) for i, size in given.items()}, frames, HEIGHT, WIDTH)
