"""Guidance: two velocities become one."""

import math

import pytest
import torch
from wanqwen.core.sampling.guidance import Guided, classifier_free, combination, norm_preserving, per_step

from .known import denoiser


def velocities() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 5, 8, generator=generator) for _ in range(2))


class Counted:
    """A velocity that counts its calls."""

    def __init__(self, value: torch.Tensor):
        self.value, self.calls = value, 0

    def __call__(self, x, timestep):
        self.calls += 1
        return self.value


def test_one_value_serves_every_step_and_a_list_gives_each_its_own():
    assert per_step((5.0,), 3) == (5.0, 5.0, 5.0)
    assert per_step([3, 2, 1], 3) == (3.0, 2.0, 1.0)
    assert per_step((5.0,), 1) == (5.0,)


@pytest.mark.parametrize("values", [(), (1.0, 2.0), (1.0, 2.0, 3.0, 4.0)])
def test_wrong_number_of_values_is_refused(values):
    with pytest.raises(ValueError, match=f"guidance holds {len(values)} values for 3 steps"):
        per_step(values, 3)


def test_guidance_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"guidance\[1\] is nan"):
        per_step((1.0, math.nan, 1.0), 3)


def test_classifier_free_extrapolates_from_the_negative():
    positive, negative = torch.tensor([3.0]), torch.tensor([1.0])
    assert [classifier_free(positive, negative, s).item() for s in (0.0, 1.0, 2.0, 5.0)] == [1.0, 3.0, 5.0, 11.0]


def test_norm_preserving_keeps_the_direction_and_the_positive_norm():
    positive, negative = velocities()
    guided, plain = norm_preserving(positive, negative, 4.0), classifier_free(positive, negative, 4.0)
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(guided, plain, dim=-1), torch.ones(2, 5), rtol=1e-6, atol=0)
    assert (plain.norm(dim=-1) > 2 * positive.norm(dim=-1)).any()


def test_norm_preserving_leaves_zeros_alone_and_hides_no_nan():
    zeros = torch.zeros(1, 2, 4)
    assert norm_preserving(zeros, zeros, 4.0).equal(zeros)
    assert norm_preserving(zeros, zeros * math.nan, 4.0).isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("strength, negative_calls", [(1.0, 0), (1.0001, 1), (0.0, 1), (5.0, 1)])
def test_negative_pass_is_skipped_at_strength_one_only(strength, negative_calls, interleaved):
    positive, negative = map(Counted, velocities())
    guided = Guided(denoise=denoiser(positive, negative), has_negative=True, interleaved=interleaved)
    v = guided(torch.zeros(2, 5, 8), torch.zeros(2), strength)
    assert (positive.calls, negative.calls) == (1, negative_calls)
    torch.testing.assert_close(v, classifier_free(positive.value, negative.value, strength), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("interleaved", "walks"), [(False, [(0,), (1,)]), (True, [(0, 1)])])
def test_passes_walk_together_where_they_are_interleaved(interleaved, walks):
    known, asked = velocities(), []

    def denoise(x, timestep_B, which):
        asked.append(which)
        return [known[k] for k in which]

    guided = Guided(denoise=denoise, has_negative=True, interleaved=interleaved)
    assert guided(torch.zeros(2, 5, 8), torch.zeros(2), 5.0).equal(classifier_free(*known, 5.0))
    assert asked == walks


def test_without_a_negative_there_is_no_guidance():
    positive, _ = velocities()
    assert Guided(denoise=denoiser(lambda x, t: x))(positive, torch.zeros(2), 5.0).equal(positive)


def test_sixteen_bit_velocities_are_combined_in_float32():
    positive, negative = (v.bfloat16() for v in velocities())
    guided = Guided(denoise=denoiser(lambda x, t: positive, lambda x, t: negative), has_negative=True)
    v = guided(torch.zeros(2, 5, 8), torch.zeros(2), 5.0)
    assert v.dtype == torch.float32
    assert v.equal(classifier_free(positive.float(), negative.float(), 5.0))


def test_another_rule_of_combining_can_be_chosen():
    positive, negative = velocities()
    denoise = denoiser(lambda x, t: positive, lambda x, t: negative)
    guided = Guided(denoise=denoise, has_negative=True, combine=norm_preserving)
    assert guided(positive, torch.zeros(2), 4.0).equal(norm_preserving(positive, negative, 4.0))


def test_tokens_of_a_latent_keep_the_length_that_the_prompt_gave_them():
    generator = torch.Generator().manual_seed(2)
    positive, negative = (torch.randn(2, 3, 1, 4, 6, generator=generator) for _ in range(2))
    guided = combination(2)(positive, negative, 4.0)
    for row, column in ((0, 0), (2, 4)):
        token = (slice(None), slice(None), 0, slice(row, row + 2), slice(column, column + 2))
        plain = classifier_free(positive[token], negative[token], 4.0).flatten(1)
        expected = plain * (positive[token].flatten(1).norm(dim=1) / plain.norm(dim=1))[:, None]
        torch.testing.assert_close(guided[token].flatten(1), expected)
    assert combination(None)(positive, negative, 4.0).equal(classifier_free(positive, negative, 4.0))


def test_latents_that_do_not_divide_into_tokens_are_refused():
    with pytest.raises(ValueError, match="5 x 4 don't divide into tokens of 2 x 2"):
        combination(2)(torch.zeros(1, 3, 1, 5, 4), torch.zeros(1, 3, 1, 5, 4), 4.0)
