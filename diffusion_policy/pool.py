"""Environments in numbered slots, in this process or spread over worker processes that may crash or hang, here or on a
Ray cluster.

Knows processes, seeds and actions. Knows no policy. A slot whose environment or worker fails answers with a `Fault`; it
can be reset again at once, in a fresh environment.
"""

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, MutableSequence
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.engines import HANG_AFTER, Engine, cluster, require_workers
from diffusion_policy.lines import describe_with_place, message_of
from diffusion_policy.spawned import Spawned, WorkerDied, end_all, reply, require_picklable

if TYPE_CHECKING:
    from diffusion_policy.ray_cluster import RayWorker

STARTS_WITHIN = 120.0
"""A worker that has not begun its first turn within this time hangs [s]: it imports the simulator first."""
LONGEST_WAIT = 1e6
"""No worker is waited for longer [s]."""
MOST_STEPS = 1000
"""Steps after which an episode ends where the environment has no time limit of its own."""


class UnfitError(ValueError):
    """An environment that is none of our kind."""

    hopeless = True
    """Trying again does not help."""


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
    """Several environments in one process, each made when it is first reset. Nothing that they do or give gets further
    than a `Fault` of the slot."""

    def __init__(self, make_env: Callable[[], gymnasium.Env], at_work: MutableSequence[int] | None = None) -> None:
        """`at_work`: two numbers, kept up to date: the slot that is at work, and a count of its signs of life."""
        self._make_env = make_env
        self._at_work: MutableSequence[int] = [0, 0] if at_work is None else at_work
        self._envs: dict[int, gymnasium.Env] = {}
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        self._endless: dict[int, bool] = {}
        self._steps_left: dict[int, float] = {}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, dict[str, np.ndarray] | Fault]:
        """Begin an episode in each slot named, with its seed; returns the first observations."""
        return {slot: self._take(slot, self._reset, seed) for slot, seed in seeds.items()}

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Stretch | Fault]:
        """Take a sequence of actions (steps, A) in each slot named, until its episode ends."""
        return {slot: self._take(slot, self._step, sequence) for slot, sequence in actions.items()}

    def close(self) -> None:
        """Close every environment; one that fails at that has done its work."""
        for slot in list(self._envs):
            self._close(slot)

    def _take(self, slot: int, turn: Callable[[int, Any], Any], argument: Any) -> Any:
        """What a slot's turn gives, or its fault."""
        self._at_work[0] = slot
        self._at_work[1] += 1
        try:
            return turn(slot, argument)
        except BaseException as error:  # a simulator may also call sys.exit
            if isinstance(error, KeyboardInterrupt) and multiprocessing.parent_process() is None:
                raise  # the user's: workers do not hear Ctrl-C
            self._close(slot)
            if getattr(error, "hopeless", False):
                return Fault(message_of(error), blamed=True, hopeless=True)
            return Fault(describe_with_place(error), blamed=True)

    def _close(self, slot: int) -> None:
        env = self._envs.pop(slot, None)
        with contextlib.suppress(Exception, SystemExit):
            if env is not None:
                env.close()

    def _reset(self, slot: int, seed: int) -> dict[str, np.ndarray]:
        if slot not in self._envs:
            self._envs[slot] = self._make_env()
            self._endless[slot] = _is_endless(self._envs[slot])
        observation, _ = self._envs[slot].reset(seed=seed)
        first = _to_arrays(observation)
        self._shapes[slot] = {key: value.shape for key, value in first.items()}
        self._steps_left[slot] = MOST_STEPS if self._endless[slot] else math.inf
        return first

    def _step(self, slot: int, sequence: np.ndarray) -> Stretch:
        observations, rewards, ended, info = [], [], False, {}
        for action in np.array(sequence):  # a copy: what another process sent may be read-only
            self._at_work[1] += 1
            observation, reward, terminated, truncated, info = self._envs[slot].step(action)
            observations.append(self._to_row(slot, observation))
            rewards.append(_to_number(reward, "the reward"))
            self._steps_left[slot] -= 1
            if ended := bool(terminated or truncated or self._steps_left[slot] <= 0):
                break
        stacked = {key: np.stack([one[key] for one in observations]) for key in observations[0]}
        return Stretch(stacked, rewards, ended, _choose_info(info))

    def _to_row(self, slot: int, observation: Any) -> dict[str, np.ndarray]:
        """An observation of the same keys and shapes as the episode's first."""
        row = _to_arrays(observation)
        shapes, before = {key: value.shape for key, value in row.items()}, self._shapes[slot]
        for key in sorted(shapes.keys() | before.keys()):
            if shapes.get(key) != before.get(key):
                was, now = (of.get(key, "nothing") for of in (before, shapes))
                raise ValueError(f"the observation {key!r} was {was} at the first step; now it is {now}")
        return row


def _is_endless(env: gymnasium.Env) -> bool:
    """Whether no time limit is put around an environment."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            return False
        env = env.env
    return True


def _to_arrays(observation: Any) -> dict[str, np.ndarray]:
    """A copy of an observation: some environments change theirs in place."""
    if not isinstance(observation, Mapping):
        raise UnfitError(
            f"an observation must be a dict of arrays; got {type(observation).__name__}; make the environment with "
            "diffusion_policy.envs.adapters.Task, which makes one of it"
        )
    arrays = {key: np.array(value, ndmin=1) for key, value in observation.items()}  # a single number is a row (1,)
    for key, value in arrays.items():
        if not isinstance(key, str) or value.dtype.kind not in "biuf":
            raise UnfitError(f"an observation must be a dict of arrays of numbers by name; {key!r} is {value.dtype}")
    return arrays


def _choose_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent on: the rest may be large, or nothing that can be sent."""
    if "is_success" not in info:
        raise UnfitError("the environment must give info['is_success'] at every step; its info has no such key")
    success = _to_number(info["is_success"], "info['is_success']")
    measures = info.get("measures")
    if measures is None:
        return {"is_success": bool(success)}
    numbers = {str(name): _to_number(value, f"the measure {name!r}") for name, value in dict(measures).items()}
    return {"is_success": bool(success), "measures": numbers}


def _to_number(value: Any, what: str) -> float:
    """A finite number, also out of an array of one."""
    try:
        number = float(np.asarray(value).item())
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number; got {value!r:.60}")
    return number


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
        return answer if has_result else message_of(answer)

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
