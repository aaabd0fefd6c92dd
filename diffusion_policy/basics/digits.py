"""Numbers as people read them: three digits that count, plain from 0.0001 to a million. Imports nothing."""

import math

SMALLEST, LARGEST = 1e-4, 1e6
"""Beyond these a number has an exponent."""


def three_digits(value: float, keep_zeros: bool = False) -> str:
    """A number rounded to three digits, or to a whole number from 1000 on: 0.0123, 12.3, 1234, 1.23e-5, 1.2e7.

    `keep_zeros`: all three are written, 0.100 for 0.1, so that what changes does not change its width.
    """
    if not math.isfinite(value):
        return str(value)
    value += 0.0  # -0 is 0
    mantissa, exponent = f"{value:.2e}".split("e")  # rounds: 999.6 has the size of 1000
    size = abs(float(f"{mantissa}e{exponent}"))
    if size and not SMALLEST <= size < LARGEST:
        return f"{mantissa if keep_zeros else _drop_zeros(mantissa)}e{int(exponent)}"
    text = f"{value:.{max(0, 2 - int(exponent))}f}"
    return text if keep_zeros else _drop_zeros(text)


def _drop_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
