"""What an environment may offer, and what only has its name by chance."""

from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.wrappers import FlattenObservation, RescaleAction, TransformReward

from diffusion_policy import envs
from diffusion_policy.envs.adapters import Adapter
from diffusion_policy.envs.protocols import (
    as_choosing,
    as_drawable,
    as_multimodal,
    as_pictured,
    as_pushable,
    repeats_by_seed,
)
from diffusion_policy.envs.spaces import EnvSpecError

AVOID = "diffusion_policy/Avoid-v0"


class Point(gymnasium.Env):
    """Moves on a line."""

    observation_space, action_space = Box(-9, 9, (1,)), Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.x, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.x = self.x + action
        return self.x, 0.0, False, False, {"is_success": False}


class Ignoring(Point):
    """Draws its start from numbers of its own."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return super().reset(seed=None)


class Noisy(Point):
    """Starts as the seed says, and then does not."""

    rng = np.random.default_rng(0)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return super().step(action + self.rng.normal(size=1).astype(np.float32))


class Remembering(Point):
    """Goes on from where the last episode ended."""

    x = np.zeros(1, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        before = self.x
        return super().reset(seed=seed)[0] + before, {}


def test_our_tasks_can_be_drawn_and_chosen_in() -> None:
    env = envs.make(AVOID)
    for ask in (as_drawable, as_pictured, as_choosing, as_multimodal):
        assert ask(env) is env.unwrapped
        assert ask(TransformReward(env, float)) is env.unwrapped


def test_a_wrapper_that_changes_what_is_observed_or_done_takes_drawings_and_modes_away() -> None:
    env = FlattenObservation(envs.make(AVOID))
    assert [ask(env) for ask in (as_drawable, as_pictured, as_choosing, as_multimodal)] == [None] * 4
    env = RescaleAction(envs.make(AVOID), np.float32(-1), np.float32(1))
    assert [ask(env) for ask in (as_drawable, as_choosing)] == [None] * 2
    assert as_multimodal(env) is env.unwrapped


def test_bodies_can_be_pushed_where_a_task_has_some() -> None:
    env = envs.make("diffusion_policy/BlockPush-v0")
    assert as_pushable(env) is env.unwrapped
    assert as_pushable(RescaleAction(env, np.float32(-1), np.float32(1))) is None
    assert as_pushable(envs.make(AVOID)) is None
    point: Any = Point()
    point.grip, point.push = (lambda xy: None), (lambda push: None)
    assert as_pushable(point) is None  # nobody knows where its points lie in a picture


@pytest.mark.parametrize(
    "attributes",
    [
        {"path": "/assets/point.xml", "scene": {"lights": 2}, "planned_path": None, "choice": 0},
        {"choice": np.random.default_rng(0).choice},
        {"path": lambda observations: 0, "planned_path": lambda observation, actions: 0, "scene": object()},
        {"mode": "train", "modes": ["train", "test"]},
        {"mode": lambda: "train", "modes": ["train", "test"]},
        {"mode": lambda observations: 0, "modes": [0, 1]},
        {"mode": lambda observations: None, "modes": {"a": 1}},
        {"mode": lambda observations: None, "modes": ["a", "a"]},
        {"mode": lambda observations: None},
        {"mode": lambda observations, more: None, "modes": ["a"]},
    ],
)
def test_names_that_mean_something_else_are_nobodys_business(attributes: dict[str, Any]) -> None:
    env = Point()
    vars(env).update(attributes)
    assert [ask(env) for ask in (as_drawable, as_pictured, as_choosing, as_multimodal)] == [None] * 4
    adapted = Adapter(env)
    assert adapted.modes == ()
    assert adapted.mode({}) is None


def test_properties_that_raise_are_none() -> None:
    class Broken(Point):
        @property
        def scene(self) -> object:
            raise RuntimeError("no display")

        modes = scene

    assert (as_drawable(Broken()), as_multimodal(Broken())) == (None, None)


@pytest.mark.parametrize("label", ["two\nlines", "\x1b[31mred", "x" * 201, ""])
def test_labels_that_cannot_be_printed_are_refused(label: str) -> None:
    env: Any = Point()
    env.modes, env.mode = [label], lambda observations: label
    with pytest.raises(EnvSpecError, match="a label is printable text of one line") as error:
        Adapter(env)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("kind, repeats", [(Point, True), (Ignoring, False), (Noisy, False), (Remembering, False)])
def test_environments_that_do_not_repeat_by_seed_are_found(kind: type, repeats: bool) -> None:
    assert repeats_by_seed(partial(make_adapted, kind), seed=3) == repeats


def make_adapted(kind: type) -> gymnasium.Env:
    return Adapter(kind())
