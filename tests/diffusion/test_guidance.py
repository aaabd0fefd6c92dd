import pytest
import torch
from torch import Tensor

from diffusion_policy.diffusion.guidance import (
    CLIPS,
    GUIDANCE_SCHEDULES,
    agreeing,
    classifier_free,
    dynamic_clip,
    static_clip,
)
from diffusion_policy.diffusion.inpainting import inpainted
from diffusion_policy.diffusion.samplers import SAMPLERS, Denoise
from diffusion_policy.diffusion.schedules import Schedule, choose_levels, cosine, flow

K = 10
X0_COND, X0_UNCOND = torch.randn(2, 3, 8, 2, dtype=torch.float64)


def both(xt: Tensor, level: int) -> Tensor:
    """A denoiser of a doubled batch."""
    assert torch.equal(xt[:3], xt[3:])
    return torch.cat([X0_COND, X0_UNCOND])


def test_no_weight_is_the_conditional_denoiser_and_minus_one_the_unconditional() -> None:
    xt = torch.randn(3, 8, 2)
    assert torch.equal(classifier_free(both, torch.zeros(K))(xt, 4), X0_COND)
    torch.testing.assert_close(classifier_free(both, -torch.ones(K))(xt, 4), X0_UNCOND)


def test_guidance_mixes_the_noise_as_the_paper_says() -> None:
    schedule, level, w = cosine(K), 4, 2.5
    alpha, sigma = schedule.alpha[level], schedule.sigma[level]
    xt = torch.randn(3, 8, 2, dtype=torch.float64)
    eps_cond, eps_uncond = ((xt - alpha * x0) / sigma for x0 in (X0_COND, X0_UNCOND))
    eps = (1 + w) * eps_cond - w * eps_uncond
    x0 = classifier_free(both, torch.full((K,), w))(xt, level)
    torch.testing.assert_close(x0, (xt - sigma * eps) / alpha)


def test_the_weight_may_differ_from_level_to_level() -> None:
    weights = torch.arange(K, dtype=torch.float64)
    xt = torch.randn(3, 8, 2)
    for level in (0, 3):
        expected = (1 + level) * X0_COND - level * X0_UNCOND
        torch.testing.assert_close(classifier_free(both, weights)(xt, level), expected)


@pytest.mark.parametrize("levels", [2, 10, 100])
def test_guidance_schedules_are_shares_of_the_weight(levels: int) -> None:
    tables = {name: make(levels) for name, make in GUIDANCE_SCHEDULES.items()}
    for table in tables.values():
        assert table.shape == (levels,)
        assert ((table >= 0) & (table <= 1)).all()
    assert (tables["constant"] == 1).all()
    assert tables["falling"][-1] == tables["rising"][0] == 1
    assert tables["falling"][0] == tables["rising"][-1] == 0


def test_the_middle_is_three_fifths() -> None:
    assert GUIDANCE_SCHEDULES["middle"](100)[[0, -1]].sum() == 0
    assert GUIDANCE_SCHEDULES["middle"](100).mean() == pytest.approx(0.6)


def test_static_clipping_keeps_x0_in_range() -> None:
    x0 = static_clip(lambda xt, level: 3 * xt)(torch.tensor([[0.1, -0.5, 2.0]]), 0)
    torch.testing.assert_close(x0, torch.tensor([[0.3, -1.0, 1.0]]))


def test_dynamic_clipping_scales_only_rows_that_leave_the_range() -> None:
    inside, outside = torch.linspace(-0.9, 0.9, 101), torch.linspace(-4, 4, 101)
    x0 = dynamic_clip(lambda xt, level: xt, share=0.9)(torch.stack([inside, outside]), 0)
    assert torch.equal(x0[0], inside)
    limit = outside.abs().quantile(0.9)
    torch.testing.assert_close(x0[1], outside.clamp(-limit, limit) / limit)
    assert x0.abs().max() <= 1


def test_no_clipping_changes_nothing() -> None:
    assert CLIPS["none"](both) is both


RHO, DEVIATION = 0.8, 0.5
"""Of two steps of Gaussian data: their correlation, and the deviation of each."""


