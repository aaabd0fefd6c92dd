"""What strangers say (a file, a simulator, an error), as text that a terminal shows and does not obey, and as one line.

Imports only the standard library.
"""

import traceback
import unicodedata

OBEYED = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
"""Unicode categories of what is not shown but acted upon: control characters, reversed writing, line separators."""
LONGEST = 500
"""Characters of a line."""


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


def message_of(error: BaseException) -> str:
    """What an error says, as one line; also where it cannot."""
    try:
        return one_line(str(error))
    except Exception:
        return "its message cannot be shown"


def describe(error: BaseException) -> str:
    """An error's type and message as one line."""
    name, message = one_line(type(error).__name__, 100), message_of(error)
    return f"{name}: {message}" if message else name


def describe_with_place(error: BaseException) -> str:
    """As `describe`, with the file and line where it was raised."""
    place = traceback.extract_tb(error.__traceback__)
    return f"{describe(error)} ({one_line(place[-1].filename)}:{place[-1].lineno})" if place else describe(error)
