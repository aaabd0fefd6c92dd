"""Samplers against diffusers step for step, and against the exact denoiser of Gaussian data."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from diffusion_policy.samplers import SAMPLERS, choose_levels, ddim, ddpm
from diffusion_policy.schedules import Schedule, cosine, from_betas, linear

SHAPE = (3, 8, 2)


def fake_network(xt: Tensor, level: int) -> Tensor:
    """A smooth stand-in for a network that predicts noise."""
    return torch.tanh(1.3 * xt + 0.01 * level) * 0.9


def denoiser(schedule: Schedule, clip: bool):
    def denoise(xt: Tensor, level: int) -> Tensor:
        x0 = (xt - schedule.sigma[level] * fake_network(xt, level)) / schedule.alpha[level]
        return x0.clamp(-1, 1) if clip else x0

    return denoise


def gaussian_denoiser(schedule: Schedule, mean: float, deviation: float):
    """E[x0 | xt] where x0 ~ N(mean, deviation²)."""

    def denoise(xt: Tensor, level: int) -> Tensor:
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (xt - alpha * mean)

    return denoise


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 5, 20, 100])
def test_ddim_equals_diffusers(steps: int, eta: float, clip: bool) -> None:
    reference = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=clip)
    reference.set_timesteps(steps)  # leading
    schedule = cosine(100)
    levels = choose_levels(schedule, steps, "leading")
    assert levels == reference.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x = xT = torch.randn(SHAPE, generator=generator)
    noise = torch.randn((steps, *SHAPE), generator=generator)
    for i, level in enumerate(levels):
        output = fake_network(x, level)
        options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise[i] if eta else None}
        x = reference.step(output, level, x, **options).prev_sample
    ours = ddim(denoiser(schedule, clip), xT, schedule, levels, noise, eta=eta)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("large", [False, True])
def test_ddpm_equals_diffusers_on_all_levels(large: bool) -> None:
    kind = "fixed_large" if large else "fixed_small"
    reference = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True, variance_type=kind)
    schedule = cosine(100)
    levels = choose_levels(schedule, 100)
    xT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    x = xT
    for level in levels:
        x = reference.step(fake_network(x, level), level, x, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(1)
    noise = torch.stack([torch.randn(SHAPE, generator=generator) for _ in levels[:-1]] + [torch.zeros(SHAPE)])
    ours = ddpm(denoiser(schedule, clip=True), xT, schedule, levels, noise, large_variance=large)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_with_full_noise_is_ddpm_on_the_same_levels(steps: int) -> None:
    schedule = linear(50)
    levels = choose_levels(schedule, steps)
    generator = torch.Generator().manual_seed(0)
    xT = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    noise = torch.randn((steps, *SHAPE), generator=generator, dtype=torch.float64)
    denoise = denoiser(schedule, clip=False)
    a = ddim(denoise, xT, schedule, levels, noise, eta=1.0)
    b = ddpm(denoise, xT, schedule, levels, noise)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_moments_of_gaussian_data(name: str) -> None:
    mean, deviation, count = 0.7, 0.3, 40_000
    schedule = cosine(200)
    levels = choose_levels(schedule, 200)
    generator = torch.Generator().manual_seed(0)
    xT = torch.randn((count, 1, 1), generator=generator, dtype=torch.float64)
    noise = torch.randn((len(levels), count, 1, 1), generator=generator, dtype=torch.float64)
    x0 = SAMPLERS[name].function(gaussian_denoiser(schedule, mean, deviation), xT, schedule, levels, noise)
    assert x0.mean().item() == pytest.approx(mean, abs=0.01)
    assert x0.std().item() == pytest.approx(deviation, abs=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_gives_the_denoised_noise(name: str) -> None:
    schedule = from_betas(torch.full((10,), 0.3, dtype=torch.float64))
    denoise = denoiser(schedule, clip=True)
    xT = torch.randn(SHAPE, dtype=torch.float64)
    levels = choose_levels(schedule, 1)
    x0 = SAMPLERS[name].function(denoise, xT, schedule, levels, torch.randn(1, *SHAPE))
    torch.testing.assert_close(x0, denoise(xT, 9))


@pytest.mark.parametrize("spacing", ["trailing", "leading", "even"])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_levels_decrease_without_repeating(spacing: str, count: int) -> None:
    for steps in range(1, count + 1):
        levels = choose_levels(cosine(count), steps, spacing)
        assert len(levels) == steps
        assert all(a > b for a, b in pairwise(levels))
        assert 0 <= levels[-1] <= levels[0] < count
        assert levels[0] == count - 1 or spacing == "leading"
        assert levels[-1] == 0 or spacing == "trailing" or (steps == 1 and spacing == "even")


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"sampling steps must be from 1 to the 100 noise levels .* got {steps}"):
        choose_levels(cosine(100), steps)


def test_an_unknown_spacing_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="unknown spacing 'odd'; choose from trailing, leading, even"):
        choose_levels(cosine(100), 5, "odd")
