import os
import signal
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import FilterObservation

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.config import PolicyConfig, SampleConfig, with_options
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.envs.adapters import EnvSpecError
from diffusion_policy.evaluation.episode import Episode, FailedEpisode
from diffusion_policy.evaluation.rollout import RolloutError, rollout
from diffusion_policy.policy import DiffusionPolicy, Shapes

SEEDS = range(100_000, 100_007)


@pytest.fixture(scope="module")
def make_controller(run: Path) -> partial:
    return partial(Controller, PolicyPlanner(checkpoint.load(run).policy, SampleConfig("ddim", 2)))


def roll_out(make_env: partial, make_controller: partial, seeds=SEEDS, **options) -> list[Episode]:
    return rollout(make_env, make_controller, seeds, make_env().unwrapped.mode, parallel=3, **options)


def test_one_episode_a_seed_in_the_order_of_the_seeds(make_env: partial, make_controller: partial) -> None:
    seen: list[int] = []
    episodes = roll_out(make_env, make_controller, on_episode=lambda episode: seen.append(episode.seed))
    assert [episode.seed for episode in episodes] == list(SEEDS)
    assert sorted(seen) == list(SEEDS)
    for episode in episodes:
        steps = len(episode.actions)
        assert {key: rows.shape for key, rows in episode.observations.items()} == {
            "desired_xy": (steps + 1, 2), "actual_xy": (steps + 1, 2),
        }  # fmt: skip


def test_episodes_replay_from_seed_and_actions(make_env: partial, make_controller: partial) -> None:
    episode = roll_out(make_env, make_controller)[-1]
    env = make_env()
    observation, _ = env.reset(seed=episode.seed)
    np.testing.assert_array_equal(observation["actual_xy"], episode.observations["actual_xy"][0])
    for action in episode.actions:
        observation, *_ = env.step(action)
    np.testing.assert_array_equal(observation["actual_xy"], episode.observations["actual_xy"][-1])


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_neither_workers_nor_planning_threads_change_a_bit(
    make_env: partial, make_controller: partial, torch_threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        one, two = (
            rollout(make_env, make_controller, SEEDS, lambda _: None, 7, workers=number, planning_threads=number)
            for number in (1, 2)
        )
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert (a.seed, a.success) == (b.seed, b.success)
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.observations["actual_xy"], b.observations["actual_xy"])


def test_an_episode_does_not_depend_on_which_others_run(make_env: partial, make_controller: partial) -> None:
    all_seeds = roll_out(make_env, make_controller)
    alone = roll_out(make_env, make_controller, seeds=[SEEDS[5]])
    np.testing.assert_allclose(alone[0].actions, all_seeds[5].actions, atol=1e-5)


def alike(a: Episode, b: Episode) -> bool:
    """Equal but for the last digits, which other neighbours in a planning batch may change."""
    same_length = a.actions.shape == b.actions.shape
    named = (a.seed, a.repeat, a.mode) == (b.seed, b.repeat, b.mode)
    return named and same_length and np.allclose(a.actions, b.actions, atol=1e-4)


class Fragile(gymnasium.Wrapper):
    """Fails in the tenth step of chosen seeds, as often as `folder` lacks files that say that it has."""

    def __init__(self, make_env: partial, folder: Path, failures: dict[int, tuple[str, int]]) -> None:
        super().__init__(make_env())
        self._folder, self._failures = folder, failures

    def reset(self, *, seed=None, options=None):
        self._seed, self._steps = seed, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        self._steps += 1
        kind, times = self._failures.get(self._seed, ("", 0))
        happened = len(list(self._folder.glob(f"{self._seed}-*")))
        if self._steps == 10 and happened < times:
            (self._folder / f"{self._seed}-{happened}").touch()
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "hangs":
                time.sleep(60)
            raise RuntimeError("the simulator lost its balance")
        return self.env.step(action)


def test_crashes_and_hangs_cost_a_retry_and_change_nothing(
    make_env: partial, make_controller: partial, tmp_path: Path
) -> None:
    failures = {SEEDS[1]: ("dies", 1), SEEDS[3]: ("hangs", 1), SEEDS[4]: ("raises", 1), SEEDS[5]: ("raises", 2)}
    fragile = partial(Fragile, make_env, tmp_path, failures)
    lost: list[FailedEpisode] = []
    episodes = roll_out(fragile, make_controller, workers=2, on_lost=lost.append, hang_after=3)
    assert [(one.seed, one.repeat) for one in lost] == [(SEEDS[5], 0)]
    assert "lost its balance" in lost[0].reason
    whole = [episode for episode in roll_out(make_env, make_controller) if episode.seed != SEEDS[5]]
    assert all(alike(a, b) for a, b in zip(episodes, whole, strict=True))


