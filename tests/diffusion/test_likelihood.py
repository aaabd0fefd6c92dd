"""The bound and the score where both are known: Gaussian data and a mixture of Gaussians."""

import math

import pytest
import torch
from torch import Tensor

from diffusion_policy.diffusion.likelihood import score, variational_bound
from diffusion_policy.diffusion.samplers import Denoise
from diffusion_policy.diffusion.schedules import SCHEDULES, Schedule, choose_levels, cosine

MEAN, DEVIATION = 0.7, 0.3
CENTERS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
WIDTH = 0.25


def mixture(schedule: Schedule, level: int) -> torch.distributions.MixtureSameFamily:
    """The distribution of xt at one level when x0 is the mixture."""
    alpha, sigma = schedule.alpha[level], schedule.sigma[level]
    parts = torch.distributions.Normal(alpha * CENTERS, (alpha**2 * WIDTH**2 + sigma**2).sqrt().expand(3))
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(SHARES), parts)


def mixture_denoiser(schedule: Schedule) -> Denoise:
    """E[x0 | xt] by Bayes' rule over the parts, without any score."""

    def denoise(xt: Tensor, level: int) -> Tensor:
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        parts = mixture(schedule, level).component_distribution
        weights = torch.softmax(parts.log_prob(xt[..., None]) + SHARES.log(), dim=-1)
        gain = alpha * WIDTH**2 / (alpha**2 * WIDTH**2 + sigma**2)
        means = CENTERS + gain * (xt[..., None] - alpha * CENTERS)
        return (weights * means).sum(dim=-1)

    return denoise


def gaussian_denoiser(schedule: Schedule) -> Denoise:
    def denoise(xt: Tensor, level: int) -> Tensor:
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        return MEAN + gain * (xt - alpha * MEAN)

    return denoise


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_score_is_the_gradient_of_the_log_density_of_a_mixture(name: str) -> None:
    schedule = SCHEDULES[name](50)
    for level in (0, 10, 25, 49):
        xt = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
        (analytic,) = torch.autograd.grad(mixture(schedule, level).log_prob(xt).sum(), xt)
        found = score(mixture_denoiser(schedule), xt.detach(), level, schedule)
        torch.testing.assert_close(found, analytic, rtol=1e-9, atol=1e-9)


def expected_bound(schedule: Schedule, levels: list[int]) -> Tensor:
    """Prior and terms on average over Gaussian data, in closed form, (1 + levels,)."""
    alpha, sigma = schedule.alpha[levels], schedule.sigma[levels]
    snr = (alpha / sigma) ** 2
    error = DEVIATION**2 * sigma**2 / (alpha**2 * DEVIATION**2 + sigma**2)  # variance of x0 given xt
    steps = snr.diff() / 2 * error[:-1]
    last = snr[-1] / 2 * error[-1] + torch.log(2 * math.pi / snr[-1]) / 2
    power = MEAN**2 + DEVIATION**2
    prior = (alpha[0] ** 2 * power + sigma[0] ** 2 - 1 - 2 * sigma[0].log()) / 2
    return torch.cat([prior[None], steps, last[None]])


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_every_term_of_the_bound_is_that_of_gaussian_data(steps: int) -> None:
    schedule, count = cosine(100), 20_000
    levels = choose_levels(schedule, steps)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn((1 + steps, count), generator=generator, dtype=torch.float64)
    x0 = MEAN + DEVIATION * draws[0]
    bound = variational_bound(gaussian_denoiser(schedule), x0[:, None], schedule, levels, draws[1:, :, None])
    found = torch.cat([bound.prior[None], bound.terms]).mean(dim=1)
    torch.testing.assert_close(found, expected_bound(schedule, levels), rtol=0.05, atol=1e-3)
    assert bound.dimensions == 1
    torch.testing.assert_close(bound.bits_per_dimension, bound.nats / math.log(2))


def test_the_bound_is_above_the_entropy_and_comes_near_it_with_many_levels() -> None:
    entropy = 0.5 * math.log(2 * math.pi * math.e * DEVIATION**2)
    gaps = []
    for levels in (10, 100, 1000):
        log_snr = torch.linspace(12, -12, levels, dtype=torch.float64)
        schedule = Schedule(torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt())
        gaps.append(float(expected_bound(schedule, choose_levels(schedule, levels)).sum()) - entropy)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < gaps[1] / 5 < 0.2  # it falls as 1 / K


def test_bits_count_every_number_of_a_sequence() -> None:
    schedule = cosine(20)
    x0 = torch.full((3, 8, 2), MEAN, dtype=torch.float64)
    noise = torch.zeros(20, 3, 8, 2, dtype=torch.float64)
    bound = variational_bound(gaussian_denoiser(schedule), x0, schedule, choose_levels(schedule, 20), noise)
    assert bound.dimensions == 16
    assert bound.terms.shape == (20, 3)
    single = variational_bound(
        gaussian_denoiser(schedule), x0[:, :1, 0], schedule, choose_levels(schedule, 20), noise[:, :, :1, 0]
    )
    torch.testing.assert_close(bound.bits_per_dimension, single.bits_per_dimension)
