import pytest
import torch
from diffusers import DDIMScheduler

from diffusion_policy.schedules import SCHEDULES, Schedule, cosine, from_betas, linear


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("levels", [5, 16, 100, 1000])
def test_signal_decreases_and_variance_is_preserved(name: str, levels: int) -> None:
    schedule = SCHEDULES[name](levels)
    assert len(schedule) == levels
    assert (schedule.alpha.diff() < 0).all()
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(levels, dtype=torch.float64))


@pytest.mark.parametrize("levels", [16, 100, 1000])
def test_the_last_level_is_noise_for_any_number_of_levels(levels: int) -> None:
    for make in SCHEDULES.values():
        assert make(levels).alpha[-1] < 0.02


def test_cosine_equals_diffusers() -> None:
    reference = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(cosine(100).alpha.float() ** 2, reference, rtol=1e-5, atol=1e-7)


def test_linear_equals_diffusers() -> None:
    reference = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02).alphas_cumprod
    torch.testing.assert_close(linear(1000).alpha.float() ** 2, reference, rtol=1e-4, atol=1e-7)
    reference = DDIMScheduler(50, beta_start=1e-3, beta_end=0.1).alphas_cumprod
    torch.testing.assert_close(linear(50, 1e-3, 0.1).alpha.float() ** 2, reference, rtol=1e-5, atol=1e-7)


def test_constant_beta_gives_the_powers_of_what_remains() -> None:
    schedule = from_betas(torch.full((10,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(
        schedule.alpha[[0, 4, 9]] ** 2, torch.tensor([0.9, 0.59049, 0.3486784401], dtype=torch.float64)
    )


def test_a_schedule_that_does_not_decrease_is_refused() -> None:
    with pytest.raises(ValueError, match="must decrease"):
        Schedule(torch.tensor([0.5, 0.9]), torch.tensor([0.8, 0.4]))
