import pytest
import torch
from torch import Tensor

from diffusion_policy.diffusion.guidance import CLIPS, GUIDANCE_SCHEDULES, classifier_free, dynamic_clip, static_clip
from diffusion_policy.diffusion.schedules import cosine

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
