import math

import pytest

from diffusion_policy.basics.text import three_digits


@pytest.mark.parametrize(
    "value, text",
    [
        (999.6, "1000"),
        (-999.6, "-1000"),
        (99.96, "100"),
        (9.996, "10"),
        (0.0009996, "0.001"),
        (0.0001234, "0.000123"),
        (0.00009996, "0.0001"),
        (0.00001234, "1.23e-5"),
        (1e-9, "1e-9"),
        (1234.5, "1234"),
        (99_999.7, "100000"),
        (999_400.0, "999400"),
        (999_999.7, "1e6"),
        (12_345_678.0, "1.23e7"),
        (1e12, "1e12"),
        (0.0, "0"),
        (-0.0, "0"),
        (100, "100"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_a_number_has_three_digits_and_an_exponent_only_far_from_one(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(
    "value, text",
    [(0.1, "0.100"), (999.6, "1000"), (99.96, "100"), (1.2e-5, "1.20e-5"), (0.0, "0.00"), (12.34, "12.3")],
)
def test_zeros_that_count_are_kept_where_they_are_asked_for(value: float, text: str) -> None:
    assert three_digits(value, keep_zeros=True) == text
