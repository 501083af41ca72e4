"""The loop: parts of a run, noise, errors, and what it tells its listener."""

import math

import pytest
import torch
from wanqwen.core.sampling.guidance import Guided
from wanqwen.core.sampling.sample import Hold, SampleError, StepNoise, draw_noise, noised, sample, start_of
from wanqwen.core.sampling.schedule import plan_steps
from wanqwen.core.types import Conditioning, SampleRequest, Schedule

from .known import denoiser

CPU = torch.device("cpu")
SHAPE = (1, 4, 2, 3, 3)


def plan(**fields):
    request = SampleRequest(latent=torch.zeros(SHAPE), positive=Conditioning(text=torch.zeros(1, 1, 1)), **fields)
    return plan_steps(request, Schedule(shift=5.0))


def velocity(x, timestep_B):
    """Return something that depends on x and on the time, so that a wrong order or timestep shows."""
    return 0.4 * x.roll(1, dims=1) + torch.sin(timestep_B / 100).view(-1, 1, 1, 1, 1)


def run(steps, solver, x=None, seed=0, negative=None, on_step=None):
    x = draw_noise(SHAPE, 3, "cpu", CPU) if x is None else x
    guided = Guided(denoise=denoiser(velocity, negative), has_negative=negative is not None)
    return sample(x, steps, solver, guided, StepNoise(x.shape, seed, "cpu", CPU), on_step)


