import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from diffusion_policy.config import ConfigError
from diffusion_policy.control.chunking import Chunking, Handover
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.planner import Steering, planning_rng


class ScriptedPlanner:
    """Plans the numbers 0, 1, 2, ... shifted so that the step of *now* says what was last observed."""

    def __init__(self, observation_horizon: int, prediction_horizon: int, action_horizon: int) -> None:
        self.observation_horizon, self.action_horizon = observation_horizon, action_horizon
        self.steps = prediction_horizon - observation_horizon + 1
        self.observation_shapes = {"x": (1,)}
        self.action_shape = (1,)
        self.noise_shape = (2, 3)
        self.guides, self.longest_prefix = True, self.steps - 1
        self.seen: list[np.ndarray] = []
        self.noise: list[np.ndarray] = []
        self.steering: list[Steering | None] = []

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        self.seen.append(observations["x"][..., 0].copy())
        self.noise.append(noise)
        self.steering.append(steering)
        now = observations["x"][:, -1]  # (B, 1)
        plans = (now + np.arange(self.steps))[:, None, :, None]  # (B, 1, steps, 1)
        return plans + np.arange(noise.shape[1])[:, None, None] / 1000


def controller(planner: ScriptedPlanner, environments: int = 1, plan_batch: int = 4) -> Controller:
    made = Controller(planner, environments, plan_batch=plan_batch)
    made.reset(np.ones(environments, bool), [(i, 0) for i in range(environments)])
    return made


