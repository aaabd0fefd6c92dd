"""Where independent work runs: in this process (one worker) or in local worker processes.

Workers are spawned, ignore Ctrl-C (their parent ends them) and import no torch. What they run must be picklable.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

HANG_AFTER = 60.0
"""A worker that does not finish one reset or step of an environment within this time hangs [s]."""

_function: Callable[[Any], Any]
"""What a worker of `ordered_map` applies; made once in each."""


def ordered_map(make_function: Callable[[], Callable[[T], R]], items: Iterable[T], workers: int = 1) -> Generator[R]:
    """Yield `function(item)` in the order of the (possibly endless) items; each process makes its own function.

    Close the generator to stop early: what has begun is finished and dropped.
    """
    if workers == 1:
        function = make_function()
        for item in items:
            yield function(item)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(make_function,))
    waiting: deque[Future[R]] = deque()
    source = iter(items)
    try:
        while True:
            for item in source:
                with no_interrupts():  # submitting may start a worker
                    waiting.append(executor.submit(_apply, item))
                if len(waiting) >= 4 * workers:
                    break
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Processes started within the context never hear Ctrl-C, not even while they import (where signals have masks);
    here it acts once the context ends, so that no process is started by half."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # starting it, as the first worker would, unblocks the signal again
    heard = []  # another thread of ours may take the signal, and Python handles it in this one
    handler = signal.signal(signal.SIGINT, lambda *signal_and_frame: heard.append(signal_and_frame))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if heard and callable(handler):
            handler(*heard[0])


def _prepare(make_function: Callable[[], Callable[[Any], Any]]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    _function = make_function()


def end_with_parent() -> None:
    """Have this worker end when its parent does: a killed parent cannot end its workers, and they would wait for it for
    ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _apply(item: Any) -> Any:
    return _function(item)
