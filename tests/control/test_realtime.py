"""A loop that keeps time: what it counts, what it joins, and that it always stops the robot."""

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from diffusion_policy.config import ConfigError
from diffusion_policy.control.chunking import Chunking, Guided, Inpainted
from diffusion_policy.control.limits import Limits
from diffusion_policy.control.planner import Steering
from diffusion_policy.control.realtime import RealTimeRunner
from diffusion_policy.control.run_log import RunLog

RATE = 100.0
MEASURED = 8
"""Plans that are made before a run, to know how long they take."""


class Planner:
    """Plans the numbers from what is observed on; takes so long [s] for each plan."""

    observation_horizon, steps, action_horizon = 2, 8, 4
    action_shape, noise_shape = (1,), (1,)
    guides, longest_prefix = True, 2

    def __init__(self, seconds: float | Callable[[int], float] = 0.0) -> None:
        self.observation_shapes = {"x": (1,)}
        self.seconds = seconds
        self.asked: list[tuple[np.ndarray, Steering | None]] = []

    def sample(self, observations, noise, steering=None) -> np.ndarray:
        self.asked.append((observations["x"][0, :, 0].copy(), steering))
        time.sleep(self.seconds(len(self.asked)) if callable(self.seconds) else self.seconds)
        return observations["x"][:, None, -1:] + np.arange(8.0)[:, None]


class Counter:
    """Observes how many actions it has taken; ends after so many."""

    def __init__(self, last: int = 10**9) -> None:
        self.taken: list[float] = []
        self.stops, self.last = 0, last

    def observe(self):
        return None if len(self.taken) >= self.last else {"x": np.array([float(len(self.taken))]), "beside": "it"}

    def act(self, action: np.ndarray) -> None:
        self.taken.append(float(action[0]))

    def stop(self) -> None:
        self.stops += 1


def run(planner: Planner, robot, steps: int | None = 20, **options) -> RunLog:
    return RealTimeRunner(planner, RATE, **options).run(robot, steps)


@pytest.mark.parametrize("delay, seconds", [(0, 0.0), (2, 0.0), (2, 0.012), (4, 0.032)])
def test_what_is_executed_is_the_plan_of_each_step_whatever_planning_takes(delay: int, seconds: float) -> None:
    robot = Counter()
    log = run(Planner(seconds), robot, delay_steps=delay)
    assert (log.ended, log.failed, log.starved, robot.stops) == ("20 steps are done", False, 0, 1)
    assert robot.taken == list(range(20))  # each plan continues the one before: the robot counts on
    assert [len(rows) for rows in (log.actions, log.times, log.lateness, log.plan_of, log.observations["x"])] == [
        20
    ] * 5
    assert all(plan.expected == (delay if i else 0) for i, plan in enumerate(log.plans))


def test_delay_is_counted_in_actions_and_expected_of_the_next_plan() -> None:
    planner = Planner(
        lambda number: 0.025 if number > 9 else 0.0
    )  # the first 8 are made before the start, and one in it
    log = run(planner, Counter(), steps=40)
    counted = [plan.ready - plan.asked for plan in log.plans]
    assert counted[0] == 0
    assert max(counted) >= 2
    assert [plan.expected for plan in log.plans[1:]] == [max([0, *counted[1:i]][-10:]) for i in range(1, len(counted))]


def test_the_history_holds_the_last_steps_and_repeats_the_first() -> None:
    planner = Planner()
    run(planner, Counter(), steps=5, delay_steps=0)
    assert [seen.tolist() for seen, _ in planner.asked[MEASURED:]] == [[0, 0], [3, 4]]


def test_a_strategy_is_told_what_runs_on() -> None:
    planner = Planner()
    log = run(planner, Counter(), steps=12, delay_steps=2, chunking=Chunking(Inpainted()))
    steering = planner.asked[MEASURED + 1][1]
    assert steering is not None
    assert steering.actions[0, :, 0].tolist()[:4] == [4, 5, 6, 7]
    assert np.isnan(steering.actions[0, 4:]).all()
    assert steering.weights.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert not log.failed


class Faulty(Counter):
    """What it does at its fifth action or observation."""

    def __init__(self, where: str, what: Callable[[], object]) -> None:
        super().__init__()
        self.where, self.what = where, what

    def observe(self):
        if self.where == "observe" and len(self.taken) == 5:
            return self.what()
        return super().observe()

    def act(self, action: np.ndarray) -> None:
        super().act(action)
        if self.where == "act" and len(self.taken) == 5:
            self.what()

    def stop(self) -> None:
        super().stop()
        if self.where == "stop":
            self.what()


def raises() -> None:
    raise OSError("the cable is loose")


