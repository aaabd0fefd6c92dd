"""Environments in numbered slots, in this process or spread over worker processes that may crash or hang, here or on a
Ray cluster.

Knows processes, seeds and actions. Knows no policy. A slot whose environment or worker fails answers with
an `EnvFailure`; it can be reset again at once, in a fresh environment.
"""

import contextlib
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableSequence
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from diffusion_policy.basics.text import error_message
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine, cluster, on_ray, require_workers
from diffusion_policy.evaluation.host import EnvFailure, EnvironmentHost, Sight, StepsResult
from diffusion_policy.evaluation.spawned import Spawned, WorkerDied, end_all, reply, require_picklable

if TYPE_CHECKING:
    from diffusion_policy.evaluation.ray_engine import RayWorker

STARTS_WITHIN = 120.0
"""A worker that has not begun its first turn within this time hangs [s]: it imports the simulator first."""
LONGEST_WAIT = 1e6
"""No worker is waited for longer [s]."""


class Worker:
    """A process with a host, and what it was asked."""

    def __init__(self, make_env: Callable[[], gymnasium.Env], sight: Sight) -> None:
        self._at_work = multiprocessing.get_context("spawn").RawArray("q", 2)
        self.spawned = Spawned(_serve, (make_env, sight), (self._at_work,))

    @property
    def culprit(self) -> int | None:
        """The slot that is at work, or was when the worker failed; None before its first turn."""
        return self._at_work[0] if self._at_work[1] else None

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        """Ask; a worker that is gone is noticed when it should answer."""
        self.spawned.send((method, arguments))

    def answer(self, hang_after: float) -> tuple[dict[int, Any], float] | str:
        """The results and the seconds they took; why there are none, where the worker has crashed or hangs. Raises
        SpawnError for a worker that cannot begin."""
        turns = self._at_work[1]
        try:
            patience = hang_after if turns else max(hang_after, STARTS_WITHIN)
            while not self.spawned.wait(patience):
                patience = hang_after
                if self._at_work[1] == turns:
                    return f"its environment did not answer within {hang_after:g} s"
                turns = self._at_work[1]
            has_result, answer = self.spawned.receive()
        except WorkerDied as death:
            return str(death)
        return answer if has_result else error_message(answer)

    def end(self, patience: float) -> None:
        """Have the process close its environments and end, then kill it; `patience` [s] in between."""
        end_all([self.spawned], patience)


class _ThisProcess:
    """A worker that is no process of its own: it has done what it is asked when `send` returns."""

    culprit = None

    def __init__(self, make_env: Callable[[], gymnasium.Env], sight: Sight) -> None:
        self._host = EnvironmentHost(make_env, sight=sight)
        self._answers: deque[tuple[dict[int, Any], float]] = deque()

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        self._answers.append(_answer(self._host, method, arguments))

    def answer(self, hang_after: float) -> tuple[dict[int, Any], float]:
        return self._answers.popleft()

    def end(self, patience: float) -> None:
        self._host.close()


class Request:
    """What was asked of several slots, and what they have answered so far."""

    def __init__(self, workers: set[int]) -> None:
        self.waiting = workers
        """The workers that have yet to answer."""
        self.results: dict[int, Any] = {}
        self.seconds = 0.0
        """Of the worker that took longest."""


