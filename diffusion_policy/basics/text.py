"""Text of unknown origin (a file, a simulator, an error) as one line, safe for a terminal; numbers with three digits.

Imports only the standard library.
"""

import math
import traceback
import unicodedata

OBEYED = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
"""Unicode categories of what is not shown but acted upon: control characters, reversed writing, line separators."""
LONGEST = 500
"""Characters of a line."""
SMALLEST, LARGEST = 1e-4, 1e6
"""Beyond these a number is written with an exponent."""


def printable(text: object) -> str:
    """Text as one line in which whatever a terminal would obey is spelled out, as in \\x1b; tabs stay."""
    return "".join(
        character
        if character == "\t" or unicodedata.category(character) not in OBEYED
        else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def one_line(text: str, longest: int = LONGEST) -> str:
    """Text as one printable line of at most so many characters."""
    short = printable(" ".join(text[: 4 * longest].split()))
    return short if len(short) <= longest and len(text) <= 4 * longest else f"{short[: longest - 4]} ..."


def error_message(error: BaseException) -> str:
    """What an error says, as one line; also where it cannot."""
    try:
        return one_line(str(error))
    except Exception:
        return "its message cannot be shown"


def error_line(error: BaseException) -> str:
    """An error's type and message as one line."""
    name, message = one_line(type(error).__name__, 100), error_message(error)
    return f"{name}: {message}" if message else name


def error_line_with_place(error: BaseException) -> str:
    """As `error_line`, with the file and line where it was raised."""
    place = traceback.extract_tb(error.__traceback__)
    return f"{error_line(error)} ({one_line(place[-1].filename)}:{place[-1].lineno})" if place else error_line(error)


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
