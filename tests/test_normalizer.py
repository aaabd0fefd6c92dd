import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusion_policy.datasets.statistics import measure
from diffusion_policy.normalizer import Normalizer, limits, moments, quantiles

rows = arrays(np.float32, (12, 3), elements=st.floats(-1000, 1000, width=32))


@given(rows, st.sampled_from([limits, moments]))
def test_unnormalize_undoes_normalize(data: np.ndarray, statistics) -> None:
    normalizer = Normalizer({"x": (3,)})
    normalizer.fit({"x": measure(data)}, statistics)
    x = torch.from_numpy(data)
    torch.testing.assert_close(normalizer.unnormalize("x", normalizer.normalize("x", x)), x, rtol=1e-4, atol=1e-3)


@given(rows)
def test_limits_map_the_data_into_plus_minus_one(data: np.ndarray) -> None:
    normalizer = Normalizer({"x": (3,)})
    normalizer.fit({"x": measure(data)})
    normalized = normalizer.normalize("x", torch.from_numpy(data))
    assert normalized.abs().max() <= 1 + 1e-3


def test_moments_give_mean_zero_and_deviation_one() -> None:
    normalizer = Normalizer({"x": (2,)})
    data = np.random.default_rng(0).normal([3, -5], [0.1, 40], (500, 2))
    normalizer.fit({"x": measure(data)}, moments)
    normalized = normalizer.normalize("x", torch.tensor(data, dtype=torch.float32))
    torch.testing.assert_close(normalized.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)


def test_a_constant_column_is_shifted_but_not_stretched() -> None:
    normalizer = Normalizer({"x": (2,)})
    normalizer.fit({"x": measure(np.array([[7.0, 0.0], [7.0, 2.0]]))})
    assert normalizer.normalize("x", torch.tensor([7.5, 1.0])).tolist() == pytest.approx([0.5, 0.0])


def test_its_numbers_travel_in_the_state_dict() -> None:
    fitted, fresh = Normalizer({"x": (2,)}), Normalizer({"x": (2,)})
    fitted.fit({"x": measure(np.array([[0.0, -4.0], [10.0, 2.0]]))})
    fresh.load_state_dict(fitted.state_dict())
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(fresh.normalize("x", x), fitted.normalize("x", x))


@given(arrays(np.float32, (8, 4), elements=st.floats(-3, 3, width=32)))
def test_angles_become_cosine_and_sine_and_come_back(data: np.ndarray) -> None:
    normalizer = Normalizer({"x": (4,)}, {"x": (1, 3)})
    normalizer.fit({"x": measure(data)})
    x = torch.from_numpy(data)
    normalized = normalizer.normalize("x", x)
    assert normalizer.shapes["x"] == (6,)
    torch.testing.assert_close(normalized[:, 2:], torch.cat([x[:, [1, 3]].cos(), x[:, [1, 3]].sin()], dim=-1))
    torch.testing.assert_close(normalizer.unnormalize("x", normalized), x, rtol=1e-4, atol=1e-3)


def test_an_angle_is_the_same_after_a_full_turn() -> None:
    normalizer = Normalizer({"x": (2,)}, {"x": (0,)})
    x = torch.tensor([[0.3, 1.0]])
    turned = x + torch.tensor([[2 * torch.pi, 0.0]])
    torch.testing.assert_close(normalizer.normalize("x", turned), normalizer.normalize("x", x))
    torch.testing.assert_close(normalizer.unnormalize("x", normalizer.normalize("x", turned)), x)


@pytest.mark.parametrize("angles", [{"x": (4,)}, {"x": (-1,)}, {"x": (1, 1)}, {"y": (0,)}, {"grid": (0,)}])
def test_angles_that_are_not_there_are_refused(angles: dict) -> None:
    with pytest.raises(ValueError, match="angles must name columns of a key, each once"):
        Normalizer({"x": (4,), "grid": (2, 2)}, angles)


def test_quantiles_are_not_stretched_by_outliers() -> None:
    data = np.concatenate([np.linspace(-1, 1, 999), [1000.0]])[:, None]
    normalizer = Normalizer({"x": (1,)})
    normalizer.fit({"x": measure(data)}, quantiles)
    assert normalizer.normalize("x", torch.tensor([0.98])).item() == pytest.approx(1, abs=0.02)


def test_a_key_with_dots_has_buffers_too() -> None:
    normalizer = Normalizer({"observation.state": (2,)})
    normalizer.fit({"observation.state": measure(np.array([[0.0, -4.0], [10.0, 2.0]]))})
    assert normalizer.normalize("observation.state", torch.tensor([10.0, 2.0])).tolist() == [1, 1]