@pytest.mark.parametrize("horizons", [(2, 16, 8), (1, 4, 1), (3, 8, 6), (1, 1, 1), (2, 16, 15)])
def test_what_is_executed_starts_now_and_plans_come_every_action_horizon(horizons: tuple[int, int, int]) -> None:
    planner = ScriptedPlanner(*horizons)
    act = controller(planner)
    for step in range(20):
        action = act.act({"x": np.array([[float(step)]])})
        assert action[0, 0] == step  # planned at the last plan as its step `now + k`
    assert len(planner.seen) == -(-20 // horizons[2])


def test_the_history_holds_the_last_steps_and_repeats_the_first() -> None:
    planner = ScriptedPlanner(3, 8, 2)
    act = controller(planner, plan_batch=1)
    for step in range(5):
        act.act({"x": np.array([[10.0 + step]])})
    assert [seen[0].tolist() for seen in planner.seen] == [[10, 10, 10], [10, 11, 12], [12, 13, 14]]


@pytest.mark.parametrize("delay", [0, 2])
def test_all_actions_up_to_the_next_plan_are_those_of_single_steps(delay: int) -> None:
    planned, executed = [], []
    for together in (False, True):
        planner = ScriptedPlanner(3, 8, 4)
        act = Controller(planner, 2, plan_batch=2, delay_steps=delay)
        act.reset(np.ones(2, bool), [(i, 0) for i in range(2)])
        observations = np.random.default_rng(0).normal(size=(12, 2, 1))
        actions = []
        for step, observation in enumerate(observations):
            if not together:
                actions.append(act.act({"x": observation}))
            elif step % 4 == 0:
                actions.extend(act.act_until_next_plan({"x": observation}, np.ones(2, bool)).swapaxes(0, 1))
            else:
                act.observe({"x": observation}, np.ones(2, bool))
        executed.append(np.stack(actions))
        planned.append(np.stack(planner.seen))
    np.testing.assert_array_equal(*executed)
    np.testing.assert_array_equal(*planned)


def test_in_the_middle_of_a_plan_the_rest_is_not_handed_out_at_once() -> None:
    act = controller(ScriptedPlanner(2, 8, 4))
    act.act({"x": np.zeros((1, 1))})
    with pytest.raises(RuntimeError, match="act step by step until the next one"):
        act.act_until_next_plan({"x": np.zeros((1, 1))}, np.ones(1, bool))


def test_environments_plan_at_their_own_time_and_reset_forgets() -> None:
    planner = ScriptedPlanner(2, 8, 4)
    act = controller(planner, environments=3)
    act.act({"x": np.array([[0.0], [100.0], [200.0]])})
    act.reset(np.array([False, True, False]), [(7, 0)])
    actions = act.act({"x": np.array([[1.0], [500.0], [201.0]])})
    assert actions[:, 0].tolist() == [1, 500, 201]
    assert len(planner.seen) == 2
    assert planner.seen[1][0].tolist() == [500, 500]  # no trace of the episode before


def test_inactive_environments_neither_plan_nor_move_on() -> None:
    planner = ScriptedPlanner(1, 4, 2)
    act = controller(planner, environments=2)
    act.act({"x": np.array([[0.0], [10.0]])})
    for _ in range(3):
        act.act({"x": np.array([[1.0], [11.0]])}, np.array([True, False]))
    assert act.act({"x": np.array([[9.0], [11.0]])})[1, 0] == 11  # the second action of its first plan


def test_every_planning_batch_has_the_same_size() -> None:
    planner = ScriptedPlanner(1, 4, 2)
    act = controller(planner, environments=7, plan_batch=3)
    act.act({"x": np.arange(7.0)[:, None]})
    assert [len(seen) for seen in planner.seen] == [3, 3, 3]


def test_a_plan_of_nan_is_stopped_at_once() -> None:
    act = controller(ScriptedPlanner(1, 4, 2))
    with pytest.raises(FloatingPointError, match="the policy planned NaN or infinity"):
        act.act({"x": np.array([[np.nan]])})


def test_a_controller_that_was_not_reset_does_not_act() -> None:
    planner = ScriptedPlanner(1, 4, 2)
    with pytest.raises(RuntimeError, match="reset the controller before it acts"):
        Controller(planner, 1).act({"x": np.zeros((1, 1))})


@pytest.mark.parametrize(
    "observations, message",
    [
        ({}, "the policy observes 'x'; got nothing"),
        ({"y": np.zeros((2, 1))}, "the policy observes 'x'; got 'y'"),
        ({"x": np.zeros((2, 3))}, r"the observation x must be numbers of shape \(2, 1\); got float64 \(2, 3\)"),
        ({"x": np.zeros(1)}, r"the observation x must be numbers of shape \(2, 1\); got float64 \(1,\)"),
        ({"x": np.array([["a"], ["b"]])}, r"the observation x must be numbers of shape \(2, 1\); got <U1 \(2, 1\)"),
    ],
)
def test_observations_that_the_policy_cannot_use_are_refused_in_a_line(observations: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controller(ScriptedPlanner(2, 8, 4), environments=2).act(observations)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_observations_keep_their_precision_and_actions_have_the_type_that_is_asked(dtype: type) -> None:
    planner = ScriptedPlanner(1, 4, 2)
    act = Controller(planner, 2, dtype=dtype)
    act.reset(np.ones(2, bool), [(i, 0) for i in range(2)])
    action = act.act(
        {"x": np.array([5.4e6, 5.4e6 + 0.001]), "beside": np.array(["not", "observed"])}
    )  # a number is a row
    assert planner.seen[0].flatten().tolist() == [5.4e6, 5.4e6 + 0.001]
    assert action.dtype == dtype


def test_planning_noise_derives_from_seed_repeat_and_the_number_of_the_plan() -> None:
    draws = {planning_rng(*name).normal() for name in itertools.product(range(4), range(4), range(4))}
    assert len(draws) == 64
    planner = ScriptedPlanner(1, 4, 1)
    act = Controller(planner, 2, plan_batch=2)
    act.reset(np.ones(2, bool), [(5, 0), (5, 1)])
    for _ in range(2):
        act.act({"x": np.zeros((2, 1))})
    for plan, noise in enumerate(planner.noise):
        assert noise.dtype == np.float32
        for repeat in range(2):
            expected = planning_rng(5, repeat, plan).standard_normal((2, 3), np.float32)
            np.testing.assert_array_equal(noise[repeat, 0], expected)


def test_a_strategy_is_told_what_is_left_of_the_plan_before() -> None:
    told = []

    def merge(handover: Handover, plans: np.ndarray) -> np.ndarray:
        told.append(handover)
        return plans

    act = Controller(ScriptedPlanner(1, 6, 2), 1, chunking=Chunking(merge=merge), delay_steps=1)
    act.reset(np.ones(1, bool), [(0, 0)])
    for step in range(4):
        act.act({"x": np.array([[10.0 * step]])})
    first, second = told
    assert np.isnan(first.executing).all()
    np.testing.assert_array_equal(second.executing[0, :, 0], [2, 3, 4, 5, np.nan, np.nan])
    assert [(one.delay_steps, one.action_horizon, *one.made) for one in told] == [(1, 2, 0), (1, 2, 1)]
    assert [one.known.sum() for one in told] == [0, 4]
    assert [one.committed.sum() for one in told] == [0, 1]


def test_the_action_horizon_of_running_may_differ_from_that_of_training() -> None:
    planner = ScriptedPlanner(2, 16, 8)
    act = Controller(planner, 1, action_horizon=3)
    act.reset(np.ones(1, bool), [(0, 0)])
    for step in range(9):
        act.act({"x": np.array([[float(step)]])})
    assert len(planner.seen) == 3
    for wrong in (0, 16):
        with pytest.raises(ConfigError, match=rf"action-horizon must be from 1 to the 15 steps of a plan; got {wrong}"):
            Controller(planner, 1, action_horizon=wrong)


def test_another_chunking_decides_what_is_executed() -> None:
    planner = ScriptedPlanner(1, 4, 1)
    slowest = Chunking(merge=lambda handover, plans: np.fmin(handover.executing, plans))
    act = Controller(planner, 1, chunking=slowest)
    act.reset(np.ones(1, bool), [(0, 0)])
    assert [act.act({"x": np.array([[x]])})[0, 0] for x in (5.0, 9.0, 3.0)] == [5, 6, 3]


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_under_delay_the_old_plan_runs_on_and_the_time_that_has_passed_is_left_out(delay: int) -> None:
    planner = ScriptedPlanner(2, 8, 4)
    act = Controller(planner, 1, plan_batch=1, delay_steps=delay)
    act.reset(np.ones(1, bool), [(0, 0)])
    offset, executed = {}, []
    for step in range(
        16
    ):  # each plan says which observation it was made from: thousands, and the step it is for: units
        offset[step] = 1000.0 * (step // 4)
        executed.append(act.act({"x": np.array([[offset[step] + step]])})[0, 0])
    made_from = [max(0, (step - delay) // 4) for step in range(16)]
    assert executed == [1000.0 * plan + step for step, plan in enumerate(made_from)]
    assert len(planner.seen) == 4  # still every Ta steps


def test_a_delay_that_the_plans_cannot_bridge_is_refused() -> None:
    for delay in (-1, 4):
        with pytest.raises(ConfigError, match=rf"delay-steps must be from 0 to 3 \(.* = 7 - 4\); got {delay}"):
            Controller(ScriptedPlanner(2, 8, 4), 1, delay_steps=delay)


def test_what_was_planned_is_told_for_those_who_planned() -> None:
    act = controller(ScriptedPlanner(2, 8, 4), environments=3)
    act.act({"x": np.array([[0.0], [100.0], [200.0]])}, np.array([True, False, True]))
    assert {key: plan[:, 0].tolist() for key, plan in act.planned.items()} == {
        0: [0, 1, 2, 3, 4, 5, 6], 2: [200, 201, 202, 203, 204, 205, 206],
    }  # fmt: skip
    act.act({"x": np.array([[1.0], [100.0], [201.0]])}, np.array([True, False, True]))
    assert act.planned == {}


def test_actions_are_as_precise_as_they_were_planned_unless_told_otherwise() -> None:
    planner = ScriptedPlanner(1, 4, 2)
    planner.sample = lambda *_: np.full((1, 1, 4, 1), 5399999.35)
    assert controller(planner, plan_batch=1).act({"x": np.zeros((1, 1))})[0, 0] == 5399999.35


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool, np.float16, None])
def test_actions_of_other_types_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="actions are of float32 or float64; got"):
        Controller(ScriptedPlanner(1, 4, 2), 1, dtype=dtype)


def test_environments_are_chosen_by_booleans_and_there_is_one_at_least() -> None:
    act = controller(ScriptedPlanner(1, 4, 2), environments=2, plan_batch=2)
    for wrong in (np.array([1, 0]), np.array([True]), [1]):
        with pytest.raises(ValueError, match="environments are chosen by 2 booleans; got"):
            act.reset(wrong, [(0, 0)])
        with pytest.raises(ValueError, match="environments are chosen by 2 booleans; got"):
            act.act({"x": np.zeros((2, 1))}, wrong)
    for environments, plan_batch in ((0, 1), (1, 0), (1, -1)):
        with pytest.raises(ValueError, match="must be at least 1; got"):
            Controller(ScriptedPlanner(1, 4, 2), environments, plan_batch=plan_batch)  # pyright: ignore
