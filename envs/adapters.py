"""Any other Gymnasium environment made a task of ours: flat float32 observations, success, modes.

    task = Task("panda_gym:PandaReach-v3")                                      # it says info["is_success"] itself
    task = Task("MountainCarContinuous-v0", success="return>=90",
                mode="diffusion_policy.envs.examples:mountain_car_mode", modes=("left", "right"))
    env = task()

Knows Gymnasium's spaces and the user's functions. Knows no task.
"""

import contextlib
import difflib
import importlib
import inspect
import math
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from diffusion_policy import envs
from diffusion_policy.envs.quiet import silence

Observation = dict[str, np.ndarray]
SuccessOf = Callable[[Observation, dict[str, Any]], bool]
"""(the flat observation after a step, the step's info with its measures) → whether the task is solved now."""
ModeOf = Callable[[Mapping[str, np.ndarray]], str | None]
"""An episode's observations {key: (steps + 1, ...)} → its mode's label, None where there is none yet."""


class TaskError(ValueError):
    """A task that is described wrongly, or a user's function that fails."""

    hopeless = True
    """Trying again does not help."""


@dataclass(frozen=True)
class Task:
    """What environment is made, and how its success and its mode are read: a picklable factory, also for processes that
    are spawned."""

    env: str
    """Gymnasium id; `module:Id` imports the module that registers it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the environment; Gymnasium itself takes `max_episode_steps`."""
    success: str | None = None
    """None: info["is_success"], else info["success"]. `return>=90`: a threshold on the sum of the rewards, which is
    read when the episode ends and not before, as a sum of costs starts above every threshold. `module:function`: a
    SuccessOf, called after every step; as always, the last step's answer counts. `none`: nothing is a success."""
    mode: str | None = None
    """`module:function`: a ModeOf; None: the environment's own, if it has one."""
    modes: tuple[str, ...] = ()
    """All labels that the function gives; () where they are not known."""
    fresh: bool = False
    """Make the environment anew for each episode: for those where an episode depends on the ones before, whatever the
    seed (`panda_gym:PandaPush-v3` is one)."""

    def __post_init__(self) -> None:
        if self.modes and self.mode is None:
            raise TaskError(f"the modes {', '.join(self.modes)} need a mode function that tells them apart")
        if len(set(self.modes)) < len(self.modes):
            raise TaskError(f"each mode must be named once; got {', '.join(self.modes)}")

    def __call__(self, render_mode: str | None = None) -> gymnasium.Env:
        """Make the environment, in an Adapter unless it is a task of our kind already and nothing is asked of it.
        Raises ValueError for what is unknown or cannot be adapted."""
        success, mode = parse_success(self.success), None if self.mode is None else load(self.mode)
        env = Fresh(lambda: self._make(render_mode)) if self.fresh else self._make(render_mode)
        if success is None and mode is None and _is_ours(env):
            return env
        return Adapter(env, success, mode, self.modes)

    def _make(self, render_mode: str | None) -> gymnasium.Env:
        rendering = {} if render_mode is None else {"render_mode": render_mode}  # some know no None
        with _quiet():
            if ":" in self.env:
                _import(self.env.partition(":")[0])
            return envs.make(self.env, **self.arguments, **rendering)


