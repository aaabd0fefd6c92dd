"""Hiding what simulators print while they start."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hide what is printed, also by C code (PyBullet's build time, its arguments)."""
    flush()
    saved = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def flush() -> None:
    """Write out what Python and C hold back; C does where standard output is a file or a pipe."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or not there at all
            stream.flush()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # on Windows there is no such library
        ctypes.CDLL(None).fflush(None)
