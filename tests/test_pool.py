"""Environments that raise, crash and hang, in real worker processes."""

import os
import signal
import time
from functools import partial

import gymnasium
import numpy as np
import pytest

from diffusion_policy.pool import EnvironmentPool, Fault, Stretch

NOTHING = np.zeros((1, 1), np.float32)
"""One action."""


class Counter(gymnasium.Env):
    """Counts from its seed; raises at 13, dies at 66, hangs at 99; its episodes end at 50."""

    observation_space = gymnasium.spaces.Dict({"count": gymnasium.spaces.Box(0, 1000, (1,))})
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.count = seed
        return {"count": np.array([seed], np.float32)}, {}

    def step(self, action):
        self.count += 1
        if self.count == 13:
            raise RuntimeError("unlucky")
        if self.count == 66:
            os._exit(3)
        if self.count == 99:
            time.sleep(60)
        return (
            {"count": np.array([self.count], np.float32)},
            1.0,
            self.count == 50,
            False,
            {"is_success": False, "count": self.count},
        )


def counts(pool: EnvironmentPool, slots: list[int]) -> dict[int, int | str]:
    """One step of some slots: what each counts, or why it cannot."""
    answers = pool.step(dict.fromkeys(slots, NOTHING))
    return {
        slot: answer.reason if isinstance(answer, Fault) else int(answer.observations["count"][-1, 0])
        for slot, answer in sorted(answers.items())
    }


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_slot_keeps_its_environment(workers: int) -> None:
    with EnvironmentPool(Counter, workers) as pool:
        first = pool.reset({0: 20, 1: 30, 4: 40})
        assert {slot: int(observation["count"][0]) for slot, observation in first.items()} == {0: 20, 1: 30, 4: 40}
        counts(pool, [0, 4])
        assert counts(pool, [0, 4]) == {0: 22, 4: 42}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sequence_of_actions_is_taken_until_the_episode_ends(workers: int) -> None:
    with EnvironmentPool(Counter, workers) as pool:
        pool.reset({0: 20, 1: 47})
        goes_on, ends = (answer for _, answer in sorted(pool.step(dict.fromkeys([0, 1], np.zeros((5, 1)))).items()))
        assert isinstance(goes_on, Stretch)
        assert isinstance(ends, Stretch)
        assert goes_on.observations["count"].tolist() == [[21], [22], [23], [24], [25]]
        assert ends.observations["count"].tolist() == [[48], [49], [50]]
        assert (goes_on.ended, ends.ended) == (False, True)
        assert (len(goes_on.rewards), len(ends.rewards)) == (5, 3)
        assert ends.info == {"is_success": False}  # what else an environment tells stays where it is


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_its_own_slot_alone_which_can_begin_again(workers: int) -> None:
    with EnvironmentPool(Counter, workers) as pool:
        pool.reset({0: 12, 2: 20})
        answers = counts(pool, [0, 2])
        assert answers[2] == 21
        assert "RuntimeError: unlucky" in str(answers[0])
        assert "test_pool.py:" in str(answers[0])  # where it was raised
        pool.reset({0: 5})
        assert counts(pool, [0, 2]) == {0: 6, 2: 22}


def test_a_crash_takes_its_worker_along_and_is_blamed_on_the_slot_at_work() -> None:
    with EnvironmentPool(partial(Counter), 2) as pool:
        pool.reset({0: 20, 1: 30, 2: 65, 4: 40})
        answers = pool.step(dict.fromkeys([0, 1, 2, 4], NOTHING))
        assert isinstance(answers.pop(1), tuple)
        assert {slot: answer.blamed for slot, answer in answers.items() if isinstance(answer, Fault)} == {
            0: False, 2: True, 4: False,
        }  # fmt: skip
        assert "its worker process died (exit status 3)" in counts_reason(answers[2])
        pool.reset({0: 1, 2: 2, 4: 3})
        assert counts(pool, [0, 1, 2, 4]) == {0: 2, 1: 32, 2: 3, 4: 4}


def test_a_worker_that_hangs_is_replaced() -> None:
    with EnvironmentPool(Counter, 2, hang_after=2) as pool:
        pool.reset({0: 98, 1: 30})
        started = time.monotonic()
        answers = counts(pool, [0, 1])
        assert time.monotonic() - started < 10
        assert answers == {0: "its environment did not answer within 2 s", 1: 31}
        pool.reset({0: 7})
        assert counts(pool, [0, 1]) == {0: 8, 1: 32}


def test_a_worker_that_is_killed_between_two_steps_is_noticed() -> None:
    with EnvironmentPool(Counter, 2) as pool:
        pool.reset({0: 20, 1: 30})
        process = pool._workers[0].spawned.process  # pyright: ignore[reportAttributeAccessIssue]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert counts(pool, [0, 1]) == {0: "its worker process died (exit status -9)", 1: 31}


def test_the_time_that_traffic_takes_is_known() -> None:
    with EnvironmentPool(Counter, 2) as pool:
        pool.reset({0: 0, 1: 0})
        counts(pool, [0, 1])
        assert 0 < pool.seconds_worked < pool.seconds_asked


def counts_reason(answer: object) -> str:
    assert isinstance(answer, Fault)
    return answer.reason
