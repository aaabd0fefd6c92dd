"""Several environments in one process: what they do or give is answered in numbers, or with an `EnvFailure` of one
slot.

Knows Gymnasium's contract and how it is broken. Knows neither processes nor policies.
"""

import contextlib
import math
import multiprocessing
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.basics.bounds import MOST_STEPS
from diffusion_policy.basics.images import is_image
from diffusion_policy.basics.text import error_line_with_place, error_message


def look_always(env: gymnasium.Env, looking: bool) -> None:
    """A `Sight.look` of environments that draw their images at each step, whoever needs them."""


class Sight(NamedTuple):
    """Which of the images that environments observe are drawn, and sent on."""

    steps: int | None = None
    """Those of the last so many steps of each sequence of actions, and of a reset; 0: none; None: all. An image is
    large, and a policy plans from the last ones alone."""
    look: Callable[[gymnasium.Env, bool], None] = look_always
    """Tells an environment whether it need draw its images in the next step; picklable."""


class UnfitError(ValueError):
    """An environment does not keep the contract."""

    hopeless = True
    """Trying again does not help."""


class StepsResult(NamedTuple):
    """What one environment answered to the n actions of a sequence that were taken before its episode ended."""

    observations: dict[str, np.ndarray]
    """After each action, (n, ...); of images the last ones alone, see `Sight`."""
    rewards: list[float]
    ended: bool
    info: dict[str, Any]
    """`is_success` and `measures` of the last step."""


class EnvFailure(NamedTuple):
    """Why a slot's episode cannot go on."""

    reason: str
    blamed: bool
    """Whether this slot's own environment failed, not only its worker while another slot's was at work."""
    hopeless: bool = False
    """Whether the environment says that trying again does not help (the error's attribute `hopeless`)."""


class EnvironmentHost:
    """Several environments in one process, each made when it is first reset. Whatever they do or give ends at
    most in an `EnvFailure` of the slot."""

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        at_work: MutableSequence[int] | None = None,
        sight: Sight = Sight(),  # noqa: B008  (immutable)
    ) -> None:
        """`at_work`: two numbers, kept up to date: the slot that is at work, and a count of its signs of life."""
        self._make_env, self._sight = make_env, sight
        self._at_work: MutableSequence[int] = [0, 0] if at_work is None else at_work
        self._envs: dict[int, gymnasium.Env] = {}
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        self._endless: dict[int, bool] = {}
        self._steps_left: dict[int, float] = {}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, dict[str, np.ndarray] | EnvFailure]:
        """Begin an episode in each slot named, with its seed; returns the first observations."""
        return {slot: self._take(slot, self._reset, seed) for slot, seed in seeds.items()}

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, StepsResult | EnvFailure]:
        """Take a sequence of actions (steps, A) in each slot named, until its episode ends."""
        return {slot: self._take(slot, self._step, sequence) for slot, sequence in actions.items()}

    def close(self) -> None:
        """Close every environment; one that fails at that has done its work."""
        for slot in list(self._envs):
            self._close(slot)

    def _take(self, slot: int, turn: Callable[[int, Any], Any], argument: Any) -> Any:
        """What a slot's turn gives, or the failure of its environment."""
        self._at_work[0] = slot
        self._at_work[1] += 1
        try:
            return turn(slot, argument)
        except BaseException as error:  # a simulator may also call sys.exit
            if isinstance(error, KeyboardInterrupt) and multiprocessing.parent_process() is None:
                raise  # the user's: workers do not hear Ctrl-C
            self._close(slot)
            if getattr(error, "hopeless", False):
                return EnvFailure(error_message(error), blamed=True, hopeless=True)
            return EnvFailure(error_line_with_place(error), blamed=True)

    def _close(self, slot: int) -> None:
        env = self._envs.pop(slot, None)
        with contextlib.suppress(Exception, SystemExit):
            if env is not None:
                env.close()

    def _reset(self, slot: int, seed: int) -> dict[str, np.ndarray]:
        if slot not in self._envs:
            self._envs[slot] = self._make_env()
            self._endless[slot] = _is_endless(self._envs[slot])
        self._sight.look(self._envs[slot], self._sight.steps != 0)
        observation, _ = self._envs[slot].reset(seed=seed)
        first = _to_arrays(observation)
        self._shapes[slot] = {key: value.shape for key, value in first.items()}
        self._steps_left[slot] = MOST_STEPS if self._endless[slot] else math.inf
        return first

    def _step(self, slot: int, sequence: np.ndarray) -> StepsResult:
        observations, rewards, ended, info = [], [], False, {}
        unseen = 0 if self._sight.steps is None else max(0, len(sequence) - self._sight.steps)
        for step, action in enumerate(np.array(sequence)):  # a copy: what another process sent may be read-only
            self._at_work[1] += 1
            self._sight.look(self._envs[slot], step >= unseen)
            observation, reward, terminated, truncated, info = self._envs[slot].step(action)
            observations.append(self._to_row(slot, observation))
            rewards.append(_to_number(reward, "the reward"))
            self._steps_left[slot] -= 1
            if ended := bool(terminated or truncated or self._steps_left[slot] <= 0):
                break
        return StepsResult(_stack(observations, unseen), rewards, ended, _choose_info(info))

    def _to_row(self, slot: int, observation: Any) -> dict[str, np.ndarray]:
        """An observation of the same keys and shapes as the episode's first."""
        row = _to_arrays(observation)
        shapes, before = {key: value.shape for key, value in row.items()}, self._shapes[slot]
        for key in sorted(shapes.keys() | before.keys()):
            if shapes.get(key) != before.get(key):
                was, now = (of.get(key, "nothing") for of in (before, shapes))
                raise ValueError(f"the observation {key!r} was {was} at the first step; now it is {now}")
        return row