class EnvironmentPool:
    """Environments in numbered slots; one local worker is this process, where a crash or a hang cannot be survived.

    Results depend neither on the number of workers, nor on which slots each of them has, nor on the engine. While
    workers do what `begin_reset` and `begin_step` ask, one after another, this process is free. Several threads may
    ask; one, always the same, collects the answers.
    """

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        workers: int = 1,
        hang_after: float = HANG_AFTER,
        engine: Engine = "local",
        *,
        adjacent: int = 1,
        sight: Sight = Sight(),  # noqa: B008  (immutable)
    ) -> None:
        """`make_env` must be picklable for more than one worker, and of a module that can be imported there for a
        cluster; `hang_after`: see HANG_AFTER; `adjacent`: so many slots go to one worker, as many to the next, and so
        on in turn; `sight`: which images they give. Raises ValueError for what cannot be."""
        require_workers(workers)
        require_patience(hang_after)
        in_this_process = workers == 1 and engine == "local"
        if not in_this_process:
            require_picklable("make_env", make_env)
        self._make_env, self._sight = make_env, sight
        self._hang_after = hang_after
        self._engine: Engine = engine
        self._adjacent = adjacent
        self._slots: set[int] = set()
        self._fallen: set[int] = set()
        """Slots whose worker has failed since they were reset."""
        self._asked: list[deque[Request]] = [deque() for _ in range(workers)]
        """What each worker has yet to answer, in the order in which it was asked."""
        self._asking = threading.Lock()
        self.seconds_asked = 0.0
        """Time spent asking, and waiting for answers."""
        self.seconds_worked = 0.0
        """Time in which the busiest worker simulated; the rest of the time asked went into traffic between processes,
        where nothing else was done before the answers were collected."""
        with contextlib.ExitStack() as stack:
            if in_this_process:
                stack.enter_context(contextlib.chdir("."))  # an environment may change the working directory
            stack.enter_context(cluster(engine, workers))
            self._workers: list[Worker | RayWorker | _ThisProcess] = (
                [_ThisProcess(make_env, sight)] if in_this_process else [self._hire() for _ in range(workers)]
            )
            self._cluster = stack.pop_all()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reset(self, seeds: Mapping[int, int]) -> dict[int, dict[str, np.ndarray] | EnvFailure]:
        """Begin an episode in each slot named, with its seed; returns the first observations. Slots that were not named
        but fell with their worker are added."""
        return self.collect(self.begin_reset(seeds))

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, StepsResult | EnvFailure]:
        """Take a sequence of actions (steps, A) in each slot named, until its episode ends; slots that were not named
        but fell with their worker are added. Sequences cost less traffic than single steps, and none waits for the
        slowest at every step."""
        return self.collect(self.begin_step(actions))

    def begin_reset(self, seeds: Mapping[int, int]) -> Request:
        """As `reset`; the observations are to be collected."""
        with self._asking:
            self._slots |= seeds.keys()
            self._fallen -= seeds.keys()
            return self._begin("reset", seeds)

    def begin_step(self, actions: Mapping[int, np.ndarray]) -> Request:
        """As `step`; the results are to be collected. Slots that have fallen are left out."""
        with self._asking:
            return self._begin("step", {slot: rows for slot, rows in actions.items() if slot not in self._fallen})

    def collect(self, request: Request) -> dict[int, Any]:
        """Wait for the answers. A worker that fails is replaced, and does nothing more of what it was asked: its slots
        fall now, those of other requests too."""
        started = time.perf_counter()
        while request.waiting:
            index = min(request.waiting)
            answer = self._workers[index].answer(self._hang_after)
            if isinstance(answer, str):
                request.results |= self._replace(index, answer)
            else:
                answered = self._asked[index].popleft()
                answered.waiting.discard(index)
                answered.results |= answer[0]
                answered.seconds = max(answered.seconds, answer[1])
        with self._asking:
            self.seconds_asked += time.perf_counter() - started
            self.seconds_worked += request.seconds
        return request.results

    def close(self) -> None:
        """End the workers."""
        with self._cluster:
            end_all([worker.spawned for worker in self._workers if isinstance(worker, Worker)], patience=5)
            for worker in self._workers:
                if not isinstance(worker, Worker):
                    worker.end(patience=5)
            self._workers = []

    def _begin(self, method: str, arguments: Mapping[int, Any]) -> Request:
        """Send every worker its share."""
        started = time.perf_counter()
        shares: dict[int, dict[int, Any]] = {}
        for slot, argument in arguments.items():
            shares.setdefault(self._worker_of(slot), {})[slot] = argument
        request = Request(set(shares))
        for index, share in sorted(shares.items()):
            self._workers[index].send(method, share)
            self._asked[index].append(request)
        self.seconds_asked += time.perf_counter() - started
        return request

    def _replace(self, index: int, reason: str) -> dict[int, EnvFailure]:
        """Put a fresh worker in the place of a failed one; returns the failures of all its slots."""
        with self._asking:
            failed = self._workers[index]
            culprit = failed.culprit
            failed.end(patience=0)
            self._workers[index] = self._hire()
            for request in self._asked[index]:
                request.waiting.discard(index)
            self._asked[index].clear()
            fallen = [slot for slot in self._slots if self._worker_of(slot) == index]
            self._fallen |= set(fallen)
            return {slot: EnvFailure(reason, blamed=culprit in (slot, None)) for slot in fallen}

    def _worker_of(self, slot: int) -> int:
        return slot // self._adjacent % len(self._workers)

    def _hire(self) -> "Worker | RayWorker":
        if self._engine == "local":
            return Worker(self._make_env, self._sight)
        return on_ray().RayWorker(partial(Worker, self._make_env, self._sight))


def require_patience(hang_after: float) -> None:
    """Raise ValueError for a time after which nothing can be said to hang."""
    if not 0 < hang_after <= LONGEST_WAIT:
        raise ValueError(f"hang_after must be above 0 and at most {LONGEST_WAIT:g} s; got {hang_after}")


def _serve(
    connection: Connection, at_work: MutableSequence[int], make_env: Callable[[], gymnasium.Env], sight: Sight
) -> None:
    """A worker's loop: (method, arguments) in, (True, (results, seconds)) out."""
    host = EnvironmentHost(make_env, at_work, sight)
    with contextlib.closing(host):
        for method, arguments in _read_at_once(connection):
            reply(connection, (True, _answer(host, method, arguments)))


def _answer(host: EnvironmentHost, method: str, arguments: Mapping[int, Any]) -> tuple[dict[int, Any], float]:
    """The results and the seconds they took."""
    started = time.perf_counter()
    results = getattr(host, method)(arguments)
    return results, time.perf_counter() - started


def _read_at_once(connection: Connection) -> Iterator[Any]:
    """The messages of a pipe until its other end is closed. They are taken out as they come, so that who sends does not
    wait for this process: it might itself wait for an answer to be taken."""
    messages: SimpleQueue[Any] = SimpleQueue()
    closed = threading.Event()

    def read() -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    messages.put(connection.recv())
        finally:
            closed.set()
            messages.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (message := messages.get()) is not None and not closed.is_set():
        yield message
