"""Environments in numbered slots, in this process or spread over worker processes that may crash or hang, here or on a
Ray cluster.

Knows processes, seeds and actions. Knows no policy. A slot whose environment or worker fails answers with
an `EnvFailure`; it can be reset again at once, in a fresh environment.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Mapping, MutableSequence
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from diffusion_policy.basics.text import error_message
from diffusion_policy.evaluation.engines import HANG_AFTER, Engine, cluster, require_workers
from diffusion_policy.evaluation.host import EnvFailure, EnvironmentHost, StepsResult
from diffusion_policy.evaluation.spawned import Spawned, WorkerDied, end_all, reply, require_picklable

if TYPE_CHECKING:
    from diffusion_policy.evaluation.ray_engine import RayWorker

STARTS_WITHIN = 120.0
"""A worker that has not begun its first turn within this time hangs [s]: it imports the simulator first."""
LONGEST_WAIT = 1e6
"""No worker is waited for longer [s]."""


class Worker:
    """A process with a host, and what it was asked."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        self._at_work = multiprocessing.get_context("spawn").RawArray("q", 2)
        self.spawned = Spawned(_serve, (make_env,), (self._at_work,))

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


class EnvironmentPool:
    """Environments in numbered slots; one local worker is this process, where a crash or a hang cannot be survived.

    A slot belongs to the worker `slot % workers`; results depend neither on their number nor on the engine.
    """

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        workers: int = 1,
        hang_after: float = HANG_AFTER,
        engine: Engine = "local",
    ) -> None:
        """`make_env` must be picklable for more than one worker, and of a module that can be imported there for a
        cluster; `hang_after`: see HANG_AFTER. Raises ValueError for what cannot be."""
        require_workers(workers)
        require_patience(hang_after)
        in_this_process = workers == 1 and engine == "local"
        if not in_this_process:
            require_picklable("make_env", make_env)
        self._make_env = make_env
        self._hang_after = hang_after
        self._engine: Engine = engine
        self._host = EnvironmentHost(make_env) if in_this_process else None
        self._slots: set[int] = set()
        self.seconds_asked = 0.0
        """Time spent waiting for answers."""
        self.seconds_worked = 0.0
        """Time of it in which the busiest worker simulated; the rest went into traffic between processes."""
        with contextlib.ExitStack() as stack:
            if in_this_process:
                stack.enter_context(contextlib.chdir("."))  # an environment may change the working directory
            stack.enter_context(cluster(engine, workers))
            self._workers = [] if in_this_process else [self._hire() for _ in range(workers)]
            self._cluster = stack.pop_all()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reset(self, seeds: Mapping[int, int]) -> dict[int, dict[str, np.ndarray] | EnvFailure]:
        """Begin an episode in each slot named, with its seed; returns the first observations. Slots that were not named
        but fell with their worker are added."""
        self._slots |= seeds.keys()
        return self._host.reset(seeds) if self._host else self._ask("reset", seeds)

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, StepsResult | EnvFailure]:
        """Take a sequence of actions (steps, A) in each slot named, until its episode ends; slots that were not named
        but fell with their worker are added. Sequences cost less traffic than single steps, and none waits for the
        slowest at every step."""
        return self._host.step(actions) if self._host else self._ask("step", actions)

    def close(self) -> None:
        """End the workers."""
        if self._host:
            self._host.close()
        with self._cluster:
            end_all([worker.spawned for worker in self._workers if isinstance(worker, Worker)], patience=5)
            for worker in self._workers:
                if not isinstance(worker, Worker):
                    worker.end(patience=5)
            self._workers = []

    def _ask(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        """Send every worker its share, then wait for all; a worker that fails is replaced."""
        started = time.perf_counter()
        count = len(self._workers)
        shares = [{slot: value for slot, value in arguments.items() if slot % count == i} for i in range(count)]
        for worker, share in zip(self._workers, shares, strict=True):
            if share:
                worker.send(method, share)
        results: dict[int, Any] = {}
        longest = 0.0
        for i in range(count):
            if not shares[i]:
                continue
            answer = self._workers[i].answer(self._hang_after)
            if isinstance(answer, str):
                results |= self._replace(i, answer)
            else:
                results |= answer[0]
                longest = max(longest, answer[1])
        self.seconds_asked += time.perf_counter() - started
        self.seconds_worked += longest
        return results

    def _replace(self, index: int, reason: str) -> dict[int, EnvFailure]:
        """Put a fresh worker in the place of a failed one; returns the failures of all its slots."""
        failed = self._workers[index]
        culprit = failed.culprit
        failed.end(patience=0)
        self._workers[index] = self._hire()
        fallen = [slot for slot in self._slots if slot % len(self._workers) == index]
        return {slot: EnvFailure(reason, blamed=culprit in (slot, None)) for slot in fallen}

    def _hire(self) -> "Worker | RayWorker":
        if self._engine == "local":
            return Worker(self._make_env)
        from diffusion_policy.evaluation.ray_engine import RayWorker

        return RayWorker(partial(Worker, self._make_env))


def require_patience(hang_after: float) -> None:
    """Raise ValueError for a time after which nothing can be said to hang."""
    if not 0 < hang_after <= LONGEST_WAIT:
        raise ValueError(f"hang_after must be above 0 and at most {LONGEST_WAIT:g} s; got {hang_after}")


def _serve(connection: Connection, at_work: MutableSequence[int], make_env: Callable[[], gymnasium.Env]) -> None:
    """A worker's loop: (method, arguments) in, (True, (results, seconds)) out."""
    host = EnvironmentHost(make_env, at_work)
    with contextlib.closing(host), contextlib.suppress(EOFError, OSError):
        while True:
            method, arguments = connection.recv()
            started = time.perf_counter()
            results = getattr(host, method)(arguments)
            reply(connection, (True, (results, time.perf_counter() - started)))
