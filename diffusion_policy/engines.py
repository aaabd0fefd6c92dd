"""Where work runs: in this process (one worker) or in local worker processes.

Workers are spawned, ignore Ctrl-C (their parent ends them) and import no torch. What they run must be picklable.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import gymnasium
import numpy as np

T = TypeVar("T")
R = TypeVar("R")

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
                with _no_interrupts():  # submitting may start a worker
                    waiting.append(executor.submit(_apply, item))
                if len(waiting) >= 4 * workers:
                    break
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = make_function()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _apply(item: Any) -> Any:
    return _function(item)


class Transition(NamedTuple):
    """What one environment answered to one action."""

    observation: dict[str, np.ndarray]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class EnvironmentHost:
    """Several environments in one process, each made when it is first reset."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        self._make_env = make_env
        self._envs: dict[int, gymnasium.Env] = {}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, dict[str, np.ndarray]]:
        """Begin an episode in each slot named, with its seed; returns the first observations."""
        for slot in seeds.keys() - self._envs.keys():
            self._envs[slot] = self._make_env()
        return {slot: self._envs[slot].reset(seed=seed)[0] for slot, seed in seeds.items()}

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Transition]:
        """Take one step in each slot named."""
        return {
            slot: Transition(observation, float(reward), terminated, truncated, info)
            for slot, action in actions.items()
            for observation, reward, terminated, truncated, info in [self._envs[slot].step(action)]
        }

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs.values():
            env.close()


class EnvironmentPool:
    """Environments in numbered slots, spread over worker processes; one worker is this process.

    A slot belongs to the worker `slot % workers`; results do not depend on their number.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env], workers: int = 1) -> None:
        self._host = EnvironmentHost(make_env) if workers == 1 else None
        self._connections: list[Connection] = []
        self._processes = []
        context = multiprocessing.get_context("spawn")
        for _ in range(workers if workers > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make_env, theirs), daemon=True)
            with _no_interrupts():
                process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reset(self, seeds: Mapping[int, int]) -> dict[int, dict[str, np.ndarray]]:
        """Begin an episode in each slot named, with its seed; returns the first observations."""
        return self._host.reset(seeds) if self._host else self._ask("reset", seeds)

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Transition]:
        """Take one step in each slot named."""
        return self._host.step(actions) if self._host else self._ask("step", actions)

    def close(self) -> None:
        """End the workers."""
        if self._host:
            self._host.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # the worker may be gone
                connection.send(None)
        for process in self._processes:
            process.join(timeout=5)
            process.kill()
        self._connections, self._processes = [], []

    def _ask(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        """Send every worker its share, then wait for all; a worker's error is raised here."""
        asked = []
        for i, connection in enumerate(self._connections):
            share = {slot: value for slot, value in arguments.items() if slot % len(self._connections) == i}
            if share:
                try:
                    connection.send((method, share))
                except OSError as error:
                    raise RuntimeError("an environment's worker process died") from error
                asked.append(connection)
        results: dict[int, Any] = {}
        for connection in asked:
            try:
                answer = connection.recv()
            except (EOFError, OSError) as error:
                raise RuntimeError("an environment's worker process died") from error
            if isinstance(answer, str):
                raise RuntimeError(f"an environment failed in its worker process:\n{answer}")
            results |= answer
        return results


def _serve(make_env: Callable[[], gymnasium.Env], connection: Connection) -> None:
    """A worker's loop: (method, arguments) in, its result or a traceback as text out, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host = EnvironmentHost(make_env)
    with contextlib.closing(host), contextlib.suppress(EOFError, BrokenPipeError):
        while (message := connection.recv()) is not None:
            method, arguments = message
            try:
                connection.send(getattr(host, method)(arguments))
            except Exception:
                connection.send(traceback.format_exc())
