import os
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from diffusion_policy import envs
from diffusion_policy.commands.train import Train
from diffusion_policy.config import PolicyConfig, TrainConfig, with_options
from diffusion_policy.datasets.recorder import Recorder
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.experts import AvoidExpert


def swing(env: gymnasium.Env, seed: int, steps: int = 200) -> list[np.ndarray]:
    """An episode of random actions; what was observed."""
    rng = np.random.default_rng(seed)
    observations = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        observation, _, terminated, truncated, _ = env.step(rng.uniform(-2, 2, 1).astype(np.float32))
        observations.append(observation)
        if terminated or truncated:
            break
    return observations


def test_what_a_loop_does_is_recorded_and_can_be_trained_on(tmp_path: Path) -> None:
    with Recorder(gymnasium.make("Pendulum-v1", g=9.0), tmp_path / "mine.zarr", {"who": "me"}) as env:
        seen = [swing(env, seed) for seed in (3, 4)]
    store = EpisodeStore.open(tmp_path / "mine.zarr")
    assert store.attributes["environment"] == {"id": "Pendulum-v1", "arguments": {"g": 9.0}}
    assert store.attributes["control_frequency"] == 30
    assert store.attributes["who"] == "me"
    for episode, observations, seed in zip(store.episodes(), seen, (3, 4), strict=True):
        assert (episode.seed, episode.mode, episode.success) == (seed, None, None)
        np.testing.assert_array_equal(episode.data["observation"], observations[:-1])
        assert episode.final is not None
        np.testing.assert_array_equal(episode.final["observation"], observations[-1])
        assert episode.data["action"].shape == (200, 1)
    training = TrainConfig(steps=3, batch_size=16)
    policy = with_options(PolicyConfig(), widths=(16, 32), level_dim=16, noise_levels=10)
    Train(str(tmp_path / "mine.zarr"), tmp_path / "run", policy=policy, training=training, device="cpu").run()
    assert (tmp_path / "run" / "step-000003" / "config.json").exists()


def test_modes_and_success_are_recorded_where_the_environment_knows_them(tmp_path: Path) -> None:
    with Recorder(envs.make("diffusion_policy/Avoid-v0", rows=1), tmp_path / "mine.zarr") as env:
        for seed, mode in enumerate(("left", "right")):
            expert = AvoidExpert(mode)
            observation, _ = env.reset(seed=seed)
            done = False
            while not done:
                observation, _, terminated, truncated, _ = env.step(expert.act(observation))
                done = terminated or truncated
    episodes = list(EpisodeStore.open(tmp_path / "mine.zarr").episodes())
    assert [(episode.mode, episode.success) for episode in episodes] == [("left", True), ("right", True)]
    assert episodes[0].data.keys() == {"action", "actual_xy", "desired_xy"}


def test_an_episode_is_told_the_instruction_that_stands_when_it_is_saved(tmp_path: Path) -> None:
    attributes = {"instructions": ["swing up", "stay down"]}
    with Recorder(gymnasium.make("Pendulum-v1"), tmp_path / "mine.zarr", attributes) as env:
        swing(env, 0)
        env.instruction = "stay down"
        swing(env, 1)
        env.instruction = "sit down"
        with pytest.raises(StoreError, match="nearest known are: 'stay down'; 'swing up'"):
            swing(env, 2)
    assert EpisodeStore.open(tmp_path / "mine.zarr").episode_instructions() == [None, "stay down"]


def test_an_episode_that_is_cut_off_is_dropped_unless_it_is_saved(tmp_path: Path) -> None:
    with Recorder(gymnasium.make("Pendulum-v1"), tmp_path / "mine.zarr") as env:
        swing(env, 0, steps=5)
        swing(env, 1, steps=6)
        env.save()
        swing(env, 2, steps=7)
        env.discard()
        env.save()  # there is nothing
        swing(env, 3, steps=8)
    store = EpisodeStore.open(tmp_path / "mine.zarr")
    assert store.episode_ends.tolist() == [6]
    assert [episode.seed for episode in store.episodes()] == [1]