def _stack(observations: Sequence[Mapping[str, np.ndarray]], unseen: int) -> dict[str, np.ndarray]:
    """The observations of some steps, {key: (n, ...)}, without the images of the first ones."""
    stacked = {}
    for key, first in observations[0].items():
        if is_image(first.shape):
            seen = [one[key] for one in observations[unseen:]]
            stacked[key] = np.stack(seen) if seen else np.empty((0, *first.shape), first.dtype)
        else:
            stacked[key] = np.stack([one[key] for one in observations])
    return stacked


def _is_endless(env: gymnasium.Env) -> bool:
    """Whether no time limit is put around an environment."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            return False
        env = env.env
    return True


def _to_arrays(observation: Any) -> dict[str, np.ndarray]:
    """A copy of an observation: some environments change theirs in place."""
    if not isinstance(observation, Mapping):
        raise UnfitError(
            f"an observation must be a dict of arrays; got {type(observation).__name__}; make the environment with "
            "diffusion_policy.envs.adapters.EnvSpec, which makes one of it"
        )
    arrays = {key: np.array(value, ndmin=1) for key, value in observation.items()}  # a single number is a row (1,)
    for key, value in arrays.items():
        if not isinstance(key, str) or value.dtype.kind not in "biuf":
            raise UnfitError(f"an observation must be a dict of arrays of numbers by name; {key!r} is {value.dtype}")
    return arrays


def _choose_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent on: the rest may be large, or nothing that can be sent."""
    if "is_success" not in info:
        raise UnfitError("the environment must give info['is_success'] at every step; its info has no such key")
    success = _to_number(info["is_success"], "info['is_success']")
    measures = info.get("measures")
    if measures is None:
        return {"is_success": bool(success)}
    numbers = {str(name): _to_number(value, f"the measure {name!r}") for name, value in dict(measures).items()}
    return {"is_success": bool(success), "measures": numbers}


def _to_number(value: Any, what: str) -> float:
    """A finite number, also out of an array of one."""
    try:
        number = float(np.asarray(value).item())
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number; got {value!r:.60}")
    return number