def gaussian_denoiser(schedule: Schedule) -> Denoise:
    """E[x0 | xt] of sequences (B, 2, 1)."""
    covariance = DEVIATION**2 * torch.tensor([[1, RHO], [RHO, 1]], dtype=torch.float64)

    def denoise(xt: Tensor, level: int) -> Tensor:
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return (xt[..., 0] @ gain.T)[..., None]

    return denoise


@pytest.mark.parametrize("schedule", [cosine(100), flow(100)], ids=["cosine", "flow"])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm-solver-2m"])
def test_what_is_guided_to_a_known_step_has_the_posterior_of_the_other(schedule: Schedule, sampler: str) -> None:
    """Given the first of two steps y, the second is normal around RHO y with deviation DEVIATION sqrt(1 - RHO²). The
    guidance takes the data as uncorrelated, so it is near that, and nearer the more β allows."""
    y, rows = 0.6, 3000
    sequence = torch.tensor([y, 0.0], dtype=torch.float64)[None, :, None].expand(rows, 2, 1)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)[None, :, None].expand(rows, 2, 1)
    xT = torch.randn(rows, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = choose_levels(schedule, 40, "trailing", True)
    found = []
    for strength in (0.0, 5.0, 1000.0):
        denoise = gaussian_denoiser(schedule)
        guided = agreeing(denoise, sequence, weights, schedule.alpha, schedule.sigma, strength, DEVIATION)
        found.append(SAMPLERS[sampler](guided, xT, schedule, levels)[..., 0])
    first, second = torch.stack(found).mean(dim=1).unbind(1)
    assert abs(first[0]) < 0.05  # no weight, no change
    assert float(first[1]) == pytest.approx(y, abs=0.12)
    assert float(first[2]) == pytest.approx(y, abs=0.02)
    assert float(second[1]) == pytest.approx(RHO * y, abs=0.13)
    assert float(second[2]) == pytest.approx(RHO * y, abs=0.05)
    assert float(found[2][:, 1].std()) == pytest.approx(DEVIATION * (1 - RHO**2) ** 0.5, abs=0.06)


def test_guidance_goes_along_the_gradient_of_the_distance() -> None:
    schedule, level = cosine(K), 4
    alphas, sigmas = schedule.alpha, schedule.sigma
    mix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoise(xt: Tensor, level: int) -> Tensor:
        return torch.tanh(xt.flatten(1) @ mix).reshape(xt.shape)

    xt, sequence = torch.randn(2, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)[None, :, None]
    x0 = denoise(xt, level)
    step = torch.zeros_like(xt)
    for i in range(6):  # -½ W |Y - x0|², by finite differences
        moved = torch.zeros(6, dtype=torch.float64)
        moved[i] = 1e-6
        ends = [denoise(xt + sign * moved.reshape(xt.shape), level) for sign in (1, -1)]
        losses = [-(weights * (sequence - end) ** 2).sum() / 2 for end in ends]
        step.view(-1)[i] = (losses[0] - losses[1]) / 2e-6
    pull = sigmas[level] * min(3.0, float((alphas[level] ** 2 + sigmas[level] ** 2) / (alphas[level] * sigmas[level])))
    found = agreeing(denoise, sequence, weights, alphas, sigmas, 3.0)(xt, level)
    torch.testing.assert_close(found, x0 + pull * step, rtol=1e-5, atol=1e-7)


def test_guidance_of_no_weight_leaves_x0_as_it_is_also_where_nothing_is_recorded() -> None:
    schedule = cosine(K)
    xt = torch.randn(2, 3, 2)
    with torch.no_grad():
        found = agreeing(lambda x, _: x.sin(), xt, torch.zeros(2, 3, 1), schedule.alpha, schedule.sigma, 5.0)(xt, 4)
    assert torch.equal(found, xt.sin())
    assert not found.requires_grad


def test_known_steps_are_put_in_place() -> None:
    known = torch.tensor([True, False, True])[None, :, None]
    x0 = inpainted(lambda xt, _: xt, torch.full((2, 3, 1), 7.0), known)(torch.zeros(2, 3, 1), 0)
    assert x0[..., 0].tolist() == [[7, 0, 7]] * 2
