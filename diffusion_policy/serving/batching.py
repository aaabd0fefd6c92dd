"""Requests of many robots, planned together: what is computed in one call, and whose turn it is.

A batch gives each request to the bit what it would be given alone. Where a backend's rows depend on how many are
computed together, each request is planned by itself instead. Knows planners. Knows no connection.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffusion_policy.basics.images import is_image
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.control.chunking import Chunking, Handover
from diffusion_policy.control.planner import Planner, Steering

NOT_FINITE = FloatingPointError("the policy planned NaN or infinity; it is not trained, or its training diverged")
QUEUED = 1024
"""Requests that wait at most, of all robots."""


class Busy(Exception):
    """Too many requests wait."""


class Late(Exception):
    """The request's deadline has passed before its plan was begun."""


class CallsOfSizes:
    """A planner whose calls have a few fixed numbers of rows, such as 1, 4 and 16: others are made up of them, so the
    shapes of a graph are fixed. Several samples of one observation are rows of their own."""

    guides = False

    def __init__(self, planners: Mapping[int, Planner]) -> None:
        """`planners`: one for each number of rows, each of one sample."""
        self._planners = dict(sorted(planners.items(), reverse=True))
        first = next(iter(planners.values()))
        self.observation_horizon, self.steps, self.action_horizon = (
            first.observation_horizon,
            first.steps,
            first.action_horizon,
        )
        self.observation_shapes, self.action_shape = first.observation_shapes, first.action_shape
        self.noise_shape, self.longest_prefix = first.noise_shape, first.longest_prefix

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        """See `Planner.sample`; a remainder is filled up with copies."""
        rows, samples = noise.shape[:2]
        repeated = np.repeat(np.arange(rows), samples)
        noise = noise.reshape(rows * samples, 1, *noise.shape[2:])
        parts, start = [], 0
        while start < len(repeated):
            left = len(repeated) - start
            size = next((size for size in self._planners if size <= left), min(self._planners))
            chosen = np.resize(np.arange(start, min(start + size, len(repeated))), size)
            part = self._planners[size].sample(
                {key: values[repeated[chosen]] for key, values in observations.items()},
                noise[chosen],
                _rows_of(steering, repeated[chosen]),
            )
            parts.append(part[: min(size, left)])
            start += size
        return np.concatenate(parts).reshape(rows, samples, *parts[0].shape[2:])


def _rows_of(steering: Steering | None, rows: np.ndarray) -> Steering | None:
    if steering is None:
        return None
    return steering._replace(actions=steering.actions[rows], weights=steering.weights[rows])


def rows_are_independent(planner: Planner, most: int) -> bool:
    """Whether each row of up to so many comes out to the bit as it does alone, in a trial."""
    rng = derive_rng("rows")
    observations = {
        key: rng.integers(0, 256, (most, planner.observation_horizon, *shape), np.uint8)
        if is_image(shape)
        else rng.uniform(-1, 1, (most, planner.observation_horizon, *shape))
        for key, shape in planner.observation_shapes.items()
    }
    noise = rng.standard_normal((most, 1, *planner.noise_shape), np.float32)
    alone = [_sample_rows(planner, observations, noise, [row]) for row in range(most)]
    for count in range(2, most + 1):
        rows = range(most - count, most)
        together = _sample_rows(planner, observations, noise, list(rows))
        if not np.array_equal(together, np.concatenate([alone[row] for row in rows])):
            return False
    return True


def _sample_rows(
    planner: Planner, observations: Mapping[str, np.ndarray], noise: np.ndarray, rows: list[int]
) -> np.ndarray:
    return planner.sample({key: values[rows] for key, values in observations.items()}, noise[rows])


class Job(NamedTuple):
    """One request."""

    observations: dict[str, np.ndarray]
    """{key: (B, To, ...)}"""
    noise: np.ndarray
    """(B, N, *noise_shape)"""
    steering: Steering | None = None
    """Of a planner's request, B rows."""
    handover: Handover | None = None
    """Of a session that tells what it executes: its plan is joined to that."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is equal of requests that can be planned in one call."""
        steering, handover = self.steering, self.handover
        asked = None if steering is None else (steering.strength, steering.deviation, steering.actions.shape[1])
        return self.noise.shape[1:], asked, None if handover is None else handover.delay_steps


def plan_jobs(planner: Planner, chunking: Chunking, jobs: Sequence[Job]) -> list[np.ndarray]:
    """Plans of some requests of one kind, in one call; see `Answer.plans`."""
    observations = {key: np.concatenate([job.observations[key] for job in jobs]) for key in jobs[0].observations}
    noise = np.concatenate([job.noise for job in jobs])
    first = jobs[0]
    if first.handover is not None:
        handovers = [job.handover for job in jobs if job.handover is not None]
        joined = chunking.plan(planner, observations, noise, _join_handovers(handovers))
        plans = joined.executed[:, None]
    else:
        steering = first.steering
        if steering is not None:
            parts = [job.steering for job in jobs if job.steering is not None]
            steering = steering._replace(
                actions=np.concatenate([one.actions for one in parts]),
                weights=np.concatenate([one.weights for one in parts]),
            )
        plans = planner.sample(observations, noise, steering)
    ends = np.cumsum([len(job.noise) for job in jobs])[:-1]
    return np.split(plans, ends)


