import pytest
import torch
from diffusers.training_utils import compute_snr

from diffusion_policy.diffusion.prediction import PREDICTIONS, loss_weight
from diffusion_policy.diffusion.schedules import SCHEDULES, constant, cosine


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_target_decodes_to_what_was_noised(name: str, schedule: str) -> None:
    table = SCHEDULES[schedule](50)
    levels = torch.arange(49)  # a flow's last level holds no signal
    x0, eps = torch.randn(2, 49, 8, 2, dtype=torch.float64)
    alpha, sigma = table.alpha[levels, None, None], table.sigma[levels, None, None]
    output = PREDICTIONS[name].target(x0, eps, alpha, sigma)
    found_x0, found_eps = PREDICTIONS[name].decode(output, alpha * x0 + sigma * eps, alpha, sigma)
    torch.testing.assert_close(found_x0, x0)
    torch.testing.assert_close(found_eps, eps)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_any_output_decodes_to_a_pair_that_makes_up_xt(name: str, schedule: str) -> None:
    table = SCHEDULES[schedule](50)
    output, xt = torch.randn(2, 49, 8, dtype=torch.float64)
    alpha, sigma = table.alpha[:49, None], table.sigma[:49, None]
    x0, eps = PREDICTIONS[name].decode(output, xt, alpha, sigma)
    torch.testing.assert_close(alpha * x0 + sigma * eps, xt)


@pytest.mark.parametrize("name", [name for name in PREDICTIONS if not PREDICTIONS[name].needs_signal])
def test_predictions_that_need_no_signal_decode_pure_noise(name: str) -> None:
    x0, eps = torch.randn(2, 8, dtype=torch.float64)
    alpha, sigma = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    output = PREDICTIONS[name].target(x0, eps, alpha, sigma)
    torch.testing.assert_close(PREDICTIONS[name].decode(output, eps, alpha, sigma)[0], x0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_gain_is_how_an_error_in_the_output_reaches_eps(name: str) -> None:
    table = SCHEDULES["cosine"](20)
    output, xt = torch.zeros(2, 20, dtype=torch.float64)
    shifted = PREDICTIONS[name].decode(output + 1, xt, table.alpha, table.sigma)[1]
    plain = PREDICTIONS[name].decode(output, xt, table.alpha, table.sigma)[1]
    torch.testing.assert_close((shifted - plain).abs(), PREDICTIONS[name].eps_gain(table.alpha, table.sigma))


def test_min_snr_weights_are_those_of_the_paper() -> None:
    table = cosine(100)
    snr = (table.alpha / table.sigma) ** 2
    for name, expected in {
        "noise": snr.clamp(max=5) / snr,
        "sample": snr.clamp(max=5),
        "velocity": snr.clamp(max=5) / (snr + 1),
    }.items():
        torch.testing.assert_close(loss_weight(PREDICTIONS[name], table.alpha, table.sigma, 5.0), expected)
    assert torch.equal(loss_weight(PREDICTIONS["sample"], table.alpha, table.sigma), torch.ones(100).double())

    class Reference:
        alphas_cumprod = table.alpha**2

    torch.testing.assert_close(compute_snr(Reference, torch.arange(100)), snr.float())


def test_min_snr_weights_are_finite_without_signal() -> None:
    table = SCHEDULES["flow"](10)
    for prediction in PREDICTIONS.values():
        assert torch.isfinite(loss_weight(prediction, table.alpha, table.sigma, 5.0)).all()


def test_the_loss_of_a_prediction_by_hand() -> None:
    table = constant(10, 0.1)
    alpha, sigma, eps = table.alpha[4], table.sigma[4], torch.tensor(0.3, dtype=torch.float64)
    target = PREDICTIONS["noise"].target(torch.tensor(2.0), eps, alpha, sigma)
    assert float((0.4 - target) ** 2) == pytest.approx(0.01)
    assert float((-0.3 - target) ** 2) == pytest.approx(0.36)
