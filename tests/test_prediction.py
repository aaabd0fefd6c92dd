import pytest
import torch

from diffusion_policy.prediction import PREDICTIONS


@pytest.mark.parametrize("name", PREDICTIONS)
def test_decoding_the_target_gives_back_clean_sequence_and_noise(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn((2, 5, 8, 2), generator=generator, dtype=torch.float64)
    alpha = torch.linspace(0.05, 0.99, 5, dtype=torch.float64)[:, None, None]
    sigma = (1 - alpha**2).sqrt()
    output = PREDICTIONS[name].target(x0, eps, alpha, sigma)
    found_x0, found_eps = PREDICTIONS[name].decode(output, alpha * x0 + sigma * eps, alpha, sigma)
    torch.testing.assert_close(found_x0, x0)
    torch.testing.assert_close(found_eps, eps)
