"""Checks that an environment of others keeps Gymnasium's contract.

An error says in one line what the environment does wrong and how to correct it.
Knows Gymnasium. Knows no task.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from diffusion_policy.basics.text import one_line
from diffusion_policy.envs.spaces import EnvSpecError
from diffusion_policy.envs.task import TaskEnv


class Contract(gymnasium.Wrapper):
    """Stands directly around an environment, below all wrappers: `reset` is called with what it takes, and what it and
    `step` return is looked at, as wrappers would fail on it in words of their own. A wrapper that reaches for
    attributes of the environment that it was put around finds them, and sets them, as before."""

    def __init__(self, env: gymnasium.Env) -> None:
        vars(self)["_own"] = {
            "env",
            "_action_space",
            "_observation_space",
            "_metadata",
            "_cached_spec",
            "_name",
            "_takes",
        }
        super().__init__(env)
        self._name = name_of_env(env)
        self._takes = {name for name in ("seed", "options") if takes(env, name)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "env" not in vars(self):
            raise AttributeError(name)
        return getattr(self.env, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            super().__setattr__(name, value)
        else:
            setattr(self.env, name, value)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; what `reset` does not know is left out where it is None."""
        wanted: dict[str, Any] = {"seed": seed, "options": options}
        given = {name: value for name, value in wanted.items() if name in self._takes or value is not None}
        result: Any = self.env.reset(**given)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping | None)):
            raise EnvSpecError(
                f"reset of {self._name} gives {_count(result)}, as in old versions of gym; it must return "
                "(observation, info): change it, or adapt it with shimmy's GymV21CompatibilityV0"
            )
        return result[0], dict(result[1] or {})

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        result: Any = self.env.step(action)
        if not (isinstance(result, tuple) and len(result) == 5 and isinstance(result[4], Mapping | None)):
            raise EnvSpecError(
                f"step of {self._name} gives {_count(result)}, as in old versions of gym; it must return "
                "(observation, reward, terminated, truncated, info): change it, or adapt it with shimmy's "
                "GymV21CompatibilityV0"
            )
        observation, reward, terminated, truncated, info = result
        name = f"{self._name} gives"
        number = to_number(reward, f"{name} the reward")
        return observation, number, _flag(terminated, name), _flag(truncated, name), dict(info or {})


def guard(env: gymnasium.Env) -> gymnasium.Env:
    """The environment with a Contract below all its wrappers, unless it is a task of ours or has one. Raises
    EnvSpecError for what is not one environment of Gymnasium's."""
    if isinstance(env, gymnasium.vector.VectorEnv):
        raise EnvSpecError(
            f"{type(env).__name__} is several environments; give a single one: gymnasium.make, not make_vec"
        )
    if not isinstance(env, gymnasium.Env):
        raise EnvSpecError(f"an environment is a gymnasium.Env; got {type(env).__module__}.{type(env).__name__}")
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env.unwrapped, name, None), gymnasium.Space):
            raise EnvSpecError(f"{name_of_env(env)} must have an {name}, a space of Gymnasium's")
    if isinstance(env.unwrapped, TaskEnv):
        return env
    if not isinstance(env, gymnasium.Wrapper):
        return Contract(env)
    layer = env
    while isinstance(layer.env, gymnasium.Wrapper):
        layer = layer.env
    if not isinstance(layer, Contract):
        layer.env = Contract(layer.env)
    return env


def name_of_env(env: gymnasium.Env) -> str:
    """What an environment is called in messages."""
    spec = env.unwrapped.spec
    return one_line(spec.id if spec else type(env.unwrapped).__name__, 100)


def takes(env: gymnasium.Env, name: str) -> bool:
    """Whether the `reset` of the environment within knows an argument."""
    parameters = inspect.signature(env.unwrapped.reset).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in parameters)


def to_number(value: Any, what: str) -> float:
    """A number that may come as an array of one; raises EnvSpecError, which says `what` it is, for others."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise EnvSpecError(f"{what} {one_line(repr(value), 100)}; it must be one number")
    return float(array.reshape(-1)[0])


def to_truth(value: Any, what: str) -> bool:
    """Yes or no, which may come as an array or as 0.0 and 1.0; raises EnvSpecError for others, such as a share."""
    number = to_number(value, what)
    if number not in (0, 1):
        raise EnvSpecError(
            f"{what} {number:g}, which is neither true nor false; say what success is with --success module:function"
        )
    return bool(number)


def control_rate(env: gymnasium.Env) -> float | None:
    """Control steps in a second [Hz], where the environment says it and it can be."""
    rate: Any = (env.metadata or {}).get("render_fps")
    if not isinstance(rate, int | float | np.number) or isinstance(rate, bool) or not 0 < rate < math.inf:
        return None
    return rate if isinstance(rate, int | float) else rate.item()  # pyright: ignore[reportAttributeAccessIssue]


def _flag(value: Any, what: str) -> bool:
    try:
        return bool(value)
    except ValueError:
        raise EnvSpecError(f"{what} the end of the episode as {value!r}; it must be True or False") from None


def _count(result: Any) -> str:
    return f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
