"""Controls of VACE: what is encoded, against the specification; through ComfyUI's conditioning; beside a request."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wanqwen.core.types import Conditioning, Control, Identity, SampleRequest
from wanqwen.wan.conditioning import from_comfy
from wanqwen.wan.config import WanConfig
from wanqwen.wan.controls import (
    Encoded,
    Source,
    controlled,
    controls_of,
    encode,
    lay_out,
    lead_of,
    mask_channels,
    on_canvas,
    with_control,
)
from wanqwen.wan.family import prepare
from wanqwen.wan.vae import LATENT_FORMAT

WIDTH, HEIGHT, FRAMES = 48, 32, 9
# Of 81 frames, those whose mask counts; section 3 of the specification.
SOURCE_FRAMES = [1, 5, 9, 13, 17, 21, 25, 28, 32, 36, 40, 44, 48, 52, 55, 59, 63, 67, 71, 75, 79]


class VAE:
    """Notes what it is given; a latent holds the number of the call."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def encode(self, pixels_FHWC: Tensor) -> Tensor:
        frames, height, width, channels = pixels_FHWC.shape
        assert channels == 3 and frames % 4 == 1
        self.seen.append(pixels_FHWC.clone())
        return torch.full((1, 16, (frames + 3) // 4, height // 8, width // 8), float(len(self.seen)))


def video(frames: int = FRAMES, width: int = WIDTH, height: int = HEIGHT, channels: int = 3) -> Tensor:
    return torch.rand(frames, height, width, channels, generator=torch.Generator().manual_seed(frames))


def encoded(source: Source) -> tuple[Encoded, list[Tensor]]:
    vae = VAE()
    return encode(source, vae, WIDTH, HEIGHT, FRAMES), vae.seen


# What is encoded


def test_what_is_kept_and_what_guides_are_encoded_apart() -> None:
    """In [-1, 1] they are f * (1 - m) and f * m; a soft mask counts as 1 above 0.5, and as it is in its channels."""
    frames, mask = video(), torch.rand(FRAMES, HEIGHT, WIDTH)
    mask[0, 0, :2] = torch.tensor([0.5, 0.5000001])
    found, (kept, guiding) = encoded(Source(video=frames, mask=mask))
    f, m = frames * 2 - 1, (mask > 0.5).float()[..., None]
    assert torch.allclose(kept * 2 - 1, f * (1 - m), atol=1e-6) and torch.allclose(guiding * 2 - 1, f * m, atol=1e-6)
    assert kept[0, 0, 0].tolist() != [0.5] * 3 and kept[0, 0, 1].tolist() == [0.5] * 3
    assert found.frames.shape == (1, 32, 3, 4, 6) and found.lead == 0 and not found.notices
    assert found.frames[:, :16].unique().tolist() == [1.0] and found.frames[:, 16:].unique().tolist() == [2.0]
    assert torch.equal(found.mask, mask_channels(mask))


def test_channels_of_the_mask_are_the_pixels_of_a_position_row_by_row() -> None:
    mask = torch.rand(1, HEIGHT, WIDTH)
    channels = mask_channels(mask)
    assert channels.shape == (1, 64, 1, 4, 6)
    for dy, dx, y, x in ((0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 2, 3), (7, 5, 3, 4)):
        assert channels[0, dy * 8 + dx, 0, y, x] == mask[0, 8 * y + dy, 8 * x + dx]


def test_frames_of_the_mask_are_those_of_the_specification() -> None:
    mask = torch.arange(81.0)[:, None, None].expand(-1, 8, 8)
    assert mask_channels(mask)[0, 0, :, 0, 0].tolist() == SOURCE_FRAMES
    assert mask_channels(mask[:1])[0, 0, :, 0, 0].tolist() == [0]


def test_without_a_mask_the_video_guides_everywhere() -> None:
    found, (kept, guiding) = encoded(Source(video=video()))
    assert torch.equal(guiding, video()) and kept.unique().tolist() == [0.5]
    assert found.mask.unique().tolist() == [1.0]


def test_without_a_video_all_is_made_anew() -> None:
    found, seen = encoded(Source(mask=torch.zeros(1, HEIGHT, WIDTH)))
    assert found.notices == ("The mask has no effect without control_video.",)
    assert len(seen) == 1 and seen[0].shape == (FRAMES, HEIGHT, WIDTH, 3) and seen[0].unique().tolist() == [0.5]
    assert found.mask.unique().tolist() == [1.0] and found.frames.unique().tolist() == [1.0]


def test_a_short_video_is_gone_on_with() -> None:
    """A black mask of one frame keeps all frames that are given; the others are grey, and made anew."""
    clip, mask, notices = lay_out(Source(video=video(5), mask=torch.zeros(1, HEIGHT, WIDTH)), WIDTH, HEIGHT, FRAMES)
    assert torch.equal(clip[:5], video(5)) and clip[5:].unique().tolist() == [0.5]
    assert not mask[:5].any() and mask[5:].all()
    assert notices == ["control_video has 5 frames: the other 4 are made anew."]


@pytest.mark.parametrize("num_masks", [3, 9, 20])
def test_masks_are_one_for_each_frame(num_masks: int) -> None:
    masks = torch.arange(num_masks)[:, None, None].expand(-1, HEIGHT, WIDTH) / 100
    _, mask, notices = lay_out(Source(video=video(20), mask=masks), WIDTH, HEIGHT, FRAMES)
    given = min(num_masks, FRAMES)
    assert torch.equal(mask[:given], masks[:given]) and bool((mask[given:] == 1).all())
    assert notices[0] == "control_video has 20 frames: the last 11 are left out."
    assert notices[1:] == ["The mask has 3 frames: those of control_video after them are made anew."] * (given == 3)


def test_videos_and_masks_of_another_size_cover_the_one_that_is_made() -> None:
    """Twice as high as wanted: the middle half stays; the mask lies on the same pixels as the video."""
    frames = torch.zeros(1, 4 * HEIGHT, 2 * WIDTH, 3)
    frames[:, 2 * HEIGHT :] = 1
    clip, mask, notices = lay_out(Source(video=frames, mask=frames[..., 0]), WIDTH, HEIGHT, 1)
    assert notices == ["control_video of 96 x 128 was made to cover 48 x 32."]
    assert torch.equal(clip[..., 0], mask) and clip.min() == 0 and clip.max() == 1
    assert clip[0, : HEIGHT // 2 - 2].max() < 0.01 and clip[0, HEIGHT // 2 + 2 :].min() > 0.99


@pytest.mark.parametrize(("size", "is_told"), [((64, 64), True), ((2 * HEIGHT, 2 * WIDTH), False), ((31, 48), True)])
def test_a_mask_of_another_shape_than_the_video_is_told(size: tuple[int, int], is_told: bool) -> None:
    _, mask, notices = lay_out(Source(video=video(), mask=torch.ones(1, *size)), WIDTH, HEIGHT, FRAMES)
    told = f"The mask of {size[1]} x {size[0]} has another shape than control_video: it may not lie where it is meant"
    assert [notice[: len(told)] for notice in notices] == [told] * is_told
    assert mask.shape == (FRAMES, HEIGHT, WIDTH) and mask.all()


def test_reference_images_lie_whole_on_a_white_canvas_and_come_first() -> None:
    tall, exact = torch.rand(64, 32, 4), torch.rand(HEIGHT, WIDTH, 3)
    found, (_, *pictures) = encoded(Source(references=(tall, exact)))
    assert len(pictures) == 2
    assert found.lead == 2 and found.frames.shape == (1, 32, 5, 4, 6) and found.mask.shape == (1, 64, 5, 4, 6)
    canvas = on_canvas(tall, WIDTH, HEIGHT)
    small = F.interpolate(tall[..., :3].movedim(-1, 0)[None], (32, 16), mode="bilinear", align_corners=False)
    assert torch.equal(canvas[:, 16:32], small[0].movedim(0, -1))
    assert canvas[:, :16].unique().tolist() == canvas[:, 32:].unique().tolist() == [1.0]
    # Encoded one by one, and in their order whichever is encoded first.
    calls = [next(i for i, seen in enumerate(pictures) if torch.equal(seen[0], p)) + 2 for p in (canvas, exact)]
    assert [found.frames[0, :16, i].unique().tolist() for i in range(5)] == [[n] for n in (*calls, 1, 1, 1)]
    [control] = controls_of(with_control([[torch.zeros(1, 1, 8), {}]], found, 1.0)[0][1])
    assert not control.context[:, 16:32, :2].any()  # zeros as the model takes them, not as a VAE gives them
    assert not found.mask[:, :, :2].any() and found.mask[:, :, 2:].all()


# ComfyUI's conditioning


def made(lead: int = 0, frames: int = 3, seed: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 32, lead + frames, 4, 6, generator=generator)
    return Encoded(frames=latents, mask=torch.rand(1, 64, lead + frames, 4, 6, generator=generator), lead=lead)


CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, vace_layers=(0,), vace_dim=96)


def stock(conditioning: list, encoded: Encoded, strength: float) -> list:
    """Do what ComfyUI's own node does, which does not say how many frames are references."""
    added = {"vace_frames": encoded.frames, "vace_mask": encoded.mask, "vace_strength": strength}
    return [[rows, {**o, **{k: [*o.get(k, []), v] for k, v in added.items()}}] for rows, o in conditioning]


def test_controls_come_back_from_the_conditioning_whichever_node_made_them() -> None:
    text = [[torch.rand(1, 4, 8), {"pooled_output": None}]]
    ours, theirs = made(lead=1, seed=1), made(frames=4, seed=2)  # theirs has a reference, and does not say so
    mixed = with_control(stock(with_control(text, ours, 0.5), theirs, 0.7), ours, 0.9)
    [prompt] = from_comfy(mixed, CONFIG)
    assert [(c.strength, c.lead) for c in prompt.controls] == [(0.5, 1), (0.7, 1), (0.9, 1)] and prompt.lead == 1
    for control, origin in zip(prompt.controls, (ours, theirs, ours), strict=True):
        normalised = [LATENT_FORMAT.normalise(origin.frames[:, part]) for part in (slice(0, 16), slice(16, 32))]
        assert torch.equal(control.context, torch.cat((*normalised, origin.mask), dim=1))
    assert list(text[0][1]) == ["pooled_output"], "what was given has changed"
    [prompt] = from_comfy(with_control(stock(text, theirs, 0.7), ours, 0.9), CONFIG)
    assert [(c.strength, c.lead) for c in prompt.controls] == [(0.7, 1), (0.9, 1)]
    [prompt] = from_comfy(with_control(stock(text, made(), 0.7), ours, 0.9), CONFIG)
    assert [c.lead for c in prompt.controls] == [0, 1]
    [prompt] = from_comfy(with_control(with_control(text, made(frames=4), 0.7), ours, 0.9), CONFIG)
    assert [c.lead for c in prompt.controls] == [0, 1], "ours says that it has none"
    [prompt] = from_comfy(stock(text, theirs, 0.7), CONFIG)
    assert [c.lead for c in prompt.controls] == [0]


def test_a_control_without_mask_or_strength_is_made_anew_everywhere() -> None:
    [control] = controls_of({"vace_frames": [made().frames]})
    assert control.context[:, 32:].unique().tolist() == [1.0] and control.strength == 1.0
    assert controls_of({}) == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vace_frames": [torch.zeros(1, 16, 3, 4, 6)]}, r"latents .* \[1, 16, 3, 4, 6\], \[1, 32, frames"),
        ({"vace_frames": [made().frames], "vace_mask": [made(frames=2).mask]}, r"mask .* \[1, 64, 2, 4, 6\]"),
        ({"vace_frames": [made().frames] * 2, "vace_mask": [made().mask]}, "2 control videos of VACE, 1 masks"),
    ],
)
def test_controls_of_other_shapes_are_errors(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        controls_of(options)


# A request


def identity(variant: str = "vace-1.3B", config: WanConfig = CONFIG) -> Identity:
    return Identity(
        family="wan21", role="diffusion_model", variant=variant, weight_format="fp32", spelling="official",
        config=config, names={},
    )  # fmt: skip


def control(lead: int = 0, frames: int = 3) -> Control:
    generator = torch.Generator().manual_seed(lead)
    return Control(context=torch.randn(1, 96, lead + frames, 4, 6, generator=generator), lead=lead)


def request(*controls: Control, frames: int = 3, empty: int = 0, **others: object) -> SampleRequest:
    prompt = Conditioning(text=torch.zeros(1, 2, 8), controls=controls)
    latent = torch.randn(2, 16, frames, 4, 6, generator=torch.Generator().manual_seed(9))
    latent[:, :, :empty] = 0
    return SampleRequest(latent=latent, positive=prompt, negative=prompt, **others)


def test_without_references_nothing_changes() -> None:
    asked = request(control())
    given, notices = controlled(identity(), asked)
    assert given.latent is asked.latent and not notices and given.positive.lead == 0
    assert torch.equal(given.positive.controls[0].context, asked.positive.controls[0].context)


def test_controls_get_as_many_reference_frames_as_the_longest_has() -> None:
    short, long = control(lead=1), control(lead=3)
    given, _ = controlled(identity(), request(short, long, frames=6, empty=3))
    for prompt in (given.positive, given.negative):
        assert [c.lead for c in prompt.controls] == [3, 3]
        assert torch.equal(prompt.controls[0].context[:, :, 2:], short.context)
        assert not prompt.controls[0].context[:, :, :2].any()
        assert torch.equal(prompt.controls[1].context, long.context)


def test_a_clip_s_own_first_frames_are_not_taken_for_reference_frames() -> None:
    """A longer clip than the control's, as from Wan Continue Clip, would come out without its first frames."""
    with pytest.raises(ValueError, match=r"48 x 32 pixels, 13 frames, .* for 48 x 32 pixels, 9 frames after 1 ref"):
        controlled(identity(), request(control(lead=1), frames=4))
    given, notices = controlled(identity(), request(control(lead=1), frames=4, empty=1))
    assert given.latent.shape[2] == 4
    assert notices == [
        "The finished clip comes without the 1 frame(s) of reference images: no Trim Video Latent is needed."
    ]


def test_a_clip_alone_gets_the_references_before_it() -> None:
    asked, led = request(control(lead=2)), control(lead=2)
    given, _ = controlled(identity(), asked)
    assert given.latent.shape == (2, 16, 5, 4, 6) and torch.equal(given.latent[:, :, 2:], asked.latent)
    for clip in given.latent:
        assert torch.allclose(LATENT_FORMAT.normalise(clip[None, :, :2]), led.context[:, :16, :2], atol=1e-5)
    with pytest.raises(ValueError, match=r"noisy already .* lacks the 2 frame\(s\) of the reference images"):
        controlled(identity(), replace(asked, add_noise=False))
    whole = request(control(lead=2), frames=5, add_noise=False)
    assert controlled(identity(), whole)[0].latent is whole.latent


@pytest.mark.parametrize("frames", [3, 5])
@pytest.mark.parametrize("mask_frames", [1, 3])
def test_a_mask_leaves_reference_frames_free(frames: int, mask_frames: int) -> None:
    mask = torch.rand(1, 1, mask_frames, 4, 6)
    given, _ = controlled(identity(), request(control(lead=2), frames=frames, empty=frames - 3, mask=mask))
    assert given.mask.shape == (1, 1, 5, 4, 6) and bool((given.mask[:, :, :2] == 1).all())
    assert torch.equal(given.mask[:, :, 2:], mask.expand(-1, -1, 3, -1, -1))


def test_a_mask_without_references_stays() -> None:
    mask = torch.rand(1, 1, 1, 4, 6)
    assert controlled(identity(), request(control(), mask=mask))[0].mask is mask


def test_a_negative_prompt_without_controls_takes_those_of_the_positive_one() -> None:
    asked = replace(request(control()), negative=Conditioning(text=torch.zeros(1, 2, 8)))
    given, notices = controlled(identity(), asked)
    pairs = zip(given.negative.controls, given.positive.controls, strict=True)
    assert [torch.equal(one.context, other.context) for one, other in pairs] == [True]
    assert notices == ["The negative prompt has no control of VACE: those of the positive one are used for both."]
    assert controlled(identity(), replace(asked, negative=None))[0].negative is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (request(), "vace-1.3B takes at least one control, and the positive conditioning has none: put the node Wan V"),
        (request(control(lead=1), frames=5), "latent is a clip of 48 x 32 pixels, 17 frames, .* VACE is for .*, 9 f"),
        (request(control(frames=4), control(lead=1)), "for clips of 48 x 32 pixels, 13 frames and 48 x 32 .* 9 fr"),
        (request(control(lead=1), control(lead=2, frames=5), frames=5), "9 frames and 48 x 32 pixels, 17 frames: give"),
        (replace(request(control()), latent=torch.zeros(1, 16, 3, 4, 8)), "of 64 x 32 pixels, 9 .* for 48 x 32 pixels"),
    ],
)
def test_what_does_not_fit_together_is_an_error(asked: SampleRequest, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        controlled(identity(), asked)


def test_other_models_take_no_control() -> None:
    plain = identity("t2v-14B", replace(CONFIG, vace_layers=(), vace_dim=0))
    with pytest.raises(ValueError, match=r"t2v-14B takes no control, and .* load a VACE model \(wan2.1_vace_1.3B"):
        prepare(plain, request(control()))
    asked = request()
    assert controlled(plain, asked) == (asked, [])


def test_a_control_of_comfyui_s_own_node_before_ours_says_nothing_of_its_lead() -> None:
    frames, mask = torch.zeros(1, 32, 4, 4, 6), torch.zeros(1, 64, 4, 4, 6)
    stock = [[torch.zeros(1, 3, 8), {"vace_frames": [frames], "vace_mask": [mask], "vace_strength": [1.0]}]]
    assert lead_of(stock) == 0
    assert lead_of(with_control(stock, Encoded(frames=frames, mask=mask, lead=1), 1.0)) == 1
