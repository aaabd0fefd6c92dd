"""Names and shapes of observations: one definition for recorder, adapter, converters and policies.

An observation is a flat dict of named arrays. A Box is called `observation`; a space within a Dict or Tuple has the
name of its path, `camera.depth` or `joints.0`. A Box keeps its type (float64 stays float64, pictures stay uint8);
Discrete and MultiDiscrete are one-hot, MultiBinary is 0 and 1, float32; a single number is a row (1,). An action is a
row (A,).

Knows Gymnasium's spaces. Knows no environment.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from diffusion_policy.basics.names import MOST_CHARACTERS, join_names
from diffusion_policy.basics.text import error_line, one_line

Observation = dict[str, np.ndarray]
KEPT = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64)
"""Types of numbers that an observation keeps; others become float32, longer ones float64."""


class EnvSpecError(ValueError):
    """A task that is described wrongly or breaks the contract of Gymnasium, or a user's function that fails."""

    hopeless = True
    """Trying again does not help."""


class Part(NamedTuple):
    """A named part of an observation."""

    path: tuple[Any, ...]
    """Where it lies in nested Dicts and Tuples."""
    space: gymnasium.Space
    """What the environment gives."""
    box: Box
    """What is observed of it."""


def observed_parts(space: gymnasium.Space, who: str) -> dict[str, Part]:
    """The parts of an observation by name; raises EnvSpecError, which says that of `who`, for what cannot be
    observed."""
    found = [(join_names(path) or "observation", path, leaf) for path, leaf in _leaves(space)]
    parts: dict[str, Part] = {}
    for name, path, leaf in found:
        if name in parts:
            one, other = (one_line("/".join(map(str, keys)), 50) for keys in (parts[name].path, path))
            raise EnvSpecError(
                f"{who} observes {one!r} and {other!r}, which would both be called {name[:50]!r}; rename one"
            )
        parts[name] = Part(path, leaf, _box(leaf, name, who))
    if not parts or "action" in parts:
        raise EnvSpecError(
            f"{who} must observe something, and not under the name `action`, where the actions are; got {_short(space)}"
        )
    for name in parts:
        if len(name) > MOST_CHARACTERS or not re.match(r"\w", name) or name == "zarr.json":
            raise EnvSpecError(
                f"{who} observes {name[:50]!r}; a name begins with a letter, digit or '_' and has at most "
                f"{MOST_CHARACTERS} characters; rename it"
            )
    return parts


def observed_space(space: gymnasium.Space, who: str = "the environment") -> gymnasium.spaces.Dict:
    """The space of what is observed: a flat Dict of Boxes."""
    return gymnasium.spaces.Dict({name: part.box for name, part in observed_parts(space, who).items()})


def observe(parts: Mapping[str, Part], observation: Any, who: str) -> Observation:
    """An observation by the names of its parts, copied, as some environments change theirs in place. Raises
    EnvSpecError where it is none of its space's: a part is missing, has another shape or type, or holds numbers that
    its type cannot hold. Its bounds are not looked at."""
    return {name: _take(name, part, observation, who) for name, part in parts.items()}


def action_box(space: gymnasium.Space, who: str) -> Box:
    """Actions as rows (A,) of float32 or float64, from a Box of floats of any shape; raises EnvSpecError for others."""
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        raise EnvSpecError(
            f"{who} takes actions of {_short(space)}; a policy can only give those of a Box of floats: wrap it in an "
            "ActionWrapper that takes such and makes of them what it needs"
        )
    dtype = np.float32 if space.dtype.itemsize <= 4 else np.float64
    return Box(space.low.reshape(-1).astype(dtype), space.high.reshape(-1).astype(dtype), dtype=dtype)


def action_row(box: Box, action: Any, who: str) -> np.ndarray:
    """An action of any shape as a row of `action_box`, copied; raises EnvSpecError unless it is A finite numbers."""
    try:
        row = np.array(action, box.dtype).reshape(-1)
    except (TypeError, ValueError):
        row = np.empty(0)
    if row.shape != box.shape or not np.isfinite(row).all():
        raise EnvSpecError(f"an action of {who} is {box.shape[0]} finite numbers; got {_short(action)}")
    return row


def _short(thing: object) -> str:
    return one_line(str(thing), 200)


def _leaves(space: gymnasium.Space, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple, gymnasium.Space]]:
    """(path, space) of what lies in nested Dicts and Tuples."""
    if isinstance(space, gymnasium.spaces.Dict):
        for key, part in space.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(space, gymnasium.spaces.Tuple):
        for i, part in enumerate(space):
            yield from _leaves(part, (*path, i))
    else:
        yield path, space


def _box(space: gymnasium.Space, name: str, who: str) -> Box:
    """What is observed of a part."""
    if isinstance(space, Discrete | MultiDiscrete | MultiBinary):
        return Box(0, 1, (gymnasium.spaces.flatdim(space),), np.float32)
    if not isinstance(space, Box):
        raise EnvSpecError(
            f"{who} observes {name}: {_short(space)}; allowed are Box, Discrete, MultiDiscrete and MultiBinary, and "
            "Dict and Tuple of them"
        )
    if 0 in space.shape:
        raise EnvSpecError(
            f"{who} observes {name}: {_short(space)}, which holds no numbers; leave it out with FilterObservation"
        )
    longer = np.float64 if space.dtype.kind == "f" and space.dtype.itemsize > 8 else np.float32
    dtype = space.dtype if space.dtype in KEPT else np.dtype(longer)
    shape = space.shape or (1,)
    return Box(space.low.reshape(shape).astype(dtype), space.high.reshape(shape).astype(dtype), dtype=dtype.type)


def _take(name: str, part: Part, observation: Any, who: str) -> np.ndarray:
    box = part.box
    try:
        value = reduce(getitem, part.path, observation)
        if not isinstance(part.space, Box):
            value = _flatten(part.space, value)
        array = np.array(value)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EnvSpecError(
            f"{who} gives no {name} as its observation space has it, {_short(part.space)}: {error_line(error)}"
        ) from error
    fits = array.shape in (part.space.shape, box.shape) or array.size == math.prod(box.shape) == 1
    if array.dtype.kind not in "biuf" or not fits or (array.dtype.kind == "f" and box.dtype.kind in "iu"):
        raise EnvSpecError(
            f"{who} gives {name} as {array.dtype} of shape {array.shape}; "
            f"its observation space says {_short(part.space)}"
        )
    if array.dtype == box.dtype:
        return array.reshape(box.shape)
    with np.errstate(over="ignore"):
        kept = array.astype(box.dtype)
    changed = kept != array if box.dtype.kind in "iu" else np.isfinite(kept) != np.isfinite(array)
    if changed.any():
        raise EnvSpecError(f"{who} gives {name} as {array[changed][0]}, which {box.dtype} of its space cannot hold")
    return kept.reshape(box.shape)


def _flatten(space: gymnasium.Space, value: Any) -> np.ndarray:
    """A choice as 0 and 1; raises ValueError for one that is not offered, of which Gymnasium makes another."""
    given = np.asarray(value).reshape(space.shape)
    with np.errstate(invalid="ignore"):
        chosen = given.astype(space.dtype)
    if not np.array_equal(chosen, given) or not space.contains(chosen):
        raise ValueError(f"got {one_line(str(value), 50)}")
    return np.asarray(gymnasium.spaces.flatten(space, chosen))
