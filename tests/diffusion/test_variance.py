import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.process import Diffusion
from diffusion_policy.diffusion.samplers import Sampler, ddpm
from diffusion_policy.diffusion.schedules import Schedule, choose_levels, cosine, flow, linear
from diffusion_policy.diffusion.variance import BOUND_WEIGHT, LearnedVariance

K = 20


def constant_share(value: float):
    return lambda xt, level: torch.full_like(xt, value)


@pytest.mark.parametrize("steps", [1, 7, K])
def test_the_ends_of_the_share_are_the_two_fixed_variances(steps: int) -> None:
    schedule = linear(K)
    levels = choose_levels(schedule, steps)
    xT, noise = torch.randn(4, 3, dtype=torch.float64), torch.randn(steps, 4, 3, dtype=torch.float64)

    def run(**options) -> Tensor:
        sampler = Sampler(partial(ddpm, **options))
        return sampler(lambda xt, level: torch.tanh(xt), xT, schedule, levels, noise)

    torch.testing.assert_close(run(share=constant_share(0.0)), run())
    torch.testing.assert_close(run(share=constant_share(1.0)), run(large_variance=True))


@pytest.mark.parametrize("schedule", [cosine(K), linear(K), flow(K)], ids=["cosine", "linear", "flow"])
def test_the_terms_are_divergences_of_the_reverse_steps(schedule: Schedule) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, predicted, share, eps = torch.randn(4, K, 3, generator=generator, dtype=torch.float64)
    share = torch.sigmoid(share)
    level = torch.arange(K)
    found = LearnedVariance(schedule).hybrid_term(share, x0, predicted, level) / (BOUND_WEIGHT * K)
    for i in range(1, K):
        alpha, sigma, a, s = schedule.alpha[i], schedule.sigma[i], schedule.alpha[i - 1], schedule.sigma[i - 1]
        added = sigma**2 - (alpha / a) ** 2 * s**2
        posterior = added * s**2 / sigma**2
        xt = alpha * x0[i] + sigma * eps[i]

        def mean(clean: Tensor) -> Tensor:
            return alpha / a * s**2 / sigma**2 * xt + a * added / sigma**2 * clean  # noqa: B023

        learned = torch.exp(share[i] * added.log() + (1 - share[i]) * posterior.log())
        expected = kl_divergence(Normal(mean(x0[i]), posterior.sqrt()), Normal(mean(predicted[i]), learned.sqrt()))
        torch.testing.assert_close(found[i], expected.mean(), rtol=1e-4, atol=1e-6)
    variance = LearnedVariance(schedule)
    small, large = variance.get_buffer("small")[0], variance.get_buffer("large")[0]
    spread = torch.exp(share[0] * large.log() + (1 - share[0]) * small.log()).sqrt()
    torch.testing.assert_close(found[0], -Normal(predicted[0], spread).log_prob(x0[0]).mean(), rtol=1e-4, atol=1e-6)


class Constants(nn.Module):
    """A network of two numbers: what it predicts and what it says of the variance."""

    def __init__(self) -> None:
        super().__init__()
        self.prediction = nn.Parameter(torch.zeros(1))
        self.raw = nn.Parameter(torch.zeros(1))

    def forward(self, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        return torch.cat([self.prediction.expand_as(xt), self.raw.expand_as(xt)], dim=-1)


def test_the_bound_teaches_the_variance_and_leaves_the_prediction_alone() -> None:
    gradients = {}
    for learned in (True, False):
        network = Constants()
        diffusion = Diffusion(cosine(K), PREDICTIONS["noise"], learn_variance=learned)
        call = network if learned else lambda *inputs, network=network: network(*inputs)[..., :2]
        x0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
        noising = diffusion.draw(x0.shape, torch.Generator().manual_seed(0))
        diffusion.loss(call, x0, torch.zeros(64, 0), noising).mean().backward()
        gradients[learned] = network
    torch.testing.assert_close(gradients[True].prediction.grad, gradients[False].prediction.grad)
    assert gradients[True].raw.grad.abs() > 0
    assert not gradients[False].raw.grad.any()


def test_training_finds_the_share_that_fits_the_error() -> None:
    # standard normal data with the exact prediction E[eps | xt] = sigma xt: the best variance of a step is known
    schedule = linear(K)
    diffusion = Diffusion(schedule, PREDICTIONS["noise"], learn_variance=True)
    shares = nn.Parameter(torch.zeros(K))

    def network(xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        return torch.cat([diffusion.get_buffer("sigma")[level, None] * xt, shares[level, None].expand_as(xt)], dim=-1)

    optimizer = torch.optim.Adam([shares], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        optimizer.zero_grad()
        x0 = torch.randn(2048, 1, generator=generator)
        diffusion.loss(network, x0, torch.zeros(2048, 0), diffusion.draw(x0.shape, generator)).mean().backward()
        optimizer.step()
    variance = diffusion.variance
    assert variance is not None
    large, small, gain = (variance.get_buffer(name) for name in ("large", "small", "gain"))
    best = (
        small + gain**2 * schedule.sigma.float() ** 2
    )  # posterior + what is not known of x0, whose variance is sigma²
    found = torch.exp((shares + 1) / 2 * large.log() + (1 - shares) / 2 * small.log())
    torch.testing.assert_close(found[2:].log(), best[2:].log(), rtol=0, atol=0.05)


def test_noise_prediction_without_signal_cannot_learn_a_variance() -> None:
    with pytest.raises(ValueError, match="learn-variance with noise prediction needs a schedule that holds signal"):
        Diffusion(flow(K), PREDICTIONS["noise"], learn_variance=True)
    assert math.isfinite(Diffusion(flow(K), PREDICTIONS["flow"], learn_variance=True).get_buffer("alpha").sum())
