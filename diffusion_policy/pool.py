"""Environments in numbered slots, in this process or spread over worker processes that may crash or hang, here or on a
Ray cluster.

Knows processes, seeds and actions. Knows no policy. A slot whose environment or worker fails answers with a `Fault`; it
can be reset again at once, in a fresh environment.
"""

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Mapping, MutableSequence
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.engines import HANG_AFTER, Engine, cluster, end_with_parent, no_interrupts

if TYPE_CHECKING:
    from diffusion_policy.ray_cluster import RayWorker

STARTS_WITHIN = 120.0
"""A worker that has not begun its first turn within this time hangs [s]: it imports the simulator first."""


class Stretch(NamedTuple):
    """What one environment answered to the n actions of a sequence that were taken before its episode ended."""

    observations: dict[str, np.ndarray]
    """After each action, (n, ...)."""
    rewards: list[float]
    ended: bool
    info: dict[str, Any]
    """`is_success` and `measures` of the last step."""


class Fault(NamedTuple):
    """Why a slot's episode cannot go on."""

    reason: str
    blamed: bool
    """Whether this slot's own environment failed, not only its worker while another slot's was at work."""
    hopeless: bool = False
    """Whether the environment says that trying again does not help (the error's attribute `hopeless`)."""


class EnvironmentHost:
    """Several environments in one process, each made when it is first reset."""

    def __init__(self, make_env: Callable[[], gymnasium.Env], at_work: MutableSequence[int] | None = None) -> None:
        """`at_work`: two numbers, kept up to date: the slot that is at work, and a count of its signs of life."""
        self._make_env = make_env
        self._at_work: MutableSequence[int] = [0, 0] if at_work is None else at_work
        self._envs: dict[int, gymnasium.Env] = {}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, dict[str, np.ndarray] | Fault]:
        """Begin an episode in each slot named, with its seed; returns the first observations."""
        return {slot: self._take(slot, self._reset, seed) for slot, seed in seeds.items()}

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Stretch | Fault]:
        """Take a sequence of actions (steps, A) in each slot named, until its episode ends."""
        return {slot: self._take(slot, self._step, sequence) for slot, sequence in actions.items()}

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs.values():
            env.close()

    def _take(self, slot: int, turn: Callable[[int, Any], Any], argument: Any) -> Any:
        """What a slot's turn gives, or its fault."""
        self._at_work[0] = slot
        self._at_work[1] += 1
        try:
            return turn(slot, argument)
        except Exception as error:
            env = self._envs.pop(slot, None)
            if env is not None:
                with contextlib.suppress(Exception):  # it is broken already
                    env.close()
            if getattr(error, "hopeless", False):
                return Fault(str(error), blamed=True, hopeless=True)
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(f"{type(error).__name__}: {error}".split())
            return Fault(f"{said} ({place.filename}:{place.lineno})", blamed=True)

    def _reset(self, slot: int, seed: int) -> dict[str, np.ndarray]:
        if slot not in self._envs:
            self._envs[slot] = self._make_env()
        return self._envs[slot].reset(seed=seed)[0]

    def _step(self, slot: int, sequence: np.ndarray) -> Stretch:
        observations, rewards, ended, info = [], [], False, {}
        for action in np.array(sequence):  # a copy: what another process sent may be read-only
            self._at_work[1] += 1
            observation, reward, terminated, truncated, info = self._envs[slot].step(action)
            observations.append(observation)
            rewards.append(float(reward))
            if ended := terminated or truncated:
                break
        told = {key: info[key] for key in ("is_success", "measures") if key in info}  # others may be large
        stacked = {key: np.stack([one[key] for one in observations]) for key in observations[0]}
        return Stretch(stacked, rewards, ended, told)


class Worker:
    """A process with a host, and what it was asked."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        context = multiprocessing.get_context("spawn")
        self._at_work = context.RawArray("q", 2)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(make_env, theirs, self._at_work), daemon=True)
        with no_interrupts():
            self.process.start()
        theirs.close()

    @property
    def culprit(self) -> int | None:
        """The slot that is at work, or was when the worker failed; None before its first turn."""
        return self._at_work[0] if self._at_work[1] else None

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        """Ask; a worker that is gone is noticed when it should answer."""
        self._send((method, arguments))

    def answer(self, hang_after: float) -> tuple[dict[int, Any], float] | str:
        """The results and the seconds they took; why there are none, where the worker has crashed or hangs."""
        turns = self._at_work[1]
        try:
            patience = hang_after if turns else max(hang_after, STARTS_WITHIN)
            while not self.connection.poll(patience):
                patience = hang_after
                if self._at_work[1] == turns:
                    return f"its environment did not answer within {hang_after:g} s"
                turns = self._at_work[1]
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            return f"its worker process died (exit status {self.process.exitcode})"

    def end(self, patience: float) -> None:
        """Ask the process to close its environments and end, then kill it; `patience` [s] in between."""
        self._send(None)
        self.process.join(timeout=patience)
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(message)


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
        cluster; `hang_after`: see HANG_AFTER."""
        self._make_env = make_env
        self._hang_after = hang_after
        self._engine: Engine = engine
        in_this_process = workers == 1 and engine == "local"
        self._host = EnvironmentHost(make_env) if in_this_process else None
        self._slots: set[int] = set()
        self.seconds_asked = 0.0
        """Time spent waiting for answers."""
        self.seconds_worked = 0.0
        """Time of it in which the busiest worker simulated; the rest went into traffic between processes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(cluster(engine, workers))
            self._workers = [] if in_this_process else [self._hire() for _ in range(workers)]
            self._cluster = stack.pop_all()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reset(self, seeds: Mapping[int, int]) -> dict[int, dict[str, np.ndarray] | Fault]:
        """Begin an episode in each slot named, with its seed; returns the first observations. Slots that were not named
        but fell with their worker are added."""
        self._slots |= seeds.keys()
        return self._host.reset(seeds) if self._host else self._ask("reset", seeds)

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Stretch | Fault]:
        """Take a sequence of actions (steps, A) in each slot named, until its episode ends; slots that were not named
        but fell with their worker are added. Sequences cost less traffic than single steps, and none waits for the
        slowest at every step."""
        return self._host.step(actions) if self._host else self._ask("step", actions)

    def close(self) -> None:
        """End the workers."""
        if self._host:
            self._host.close()
        with self._cluster:
            for worker in self._workers:
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

    def _replace(self, index: int, reason: str) -> dict[int, Fault]:
        """Put a fresh worker in the place of a failed one; returns the faults of all its slots."""
        failed = self._workers[index]
        culprit = failed.culprit
        failed.end(patience=0)
        self._workers[index] = self._hire()
        fallen = [slot for slot in self._slots if slot % len(self._workers) == index]
        return {slot: Fault(reason, blamed=culprit in (slot, None)) for slot in fallen}

    def _hire(self) -> "Worker | RayWorker":
        if self._engine == "local":
            return Worker(self._make_env)
        from diffusion_policy.ray_cluster import RayWorker

        return RayWorker(partial(Worker, self._make_env))


def _serve(make_env: Callable[[], gymnasium.Env], connection: Connection, at_work: MutableSequence[int]) -> None:
    """A worker's loop: (method, arguments) in, (results, seconds) out, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    host = EnvironmentHost(make_env, at_work)
    with contextlib.closing(host), contextlib.suppress(EOFError, BrokenPipeError):
        while (message := connection.recv()) is not None:
            method, arguments = message
            started = time.perf_counter()
            results = getattr(host, method)(arguments)
            connection.send((results, time.perf_counter() - started))
