"""What an environment may offer beside Gymnasium's own: modes, drawing, pushes, choices; and whether a seed repeats an
episode.

An environment of others may have a `path` (of a file), a `scene` (of a simulator), a `mode` ("train") or a `choice`
by chance. So no caller looks for attributes: the functions here check whether they are what is meant.

    task = as_drawable(env)
    if task is not None:
        draw(task.scene, task.path(observations))
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import gymnasium
import numpy as np

from diffusion_policy.basics.names import MOST_CHARACTERS, is_label
from diffusion_policy.envs.scene import Place, Scene
from diffusion_policy.envs.spaces import EnvSpecError, observed_space

Observations = Mapping[str, np.ndarray]
"""{key: (...)} of one step, or {key: (steps, ...)} of several."""


class Multimodal(Protocol):
    """Knows the discrete ways in which its task can be solved."""

    modes: Sequence[str]
    """All labels; () where they are not known."""

    def mode(self, observations: Observations) -> str | None:
        """The label of an episode, {key: (steps + 1, ...)}; None where there is none yet."""
        ...


class Drawable(Protocol):
    """Can be drawn in a plane."""

    @property
    def scene(self) -> Scene:
        """The plane and what stands in it."""
        ...

    def path(self, observations: Observations) -> np.ndarray:
        """Where an episode went, (steps, 2)."""
        ...

    def planned_path(self, observation: Observations, actions: np.ndarray) -> np.ndarray:
        """Where actions (..., steps, A) would lead from one observation on, (..., steps + 1, 2)."""
        ...


class Placing(Drawable, Protocol):
    """Has episodes that each want something of their own, which no scene of all of them shows."""

    def places(self, observation: Observations) -> tuple[Place, ...]:
        """What the episode that observes this wants, to be drawn into the scene."""
        ...


class Pictured(Drawable, Protocol):
    """Knows where the points of its plane lie in the picture of `render`."""

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Points (..., 2) of the plane → column and row, (..., 2) [px]."""
        ...


class Grip(NamedTuple):
    """Where a hand holds a body."""

    body: str
    point: tuple[float, float]
    """In the body's own frame, in the plane's unit."""


class Push(NamedTuple):
    """What a hand does in one step."""

    grip: Grip
    xy: tuple[float, float]
    """The point of the plane that the gripped point is pulled to."""


class Pushable(Pictured, Protocol):
    """Has bodies that a person can push while it runs, against what stands in their way."""

    def grip(self, xy: np.ndarray) -> Grip | None:
        """What a hand holds that reaches for a point (2,) of the plane in the picture; None where there is nothing."""
        ...

    def push(self, push: Push) -> None:
        """Push a body in the next step alone, with bounded speed and force: seed, actions and pushes repeat an
        episode."""
        ...


class Choosing(Protocol):
    """Knows the decisions that lie ahead."""

    def choice(self, observation: Observations, actions: np.ndarray) -> tuple[str, str] | None:
        """Which decision comes next and how planned actions (steps, A) take it: ("row 2", "left"); None if none."""
        ...


class Posable(Protocol):
    """Can stand as an observation says, without having come there."""

    pose_keys: Sequence[str]
    """What of an observation says it."""

    def pose(self, observation: Observations) -> dict[str, np.ndarray]:
        """Stand as these keys of an observation say, without physics; returns what is observed there, images too."""
        ...


class Foreseeing(Protocol):
    """Knows where actions lead before they are executed, as far as they are commands."""

    def roll_forward(self, observations: Observations, actions: np.ndarray) -> dict[str, np.ndarray]:
        """What is expected to be observed, {key: (B, To, ...)}, once actions (B, d, A) have followed these."""
        ...


