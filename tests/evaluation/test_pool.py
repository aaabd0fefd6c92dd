"""Environments that raise, crash and hang, in real worker processes."""

import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

from diffusion_policy.basics.bounds import MOST_STEPS
from diffusion_policy.evaluation.host import EnvFailure, StepsResult
from diffusion_policy.evaluation.pool import EnvironmentPool

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
        slot: answer.reason if isinstance(answer, EnvFailure) else int(answer.observations["count"][-1, 0])
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
        assert isinstance(goes_on, StepsResult)
        assert isinstance(ends, StepsResult)
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
        assert {slot: answer.blamed for slot, answer in answers.items() if isinstance(answer, EnvFailure)} == {
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
    assert isinstance(answer, EnvFailure)
    return answer.reason


# Environments of ill will


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


ERRORS = {
    "is long": lambda: RuntimeError("x" * 10_000_000),
    "commands": lambda: RuntimeError("\x1b[2J\nall is \u202e fine"),
    "is unspeakable": Unspeakable,
    "exits": lambda: SystemExit(3),
    "interrupts": KeyboardInterrupt,
}
ANSWERS = {  # (observation, reward, terminated, truncated, info)
    "gives no reward": {1: None},
    "gives NaN as reward": {1: np.nan},
    "gives no success": {4: {}},
    "gives two successes": {4: {"is_success": np.array([True, False])}},
    "gives a text as success": {4: {"is_success": "yes"}},
    "measures no number": {4: {"is_success": True, "measures": {"score": None}}},
    "changes shape": {0: {"x": np.zeros(3)}},
    "changes keys": {0: {"y": np.zeros(2)}},
    "observes texts": {0: {"x": np.array(["a", "b"])}},
    "observes no dict": {0: np.zeros(2)},
    "gives an array as success": {
        4: {"is_success": np.array([1.0]), "measures": {"score": np.float32(0.5)}, "huge": ERRORS}
    },
}


class Ill(gymnasium.Env):
    """Goes wrong in its third step in one way, if its seed is 7."""

    observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Box(0, 1000, (2,), np.float64)})
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, kind: str = "") -> None:
        self._kind = kind

    def reset(self, *, seed=None, options=None):
        self._seed, self._steps, self._x = seed, 0, np.full(2, 1 / 3)
        return {"x": self._x}, {}

    def step(self, action):
        self._steps += 1
        self._x += 1  # in place
        answer = [{"x": self._x}, 1, False, False, {"is_success": False}]
        if self._seed == 7 and self._steps == 3:
            if self._kind in ERRORS:
                raise ERRORS[self._kind]()
            for place, value in ANSWERS.get(self._kind, {}).items():
                answer[place] = value
        return tuple(answer)

    def close(self):
        if self._kind == "cannot close":
            raise RuntimeError("already closed")
        if self._kind == "exits as it closes":
            sys.exit(3)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("is long", r"RuntimeError: x+ \.\.\. \(.*test_pool"),
        ("commands", r"RuntimeError: \\x1b\[2J all is \\u202e fine \("),
        ("is unspeakable", r"Unspeakable: its message cannot be shown \("),
        ("exits", r"SystemExit: 3 \("),
        ("gives no reward", "the reward must be a finite number; got None"),
        ("gives NaN as reward", "the reward must be a finite number; got nan"),
        ("gives no success", r"must give info\['is_success'\] at every step"),
        ("gives two successes", r"info\['is_success'\] must be a finite number; got array"),
        ("gives a text as success", r"info\['is_success'\] must be a finite number; got 'yes'"),
        ("measures no number", "the measure 'score' must be a finite number; got None"),
        ("changes shape", r"the observation 'x' was \(2,\) at the first step; now it is \(3,\)"),
        ("changes keys", "the observation 'x' was .* now it is nothing"),
        ("observes texts", "must be a dict of arrays of numbers"),
        ("observes no dict", "must be a dict of arrays; got ndarray; make the environment with .*EnvSpec"),
    ],
)
def test_what_an_environment_does_costs_its_own_episode_alone_and_is_told_in_a_line(kind: str, reason: str) -> None:
    with EnvironmentPool(partial(Ill, kind)) as pool:
        pool.reset({0: 7, 1: 8})
        answers = pool.step(dict.fromkeys([0, 1], np.zeros((3, 1))))
        assert re.search(reason, counts_reason(answers[0]))
        assert counts_reason(answers[0]).isprintable()
        assert len(counts_reason(answers[0])) < 1100
        assert isinstance(answers[1], StepsResult)


