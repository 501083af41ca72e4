"""Prompts to and from ComfyUI's CONDITIONING, and what a request may ask of which variant."""

from types import SimpleNamespace

import pytest
import torch
from wanqwen.core.types import Conditioning, SampleRequest
from wanqwen.qwen_image.conditioning import from_comfy, prepare, to_comfy, with_references

WIDTH = 12


def rows(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, num, WIDTH, generator=torch.Generator().manual_seed(seed))


def latent(height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(1, 16, 1, height, width)


def identity(variant: str):
    return SimpleNamespace(variant=variant)


def request(references: int = 0, negative: int | None = 0, frames: int = 1, **fields) -> SampleRequest:
    positive = Conditioning(text=rows(3), references=tuple(latent() for _ in range(references)))
    other = None if negative is None else Conditioning(text=rows(2), references=(latent(),) * negative)
    return SampleRequest(latent=torch.zeros(1, 16, frames, 4, 6), positive=positive, negative=other, **fields)


def test_there_and_back_is_the_same():
    given = [Conditioning(text=rows(5)), Conditioning(text=rows(7, 1), references=(latent(), latent(2, 8)))]
    comfy = to_comfy(given)
    assert "reference_latents" not in comfy[0][1]
    for ours, back in zip(given, from_comfy(comfy, WIDTH), strict=True):
        assert torch.equal(ours.text, back.text)
        assert all(torch.equal(a, b) for a, b in zip(ours.references, back.references, strict=True))
    comfy[0][0].zero_()
    assert given[0].text.abs().sum() > 0  # a copy: what nodes do to it in place never reaches our cache


def test_rows_of_zeros_are_text_like_any_other_and_hidden_rows_are_dropped():
    zeroed = torch.cat((rows(2), torch.zeros(1, 2, WIDTH)), dim=1)
    assert from_comfy([[zeroed, {}]], WIDTH)[0].text.shape[1] == 4
    mask = torch.tensor([[1, 1, 1, 0]])
    assert torch.equal(from_comfy([[zeroed, {"attention_mask": mask}]], WIDTH)[0].text, zeroed[:, :3])


def test_references_of_stock_nodes_are_taken_as_they_come():
    flat, odd = torch.randn(1, 16, 4, 6), torch.randn(1, 16, 1, 5, 7)
    [prompt] = from_comfy([[rows(3), {"reference_latents": [flat, odd]}]], WIDTH)
    assert [tuple(reference.shape) for reference in prompt.references] == [(1, 16, 1, 4, 6), (1, 16, 1, 6, 8)]
    assert torch.equal(prompt.references[0][:, :, 0], flat)
    assert torch.equal(prompt.references[1][..., :5, :7], odd)
    assert torch.equal(prompt.references[1][..., 5, :7], odd[..., 4, :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_latents": [torch.zeros(2, 16, 1, 4, 4)]}, "each reference is one picture"),
        ({"reference_latents": ["picture"]}, "is str, expected"),
        ({"area": (1, 2)}, "'area', which this sampler does not carry out"),
    ],
)
def test_what_can_t_be_carried_out_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        from_comfy([[rows(3), options]], WIDTH)


def test_text_of_another_encoder_is_refused():
    with pytest.raises(ValueError, match=r"of width 12, expected 3584: .*Qwen2.5-VL-7B"):
        from_comfy([[rows(3), {}]], 3584)


@pytest.mark.parametrize(
    ("variant", "asked", "message"),
    [
        (
            "t2i",
            request(references=1),
            "positive .*1 reference picture.*Qwen-Image, which makes .*load a Qwen-Image-Edit",
        ),
        ("t2i", request(negative=1), "negative .*1 reference picture"),
        ("edit", request(references=2), "has 2 reference pictures, and Qwen-Image-Edit takes 1.*2509 or 2511"),
        ("edit-2509", request(references=4), "4 reference pictures, and Qwen-Image-Edit-2509 takes 3"),
        ("t2i", request(frames=5), "5 frames, and Qwen-Image makes one picture"),
        ("layered", request(frames=5), "takes a picture apart"),
    ],
)
def test_requests_that_a_variant_can_t_run_are_refused(variant, asked, message):
    with pytest.raises(ValueError, match=message):
        prepare(identity(variant), asked)


def test_guidance_without_a_negative_is_said_to_have_no_effect():
    asked = request(negative=None, guidance=(4.0,))
    prepared, [notice] = prepare(identity("t2i"), asked)
    assert prepared is asked and notice.startswith("guidance 4 has no effect without a negative prompt")
    assert prepare(identity("t2i"), request(negative=None, guidance=(1.0,)))[1] == []
    assert prepare(identity("t2i"), request(guidance=(4.0,)))[1] == []


def test_the_negative_gets_the_pictures_of_the_positive():
    asked = request(references=1, negative=0)
    prepared, [notice] = prepare(identity("edit"), asked)
    assert prepared.negative.references == asked.positive.references and "used for both" in notice
    assert prepare(identity("edit"), request(references=1, negative=1))[1] == []


def test_an_edit_model_without_a_picture_runs_and_says_so():
    _, [notice] = prepare(identity("edit-2511"), request())
    assert notice.startswith("Qwen-Image-Edit-2511 is made to edit, and the conditioning has no picture")


def test_latents_of_pictures_become_references():
    made = with_references(Conditioning(text=rows(2)), [torch.zeros(1, 16, 4, 6), latent()])
    assert [tuple(reference.shape) for reference in made.references] == [(1, 16, 1, 4, 6)] * 2
