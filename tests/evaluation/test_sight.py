"""Images in rollouts: drawn and sent where something is planned from them, left out of recordings, and drawn again."""

from functools import partial
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import DelayObservation, TransformObservation

from diffusion_policy import envs
from diffusion_policy.commands.seen_again import see_again
from diffusion_policy.commands.sights import list_sights
from diffusion_policy.config import CnnConfig, ConfigError, ImageConfig, PolicyConfig, VitConfig, with_options
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.planner import Planner
from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.wrappers import look
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.evaluation.host import Sight
from diffusion_policy.evaluation.pool import EnvironmentPool
from diffusion_policy.evaluation.rollout import rollout
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.report.evaluation_figures import draw_sights

AVOID = "diffusion_policy/Avoid-v0"
SIZE = 16
AVOID_WITH_IMAGE = {"rows": 1, "image_size": SIZE, "max_episode_steps": 12}


class Watching(Planner):
    """Plans from what it sees: its actions depend on every pixel of the history, and each history is kept."""

    action_shape = (2,)
    noise_shape = (1,)
    steps, action_horizon = 8, 4

    def __init__(self, observation_horizon: int = 2, image: bool = True) -> None:
        self.observation_horizon = observation_horizon
        self.observation_shapes = {"desired_xy": (2,)} | ({"image": (SIZE, SIZE, 3)} if image else {})
        self.seen: list[np.ndarray] = []

    def sample(self, observations, noise, *_):
        rows = len(noise)
        if "image" in observations:
            assert observations["image"].dtype == np.uint8
            self.seen.extend(observations["image"])
            sums = observations["image"].reshape(rows, self.observation_horizon, -1).sum(axis=2) % 97 / 97
        else:
            sums = observations["desired_xy"][..., 0]
        turned = 0.005 * np.cos(6 * sums.sum(axis=1))
        plans = np.stack([turned, np.full(rows, 0.01)], axis=-1)[:, None, None]
        return np.broadcast_to(plans, (rows, noise.shape[1], self.steps, 2)).astype(np.float32)


def make_avoid(**arguments: object) -> partial:
    return partial(EnvSpec(AVOID, AVOID_WITH_IMAGE | arguments))


def roll_out(planner: Watching, seeds: range = range(3), action_horizon: int = 4, **options: object) -> list[Episode]:
    make_controller = partial(Controller, planner, action_horizon=action_horizon)
    return rollout(make_avoid(), make_controller, seeds, lambda _: None, parallel=2, **options)