def test_an_episode_that_fails_twice_is_an_error_unless_someone_listens(
    make_env: partial, make_controller: partial, tmp_path: Path
) -> None:
    fragile = partial(Fragile, make_env, tmp_path, {SEEDS[0]: ("raises", 2)})
    with pytest.raises(RolloutError, match=r"seed 100000 failed 2 times: RuntimeError: the simulator lost its balance"):
        roll_out(fragile, make_controller)


def test_an_environment_that_never_runs_is_given_up(
    make_env: partial, make_controller: partial, tmp_path: Path
) -> None:
    fragile = partial(Fragile, make_env, tmp_path, dict.fromkeys(SEEDS, ("raises", 9)))
    lost: list[FailedEpisode] = []
    with pytest.raises(RolloutError, match=r"the first 3 episodes failed 2 times each: RuntimeError: the simulator"):
        roll_out(fragile, make_controller, on_lost=lost.append)
    assert len(lost) == 3


def test_repeats_keep_the_initial_state_and_draw_other_plans(make_env: partial, make_controller: partial) -> None:
    episodes = roll_out(make_env, make_controller, seeds=SEEDS[:2], repeats=2)
    assert [(episode.seed, episode.repeat) for episode in episodes] == [(s, r) for s in SEEDS[:2] for r in (0, 1)]
    first, second, *_ = episodes
    for key in first.observations:
        np.testing.assert_array_equal(first.observations[key][0], second.observations[key][0])
    assert not np.array_equal(first.actions[:8], second.actions[:8])
    once = roll_out(make_env, make_controller, seeds=SEEDS[:2])
    np.testing.assert_allclose(once[0].actions[:8], first.actions[:8], atol=1e-5)


def test_every_plan_is_kept_with_its_step(make_env: partial, make_controller: partial) -> None:
    for episode in roll_out(make_env, make_controller, seeds=SEEDS[:2]):
        assert [plan.step for plan in episode.plans] == list(range(0, len(episode.actions), 8))
        for plan in episode.plans:
            assert plan.actions.shape == (15, 2)  # T - To + 1
            executed = episode.actions[plan.step : plan.step + 8]
            np.testing.assert_array_equal(plan.actions[: len(executed)], executed)


def test_without_measures_the_return_is_the_measure(make_env: partial, make_controller: partial) -> None:
    for episode in roll_out(make_env, make_controller, seeds=SEEDS[:3]):
        assert episode.measures == {"return": float(episode.success)}  # Avoid's reward is 1 at success


# What goes wrong costs no more than it must


class Blind(gymnasium.Wrapper):
    """Observes NaN from its third step on, in one key, for one seed; and something else that is NaN for all."""

    def __init__(self, make_env: partial, seed: int) -> None:
        super().__init__(make_env())
        self._blind = seed

    def reset(self, *, seed=None, options=None):
        self._seed, self._steps = seed, 0
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observe(observation), info

    def step(self, action):
        self._steps += 1
        observation, *others = self.env.step(action)
        return self._observe(observation), *others

    def _observe(self, observation):
        if self._seed == self._blind and self._steps > 2:
            observation = {**observation, "actual_xy": np.full(2, np.nan)}
        return {**observation, "broken_sensor": np.full(3, np.nan)}


def test_what_the_policy_sees_must_be_finite_and_the_rest_need_not(make_env: partial, make_controller: partial) -> None:
    lost: list[FailedEpisode] = []
    episodes = roll_out(partial(Blind, make_env, SEEDS[1]), make_controller, seeds=SEEDS[:3], on_lost=lost.append)
    assert [one.seed for one in lost] == [SEEDS[1]]
    assert lost[0].reason == "the environment observes NaN or infinity in actual_xy"
    whole = roll_out(make_env, make_controller, seeds=[SEEDS[0], SEEDS[2]])
    assert all(alike(a, b) for a, b in zip(episodes, whole, strict=True))


def test_an_environment_that_observes_something_else_is_told_before_the_first_step(
    make_env: partial, make_controller: partial
) -> None:
    fewer = partial(FilterObservation, filter_keys=["actual_xy"])
    with pytest.raises(RolloutError, match=r"^the policy observes desired_xy \(2,\); the environment gives actual_xy"):
        rollout(partial(call, fewer, make_env), make_controller, [1], str)


def call(wrap, make_env):
    return wrap(make_env())