RELEASED = threading.Event()
"""Ends what hangs."""


def hangs() -> None:
    RELEASED.wait(20)


@pytest.fixture(autouse=True)
def held() -> Iterator[None]:
    RELEASED.clear()
    yield
    RELEASED.set()


@pytest.mark.parametrize(
    "where, what, why",
    [
        ("observe", raises, r"the robot's observe\(\) raised OSError: the cable is loose"),
        ("observe", hangs, r"the robot's observe\(\) has not returned for 0.1 s"),
        ("observe", lambda: {"x": np.array([np.nan])}, "the robot observed NaN or infinity in x"),
        (
            "observe",
            lambda: {"y": np.array([1.0])},
            r"the robot's observe\(\) must give x of shape \(1,\); got None",
        ),
        ("observe", lambda: {"x": "left"}, r"must give x of shape \(1,\); got 'left'"),
        ("observe", lambda: [1.0], r"the robot's observe\(\) must give {key: numbers} or None; got list"),
        ("observe", lambda: {"x": np.zeros(3)}, r"must give x of shape \(1,\); got shape \(3,\)"),
        ("act", raises, r"the robot's act\(\) raised OSError: the cable is loose"),
        ("act", hangs, r"the robot's act\(\) has not returned for 0.1 s"),
        ("stop", raises, r"20 steps are done; the robot's stop\(\) raised OSError: the cable is loose"),
        ("stop", hangs, r"20 steps are done; the robot's stop\(\) has not returned for 0.1 s"),
    ],
)
def test_whatever_the_robot_does_it_is_stopped_and_the_log_is_kept(where: str, what, why: str) -> None:
    robot = Faulty(where, what)
    began = time.perf_counter()
    log = run(Planner(), robot, watchdog=0.1, delay_steps=1)
    assert time.perf_counter() - began < 10  # it waits for nothing that hangs
    assert log.failed
    assert robot.stops == 1
    assert re.search(why, log.ended), log.ended
    assert len(log.actions) >= 4


def test_planning_that_fails_or_does_not_end_stops_the_robot() -> None:
    def fail(number: int) -> float:
        if number > MEASURED + 1:
            raise FloatingPointError("the policy planned NaN")
        return 0.0

    robot = Counter()
    log = run(Planner(fail), robot, delay_steps=1)
    assert (log.ended, log.failed, robot.stops) == (
        "planning failed: FloatingPointError: the policy planned NaN",
        True,
        1,
    )
    robot = Counter()
    log = run(Planner(lambda number: 2.0 if number > MEASURED + 1 else 0.0), robot, None, delay_steps=1, watchdog=0.1)
    assert (log.ended, log.failed, robot.stops) == ("no plan was ready for 0.1 s", True, 1)
    assert robot.taken == list(range(8))  # all of the plan, then nothing
    assert log.starved > 0
    assert "the robot got no action meanwhile" in log.warnings[-1]


@pytest.mark.parametrize("when", ["at once", "later", "while it hangs"])
def test_a_stop_is_obeyed_within_a_period(when: str) -> None:
    stop, stopped_at = threading.Event(), []

    class Robot(Faulty):
        def stop(self) -> None:
            super().stop()
            stopped_at.append(time.perf_counter())

    robot = Robot("observe" if when == "while it hangs" else "", hangs)
    set_at = []

    def press() -> None:
        set_at.append(time.perf_counter())
        stop.set()

    timer = threading.Timer(0 if when == "at once" else 0.2, press)
    timer.start()
    log = RealTimeRunner(Planner(), 20, delay_steps=1, watchdog=10).run(robot, None, stop)
    timer.join()
    assert (log.ended, log.failed, robot.stops) == ("stopped", False, 1)
    assert stopped_at[0] - set_at[0] < 5  # a period is 0.05 s; the rest is for a busy machine


def test_an_episode_that_ends_ends_the_run() -> None:
    robot = Counter(last=7)
    log = run(Planner(), robot, None)
    assert (log.ended, len(robot.taken), log.failed) == ("the robot's episode has ended", 7, False)
    assert run(Planner(), Counter(last=0)).actions == []


def test_a_dry_run_does_all_but_act() -> None:
    robot = Counter()
    log = run(Planner(), robot, steps=6, dry_run=True, delay_steps=0)
    assert robot.taken == []
    assert [action[0] for action in log.actions] == [0, 1, 2, 3, 0, 1]  # it observes that nothing happens