@pytest.mark.parametrize("solver", ["euler", "lcm"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_two_parts_of_a_run_are_the_whole_for_solvers_without_history(solver, cut):
    head = run(plan(steps=6, solver=solver, end_step=cut), solver)
    parts = run(plan(steps=6, solver=solver, start_step=cut), solver, x=head)
    assert parts.equal(run(plan(steps=6, solver=solver), solver))


@pytest.mark.parametrize("solver", ["unipc", "dpm++2m"])
def test_two_parts_of_a_run_restart_the_history_of_multistep_solvers(solver):
    head = run(plan(steps=20, solver=solver, end_step=9), solver)
    parts = run(plan(steps=20, solver=solver, start_step=9), solver, x=head)
    whole = run(plan(steps=20, solver=solver), solver)
    difference = (parts - whole).abs().max() / whole.abs().max()
    assert 0 < difference < 2e-3  # measured 6e-5 and 6e-4


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("solver", ["unipc", "dpm++2m", "euler", "lcm"])
def test_constant_picture_is_found_in_any_number_of_steps(solver, steps):
    target, levels = torch.full(SHAPE, 0.7), plan(steps=steps, solver=solver)
    sigma_of = dict(zip(levels.timesteps, levels.sigmas, strict=False))
    out = sample(
        draw_noise(SHAPE, 0, "cpu", CPU),
        levels,
        solver,
        Guided(denoise=denoiser(lambda x, t: (x - target) / sigma_of[t[0].item()])),
        StepNoise(SHAPE, 0, "cpu", CPU),
    )
    torch.testing.assert_close(out, target, rtol=0, atol=1e-6)


def test_guidance_list_is_used_step_by_step():
    values, seen = (1.0, 5.0, 1.0, 2.0), []

    def negative(x, timestep_B):
        seen.append(timestep_B[0].item())
        return torch.zeros_like(x)

    guided = plan(steps=4, solver="euler", guidance=values)
    out = run(guided, "euler", negative=negative)
    assert seen == [guided.timesteps[1], guided.timesteps[3]]
    x = draw_noise(SHAPE, 3, "cpu", CPU)
    for i, value in enumerate(values):
        v = value * velocity(x, torch.tensor([guided.timesteps[i]]))
        x = x + (guided.sigmas[i + 1] - guided.sigmas[i]) * v
    torch.testing.assert_close(out, x, rtol=1e-6, atol=1e-6)


def test_model_gets_one_float_timestep_per_item_and_float32_latents():
    seen = []

    def recorder(x, timestep_B):
        seen.append((x.dtype, timestep_B.dtype, timestep_B.tolist()))
        return torch.zeros_like(x)

    sample(
        torch.zeros(3, *SHAPE[1:], dtype=torch.float16), plan(steps=2), "unipc", Guided(denoise=denoiser(recorder)), id
    )
    assert seen == [(torch.float32, torch.float32, [t] * 3) for t in (999.0, 833.0)]


def test_lcm_is_decided_by_the_seed():
    steps = plan(steps=4, solver="lcm")
    assert run(steps, "lcm", seed=7).equal(run(steps, "lcm", seed=7))
    assert not run(steps, "lcm", seed=7).equal(run(steps, "lcm", seed=8))


@pytest.mark.parametrize("solver", ["unipc", "dpm++2m", "euler", "lcm"])
def test_first_item_is_the_same_picture_in_every_batch_size(solver):
    steps = plan(steps=4, solver=solver)
    one, three = (run(steps, solver, x=draw_noise((batch, *SHAPE[1:]), 5, "cpu", CPU), seed=5) for batch in (1, 3))
    torch.testing.assert_close(three[:1], one, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(three[1], three[0])


def test_noise_of_one_item_is_what_the_seed_gives_in_one_draw():
    expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(11))
    assert draw_noise(SHAPE, 11, "cpu", CPU).equal(expected)
    assert draw_noise((4, *SHAPE[1:]), 11, "cpu", CPU)[:1].equal(expected)
    assert draw_noise(SHAPE, 2**64 - 1, "cpu", CPU).shape == SHAPE


def test_noise_on_the_gpu_is_drawn_by_the_device_itself():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cuda = torch.device("cuda")
    expected = torch.randn(SHAPE[1:], generator=torch.Generator("cuda").manual_seed(11), device="cuda")
    assert draw_noise(SHAPE, 11, "gpu", cuda)[0].equal(expected)
    assert draw_noise(SHAPE, 11, "cpu", cuda).cpu().equal(draw_noise(SHAPE, 11, "cpu", CPU))


def test_unknown_noise_device_is_refused():
    with pytest.raises(ValueError, match="noise_device is 'cuda'"):
        draw_noise(SHAPE, 1, "cuda", CPU)


def test_step_noise_repeats_neither_itself_nor_the_starting_noise():
    noise = StepNoise(SHAPE, 5, "cpu", CPU)
    draws = [
        noise(0),
        noise(1),
        *(draw_noise(SHAPE, seed, "cpu", CPU) for seed in (5, 6)),
        StepNoise(SHAPE, 6, "cpu", CPU)(0),
    ]
    assert noise(1).equal(draws[1])
    assert not any(a.equal(b) for i, a in enumerate(draws) for b in draws[:i])


def test_noised_mixes_picture_and_noise():
    latent, noise = torch.full((1,), 2.0), torch.full((1,), -1.0)
    assert [noised(latent, noise, sigma).item() for sigma in (0.0, 0.25, 1.0)] == [2.0, 1.25, -1.0]


def test_whole_run_starts_from_unscaled_noise_and_a_partial_one_from_the_picture():
    latent, noise = torch.full(SHAPE, 2.0), draw_noise(SHAPE, 0, "cpu", CPU)
    assert start_of(plan(steps=4), latent, noise).equal(noise)
    partial = plan(steps=4, denoise=0.5)
    assert start_of(partial, latent, noise).equal(noised(latent, noise, partial.sigmas[0]))


def test_listener_hears_every_step_with_its_picture_estimate():
    heard, steps = [], plan(steps=3, solver="euler")
    out = run(steps, "euler", on_step=lambda done, total, x0, x: heard.append((done, total, x0, x)))
    assert [(done, total) for done, total, _, _ in heard] == [(1, 3), (2, 3), (3, 3)]
    assert heard[-1][3].equal(out)
    torch.testing.assert_close(heard[-1][2], out, rtol=1e-6, atol=1e-6)  # the last step ends at its estimate
    x = draw_noise(SHAPE, 3, "cpu", CPU)
    assert heard[0][2].equal(x - velocity(x, torch.tensor([steps.timesteps[0]])))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ["unipc", "dpm++2m", "euler", "lcm"])
def test_velocity_that_is_no_number_stops_the_run_and_keeps_the_last_good_latent(solver, bad):
    good, calls = [], []

    def fails_third(x, timestep_B):
        calls.append(timestep_B)
        v = velocity(x, timestep_B)
        if len(calls) == 3:
            v[0, 0, 0, 0, :2] = bad
        return v

    x = draw_noise(SHAPE, 3, "cpu", CPU)
    with pytest.raises(SampleError, match=r"step 3 of 5 .*2 of 72 velocities are NaN") as caught:
        sample(
            x,
            plan(steps=5, solver=solver),
            solver,
            Guided(denoise=denoiser(fails_third)),
            StepNoise(SHAPE, 0, "cpu", CPU),
            lambda done, total, x0, x: good.append(x),
        )
    assert len(calls) == 3
    assert caught.value.steps_done == 2
    assert caught.value.latent.equal(good[-1])
    assert caught.value.latent.isfinite().all()


def test_latent_that_grows_without_bound_stops_the_run():
    x = torch.full(SHAPE, 1e38)
    with pytest.raises(SampleError, match="left the range of float32"):
        runaway = Guided(denoise=denoiser(lambda x, t: -3 * torch.full_like(x, 1e38)))
        sample(x, plan(steps=2, solver="euler"), "euler", runaway, id)


def test_bad_latent_is_refused_before_the_model_is_asked():
    x = torch.zeros(SHAPE)
    x[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="given to the sampler holds NaN"):
        sample(x, plan(steps=2), "unipc", Guided(denoise=denoiser(lambda x, t: pytest.fail("asked"))), id)


@pytest.mark.parametrize("solver", ["unipc", "dpm++2m", "euler", "lcm"])
def test_what_is_held_comes_back_as_it_was_and_the_rest_is_new(solver):
    clean, mask = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)), torch.zeros(1, 1, 1, 3, 3)
    mask[..., 1] = 1
    noise = draw_noise(SHAPE, 3, "cpu", CPU)
    seen = []

    def recorder(x, timestep_B):
        seen.append(x)
        return velocity(x, timestep_B) + 0.4 * x.roll(1, dims=-1)  # positions meet here, as in a transformer

    steps = plan(steps=6, solver=solver)
    fresh = StepNoise(SHAPE, 0, "cpu", CPU)
    out = sample(noise, steps, solver, Guided(denoise=denoiser(recorder)), fresh, hold=Hold(mask=mask, clean=clean))
    free = sample(noise, steps, solver, Guided(denoise=denoiser(recorder)), StepNoise(SHAPE, 0, "cpu", CPU))
    kept = mask.expand(SHAPE) == 0
    assert torch.equal(out[kept], clean[kept])
    assert not torch.allclose(out[~kept], free[~kept], atol=1e-3)  # the kept part is seen by the model
    if solver != "lcm":  # which meets the picture with fresh noise at each step
        for x, sigma in zip(seen[:6], steps.sigmas[:-1], strict=True):
            torch.testing.assert_close(x[kept], noised(clean, noise, sigma)[kept], rtol=1e-4, atol=2e-3)


def test_a_run_that_ends_early_keeps_the_noise_on_what_is_held():
    clean, mask = torch.ones(SHAPE), torch.zeros(1, 1, 1, 3, 3)
    steps = plan(steps=4, solver="euler", end_step=2)
    noise = draw_noise(SHAPE, 3, "cpu", CPU)
    out = sample(noise, steps, "euler", Guided(denoise=denoiser(velocity)), id, hold=Hold(mask=mask, clean=clean))
    torch.testing.assert_close(out, noised(clean, noise, steps.sigmas[-1]), rtol=1e-5, atol=1e-5)