class Adapter(gymnasium.Wrapper):
    """Gives an environment our contract.

    Observations are float32 arrays in a flat dict: a Box is called `observation`, what lies in a Dict or Tuple by its
    path, `camera.depth` or `joints.0`; Discrete and MultiDiscrete are one-hot, MultiBinary is 0 and 1, a single number
    is an array (1,). Actions are a float32 Box (A,); they are clipped to its bounds and get their type and shape back.
    Every info has `is_success`, and `measures` with the `return` so far unless the environment gives its own.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        success: SuccessOf | float | None = None,
        mode: ModeOf | None = None,
        modes: Sequence[str] = (),
    ) -> None:
        """`success`: as the environment says, when the return of an episode reaches a number, or a function's answer;
        `mode` and `modes`: None and () leave the environment's own. Raises TaskError for spaces that do not fit."""
        super().__init__(env)
        self._name = env.spec.id if env.spec else type(env.unwrapped).__name__
        arguments = inspect.signature(env.unwrapped.reset).parameters.values()
        if not any(each.name == "seed" or each.kind is each.VAR_KEYWORD for each in arguments):
            raise TaskError(f"{self._name} takes no seed: its reset must be reset(*, seed=None, options=None)")
        leaves = [
            (".".join(map(str, path)) or "observation", path, leaf) for path, leaf in _leaves(env.observation_space)
        ]
        self._leaves = {name: (path, leaf) for name, path, leaf in leaves}
        if not leaves or len(self._leaves) < len(leaves) or "action" in self._leaves:
            raise TaskError(
                f"{self._name} must observe something, under names that differ and are not `action`, where the "
                f"actions are; got {env.observation_space}"
            )
        self.observation_space = gymnasium.spaces.Dict({name: self._box(name, leaf) for name, _, leaf in leaves})
        space = env.action_space
        if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
            raise TaskError(f"{self._name} takes actions of {space}; a policy can only give those of a Box of floats")
        self._inner_action = space
        self.action_space = _float32(space.low.reshape(-1), space.high.reshape(-1))
        self._success = success
        self._mode = mode
        self.modes: tuple[str, ...] = tuple(modes)
        """All labels; () where they are not known."""
        if mode is None and env.has_wrapper_attr("mode") and env.has_wrapper_attr("modes"):
            self._mode, self.modes = env.get_wrapper_attr("mode"), tuple(env.get_wrapper_attr("modes"))
        self._return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._return = 0.0
        solved = self._success is None and bool(info.get("is_success", info.get("success", False)))
        return self._flat(observation), {"measures": {"return": 0.0}, **info, "is_success": solved}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take a step. Raises TaskError for an action that is not (A,) finite numbers, when an episode ends and nothing
        has said whether it is a success, and for a success function that fails."""
        action = np.asarray(action)
        inner = self._inner_action
        if action.shape != (inner.low.size,) or not np.isfinite(action).all():
            raise TaskError(f"an action of {self._name} is {inner.low.size} finite numbers; got {action}")
        given = np.clip(action.astype(inner.dtype).reshape(inner.shape), inner.low, inner.high)
        observation, reward, terminated, truncated, info = self.env.step(given)
        self._return += float(reward)
        flat = self._flat(observation)
        info = {"measures": {"return": self._return}, **info}
        info["is_success"] = self._solved(flat, info, bool(terminated or truncated))
        return flat, float(reward), bool(terminated), bool(truncated), info

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """The label of an episode, {key: (steps + 1, ...)}; raises TaskError for a function that fails or gives what is
        no label."""
        if self._mode is None:
            return None
        label = _call(self._mode, observations)
        if label is None or (isinstance(label, str) and (not self.modes or label in self.modes)):
            return label
        allowed = f"one of {', '.join(self.modes)}" if self.modes else "a text"
        raise TaskError(f"{_name_of(self._mode)} must give {allowed}, or None; got {label!r}")

    def _box(self, name: str, space: gymnasium.Space) -> Box:
        """What the adapter makes of a part of the observation."""
        if isinstance(space, Box):
            shape = space.shape or (1,)
            return _float32(space.low.reshape(shape), space.high.reshape(shape))
        if isinstance(space, Discrete | MultiDiscrete | MultiBinary):
            return Box(0, 1, gymnasium.spaces.flatten_space(space).shape, np.float32)
        raise TaskError(
            f"{self._name} observes {name}: {space}; allowed are Box, Discrete, MultiDiscrete and MultiBinary, and "
            "Dict and Tuple of them"
        )

    def _flat(self, observation: Any) -> Observation:
        flat = {}
        for name, (path, space) in self._leaves.items():
            value = reduce(getitem, path, observation)
            if not isinstance(space, Box):
                value = gymnasium.spaces.flatten(space, value)
            array = np.array(value, np.float32)  # a copy: some environments change theirs in place
            flat[name] = array.reshape(array.shape or (1,))
        return flat

    def _solved(self, observation: Observation, info: dict[str, Any], ended: bool) -> bool:
        if callable(self._success):
            answer = _call(self._success, observation, info)
            if not isinstance(answer, bool | np.bool_):
                raise TaskError(f"{_name_of(self._success)} must give True or False; got {answer!r}")
            return bool(answer)
        if self._success is not None:
            return ended and self._return >= self._success
        said = info.get("is_success", info.get("success"))
        if said is None and ended:
            raise TaskError(
                f"{self._name} gives no info['is_success'] or info['success']; say what success is with "
                "--success 'return>=NUMBER' or --success module:function (or 'none', to measure the return alone)"
            )
        return bool(said)


class Fresh(gymnasium.Wrapper):
    """Makes its environment anew at each reset, so that no trace of the last episode is left."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        super().__init__(make_env())
        self._make_env = make_env
        self._used = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in a new environment."""
        if self._used:
            self.env.close()
            self.env = self._make_env()
        self._used = True
        return self.env.reset(seed=seed, options=options)


# Spaces


def _leaves(space: gymnasium.Space, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple, gymnasium.Space]]:
    """(path, space) of what lies in nested Dicts and Tuples."""
    if isinstance(space, gymnasium.spaces.Dict):
        for key, part in space.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(space, gymnasium.spaces.Tuple):
        for i, part in enumerate(space):
            yield from _leaves(part, (*path, i))
    else:
        yield path, space


def _float32(low: np.ndarray, high: np.ndarray) -> Box:
    with np.errstate(over="ignore"):  # the largest float64 becomes infinite
        return Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


def _is_ours(env: gymnasium.Env) -> bool:
    """Whether an environment offers modes, a flat Dict of float32 Boxes, and float32 actions."""
    space, action = env.observation_space, env.action_space
    parts = space.spaces.values() if isinstance(space, gymnasium.spaces.Dict) else [space]
    return (
        env.has_wrapper_attr("modes")
        and env.has_wrapper_attr("mode")
        and isinstance(space, gymnasium.spaces.Dict)
        and all(isinstance(part, Box) and part.dtype == np.float32 for part in (*parts, action))
    )


# The user's own modules


def parse_success(text: str | None) -> SuccessOf | float | None:
    """What Task.success means; raises TaskError."""
    if text is None:
        return None
    if text == "none":
        return math.inf
    measure, reaches, number = text.partition(">=")
    if not reaches and ":" in text:
        return load(text)
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if measure.strip() != "return" or not math.isfinite(threshold):
        raise TaskError(
            f"success must be 'return>=NUMBER', such as 'return>=90', module:function, or 'none'; got {text!r}"
        )
    return threshold


def load(name: str) -> Callable[..., Any]:
    """The function or class that `module:function` names, also from a file in the working directory; raises
    TaskError."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise TaskError(f"a function is named module:function, such as my_task:mode; got {name!r}")
    module = _import(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TaskError(f"{module_name} has no function {attribute!r}{_nearest(attribute, offered)}")
    return function


def _import(name: str) -> Any:
    """Import a module, also from the working directory: last, so that nothing installed is hidden by a file there."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise TaskError(f"importing {name} failed: {type(error).__name__}: {error}") from error
        parent, _, last = missing.rpartition(".")
        beside = pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", []) if parent else None)
        raise TaskError(f"there is no module {missing!r}{_nearest(last, [each.name for each in beside])}") from error


def _nearest(name: str, offered: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, offered, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function; what it raises is named in one line."""
    try:
        return function(*arguments)
    except Exception as error:
        raise TaskError(f"{_name_of(function)} failed: {type(error).__name__}: {error}") from error


def _name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', function)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what is printed while an environment is made; Python's warnings are given afterwards."""
    with warnings.catch_warnings(record=True) as caught, silence():
        yield
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