def test_actions_stay_within_limits_and_are_counted() -> None:
    robot = Counter()
    log = run(Planner(), robot, steps=8, delay_steps=0, limits=Limits(high=(5.0,), change=(0.5,)))
    assert robot.taken == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert log.limited > 0
    fast = run(Planner(), Counter(), steps=8, delay_steps=0, limits=Limits(low=(2.0,), high=(3.0,), rate=(1000.0,)))
    assert [action[0] for action in fast.actions[:4]] == [2, 2, 2, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate": 0.0}, "the rate must be above 0 steps a second; got 0"),
        ({"watchdog": 0.0}, "the watchdog must be above 0 seconds; got 0"),
        ({"delay_steps": 5}, r"delay-steps must be from 0 to 4 .*; got 5"),
        ({"action_horizon": 9}, "action-horizon must be from 1 to the 8 steps of a plan; got 9"),
        (
            {"limits": Limits(low=(1.0,), high=(0.0,))},
            r"no action meets these limits: --low \(1.0,\) lies above --high",
        ),
        ({"limits": Limits(change=(0.0,))}, "no action meets these limits: --change and --rate must be above 0"),
        ({"limits": Limits(low=(1.0, 2.0))}, "--low takes 1 number, or one for each of the action's 1; got 2"),
        ({"limits": Limits(high=(float("nan"),))}, "--high must be numbers"),
        ({"chunking": Chunking(Inpainted()), "delay_steps": 3}, "delays up to --max-delay 2; got 3"),
    ],
)
def test_what_cannot_work_is_refused_before_the_robot_moves(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RealTimeRunner(Planner(), **{"rate": RATE} | options)


def test_a_rate_that_planning_cannot_keep_is_refused_with_what_would() -> None:
    with pytest.raises(
        ConfigError, match=r"a plan takes 5\d ms, [67] steps of 10 ms; plans can bridge 4: fewer --samp"
    ):
        RealTimeRunner(Planner(0.052), RATE)
    with pytest.raises(ConfigError, match="plans can bridge 2: fewer --sampling-steps"):
        RealTimeRunner(Planner(0.031), RATE, chunking=Chunking(Inpainted()))
    RealTimeRunner(Planner(0.031), RATE, chunking=Chunking(Guided()))


def test_no_action_reaches_a_robot_after_its_stop() -> None:
    stop = threading.Event()

    class Slow(Counter):
        events: list[str] = []  # noqa: RUF012

        def act(self, action: np.ndarray) -> None:
            if len(self.taken) == 3:
                stop.set()
                time.sleep(0.03)
            super().act(action)
            self.events.append("act")

        def stop(self) -> None:
            self.events.append("stop")

    robot = Slow()
    RealTimeRunner(Planner(), RATE, delay_steps=1).run(robot, None, stop)
    time.sleep(0.1)
    assert robot.events[-1] == "stop"
    assert robot.events.count("act") == 4


def test_times_go_on_where_steps_are_left_out() -> None:
    class Slow(Counter):
        def observe(self):
            if 5 <= len(self.taken) < 8:
                time.sleep(0.035)
            return super().observe()

    began = time.perf_counter()
    log = run(Planner(), Slow(), steps=15, delay_steps=1)
    took = time.perf_counter() - began
    assert log.missed >= 3
    assert len(log.actions) == 15
    assert np.diff(log.times).min() > 0
    assert 0.2 < log.times[-1] < took
    assert log.late >= 3
    assert max(log.lateness) > 0.02


def test_a_robot_that_ends_the_program_is_stopped_like_others() -> None:
    log = run(Planner(), Faulty("act", lambda: sys.exit(3)), delay_steps=1)
    assert log.ended == "the robot's act() raised SystemExit: 3"


def test_a_delay_that_is_longer_than_told_is_said_and_one_that_cannot_be_bridged_refused() -> None:
    log = run(Planner(0.025), Counter(), delay_steps=1)
    assert log.warnings[0] == "plans take 3 steps here, more than the 1 of --delay-steps"
    with pytest.raises(ConfigError, match=r"a plan takes 6. ms, 7 steps of 10 ms; plans can bridge 4"):
        run(Planner(0.062), Counter(), delay_steps=1)


def test_what_limits_change_is_what_plans_are_joined_to() -> None:
    planner = Planner()
    log = run(planner, Counter(), steps=8, delay_steps=2, limits=Limits(high=(4.5,)), chunking=Chunking(Inpainted()))
    steering = planner.asked[MEASURED + 1][1]
    assert steering is not None
    assert steering.actions[0, :3, 0].tolist() == [4, 4.5, 6]  # the two that are executed meanwhile
    assert log.actions[5][0] == 4.5


def test_an_action_is_of_the_plan_that_it_comes_from() -> None:
    log = run(Planner(), Counter(), steps=8, delay_steps=2)
    assert log.plan_of == [0, 0, 0, 0, 0, 0, 1, 1]
