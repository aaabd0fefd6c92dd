"""What is planned in one call, and whose turn it is."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from diffusion_policy.control.chunking import Chunking, Handover
from diffusion_policy.control.planner import Steering
from diffusion_policy.serving.batching import (
    Batcher,
    Busy,
    CallsOfSizes,
    Job,
    Late,
    LocalEngine,
    rows_are_independent,
)

RNG = np.random.default_rng(0)


def draw(rows: int, samples: int = 1) -> tuple[dict[str, np.ndarray], np.ndarray]:
    observations = {"xy": RNG.normal(size=(rows, 2, 2)), "speed": RNG.normal(size=(rows, 2, 1))}
    return observations, RNG.standard_normal((rows, samples, 1, 7, 2), np.float32)


def steer(rows: int, strength: float | None = 2.0) -> Steering:
    actions = RNG.normal(size=(rows, 6, 2))
    actions[:, 4:] = np.nan
    return Steering(actions, RNG.uniform(size=(rows, 6)), strength, 0.5)


# Calls of fixed sizes


@pytest.mark.parametrize(("rows", "calls"), [(1, [1]), (3, [1, 1, 1]), (4, [4]), (11, [4, 4, 1, 1, 1])])
def test_calls_are_made_up_of_the_sizes_there_are(arithmetic, rows: int, calls: list[int]) -> None:
    observations, noise = draw(rows)
    expected = arithmetic.sample(observations, noise, steer(rows)._replace(actions=np.zeros((rows, 6, 2))))
    arithmetic.calls.clear()
    found = CallsOfSizes({1: arithmetic, 4: arithmetic}).sample(observations, noise)
    np.testing.assert_array_equal(found, expected)
    assert [count for count, _ in arithmetic.calls] == calls


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_a_remainder_is_filled_up_and_samples_are_rows(arithmetic, rows: int) -> None:
    observations, noise = draw(rows, samples=3)
    steering = steer(rows)
    expected = arithmetic.sample(observations, noise, steering)
    arithmetic.calls.clear()
    found = CallsOfSizes({4: arithmetic}).sample(observations, noise, steering)
    np.testing.assert_array_equal(found, expected)
    assert set(arithmetic.calls) == {(4, 1)}
    assert len(arithmetic.calls) == -(-3 * rows // 4)


def test_rows_that_depend_on_how_many_there_are_are_found(arithmetic) -> None:
    assert rows_are_independent(arithmetic, 6)
    plain = arithmetic.sample

    def sample(observations, noise, steering=None):
        return plain(observations, noise, steering) * (1 + 1e-15 * (len(noise) == 5))

    arithmetic.sample = sample
    assert rows_are_independent(arithmetic, 4)
    assert not rows_are_independent(arithmetic, 6)


# Batches


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 20))


async def plan_all(batcher: Batcher, requests: list[Awaitable[Any]], hold: Any = None) -> list[Any]:
    planning = asyncio.create_task(batcher.run())
    asked = asyncio.gather(*requests, return_exceptions=True)
    if hold is not None:
        await asyncio.sleep(0.05)
        hold.may_go.set()
    found = await asked
    planning.cancel()
    return found


def test_a_batch_gives_each_request_to_the_bit_what_it_gets_alone(arithmetic) -> None:
    chunking = Chunking()
    jobs = [Job(*draw(rows)) for rows in (1, 2, 1, 1)]
    jobs += [Job(*draw(1), steer(1)) for _ in range(3)] + [Job(*draw(1, 5))]
    executing = np.where(np.arange(6)[:, None] < 3, RNG.normal(size=(1, 6, 2)), np.nan)
    jobs += [Job(*draw(1), None, Handover(executing * i, 2, 3, np.zeros(1, int))) for i in (1, 2)]

    async def work() -> tuple[list[Any], list[Any]]:
        alone = []
        for job in jobs:
            batcher = Batcher(LocalEngine(arithmetic, chunking), max_batch=1)
            alone += await plan_all(batcher, [batcher.plan(job)])
        arithmetic.calls.clear()
        batcher = Batcher(LocalEngine(arithmetic, chunking), max_batch=8, max_wait=0.02)
        return alone, await plan_all(batcher, [batcher.plan(job) for job in jobs])

    alone, together = run(work)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.plans, other.plans)
    assert [answer.batch for answer in together] == [4] * 4 + [3] * 3 + [1] + [2] * 2
    assert arithmetic.calls == [(5, 1), (3, 1), (1, 5), (2, 1)]
    np.testing.assert_array_equal(together[-1].plans[0, 0, :2], executing[0, :2] * 2)


def test_a_batch_has_at_most_so_many_rows_but_a_large_request_is_planned(arithmetic) -> None:
    jobs = [Job(*draw(rows)) for rows in (2, 2, 2, 9, 1)]

    async def work() -> list[Any]:
        batcher = Batcher(LocalEngine(arithmetic), max_batch=4, max_wait=0.02)
        return await plan_all(batcher, [batcher.plan(job) for job in jobs])

    assert [len(answer.plans) for answer in run(work)] == [2, 2, 2, 9, 1]
    assert arithmetic.calls == [(4, 1), (3, 1), (9, 1)]


def test_a_request_that_fails_fails_alone(arithmetic) -> None:
    jobs = [Job(*draw(1)) for _ in range(3)]
    jobs[1].observations["xy"][:] = 13

    async def work() -> list[Any]:
        batcher = Batcher(LocalEngine(arithmetic), max_batch=4, max_wait=0.02)
        return await plan_all(batcher, [batcher.plan(job) for job in jobs])

    first, failed, last = run(work)
    assert isinstance(failed, ArithmeticError)
    for job, answer in ((jobs[0], first), (jobs[2], last)):
        np.testing.assert_array_equal(answer.plans, arithmetic.sample(job.observations, job.noise))


class TwoCalls:
    """An engine that computes two calls at once, and begins neither before both are there."""

    calls = 2

    def __init__(self, planner: Any) -> None:
        self._local, self._both = LocalEngine(planner), threading.Barrier(2, timeout=10)

    def plan(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        self._both.wait()
        return self._local.plan(jobs)

    def count_replicas(self) -> int:
        return 2


def test_as_many_calls_are_made_at_once_as_the_engine_computes(arithmetic) -> None:
    jobs = [Job(*draw(1)) for _ in range(8)]

    async def work() -> list[Any]:
        batcher = Batcher(TwoCalls(arithmetic), max_batch=2)
        found = await plan_all(batcher, [batcher.plan(job) for job in jobs])
        assert batcher.waiting == batcher.calls == 0
        return found

    for job, answer in zip(jobs, run(work), strict=True):
        np.testing.assert_array_equal(answer.plans, arithmetic.sample(job.observations, job.noise))


def test_an_engine_that_is_busy_is_not_asked_for_each_request_again() -> None:
    asked = []

    class BusyEngine(TwoCalls):
        def plan(self, jobs: Sequence[Job]) -> list[np.ndarray]:
            asked.append(len(jobs))
            raise Busy("no replica is there")

    async def work() -> list[Any]:
        batcher = Batcher(BusyEngine(None), max_batch=4, max_wait=0.02)
        return await plan_all(batcher, [batcher.plan(Job(*draw(1))) for _ in range(4)])

    assert [str(one) for one in run(work)] == ["no replica is there"] * 4
    assert asked == [4]


def test_who_comes_too_late_is_told_so_and_not_planned_for(arithmetic) -> None:
    arithmetic.may_go.clear()
    jobs = [Job(*draw(1)) for _ in range(3)]

    async def work() -> list[Any]:
        batcher = Batcher(LocalEngine(arithmetic), max_batch=1)
        now = time.monotonic()
        requests = [batcher.plan(jobs[0]), batcher.plan(jobs[1], now + 0.01), batcher.plan(jobs[2], now + 60)]
        return await plan_all(batcher, requests, arithmetic)

    first, late, last = run(work)
    assert isinstance(late, Late)
    assert "the deadline passed" in str(late)
    assert len(first.plans) == len(last.plans) == 1
    assert len(arithmetic.calls) == 2


def test_more_than_may_wait_are_told_that_it_is_busy(arithmetic) -> None:
    arithmetic.may_go.clear()

    async def work() -> list[Any]:
        batcher = Batcher(LocalEngine(arithmetic), max_batch=1, queued=3)
        return await plan_all(batcher, [batcher.plan(Job(*draw(1))) for _ in range(6)], arithmetic)

    found = run(work)
    assert [isinstance(one, Busy) for one in found] == [False] * 3 + [True] * 3


def test_a_robot_that_is_gone_is_not_planned_for(arithmetic) -> None:
    arithmetic.may_go.clear()

    async def work() -> None:
        batcher = Batcher(LocalEngine(arithmetic), max_batch=1)
        planning = asyncio.create_task(batcher.run())
        asked = [asyncio.create_task(batcher.plan(Job(*draw(1)))) for _ in range(3)]
        await asyncio.sleep(0.05)
        asked[1].cancel()
        await asyncio.sleep(0.01)
        arithmetic.may_go.set()
        await asyncio.gather(asked[0], asked[2])
        planning.cancel()

    run(work)
    assert len(arithmetic.calls) == 2
