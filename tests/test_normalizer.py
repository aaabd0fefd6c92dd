import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusion_policy.datasets.statistics import measure
from diffusion_policy.normalizer import Normalizer, limits, moments

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