class Obstructed(Protocol):
    """Knows what stands in its plane."""

    @property
    def barriers(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Boxes that stand there in all episodes, (m, 4): the middle x, y and half the width and height; the room
        within walls, (4,), likewise; the radius of the body that moves. An observation `obstacles` (k, 3) of x, y and
        radius says what else stands in an episode."""
        ...


class ArmShape(NamedTuple):
    """An arm of joints that turn, and what stands around it in all episodes."""

    origins: np.ndarray
    """Each joint in the frame of the link before it: x, y, z [m] and the turn about x [rad], (joints, 4). It turns
    about its own z."""
    balls: np.ndarray
    """What covers the links: the number of the link (the base is 0), x, y, z in its frame, radius, (n, 5) [m]."""
    boxes: np.ndarray
    """The middle and half the size, (m, 6) [m]; the table lies at height 0."""


class Armed(Protocol):
    """Moves an arm whose actions and whose observation `joints` are joint angles. An observation `obstacles` (k, 4) of
    x, y, z and radius says what else is there in an episode."""

    @property
    def arm(self) -> ArmShape:
        """Its shape, and what it must not touch."""
        ...


class Verdict(NamedTuple):
    """What comes of a plan that is executed as it is."""

    valid: bool
    """Whether it comes to the goal and touches nothing."""
    mode: str | None
    """Of those that solve the task."""
    ratio: float
    """Its length over that of the shortest way to the goal."""


class Judging(Placing, Protocol):
    """Knows what comes of a plan without executing it, and in how many ways a task can be solved from where it is."""

    def judge(self, observation: Observations, actions: np.ndarray) -> list[Verdict]:
        """Of each plan (N, steps, A), the first action of which follows what is observed."""
        ...

    def modes_that_solve(self, observation: Observations) -> tuple[str, ...]:
        """The modes that exist from what is observed."""
        ...


def as_multimodal(env: gymnasium.Env) -> Multimodal | None:
    """The environment, or the wrapper around it, that knows the modes of what `env` observes. Raises EnvSpecError for
    labels that cannot be printed."""
    for layer in layers(env):
        modes = _get(layer, "modes")
        if not isinstance(modes, list | tuple) or not _takes(layer, "mode", 1) or not _observes_all(env, layer):
            continue
        if all(isinstance(label, str) for label in modes) and len(set(modes)) == len(modes):
            for label in modes:
                check_label(label, type(layer).__name__)
            return cast(Multimodal, layer)
    return None


def as_drawable(env: gymnasium.Env) -> Drawable | None:
    """The environment within, where it can be drawn and no wrapper changes what it takes or observes, but for what is
    added."""
    task: Any = env.unwrapped
    offers = isinstance(_get(task, "scene"), Scene) and _takes(task, "path", 1) and _takes(task, "planned_path", 2)
    return task if offers and _observes_all(env, task) and _acts_alike(env, task) else None


def as_pictured(env: gymnasium.Env) -> Pictured | None:
    """As `as_drawable`, where the plane can also be found in the picture."""
    task = as_drawable(env)
    return cast(Pictured, task) if _takes(task, "pixels", 1) else None


def places_of(plane: Drawable, observation: Observations) -> tuple[Place, ...]:
    """What the episode that observes this wants for itself, where the plane says so."""
    return cast(Placing, plane).places(observation) if _takes(plane, "places", 1) else ()


def as_pushable(env: gymnasium.Env) -> Pushable | None:
    """As `as_pictured`, where a person can also push bodies."""
    task = as_pictured(env)
    return cast(Pushable, task) if _takes(task, "grip", 1) and _takes(task, "push", 1) else None


def as_choosing(env: gymnasium.Env) -> Choosing | None:
    """The environment within, where it knows its decisions and no wrapper changes what it takes or observes, but
    for what is added."""
    task: Any = env.unwrapped
    return task if _takes(task, "choice", 2) and _observes_all(env, task) and _acts_alike(env, task) else None


def as_foreseeing(env: gymnasium.Env) -> Foreseeing | None:
    """The environment within, where it foresees and no wrapper changes what it takes or observes, but for what is
    added."""
    task: Any = env.unwrapped
    return task if _takes(task, "roll_forward", 2) and _observes_all(env, task) and _acts_alike(env, task) else None


def as_obstructed(env: gymnasium.Env) -> Obstructed | None:
    """The environment within, where it says what stands in its plane and no wrapper changes what it takes or observes,
    but for what is added."""
    task: Any = env.unwrapped
    return task if _get(task, "barriers") is not None and as_drawable(env) is not None else None


def as_armed(env: gymnasium.Env) -> Armed | None:
    """The environment within, where it says what its arm is and no wrapper changes what it takes or observes, but for
    what is added."""
    task: Any = env.unwrapped
    return task if isinstance(_get(task, "arm"), ArmShape) and as_drawable(env) is not None else None


def as_judging(env: gymnasium.Env) -> Judging | None:
    """The environment within, where it judges plans and no wrapper changes what it takes or observes, but for what is
    added."""
    task = as_drawable(env)
    return cast(Judging, task) if _takes(task, "judge", 2) else None


def as_posable(env: gymnasium.Env) -> Posable | None:
    """The environment within, where it can be posed and no wrapper observes anything else."""
    task: Any = env.unwrapped
    known = isinstance(_get(task, "pose_keys"), tuple) and _takes(task, "pose", 1)
    return task if known and env.observation_space == task.observation_space else None


def layers(env: gymnasium.Env) -> list[gymnasium.Env]:
    """The environment with its wrappers, from the outermost to the one within."""
    found = [env]
    while isinstance(found[-1], gymnasium.Wrapper):
        found.append(found[-1].env)
    return found


def check_label(label: object, who: str) -> None:
    """Raise EnvSpecError for what cannot be the label of a mode."""
    if not is_label(label):
        raise EnvSpecError(
            f"{who} has the mode {label!r:.60}; a label is printable text of one line with at most "
            f"{MOST_CHARACTERS} characters"
        )


def repeats_by_seed(make_env: Callable[[], gymnasium.Env], seed: int, steps: int = 10) -> bool:
    """Whether a seed repeats an episode: whether two fresh environments, and one of them again after another episode,
    observe the same at its start and in its first steps, under the same actions."""
    first, second = make_env(), make_env()
    try:
        alone, other = _trace(first, seed, steps), _trace(second, seed, steps)
        _trace(second, seed + 1, steps)
        return _equal(alone, other) and _equal(alone, _trace(second, seed, steps))
    finally:
        first.close()
        second.close()


def _trace(env: gymnasium.Env, seed: int, steps: int) -> list[Any]:
    """What is observed in the beginning of an episode, and whether it ended."""
    space: Any = env.action_space
    rng = np.random.default_rng(seed)
    low, high = (np.nan_to_num(bound, posinf=1, neginf=-1) for bound in (space.low, space.high))
    trace: list[Any] = [env.reset(seed=seed)[0]]
    ended = False
    while not ended and len(trace) < steps:
        action = rng.uniform(np.maximum(low, -1e6), np.minimum(high, 1e6)).astype(space.dtype)
        observation, _, terminated, truncated, _ = env.step(action)
        ended = bool(terminated or truncated)
        trace.append(observation)
    return trace


def _equal(a: list[Any], b: list[Any]) -> bool:
    """Whether two traces of flat observations are the same to the last digit."""
    return len(a) == len(b) and all(
        one.keys() == other.keys() and all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)
        for one, other in zip(a, b, strict=True)
    )


def _observes_all(env: gymnasium.Env, layer: gymnasium.Env) -> bool:
    """Whether `env` observes at least what `layer`, within it, observes: a wrapper may have added to it."""
    if env is layer:
        return True
    try:
        outer, inner = (observed_space(each.observation_space) for each in (env, layer))
    except EnvSpecError:
        return False
    return all(key in outer.spaces and outer[key] == space for key, space in inner.items())


def _acts_alike(env: gymnasium.Env, layer: gymnasium.Env) -> bool:
    outer, inner = env.action_space, layer.action_space
    return outer == inner or (
        isinstance(outer, gymnasium.spaces.Box)
        and isinstance(inner, gymnasium.spaces.Box)
        and np.array_equal(outer.low.reshape(-1), inner.low.reshape(-1).astype(outer.dtype))
        and np.array_equal(outer.high.reshape(-1), inner.high.reshape(-1).astype(outer.dtype))
    )


def _get(task: object, name: str) -> Any:
    """An attribute, None where there is none or a foreign property raises."""
    try:
        return getattr(task, name, None)
    except Exception:
        return None


def _takes(task: object, name: str, count: int) -> bool:
    """Whether this is a method that needs exactly so many arguments."""
    method = _get(task, name)
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [each for each in parameters if each.default is each.empty]
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return len(needed) == count and all(each.kind in kinds for each in needed)
