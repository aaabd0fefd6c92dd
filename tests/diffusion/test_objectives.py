"""Objectives against closed forms: what they learn is known where the data are a point, a Gaussian, or a mixture."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from diffusion_policy.config import PolicyConfig
from diffusion_policy.diffusion.objectives import (
    LEAST_DEVIATION,
    NEAR,
    OBJECTIVES,
    MeanFlow,
    MinimalIterative,
    Mixture,
    Regression,
    Shortcut,
)
from diffusion_policy.diffusion.process import Diffusion, Noising
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.diffusion.schedules import cosine, flow

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.func.jvp

B, T, D, K = 6, 4, 2, 64
DDIM = SAMPLERS["ddim"]


class Known:
    """A network that says what a function does, and keeps what it was asked."""

    def __init__(self, function: Any) -> None:
        self.function, self.asked = function, []

    def __call__(self, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        self.asked.append((xt, level))
        return self.function(xt, level, cond)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(diffusion: Diffusion, rows: int = B, seed: int = 0) -> Noising:
    return diffusion.draw((rows, T, D), torch.Generator().manual_seed(seed))


def sample(diffusion: Diffusion, network: Known, noise: Tensor, steps: int | None = None) -> Tensor:
    """By DDIM, of noise (B, T, D)."""
    cond, sampler = torch.zeros(len(noise), 1), diffusion.adapt(DDIM)
    levels = diffusion.choose_levels(sampler, diffusion.choose_steps(sampler, steps))
    told = diffusion.list_levels(levels)

    def outputs(xt: Tensor, level: int) -> Tensor:
        return network(xt, told[levels.index(level)].expand(len(xt), *told.shape[1:]), cond)

    return diffusion.sample(diffusion.decode(outputs), noise[None], sampler, levels)


def test_regression_learns_the_sequence_from_zeros_and_draws_nothing() -> None:
    diffusion, x0 = Regression(cosine(K)), randn(B, T, D)
    network = Known(lambda xt, level, cond: xt + 0.5)
    assert torch.allclose(
        diffusion.loss(network, x0, torch.zeros(B, 1), drawn(diffusion)), (0.5 - x0).square().mean(dim=(1, 2))
    )
    assert torch.equal(sample(diffusion, network, randn(B, T, D)), torch.full((B, T, D), 0.5))
    assert all(torch.equal(xt, torch.zeros_like(xt)) and (level == K - 1).all() for xt, level in network.asked)


def test_mip_gives_the_second_call_what_the_first_has_said() -> None:
    diffusion, x0, eps = MinimalIterative(cosine(K)), randn(B, T, D), randn(B, T, D, seed=1)
    network = Known(lambda xt, level, cond: torch.where((level == 0)[:, None, None], 2 * xt, xt + 0.3))
    assert torch.allclose(sample(diffusion, network, randn(B, T, D)), torch.full((B, T, D), 0.6))
    (first, _), (second, level) = network.asked
    assert (first == 0).all()
    assert torch.equal(second, torch.full_like(second, 0.3))
    assert (level == 0).all()
    found = diffusion.loss(network, x0, torch.zeros(B, 1), Noising(torch.zeros(B).long(), eps))
    errors = (0.3 - x0).square() / NEAR**2 + (2 * (x0 + (1 - NEAR) * eps) - x0).square() / (1 - NEAR) ** 2
    assert torch.allclose(found, errors.mean(dim=(1, 2)), rtol=1e-5)


def test_a_mixture_has_torchs_likelihood_and_is_chosen_by_its_weights() -> None:
    components = 3
    diffusion, x0 = Mixture(cosine(K), components), randn(B, T, D)
    output = randn(1, T, diffusion.count_outputs(D, 0), seed=2)
    network = Known(lambda xt, level, cond: output.expand(len(xt), -1, -1))
    means, logits = output[..., :-6].unflatten(-1, (components, D))[0].transpose(0, 1), output[0, :, -6:-3].mean(dim=0)
    deviations = LEAST_DEVIATION + torch.nn.functional.softplus(output[0, :, -3:].mean(dim=0))
    expected = MixtureSameFamily(
        Categorical(logits=logits), Independent(Normal(means, deviations[:, None, None].expand_as(means)), 2)
    )
    found = diffusion.loss(network, x0, torch.zeros(B, 1), drawn(diffusion))
    assert torch.allclose(found, -expected.log_prob(x0) / (T * D), rtol=1e-5)
    samples = sample(diffusion, network, randn(20_000, T, D))
    nearest = torch.cdist(samples.flatten(1), means.flatten(1)).argmin(dim=1)
    assert torch.equal(samples, means[nearest])
    shares = torch.bincount(nearest, minlength=components) / len(samples)
    assert torch.allclose(shares, logits.softmax(dim=0), atol=0.01)


@pytest.mark.parametrize("schedule", [flow(K), cosine(K)], ids=["flow", "cosine"])
@pytest.mark.parametrize("kind", [Shortcut, MeanFlow])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_jumps_along_straight_lines_come_to_the_point(schedule: Any, kind: Any, steps: int) -> None:
    """All data at one point: the velocity (z - point) / t is the same all the way."""
    diffusion, point = kind(schedule), 0.7
    network = Known(lambda z, level, cond: (z - point) / (level[:, :1, None] / K))
    assert torch.allclose(sample(diffusion, network, randn(B, T, D), steps), torch.full((B, T, D), point), atol=1e-4)
    noising, x0 = drawn(diffusion, 200), torch.full((200, T, D), point)
    assert diffusion.loss(network, x0, torch.zeros(200, 1), noising).max() < 1e-5


def gaussian(deviation: float = 0.5) -> tuple[Any, Any]:
    """The average velocity of N(0, deviation²) in a flow's coordinates, by jumps as the network is told them; and the
    velocity at a level of the flow schedule."""

    def spread(t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * deviation**2 + t**2).sqrt()

    def average(z: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        t, r = (level[:, 0] / K)[:, None, None], ((level[:, 0] - level[:, 1]) / K)[:, None, None]
        at_once = z * (t - (1 - t) * deviation**2) / spread(t) ** 2
        return torch.where(t == r, at_once, z * (1 - spread(r) / spread(t)) / (t - r).where(t > r, 1))

    def velocity(xt: Tensor, level: Tensor) -> Tensor:
        t = ((level + 1) / K)[:, None, None]
        return xt * (t - (1 - t) * deviation**2) / spread(t) ** 2

    return average, velocity


def test_the_average_velocity_of_a_gaussian_is_what_meanflow_and_shortcuts_settle_on() -> None:
    average, velocity = gaussian()
    for kind, most in ((MeanFlow, 1e-4), (Shortcut, 2e-3)):  # the halves of the shortest shortcut are no jumps
        diffusion = kind(flow(K))
        network, x0 = Known(average), 0.5 * randn(500, T, D)
        found = diffusion.loss(network, x0, torch.zeros(500, 1), drawn(diffusion, 500), velocity)
        assert found.max() < most
        wrong = Known(lambda *asked: 1.1 * average(*asked))
        off = diffusion.loss(wrong, x0, torch.zeros(500, 1), drawn(diffusion, 500), velocity)
        assert off.mean() > 1e-3 + 10 * found.mean()
    noise = randn(500, T, D, seed=3)
    for steps in (1, 2, 4):  # every number of steps gives the same
        assert torch.allclose(sample(Shortcut(flow(K)), Known(average), noise, steps), 0.5 * noise, atol=1e-5)


def test_what_is_drawn_covers_jumps_of_all_lengths() -> None:
    shortcut, meanflow = Shortcut(flow(K)), MeanFlow(flow(K))
    start, middle, end = drawn(shortcut, 4000).level.unbind(-1)
    jumps = start != end
    assert jumps.float().mean() == pytest.approx(0.25, abs=0.03)
    assert {K // n for n in (1, 2, 4, 8, 16, 32)} == {*(start - end)[jumps].tolist()}
    assert torch.equal(2 * (start - middle)[jumps], (start - end)[jumps])
    assert (end[jumps] == -1).any()
    start, end = drawn(meanflow, 4000).level.unbind(-1)
    assert (start == end).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (end <= start).all()
    assert end.min() == -1


def test_other_numbers_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="trained for sampling steps 1; got 16"):
        Regression(cosine(K)).choose_steps(DDIM, 16)
    with pytest.raises(ValueError, match="trained for sampling steps 1, 2, 4, 8, 16, 32; got 3"):
        Shortcut(cosine(K)).choose_steps(DDIM, 3)
    with pytest.raises(ValueError, match="shortcuts are sampled in 1, 2, 4, 8, 16, 32 steps; got 6"):
        Shortcut(cosine(K), 6)
    usual = {name: make(cosine(K), PolicyConfig()).choose_steps(DDIM, None) for name, make in OBJECTIVES.items()}
    assert usual == {
        "denoising": 16,
        "autoencoding": 16,
        "classifying": 16,
        "regression": 1,
        "mip": 2,
        "mixture": 1,
        "shortcut": 1,
        "meanflow": 1,
    }
