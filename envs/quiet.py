"""Hides what simulators print when they start. Knows file descriptors. Knows no simulator."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hide what is printed, also by C code (PyBullet's build time, its arguments)."""
    flush()
    with contextlib.ExitStack() as stack:
        null = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, null)
        for number in (1, 2):
            if number != null:
                stack.callback(_restore, _duplicate(number), number)
                os.dup2(null, number)
        stack.callback(flush)
        yield


def _duplicate(number: int) -> int | None:
    """A second descriptor of an open file; None where it is closed, as after `>&-`."""
    try:
        return os.dup(number)
    except OSError:
        return None


def _restore(saved: int | None, number: int) -> None:
    """Give a descriptor its file back."""
    if saved is None:
        os.close(number)
    else:
        os.dup2(saved, number)
        os.close(saved)


def flush() -> None:
    """Write out what Python and C hold back; C does where standard output is a file or a pipe."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or not there at all
            stream.flush()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # on Windows there is no such library
        ctypes.CDLL(None).fflush(None)