def same(one: list[Episode], other: list[Episode]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        for key in a.observations.keys() & b.observations.keys():
            np.testing.assert_array_equal(a.observations[key], b.observations[key])


@pytest.mark.parametrize("horizons", [(1, 4), (2, 4), (3, 1), (4, 2)], ids=lambda pair: f"To={pair[0]},Ta={pair[1]}")
def test_a_policy_sees_the_same_whether_other_images_are_drawn_or_not(horizons: tuple[int, int]) -> None:
    observed, executed = horizons
    watching, sparing = Watching(observed), Watching(observed)
    everything = roll_out(watching, action_horizon=executed, keep_images=True)
    same(everything, roll_out(sparing, action_horizon=executed, look=look))
    np.testing.assert_array_equal(watching.seen, sparing.seen)
    assert all(history[-1].any() for history in sparing.seen)  # none is black


def test_workers_give_the_same() -> None:
    same(roll_out(Watching(), look=look), roll_out(Watching(), look=look, workers=2))


def test_recordings_leave_images_out_unless_they_are_asked_for() -> None:
    for episode in roll_out(Watching(), look=look):
        assert episode.observations.keys() == {"actual_xy", "desired_xy"}
    for episode in roll_out(Watching(), look=look, keep_images=True):
        images = episode.observations["image"]
        assert images.shape == (len(episode.actions) + 1, SIZE, SIZE, 3)
        assert images.dtype == np.uint8
        assert images.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_only_the_last_images_of_a_sequence_are_sent(workers: int) -> None:
    actions = {slot: np.zeros((5, 2), np.float32) for slot in (0, 1)}
    for steps, sent in ((None, 5), (2, 2), (9, 5), (0, 0)):
        with EnvironmentPool(make_avoid(), workers, sight=Sight(steps, look)) as pool:
            starts = pool.reset({0: 1, 1: 2})
            answers = pool.step(actions)
        for slot in (0, 1):
            assert starts[slot]["image"].any() == (steps != 0)
            assert answers[slot].observations["image"].shape == (sent, SIZE, SIZE, 3)
            assert answers[slot].observations["actual_xy"].shape == (5, 2)


def test_an_episode_that_ends_before_its_images_are_due_ends_without_them() -> None:
    with EnvironmentPool(make_avoid(max_episode_steps=2), sight=Sight(1, look)) as pool:
        pool.reset({0: 1})
        answer = pool.step({0: np.zeros((5, 2), np.float32)})[0]
    assert answer.ended
    assert answer.observations["image"].shape == (0, SIZE, SIZE, 3)
    assert answer.observations["actual_xy"].shape == (2, 2)


def test_nothing_is_drawn_for_a_policy_that_sees_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(envs.simulation.Simulation, "photograph", lambda *_: drawn.append(1))
    assert len(roll_out(Watching(image=False), look=look)) == 3
    assert not drawn


class Pictures(gymnasium.Env):
    """Observes nothing but pictures, which count its steps."""

    observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    steps = 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self._see(), {}

    def step(self, action):
        self.steps += 1
        return self._see(), 1.0, self.steps == 6, False, {"is_success": True}

    def _see(self):
        return np.full((SIZE, SIZE, 3), 10 + self.steps, np.uint8)


def test_an_environment_of_nothing_but_pictures_can_be_rolled_out() -> None:
    gymnasium.register("sight/Pictures-v0", Pictures)
    try:
        planner = Watching()
        planner.observation_shapes = {"observation": (SIZE, SIZE, 3)}
        planner.sample = lambda observations, noise, *_: np.zeros((len(noise), 1, 8, 2), np.float32)
        spec = EnvSpec("sight/Pictures-v0")
        (episode,) = rollout(spec, partial(Controller, planner), [0], lambda _: "seen", look=look)
        assert (episode.success, episode.observations, len(episode.actions)) == (True, {}, 6)
        assert spec().observation_space["observation"].dtype == np.uint8
    finally:
        del gymnasium.registry["sight/Pictures-v0"]


@pytest.mark.parametrize("wrapper, passes", [
    (partial(gymnasium.wrappers.TimeLimit, max_episode_steps=3), True),
    (partial(DelayObservation, delay=1), False),
])  # fmt: skip
def test_images_are_drawn_where_a_wrapper_may_make_one_of_several(wrapper: partial, passes: bool) -> None:
    env = wrapper(EnvSpec(AVOID, AVOID_WITH_IMAGE)())
    look(env, False)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(np.zeros(2, np.float32))
    assert observation["image"].any() != passes
    look(env, True)
    env.step(np.zeros(2, np.float32))
    observation, *_ = env.step(np.zeros(2, np.float32))
    assert observation["image"].any()
    env.close()


# What was left out


def loaded(env: gymnasium.Env, observation_horizon: int = 2) -> SimpleNamespace:
    watched = {"image": (SIZE, SIZE, 3), "desired_xy": (2,)}
    config = SimpleNamespace(observation_horizon=observation_horizon)
    return SimpleNamespace(env=env, env_id=AVOID, policy=SimpleNamespace(watched=watched, config=config))


def test_images_that_were_planned_from_are_drawn_again() -> None:
    whole = roll_out(Watching(), range(1), keep_images=True)[0]
    (sparse,) = roll_out(Watching(), range(1))
    env = make_avoid()()
    again = see_again(loaded(env), sparse, [0, 8])
    expected = np.zeros_like(whole.observations["image"])
    expected[[0, 7, 8]] = whole.observations["image"][[0, 7, 8]]
    np.testing.assert_array_equal(again.observations["image"], expected)
    assert see_again(loaded(env), whole, [0, 8]) is whole
    assert env.reset(seed=0)[0]["image"].any()  # it looks again
    env.close()


def test_an_episode_that_is_not_repeated_is_not_drawn_again() -> None:
    (sparse,) = roll_out(Watching(), range(1))
    env = make_avoid()()
    space = env.observation_space
    shifted = TransformObservation(env, lambda seen: seen | {"actual_xy": seen["actual_xy"] + 1}, space)
    with pytest.raises(ConfigError, match=r"does not repeat the episode of seed 0.*actual_xy differs at step 0"):
        see_again(loaded(shifted), sparse, [4])
    env.close()


# What the page shows of it


def test_a_page_shows_the_crops_that_a_policy_was_given_and_where_it_looks() -> None:
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 24, 3), np.uint8)
    data = {"image": images, "xy": np.ones((40, 2)), "action": np.ones((40, 2))}
    for vision, looks in ((CnnConfig((4, 4), 3), True), (VitConfig(8, 1, 2), False)):
        config = with_options(PolicyConfig(images=ImageConfig(vision, image_crop=0.75)), widths=(8,), level_dim=16)
        policy = DiffusionPolicy.for_data(config, data).eval()
        episode = Episode(7, True, None, {"image": images, "xy": data["xy"]}, data["action"][:-1], 0, {}, ())
        sights = list_sights(policy, episode, [0, 5])
        assert [(sight.seed, sight.key, sight.step) for sight in sights] == [(7, "image", 0), (7, "image", 5)]
        np.testing.assert_array_equal(sights[1].image, images[5, 4:28, 3:21])
        assert (sights[0].keypoints is not None) == looks
        if sights[0].keypoints is not None:
            assert sights[0].keypoints.shape == (3, 2)
            assert ((sights[0].keypoints >= 0) & (sights[0].keypoints <= [17, 23])).all()
        figure = draw_sights([*sights, *(sight._replace(seed=8, image=sight.image[..., :1]) for sight in sights[:1])])
        titles = [axis.get_title("left") for axis in figure.axes]
        assert titles == ["image, seed 7\nstep 0", "step 5", "image, seed 8\nstep 0", ""]