class Forgetful(gymnasium.Wrapper):
    """Does not say at the end of one seed's episodes whether it is a success."""

    def __init__(self, make_env: partial, seed: int) -> None:
        super().__init__(make_env())
        self._forgotten = seed

    def reset(self, *, seed=None, options=None):
        self._seed = seed
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        *others, info = self.env.step(action)
        return *others, {} if self._seed == self._forgotten else info


def test_what_is_hopeless_ends_a_rollout_only_before_anything_has_finished(
    make_env: partial, make_controller: partial
) -> None:
    lost: list[FailedEpisode] = []
    forgetful = partial(Forgetful, make_env, SEEDS[2])
    mode_of = make_env().unwrapped.mode
    episodes = rollout(forgetful, make_controller, SEEDS[:3], mode_of, parallel=1, on_lost=lost.append)
    assert [episode.seed for episode in episodes] == list(SEEDS[:2])
    assert [one.seed for one in lost] == [SEEDS[2]]
    with pytest.raises(RolloutError, match=r"must give info\['is_success'\] at every step"):
        rollout(forgetful, make_controller, SEEDS[2:4], mode_of, parallel=1, on_lost=lost.append)


def mode_that(mode: object):
    def mode_of(observations: object) -> str | None:
        if isinstance(mode, Exception):
            raise mode
        return mode  # pyright: ignore[reportReturnType]

    return mode_of


NO_LABEL = "ValueError: a mode is printable text on one line, or None"


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (OSError("x\x1b[2J"), r"the mode function failed: OSError: x\x1b[2J"),
        (EnvSpecError("mine:mode must give one of a, b"), "mine:mode must give one of a, b"),
        (3, f"the mode function failed: {NO_LABEL}; got 3"),
        ("left\nright", rf"the mode function failed: {NO_LABEL}; got 'left\nright'"),
    ],
)
def test_a_mode_that_cannot_be_told_is_none_and_is_told(
    make_env: partial, make_controller: partial, mode: object, reason: str
) -> None:
    failures: list[FailedEpisode] = []
    seeds = SEEDS[:2]
    episodes = rollout(make_env, make_controller, seeds, mode_that(mode), on_mode_failure=failures.append)
    assert [(episode.seed, episode.mode) for episode in episodes] == [(seed, None) for seed in seeds]
    assert sorted(failures) == [FailedEpisode(seed, 0, reason) for seed in seeds]


def test_a_mode_that_cannot_be_told_is_a_warning_unless_someone_listens(
    make_env: partial, make_controller: partial
) -> None:
    with pytest.warns(UserWarning, match="episodes count as without a mode: the mode function failed: OSError: gone"):
        rollout(make_env, make_controller, SEEDS[:1], mode_that(OSError("gone")))


def refuse_to_work(slots: int) -> Controller:
    raise AssertionError("no work was to be done")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": []}, "rollout needs at least one seed; got none"),
        ({"seeds": [0, -1]}, "each seed must be a whole number of at least 0; got -1"),
        ({"seeds": [0.5]}, "each seed must be a whole number"),
        ({"parallel": 0}, "parallel must be a whole number of at least 1; got 0"),
        ({"workers": 0}, "workers must be a whole number of at least 1; got 0"),
        ({"workers": 1.5}, "workers must be"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1; got 0"),
        ({"hang_after": 0}, "hang_after must be above 0"),
        ({"hang_after": float("nan")}, "hang_after must be above 0"),
        ({"mode_of": None}, "mode_of must be a function"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(make_env: partial, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rollout(**{"make_env": make_env, "make_controller": refuse_to_work, "seeds": [1], "mode_of": str, **arguments})


class Widening(gymnasium.Env):
    """Its first observation is of whole numbers, the others are not."""

    observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Box(-9, 9, (1,), np.float64)})
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        self.x = 0.0
        return {"x": np.array([0])}, {}

    def step(self, action):
        self.x += 0.125
        return {"x": np.array([self.x])}, 0.0, self.x > 1, False, {"is_success": True}


def test_the_policy_sees_what_is_observed_whatever_type_came_first() -> None:
    seen = []

    class Looking(Controller):
        def observe(self, observations, active):
            seen.append(float(observations["x"][0, 0]))
            super().observe(observations, active)

    config = with_options(
        PolicyConfig(), widths=(8, 8), prediction_horizon=4, action_horizon=2, level_dim=4, noise_levels=4
    )
    policy = DiffusionPolicy(config, Shapes({"x": (1,)}, (1,))).eval()
    sampling = SampleConfig(sampling_steps=1)
    rollout(Widening, partial(Looking, PolicyPlanner(policy, sampling)), [0], lambda _: None)
    assert seen[:9] == [step * 0.125 for step in range(9)]