def test_what_is_observed_is_copied(tmp_path: Path) -> None:
    class Reusing(gymnasium.Env):
        """Gives the same array each time, changed in place."""

        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
        action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float64)

        def reset(self, *, seed=None, options=None):
            self.state = np.zeros(1)
            return self.state, {}

        def step(self, action):
            self.state += 1
            return self.state, 0.0, bool(self.state[0] == 4), False, {"success": True}

    with Recorder(Reusing(), tmp_path / "mine.zarr") as env:
        env.reset()
        action = np.zeros(1)
        for _ in range(4):
            action += 0.1
            env.step(action)
    (episode,) = EpisodeStore.open(tmp_path / "mine.zarr").episodes()
    assert episode.data["observation"][:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(episode.data["action"][:, 0], [0.1, 0.2, 0.3, 0.4])
    assert episode.success is True


def test_recording_goes_on_in_a_store_that_is_open(tmp_path: Path) -> None:
    for seed in (0, 1):
        env = gymnasium.make("Pendulum-v1")
        path = tmp_path / "mine.zarr"
        with Recorder(env, EpisodeStore.append_to(path) if path.exists() else path) as recorder:
            swing(recorder, seed)
    assert len(EpisodeStore.open(tmp_path / "mine.zarr").episode_ends) == 2


def test_what_cannot_be_recorded_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"CartPole-v1 takes actions of Discrete\(2\); a policy can only give those of a Box of floats"
    ):
        Recorder(gymnasium.make("CartPole-v1"), tmp_path / "mine.zarr")
    assert not (tmp_path / "mine.zarr").exists()
    (tmp_path / "mine.zarr").mkdir()
    with pytest.raises(StoreError, match="already exists"):
        Recorder(gymnasium.make("Pendulum-v1"), tmp_path / "mine.zarr")


def test_a_loop_that_gives_its_seed_once_is_recorded_to_the_end(tmp_path: Path) -> None:
    with Recorder(gymnasium.make("Pendulum-v1"), tmp_path / "mine.zarr") as env:
        for seed in (7, None, None):
            env.reset(seed=seed)
            over = False
            while not over:
                _, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
                over = terminated or truncated
    episodes = list(EpisodeStore.open(tmp_path / "mine.zarr").episodes())
    assert [(episode.seed, episode.success) for episode in episodes] == [(7, None), (None, None), (None, None)]


