"""What is refused before a model is read, and in what words."""

from dataclasses import replace

import pytest
import torch
from wanqwen.core.types import Conditioning, Identity, SampleRequest
from wanqwen.wan.config import WanConfig
from wanqwen.wan.family import prepare

TEXT = WanConfig(dim=48, ffn_dim=112, num_heads=3, num_layers=2, text_dim=40)
PICTURE = replace(TEXT, in_dim=36, image_dim=24)
TWO_PICTURES = replace(PICTURE, image_positions=514)
NO_ENCODER = replace(TEXT, in_dim=36)  # as Wan 2.2's image to video
VARIANTS = {TEXT: "t2v-14B", PICTURE: "i2v-14B", TWO_PICTURES: "flf2v-14B", NO_ENCODER: "i2v-custom"}

TEXT_ONLY = Conditioning(text=torch.zeros(1, 3, 40))
EXTRA = torch.zeros(1, 20, 3, 4, 6)
PICTURED = replace(TEXT_ONLY, image=torch.zeros(1, 257, 24), extra=EXTRA)


def ask(config: WanConfig, positive: Conditioning, negative: Conditioning | None = None) -> SampleRequest:
    identity = Identity(
        family="wan21", role="diffusion_model", variant=VARIANTS[config], weight_format="fp32", spelling="official",
        config=config, names={},
    )  # fmt: skip
    request = SampleRequest(latent=torch.zeros(1, 16, 3, 4, 6), positive=positive, negative=negative)
    prepared, notices = prepare(identity, request)
    assert not notices
    return prepared


@pytest.mark.parametrize(
    ("config", "conditioning"),
    [
        (TEXT, TEXT_ONLY),
        (PICTURE, PICTURED),
        (PICTURE, replace(PICTURED, image=torch.zeros(1, 514, 24))),  # ComfyUI attends to all of them
        (TWO_PICTURES, PICTURED),
        (TWO_PICTURES, replace(PICTURED, image=torch.zeros(1, 514, 24))),
        (NO_ENCODER, replace(PICTURED, image=None)),
    ],
)
def test_what_a_model_was_made_for_passes_unchanged(config, conditioning):
    assert ask(config, conditioning, conditioning).positive is conditioning


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (TEXT, {}, "t2v-14B.* has an encoded picture.*choose a file of image to video, such as wan2.1_i2v_480p_14B"),
        (TEXT, {"extra": None}, "has rows of the image encoder.*disconnect clip_vision"),
        (PICTURE, {"extra": None}, "i2v-14B.* has no encoded picture.*put Wan Image to Video.*wan2.1_t2v_14B"),
        (PICTURE, {"image": None}, "has no rows of the image encoder.*connect Load Wan Image Encoder"),
        (NO_ENCODER, {}, "has rows of the image encoder, which this model does not take"),
        (PICTURE, {"image": torch.zeros(1, 257, 32)}, "image rows of width 32, where 24 are expected.*CLIP ViT-H"),
        (TWO_PICTURES, {"image": torch.zeros(1, 771, 24)}, r"has 771 image rows.*room for 514"),
        (PICTURE, {"extra": torch.zeros(1, 36, 3, 4, 6)}, "36 channels of an encoded picture, and this file takes 20"),
        (
            PICTURE,
            {"extra": torch.zeros(1, 20, 3, 8, 6)},
            "encoded for 48 x 64 pixels, 9 frames, and the latent is 48 x 32 pixels, 9 frames: connect the latent",
        ),
        (PICTURE, {"extra": torch.zeros(1, 20, 2, 4, 6)}, "for 48 x 32 pixels, 5 frames, and the latent is 48 x 32"),
        (PICTURE, {"text": torch.zeros(1, 3, 77)}, "text rows of width 77, where 40"),
        (PICTURE, {"references": (torch.zeros(1, 16, 1, 4, 6),)}, "i2v-14B takes no reference pictures"),
    ],
)
@pytest.mark.parametrize("which", ["positive", "negative"])
def test_what_does_not_fit_is_refused_with_what_would(config, change, said, which):
    fitting = {TEXT: TEXT_ONLY, NO_ENCODER: replace(PICTURED, image=None)}.get(config, PICTURED)
    wrong = replace(PICTURED, **change)
    prompts = (wrong, fitting) if which == "positive" else (fitting, wrong)
    with pytest.raises(ValueError, match=said) as caught:
        ask(config, *prompts)
    assert "takes no reference" in said or f"the sampler's {which} input" in str(caught.value)
