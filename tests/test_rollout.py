import os
import signal
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from diffusion_policy import checkpoint
from diffusion_policy.config import SampleConfig
from diffusion_policy.controller import Controller
from diffusion_policy.metrics import Episode, Lost
from diffusion_policy.rollout import RolloutError, rollout

SEEDS = range(100_000, 100_007)


@pytest.fixture(scope="module")
def make_controller(run: Path) -> partial:
    return partial(Controller, checkpoint.load(run).policy, sampling=SampleConfig("ddim", 2), plan_batch=3)


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


def test_the_number_of_workers_does_not_change_a_bit(make_env: partial, make_controller: partial) -> None:
    one, two = (roll_out(make_env, make_controller, workers=workers) for workers in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a.seed, a.success, a.mode) == (b.seed, b.success, b.mode)
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
    lost: list[Lost] = []
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
    lost: list[Lost] = []
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