def test_an_observation_called_action_is_refused(tmp_path: Path) -> None:
    class Confusing(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict({"action": gymnasium.spaces.Box(-1, 1, (2,))})
        action_space = gymnasium.spaces.Box(-1, 1, (1,))

    with pytest.raises(ValueError, match="not under the name `action`"):
        Recorder(Confusing(), tmp_path / "mine.zarr")
    assert not (tmp_path / "mine.zarr").exists()


class Steps(gymnasium.Env):
    """Ends after three steps, and has modes."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    modes = ("left", "right")

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(1, self.steps, np.float32), 0.0, self.steps >= 3, False, {"success": np.array([1.0])}

    def mode(self, observations):
        return "left"


def walk(env: gymnasium.Env, steps: int = 3) -> None:
    env.reset(seed=0)
    for _ in range(steps):
        env.step(np.zeros(1, np.float32))


def test_steps_after_the_end_are_not_recorded(tmp_path: Path) -> None:
    with Recorder(Steps(), tmp_path / "mine.zarr") as env:
        walk(env, steps=7)
        walk(env)
    episodes = list(EpisodeStore.open(tmp_path / "mine.zarr").episodes())
    assert [len(episode.data["action"]) for episode in episodes] == [3, 3]
    assert [(episode.success, episode.mode) for episode in episodes] == [(True, "left")] * 2


@pytest.mark.parametrize("answer", ["up", 3, KeyError("x")])
def test_an_episode_is_kept_where_its_mode_cannot_be_told(answer: object, tmp_path: Path) -> None:
    class Broken(Steps):
        def mode(self, observations):
            if isinstance(answer, Exception):
                raise answer
            return answer

    with Recorder(Broken(), tmp_path / "mine.zarr") as env, pytest.warns(UserWarning, match="mode"):
        walk(env)
    (episode,) = EpisodeStore.open(tmp_path / "mine.zarr").episodes()
    assert episode.mode is None


def test_actions_that_are_none_are_refused_before_the_step_and_those_beyond_the_space_said_once(tmp_path: Path) -> None:
    with Recorder(Steps(), tmp_path / "mine.zarr") as env:
        env.reset(seed=0)
        for wrong in (np.zeros(2), [np.nan], "left", None):
            with pytest.raises(ValueError, match="an action of Steps is 1 finite numbers; got"):
                env.step(wrong)
        with pytest.warns(UserWarning, match="outside Steps's action space: a policy's actions will be clipped"):
            env.step(np.full(1, 2.0, np.float32))
        for _ in range(2):
            env.step(np.full(1, 2.0, np.float32))
    assert EpisodeStore.open(tmp_path / "mine.zarr").episode_ends.tolist() == [3]


def test_a_store_of_others_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with Recorder(gymnasium.make("Pendulum-v1"), tmp_path / "pendulum.zarr") as env:
        swing(env, 0)
    with Recorder(Steps(), tmp_path / "steps.zarr") as env:
        walk(env)
    other = Steps()
    other.modes = ("left", "up")  # pyright: ignore[reportAttributeAccessIssue]
    for store, env, said in (
        ("pendulum.zarr", gymnasium.make("Pendulum-v1", max_episode_steps=5), "holds episodes of"),
        ("steps.zarr", other, "knows the modes left, right; Steps has up as well"),
        ("steps.zarr", gymnasium.make("Pendulum-v1").unwrapped.__class__(), "record it into another store"),
    ):
        with EpisodeStore.append_to(tmp_path / store) as opened, pytest.raises(ValueError, match=said):
            Recorder(env, opened)


@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_seed_that_cannot_be_kept_is_refused_before_the_episode(tmp_path: Path, seed: int) -> None:
    with Recorder(Steps(), tmp_path / "mine.zarr") as env:
        with pytest.raises(ValueError, match=rf"a seed is None or a whole number from 0 to 2\*\*63 - 1; got {seed}"):
            env.reset(seed=seed)
        env.reset(seed=2**63 - 1)
        for _ in range(3):
            env.step(np.zeros(1, np.float32))
    assert EpisodeStore.open(tmp_path / "mine.zarr").seeds().tolist() == [2**63 - 1]


@pytest.mark.parametrize(
    "attributes, said",
    [
        ({"format": "x"}, "the attribute format is the store's own"),
        ({"note": np.nan}, "attributes must be JSON with finite numbers"),
        ({"note": {"deep": [np.inf]}}, "attributes must be JSON with finite numbers"),
        ({"note": Path()}, "attributes must be JSON with finite numbers"),
        ({"observation_keys": ["nope"]}, "observation_keys names 'nope'; Steps is recorded as observation, action"),
        ({"observation_keys": 3}, "the attribute observation_keys must be a list of keys"),
        ({"action_key": "nope"}, "action_key names 'nope'; Steps is recorded as observation, action"),
    ],
)
def test_attributes_that_make_a_store_useless_are_refused_before_it_is_made(
    tmp_path: Path, attributes: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Recorder(Steps(), tmp_path / "mine.zarr", attributes)
    assert list(tmp_path.iterdir()) == []


def test_a_simulator_that_changes_the_working_folder_takes_no_episode_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wandering(Steps):
        def reset(self, *, seed=None, options=None):
            (tmp_path / "away").mkdir(exist_ok=True)
            os.chdir(tmp_path / "away")
            return super().reset()

    monkeypatch.chdir(tmp_path)
    with Recorder(Wandering(), "mine.zarr") as env:
        walk(env)
        walk(env)
    assert EpisodeStore.open(tmp_path / "mine.zarr").episode_ends.tolist() == [3, 6]
    assert list((tmp_path / "away").iterdir()) == []


def test_environments_that_reset_themselves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Steps resets itself"):
        Recorder(gymnasium.wrappers.Autoreset(Steps()), tmp_path / "mine.zarr")
    assert not (tmp_path / "mine.zarr").exists()


def test_a_rate_that_is_none_is_left_out(tmp_path: Path) -> None:
    env = Steps()
    env.metadata = {"render_fps": "fast"}
    with Recorder(env, tmp_path / "mine.zarr") as recorder:
        walk(recorder)
    assert "control_frequency" not in EpisodeStore.open(tmp_path / "mine.zarr").attributes
