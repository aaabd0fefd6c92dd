import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusion_policy.datasets.statistics import measure
from diffusion_policy.normalizer import Normalizer, is_flat, limits, moments, quantiles

rows = arrays(np.float32, (12, 3), elements=st.floats(-1000, 1000, width=32))


@given(rows, st.sampled_from([limits, moments]))
def test_unnormalize_undoes_normalize(data: np.ndarray, statistics) -> None:
    normalizer = Normalizer({"x": (3,)})
    normalizer.fit({"x": measure(data)}, statistics)
    x = torch.from_numpy(data).double()
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


def test_a_constant_column_becomes_zero_and_whatever_comes_back_is_the_constant() -> None:
    for normalization in (limits, moments, quantiles):
        normalizer = Normalizer({"x": (2,)})
        normalizer.fit({"x": measure(np.array([[0.1, 0.0], [0.1, 2.0]]))}, normalization)
        assert normalizer.normalize("x", torch.tensor([7.5, 1.0])).tolist() == [0.0, 0.0]
        assert normalizer.unnormalize("x", torch.tensor([3.0, 0.0])).tolist() == [0.1, 1.0]


@given(st.sampled_from([limits, moments, quantiles]), st.integers(-30, 30), st.sampled_from([np.float32, np.float64]))
def test_the_unit_does_not_matter(normalization, exponent: int, dtype: type) -> None:
    x = np.random.default_rng(0).normal(size=(200, 2))
    rows = (10.0**exponent * x).astype(dtype)
    here, there = Normalizer({"x": (2,)}), Normalizer({"x": (2,)})
    here.fit({"x": measure(x)}, normalization)
    there.fit({"x": measure(rows)}, normalization)
    normalized = there.normalize("x", torch.from_numpy(rows))
    torch.testing.assert_close(normalized, here.normalize("x", torch.from_numpy(x)), rtol=1e-4, atol=1e-4)
    back = there.unnormalize("x", normalized) / 10.0**exponent
    torch.testing.assert_close(back, torch.from_numpy(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtype, moves, small", [(np.float16, 4, 0.9), (np.float32, 5e-4, 1e-4), (np.float64, 1e-8, 2e-13)]
)
def test_a_column_is_constant_within_the_rounding_of_its_type(dtype: type, moves: float, small: float) -> None:
    varies, rounds = (measure((1000 + np.array([[0.0], [by]])).astype(dtype)) for by in (moves, small))
    assert not varies.constant
    assert rounds.constant


def test_whole_numbers_are_exact() -> None:
    statistics = measure(np.array([[2**40, 5], [2**40 + 1, 5]]))
    assert statistics.constant.tolist() == [False, True]


@pytest.mark.parametrize("normalization", [moments, quantiles])
def test_a_column_that_hardly_ever_varies_is_not_stretched_beyond_its_limits(normalization) -> None:
    gripper = np.zeros((1000, 1), np.float32)
    gripper[7] = 0.04
    statistics = measure(gripper)
    assert is_flat(statistics, quantiles)
    assert not is_flat(statistics, moments)
    normalizer = Normalizer({"x": (1,)})
    normalizer.fit({"x": statistics}, normalization)
    normalized = normalizer.normalize("x", torch.from_numpy(gripper))
    assert (normalized[7] - normalized[0]).item() == pytest.approx(2 if normalization is quantiles else 31.6, rel=0.01)


def test_small_moves_at_large_positions_are_still_there() -> None:
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)[:, None] + 5.4e6
    normalizer = Normalizer({"x": (1,)})
    normalizer.fit({"x": measure(x.numpy())})
    normalized = normalizer.normalize("x", x)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized[:, 0], torch.linspace(-1, 1, 1001), atol=1e-6, rtol=0)
    torch.testing.assert_close(normalizer.unnormalize("x", normalized), x, atol=1e-6, rtol=0)


def test_an_angle_of_many_turns_is_still_exact() -> None:
    normalizer = Normalizer({"x": (1,)}, {"x": (0,)})
    angle = 2 * math.pi * 100_000 + 0.3
    seen = normalizer.normalize("x", torch.tensor([angle], dtype=torch.float64))
    torch.testing.assert_close(seen, torch.tensor([math.cos(0.3), math.sin(0.3)]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("largest, normalization", [(np.nan, limits), (np.inf, limits), (1e308, moments)])
def test_numbers_that_cannot_be_normalized_are_refused(largest: float, normalization) -> None:
    statistics = measure(np.array([[-1e308], [largest]]))
    with pytest.raises(ValueError, match="x holds NaN, infinity, or numbers too large to be normalized"):
        Normalizer({"x": (1,)}).fit({"x": statistics}, normalization)


def test_a_device_without_float64_computes_in_float32_and_saves_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_policy.normalizer.WITHOUT_FLOAT64", ("cpu",))
    normalizer = Normalizer({"x": (1,)})
    normalizer.fit({"x": measure(np.array([[1.0], [3.0]]))})
    normalizer.to("cpu")
    assert normalizer.precision == torch.float32
    assert normalizer.unnormalize("x", torch.tensor([1.0])).dtype == torch.float32
    saved = normalizer.state_dict()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float64}
    normalizer.load_state_dict(saved)
    assert normalizer.normalize("x", torch.tensor([3.0])).item() == 1


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
    x = torch.from_numpy(data).double()
    normalized = normalizer.normalize("x", x)
    assert normalizer.shapes["x"] == (6,)
    circle = torch.cat([x[:, [1, 3]].cos(), x[:, [1, 3]].sin()], dim=-1)
    torch.testing.assert_close(normalized[:, 2:], circle.float())
    torch.testing.assert_close(normalizer.unnormalize("x", normalized), x, rtol=1e-4, atol=1e-3)


def test_an_angle_is_the_same_after_a_full_turn() -> None:
    normalizer = Normalizer({"x": (2,)}, {"x": (0,)})
    x = torch.tensor([[0.3, 1.0]], dtype=torch.float64)
    turned = x + torch.tensor([[2 * torch.pi, 0.0]])
    torch.testing.assert_close(normalizer.normalize("x", turned), normalizer.normalize("x", x))
    torch.testing.assert_close(normalizer.unnormalize("x", normalizer.normalize("x", turned)), x, atol=1e-6, rtol=0)


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
