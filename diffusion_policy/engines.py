"""Where independent work runs: in this process (one worker), in local worker processes, or on a Ray cluster.

Workers are spawned, ignore Ctrl-C (their parent ends them) and import no torch of themselves. What they run must be
picklable.
"""

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Literal, TypeVar

T = TypeVar("T")
R = TypeVar("R")

Engine = Literal["local", "ray"]
"""Workers of this machine, or of a Ray cluster: that of the environment variable RAY_ADDRESS, else one started here."""
HANG_AFTER = 60.0
"""A worker that does not finish one reset or step of an environment within this time hangs [s]."""
ENDS_WITHIN = 10.0
"""A process of `each_alone` that is told to stop is killed after this time [s]."""

_function: Callable[[Any], Any]
"""What a worker of `ordered_map` applies; made once in each."""


def require_engine(engine: Engine) -> None:
    """Raise ValueError for an engine that there is not, or that is not installed."""
    if engine not in ("local", "ray"):
        raise ValueError(f"unknown engine {engine!r}; choose from local, ray")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("the engine ray is not installed: pip install 'diffusion-policy-toolkit[ray]'")


def cluster(engine: Engine, workers: int) -> contextlib.AbstractContextManager[None]:
    """What an engine needs for as long as it is used: a connection to a Ray cluster, or nothing."""
    require_engine(engine)
    if engine == "local":
        return contextlib.nullcontext()
    from diffusion_policy.ray_cluster import connect

    return connect(workers)


def ordered_map(
    make_function: Callable[[], Callable[[T], R]], items: Iterable[T], workers: int = 1, engine: Engine = "local"
) -> Generator[R]:
    """Yield `function(item)` in the order of the (possibly endless) items; each process makes its own function.

    Close the generator to stop early: what has begun is finished and dropped.
    """
    require_engine(engine)
    if engine == "ray":
        from diffusion_policy import ray_cluster

        yield from ray_cluster.ordered_map(make_function, items, workers)
        return
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


def each_alone(
    function: Callable[[T], str | None],
    items: Iterable[T],
    workers: int = 1,
    engine: Engine = "local",
    gpus: float = 0.0,
) -> Generator[tuple[T, str | None]]:
    """Call the function once for each item, in a process of its own, so many at a time, which share the cores: yields
    items as they end, with what the function returned (None, or what went wrong) or how its process died.

    `gpus`: how many each takes of a Ray cluster. Close the generator to stop early: processes that run are ended.
    """
    require_engine(engine)
    if engine == "ray":
        from diffusion_policy import ray_cluster

        yield from ray_cluster.each_alone(function, items, workers, gpus)
        return
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    running: dict[Connection, tuple[SpawnProcess, T]] = {}
    source = iter(items)
    try:
        while True:
            for item in itertools.islice(source, workers - len(running)):
                ours, theirs = context.Pipe()
                process = context.Process(target=_run_alone, args=(function, item, theirs, max(1, cores // workers)))
                with no_interrupts():
                    process.start()
                theirs.close()
                running[ours] = process, item
            if not running:
                return
            for ours in connection.wait(list(running)):
                assert isinstance(ours, Connection)
                process, item = running[ours]
                try:
                    said = ours.recv()
                    process.join()
                except (EOFError, OSError):
                    process.join()
                    said = f"its process died (exit status {process.exitcode})"
                ours.close()
                del running[ours]
                yield item, said
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join(timeout=ENDS_WITHIN)
            process.kill()
            process.join()
        for ours in running:
            ours.close()


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


def _run_alone(function: Callable[[Any], str | None], item: Any, theirs: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before anything imports torch
    theirs.send(function(item))