class Engine(Protocol):
    """Where calls are computed."""

    calls: int
    """That it computes at once."""

    def plan(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """As `plan_jobs`; `calls` threads may ask. Raises Busy where the same call can succeed later."""
        ...

    def count_replicas(self) -> int:
        """How many copies of the policy plan now."""
        ...


class LocalEngine:
    """This process."""

    calls = 1

    def __init__(self, planner: Planner, chunking: Chunking | None = None) -> None:
        """`chunking`: how a session's plan is joined to what it executes."""
        self._planner, self._chunking = planner, chunking or Chunking()

    def plan(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """See `Engine`."""
        return plan_jobs(self._planner, self._chunking, jobs)

    def count_replicas(self) -> int:
        """See `Engine`."""
        return 1


class Answer(NamedTuple):
    """What came of a request."""

    plans: np.ndarray
    """(B, N, steps, A); for a session that tells what it executes, what it is to execute from now on, (1, 1, ...)."""
    milliseconds: float
    """Of the call that made it."""
    batch: int
    """Requests in that call."""


class Stopping(Exception):
    """The server ends before the request was planned."""


class _Waiting(NamedTuple):
    job: Job
    deadline: float | None
    answer: "asyncio.Future[Answer]"


class Batcher:
    """Plans requests in the order in which they come, those of one kind together, in threads beside the event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 16,
        max_wait: float = 0.003,
        queued: int = QUEUED,
    ) -> None:
        """`max_batch`: rows planned together, 1 for one request after the other; `max_wait`: how long a request waits
        for those that were planned together last [s]; `queued`: requests that wait at most."""
        self._engine = engine
        self._max_batch, self._max_wait, self._queued = max_batch, max_wait, queued
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._threads = ThreadPoolExecutor(engine.calls, "planning")
        self._running, self._last = 0, 1
        self.calls = 0
        """Under way."""

    @property
    def waiting(self) -> int:
        """Requests that wait, or are being planned."""
        return len(self._waiting) + self._running

    async def plan(self, job: Job, deadline: float | None = None) -> Answer:
        """The plans of a request. `deadline`: as `time.monotonic` counts. Raises Busy, Late, and as planning does."""
        if len(self._waiting) >= self._queued:
            raise Busy(f"{self._queued} requests wait already")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(job, deadline, answer))
        self._arrived.set()
        return await answer

    async def run(self) -> None:
        """Plan for ever; to be cancelled. Whoever waits then is told that the server stops."""
        free = asyncio.Semaphore(self._engine.calls)

        def end(batch: list[_Waiting], _task: asyncio.Task[None]) -> None:
            for one in batch:  # who has no answer when a call is cancelled
                _give(one, Stopping("the server stops"))
            self._running -= len(batch)
            self.calls -= 1
            free.release()

        try:
            async with asyncio.TaskGroup() as calls:
                while True:
                    await free.acquire()
                    batch = await self._next()
                    self._running += len(batch)
                    self.calls += 1
                    calls.create_task(self._call(batch)).add_done_callback(partial(end, batch))
        finally:
            for one in self._waiting:
                _give(one, Stopping("the server stops"))
            self._waiting.clear()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _next(self) -> list[_Waiting]:
        """The next batch, as soon as there is one."""
        while True:
            await self._arrived.wait()
            await self._wait_for_others()
            batch = self._take()
            if batch:
                self._last = len(batch)
                return batch

    async def _call(self, batch: Sequence[_Waiting]) -> None:
        """Answer the requests of a batch."""
        try:
            await self._plan_together(batch)
        except Busy as error:
            for one in batch:
                _give(one, error)
        except Exception as error:
            await self._plan_alone(batch, error)

    async def _plan_together(self, batch: Sequence[_Waiting]) -> None:
        started, jobs = time.perf_counter(), [one.job for one in batch]
        plans = await asyncio.get_running_loop().run_in_executor(self._threads, self._engine.plan, jobs)
        milliseconds = 1000 * (time.perf_counter() - started)
        for one, plan in zip(batch, plans, strict=True):
            _give(one, Answer(plan, milliseconds, len(batch)) if np.isfinite(plan).all() else NOT_FINITE)

    async def _wait_for_others(self) -> None:
        """A moment for the robots of the last call, which come back about now; one that is alone waits for nobody."""
        expected = min(self._last, self._max_batch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._max_wait):
                while len(self._waiting) < expected:
                    self._arrived.clear()
                    await self._arrived.wait()

    async def _plan_alone(self, batch: Sequence[_Waiting], error: Exception) -> None:
        """After a failure each request of the batch by itself, so that it fails alone."""
        for one in batch:
            if len(batch) == 1:
                _give(one, error)
                return
            try:
                await self._plan_together([one])
            except Exception as own:
                _give(one, own)

    def _take(self) -> list[_Waiting]:
        """The next requests of one kind, in the order in which they came; late ones are told so."""
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        rows, now = 0, time.monotonic()
        while self._waiting:
            one = self._waiting.popleft()
            count = one.job.noise.shape[0] * one.job.noise.shape[1]
            if one.answer.done():  # its robot is gone
                continue
            if one.deadline is not None and now > one.deadline:
                _give(one, Late("the deadline passed before planning began"))
            elif not batch or (one.job.kind == batch[0].job.kind and rows + count <= self._max_batch):
                batch.append(one)
                rows += count
                if rows >= self._max_batch:
                    break
            else:
                others.append(one)
        self._waiting.extendleft(reversed(others))
        if self._waiting:
            self._arrived.set()
        else:
            self._arrived.clear()
        return batch


def _join_handovers(handovers: Sequence[Handover]) -> Handover:
    first = handovers[0]
    executing = np.concatenate([one.executing for one in handovers])
    return first._replace(executing=executing, made=np.concatenate([one.made for one in handovers]))


def _give(one: _Waiting, found: Answer | Exception) -> None:
    """Hand an answer to whoever waits for it still."""
    if one.answer.done():
        return
    if isinstance(found, Exception):
        one.answer.set_exception(found)
    else:
        one.answer.set_result(found)
