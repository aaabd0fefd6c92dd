"""Makes any other Gymnasium environment a task: flat observations, rows of actions, success, modes, a time limit.

    spec = EnvSpec("panda_gym:PandaReach-v3")                                   # it says info["is_success"] itself
    spec = EnvSpec("MountainCarContinuous-v0", success="return>=90",
                   mode="diffusion_policy.envs.examples:mountain_car_mode", modes=("left", "right"))
    env = spec()

Knows Gymnasium's environments and the user's functions. Knows no task.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from diffusion_policy import envs
from diffusion_policy.basics.bounds import MOST_STEPS
from diffusion_policy.basics.names import is_label
from diffusion_policy.envs.contract import guard, name_of_env, takes, to_number, to_truth
from diffusion_policy.envs.modules import call, import_module, load, name_of
from diffusion_policy.envs.protocols import as_multimodal, check_label, layers
from diffusion_policy.envs.quiet import silence
from diffusion_policy.envs.spaces import EnvSpecError, Observation, action_box, action_row, observe, observed_parts
from diffusion_policy.envs.task import TaskEnv
from diffusion_policy.envs.wrappers import Wrapped, wrap

SuccessOf = Callable[[Observation, dict[str, Any]], bool]
"""(the flat observation after a step, the step's info with its measures) → whether the task is solved now."""
ModeOf = Callable[[Mapping[str, np.ndarray]], str | None]
"""An episode's observations {key: (steps + 1, ...)} → its mode's label, None where there is none yet."""


@dataclass(frozen=True)
class EnvSpec:
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
    wrappers: tuple[Wrapped, ...] = ()
    """Put around it, the inner first, as `envs.wrappers` writes them."""

    def __post_init__(self) -> None:
        if self.modes and self.mode is None:
            raise EnvSpecError(f"the modes {', '.join(self.modes)} need a mode function that tells them apart")
        if len(set(self.modes)) < len(self.modes):
            raise EnvSpecError(f"each mode must be named once; got {', '.join(self.modes)}")
        for label in self.modes:
            check_label(label, self.env)

    @property
    def described(self) -> dict[str, Any]:
        """The environment as stores and checkpoints keep it."""
        signals = {
            "success": self.success,
            "mode_function": self.mode,
            "mode_labels": list(self.modes),
            "fresh": self.fresh,
        }
        described = {
            "id": self.env,
            "arguments": dict(self.arguments),
            "wrappers": [dict(one) for one in self.wrappers],
        }
        described["signals"] = {name: value for name, value in signals.items() if value}
        return {name: value for name, value in described.items() if value or name in ("id", "arguments")}

    def __call__(self, render_mode: str | None = None) -> gymnasium.Env:
        """Make the environment, in an Adapter unless it is a task of our kind already and nothing is asked of it.
        Raises ValueError for what is unknown or cannot be adapted."""
        success, mode = parse_success(self.success), None if self.mode is None else load(self.mode)
        env = Fresh(lambda: self._make(render_mode)) if self.fresh else self._make(render_mode)
        if success is not None or mode is not None or not _is_ours(env):
            env = Adapter(env, success, mode, self.modes)
        env.described = self.described  # pyright: ignore[reportAttributeAccessIssue]  (for whoever records it)
        return env

    def _make(self, render_mode: str | None) -> gymnasium.Env:
        rendering = {} if render_mode is None else {"render_mode": render_mode}  # some know no None
        with _quiet():
            if ":" in self.env:
                import_module(self.env.partition(":")[0])
            # a checker that asserts is for whoever writes an environment; what matters here, guard and Adapter look at
            env = guard(envs.make(self.env, **{"disable_env_checker": True, **self.arguments, **rendering}))
            for wrapped in self.wrappers:
                env = wrap(env, wrapped)
            limited = any(isinstance(layer, gymnasium.wrappers.TimeLimit) for layer in layers(env))
            return env if limited else Capped(env, MOST_STEPS)


class Capped(gymnasium.wrappers.TimeLimit):
    """Ends the episodes of an environment that has no time limit."""


def capped_steps(env: gymnasium.Env) -> int | None:
    """Steps after which an EnvSpec ends the episodes of an environment without a time limit; None where it has one."""
    return MOST_STEPS if any(isinstance(layer, Capped) for layer in layers(env)) else None


class Adapter(gymnasium.Wrapper):
    """Gives an environment our contract.

    What is observed is named and shaped as `spaces` says; actions are rows (A,), clipped to their bounds, that get
    their type and shape back. Every info has `is_success`, and `measures` with the `return` so far unless the
    environment gives its own.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        success: SuccessOf | float | None = None,
        mode: ModeOf | None = None,
        modes: Sequence[str] = (),
    ) -> None:
        """`success`: as the environment says, when the return of an episode reaches a number, or a function's answer;
        `mode` and `modes`: None and () leave the environment's own. Raises EnvSpecError for spaces that do not fit."""
        env = guard(env)
        super().__init__(env)
        self._name = name_of_env(env)
        if not takes(env, "seed"):
            raise EnvSpecError(f"{self._name} takes no seed: its reset must be reset(*, seed=None, options=None)")
        self._parts = observed_parts(env.observation_space, self._name)
        self.observation_space = gymnasium.spaces.Dict({name: part.box for name, part in self._parts.items()})
        self.action_space = action_box(env.action_space, self._name)
        self._inner_action: Any = env.action_space
        self._success = success
        self._mode = mode
        self.plain = success is None and mode is None
        """Whether it brings no functions of its own."""
        self.modes: tuple[str, ...] = tuple(modes)
        """All labels; () where they are not known."""
        own = as_multimodal(env) if mode is None else None
        if own is not None:
            self._mode, self.modes = own.mode, tuple(own.modes)
        self._return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._return = 0.0
        info = self._measured(info)
        info["is_success"] = self._success is None and self._says(info) is True
        return observe(self._parts, observation, self._name), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take a step. Raises EnvSpecError for an action that is not (A,) finite numbers, for what is observed and does
        not fit its space, when an episode ends and nothing has said whether it is a success, and for a success function
        that fails."""
        inner = self._inner_action
        row = action_row(self.action_space, action, self._name)  # pyright: ignore[reportArgumentType]
        given = np.asarray(np.clip(row.astype(inner.dtype).reshape(inner.shape), inner.low, inner.high))
        observation, reward, terminated, truncated, info = self.env.step(given)
        reward = to_number(reward, f"{self._name} gives the reward")
        self._return += reward
        flat = observe(self._parts, observation, self._name)
        info = self._measured(info)
        info["is_success"] = self._solved(flat, info, bool(terminated or truncated))
        return flat, reward, bool(terminated), bool(truncated), info

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """The label of an episode, {key: (steps + 1, ...)}; raises EnvSpecError for a function that fails or gives
        what is no label."""
        if self._mode is None:
            return None
        label = call(self._mode, observations)
        if label is None or (label in self.modes if self.modes else is_label(label)):
            return label
        allowed = f"one of {', '.join(self.modes)}" if self.modes else "a text"
        raise EnvSpecError(f"{name_of(self._mode)} must give {allowed}, or None; got {label!r:.100}")

    def close(self) -> None:
        """Close the environment; some fail, as when a physics server that they share is gone, and nobody is harmed."""
        with contextlib.suppress(Exception):
            super().close()

    def _measured(self, info: dict[str, Any]) -> dict[str, Any]:
        """The info with measures: the environment's own where they are named numbers, else the return."""
        own = info.get("measures")
        if isinstance(own, Mapping) and all(
            isinstance(name, str) and isinstance(value, bool | int | float | np.number) for name, value in own.items()
        ):
            return dict(info)
        return {**info, "measures": {"return": self._return}}

    def _says(self, info: dict[str, Any]) -> bool | None:
        """Whether the environment says that the task is solved; None where it does not say."""
        for name in ("is_success", "success"):
            if info.get(name) is not None:
                return to_truth(info[name], f"{self._name} gives info[{name!r}] =")
        return None

    def _solved(self, observation: Observation, info: dict[str, Any], ended: bool) -> bool:
        if callable(self._success):
            answer = call(self._success, observation, info)
            if not isinstance(answer, bool | np.bool_):
                raise EnvSpecError(f"{name_of(self._success)} must give True or False; got {answer!r}")
            return bool(answer)
        if self._success is not None:
            return ended and self._return >= self._success < math.inf  # of `none`, nothing is a success
        said = self._says(info)
        if said is None and ended:
            raise EnvSpecError(
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
            with contextlib.suppress(Exception):  # it is done with
                self.env.close()
            self.env = self._make_env()
        self._used = True
        return self.env.reset(seed=seed, options=options)


def _is_ours(env: gymnasium.Env) -> bool:
    """Whether an environment is a task of our kind, and no wrapper changes what it observes or takes."""
    task = env.unwrapped
    alike = env.observation_space == task.observation_space and env.action_space == task.action_space
    return isinstance(task, TaskEnv) and alike


def parse_success(text: str | None) -> SuccessOf | float | None:
    """What EnvSpec.success means; raises EnvSpecError."""
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
        raise EnvSpecError(
            f"success must be 'return>=NUMBER', such as 'return>=90', module:function, or 'none'; got {text!r}"
        )
    return threshold


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what is printed while an environment is made; Python's warnings are given afterwards."""
    with warnings.catch_warnings(record=True) as caught, silence():
        yield
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
