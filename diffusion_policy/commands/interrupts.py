"""How a program is stopped, and what it says then: Ctrl-C, SIGTERM, a check that failed."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator

ONE_PRESS = 0.5
"""Signals within this time of the first are the same press of Ctrl-C [s]."""


class Interrupted(Exception):
    """The user stopped the work (Ctrl-C); the message says what was kept."""


class Failed(Exception):
    """What was checked is not as it should be; the message says what. Exit status 1."""


@contextlib.contextmanager
def hearing(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Within the context, Ctrl-C and SIGTERM call this; but only in the main thread, as they reach no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Within the context, Ctrl-C and SIGTERM set the event, so that the step under way is finished; a second Ctrl-C
    interrupts at once (but torchrun hands on the first one, which then comes twice)."""
    stop = threading.Event()
    first = math.inf  # [s]

    def handle(number: int, _frame: object) -> None:
        nonlocal first
        if number == signal.SIGINT and stop.is_set() and time.monotonic() - first > ONE_PRESS:
            raise KeyboardInterrupt
        if not stop.is_set():
            first = time.monotonic()
        stop.set()

    with hearing(handle):
        yield stop
