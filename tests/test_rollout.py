from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diffusion_policy import checkpoint
from diffusion_policy.config import SampleConfig
from diffusion_policy.controller import Controller
from diffusion_policy.metrics import Episode
from diffusion_policy.rollout import rollout

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