def test_numbers_come_as_numbers_whatever_they_were_in() -> None:
    with EnvironmentPool(partial(Ill, "gives an array as success")) as pool:
        pool.reset({0: 7})
        answer = pool.step({0: np.zeros((3, 1))})[0]
        assert isinstance(answer, StepsResult)
        assert answer.info == {"is_success": True, "measures": {"score": 0.5}}


def test_an_interrupt_that_a_simulator_raises_does_not_end_its_worker() -> None:
    with EnvironmentPool(partial(Ill, "interrupts"), 2) as pool:
        pool.reset({0: 7, 2: 8})
        answers = pool.step(dict.fromkeys([0, 2], np.zeros((5, 1))))
        assert isinstance(answers[0], EnvFailure)
        assert isinstance(answers[2], StepsResult)


def test_ctrl_c_in_a_simulator_of_this_process_is_the_users() -> None:
    with EnvironmentPool(partial(Ill, "interrupts")) as pool:
        pool.reset({0: 7})
        with pytest.raises(KeyboardInterrupt):
            pool.step({0: np.zeros((5, 1))})


def test_observations_keep_their_precision_and_are_copied() -> None:
    with EnvironmentPool(Ill) as pool:
        first = pool.reset({0: 1})[0]
        answer = pool.step({0: np.zeros((3, 1))})[0]
        assert isinstance(first, dict)
        assert isinstance(answer, StepsResult)
        rows = np.concatenate([first["x"][None], answer.observations["x"]])
        assert rows[0, 0] == 1 / 3
        np.testing.assert_allclose(rows[:, 0], 1 / 3 + np.arange(4), rtol=1e-15)


@pytest.mark.parametrize(
    ("kind", "workers"), [("cannot close", 1), ("exits as it closes", 1), ("exits as it closes", 2)]
)
def test_an_environment_that_cannot_be_closed_takes_nothing_along(
    kind: str, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with EnvironmentPool(partial(Ill, kind), workers) as pool:
        pool.reset({0: 1, 1: 2})
        assert isinstance(pool.step({0: NOTHING, 1: NOTHING})[1], StepsResult)
    assert "Traceback" not in capfd.readouterr().err


def test_an_episode_without_an_end_ends() -> None:
    for make_env, steps in ((Ill, MOST_STEPS), (lambda: TimeLimit(Ill(), MOST_STEPS + 5), MOST_STEPS + 5)):
        with EnvironmentPool(make_env) as pool:
            pool.reset({0: 1})
            answer = pool.step({0: np.zeros((2 * MOST_STEPS, 1))})[0]
            assert isinstance(answer, StepsResult)
            assert answer.ended
            assert len(answer.rewards) == steps


class Wandering(Ill):
    def step(self, action):
        os.chdir("/")
        return super().step(action)


def test_an_environment_may_change_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with EnvironmentPool(Wandering) as pool:
        pool.reset({0: 1})
        pool.step({0: NOTHING})
        assert Path.cwd() == Path("/")
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be a whole number of at least 1; got 0"),
        ({"hang_after": 0}, "hang_after must be above 0"),
        ({"hang_after": float("nan")}, "hang_after must be above 0"),
        ({"hang_after": 1e9}, "hang_after must be above 0"),
        ({"workers": 2, "make_env": lambda: Ill()}, "make_env must be picklable .*: use functools.partial or a"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvironmentPool(**{"make_env": Ill, **arguments})
