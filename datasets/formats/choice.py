"""Selects what a copy takes of a dataset, and checks each of its episodes, for all formats alike.

Arrays that cannot be used, or that hold NaN or infinity, are left out and named, unless they were asked for. In the
copy an array has the name that `join_names` gives it, and one number a step is a row (1,).

Knows names and arrays. Knows no files and no format.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.names import join_names, nearest_instructions
from diffusion_policy.datasets.demonstration import Demonstration, nonfinite_rows
from diffusion_policy.datasets.formats.format import Contents, Source, Unusable
from diffusion_policy.datasets.formats.reading import store_errors
from diffusion_policy.datasets.storage import KEY, StoreError, say_names


class _Choice(NamedTuple):
    """What a copy takes of the contents, in their own names."""

    names: dict[str, str]
    """Every array that is read, and its name in the copy."""
    observed: tuple[str, ...]
    action: tuple[str, ...]
    """Several are joined."""
    action_name: str
    kept: tuple[str, ...]
    """Arrays that are copied as they are."""
    asked: frozenset[str]
    """What must be usable."""


def choose(
    contents: Contents,
    observation: tuple[str, ...],
    action: tuple[str, ...],
    left_out: dict[str, str],
    *,
    location: str | Path,
    description: str,
) -> Source:
    """What is taken of a dataset; `left_out` gets what is not, and may name arrays that have been found useless."""
    useless = {name: why for name, why in contents.arrays.items() if why is not None} | left_out
    names = _allowed_names(contents.arrays, useless)
    left_out |= {**contents.left_out, **useless}
    find = _Finder(contents, names, useless, "" if observation or action else "; name the actions with --action")
    done = find.all(find.split(action or (contents.action_key,)))
    observed = find.all(observation)
    if not observation:
        left_out |= {name: "it is not there" for name in contents.observation_keys if name not in contents.arrays}
        observed = tuple(name for name in contents.observation_keys if name in names and name not in done)
    if not observed:
        raise StoreError(_nothing_to_observe(contents, useless, sorted({*names} - {*done})))
    asked = frozenset({*(observed if observation else ()), *done})
    choice = _combine(names, observed, done, only=bool(observation), left_out=left_out, asked=asked)

    def without(key: str, why: str) -> Source:
        left_out[key] = why
        return choose(contents, observation, action, left_out, location=location, description=description)

    return Source(
        _attributes(contents.attributes, choice, bool(observation or action)),
        contents.modes,
        tuple(choice.names[name] for name in observed),
        choice.action_name,
        _checked(contents, choice, location, description),
        left_out,
        (*contents.remarks, *_remarks(choice)),
        without,
    )


class _Finder(NamedTuple):
    """Finds arrays by their names in the file or in the copy."""

    contents: Contents
    names: dict[str, str]
    useless: dict[str, str]
    hint: str
    """The end of the message that there is no such array."""

    def split(self, keys: Iterable[str]) -> list[str]:
        """The parts of keys that are sums of arrays, `a+b`, unless an array has that name."""
        known = {*self.contents.arrays, *self.names.values()}
        return [part for key in keys for part in ([key] if key in known else key.split("+"))]

    def all(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Names in the file, each once; raises StoreError for arrays that are not there or cannot be used."""
        return tuple(dict.fromkeys(map(self._one, keys)))

    def _one(self, name: str) -> str:
        arrays, names = self.contents.arrays, self.names
        found = name if name in arrays else next((raw for raw in names if names[raw] == name), None)
        if found is None:
            raise StoreError(f"there is no {name}; there is {say_names(sorted(arrays))}{self.hint}")
        if found in self.useless:
            raise StoreError(f"{name} cannot be used: {self.useless[found]}")
        return found


def _nothing_to_observe(contents: Contents, useless: Mapping[str, str], others: Sequence[str]) -> str:
    """Why, and what else could be observed."""
    why = "; ".join(f"{name}: {useless[name]}" for name in contents.observation_keys if name in useless)
    hint = f"name some with --observation of: {say_names(others)}"
    return "; ".join([f"there is nothing to observe{f' ({why})' if why else ''}", *contents.remarks, hint])


def _combine(
    names: dict[str, str],
    observed: tuple[str, ...],
    done: tuple[str, ...],
    *,
    only: bool,
    left_out: dict[str, str],
    asked: frozenset[str],
) -> _Choice:
    """Which arrays are copied, and which are joined into the action. `only`: nothing but what was named."""
    first, *others = done
    joined = bool(others) or first in observed
    action_name = "action" if joined else names[first]
    kept = {*observed} if only else {*names}
    kept |= set() if joined else {*done}
    same = next((name for name in kept if joined and names[name] == "action"), None)
    if same in observed:
        raise StoreError(f"{same} cannot be both observed and the action, or a part of it; rename it")
    if same is not None:
        kept.remove(same)
        left_out[same] = f"the action, {' and '.join(done)}, takes its name"
    return _Choice(
        {name: names[name] for name in sorted(kept | {*done})}, observed, done, action_name, tuple(sorted(kept)), asked
    )


def _allowed_names(arrays: Iterable[str], useless: dict[str, str]) -> dict[str, str]:
    """The name in a store of every array that can be used; others join the useless ones."""
    names: dict[str, str] = {}
    for raw in sorted({*arrays} - useless.keys(), key=lambda raw: (raw != join_names([raw]), raw)):
        name = join_names([raw])
        if not KEY.fullmatch(name):
            useless[raw] = "a store has no arrays of such a name: it begins with a letter, digit or '_'"
        elif name in names.values():
            useless[raw] = f"another array is called {name}, which is its name in a store"
        else:
            names[raw] = name
    return names


def _attributes(attributes: dict[str, Any], choice: _Choice, named: bool) -> dict[str, Any]:
    """Attributes that say of a copy which arrays are observed and done. Where that goes without saying (a store of
    another tool of which all is taken) it is not said."""
    keys = [choice.names[name] for name in choice.observed]
    plain = choice.action_name == "action" and {*choice.kept} - {*choice.action} == {*choice.observed}
    said = {**attributes}
    if named or not plain or {"observation_keys", "action_key"} & attributes.keys():
        said |= {"observation_keys": keys, "action_key": choice.action_name}
    names = {name: choice.names[name] for name in choice.kept}
    return with_angles_of(said, names)


def with_angles_of(attributes: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Attributes whose angles are those of these arrays alone, under the names given."""
    angles = attributes.get("angles")
    if not isinstance(angles, dict):
        return attributes
    return attributes | {"angles": {names[key]: columns for key, columns in angles.items() if key in names}}


def _remarks(choice: _Choice) -> Iterator[str]:
    renamed = [f"{name} -> {choice.names[name]}" for name in choice.names if choice.names[name] != name]
    if renamed:
        yield f"renamed: {', '.join(renamed)}"
    if len(choice.action) > 1:
        yield f"action: the columns of {', '.join(choice.action)}"


# What is checked of every source


def _checked(contents: Contents, choice: _Choice, location: str | Path, description: str) -> Iterator[Demonstration]:
    """The episodes of a source, each checked; arrays in the machine's byte order. Raises StoreError."""
    layouts: dict[str, tuple[Any, ...]] = {}
    with store_errors(location, description):
        episodes = iter(contents.episodes(tuple(choice.names)))
    for i in itertools.count():
        with store_errors(location, description):
            try:
                episode = next(episodes, None)
                if episode is None:
                    return
                episode = _check_episode(contents, choice, episode, layouts)
            except Unusable as error:
                if error.key in choice.asked:
                    raise StoreError(f"episode {i}: {error}") from error
                raise
            except StoreError as error:
                raise StoreError(f"episode {i}: {error}") from error
        yield episode


def _check_episode(
    contents: Contents, choice: _Choice, episode: Demonstration, layouts: dict[str, tuple[Any, ...]]
) -> Demonstration:
    first = episode.data.get(choice.action[0])
    steps = len(first) if isinstance(first, np.ndarray) and first.ndim else 0
    if steps == 0:
        raise StoreError(f"{choice.action[0]!r} has no rows")
    if episode.mode is not None and episode.mode not in contents.modes:
        raise StoreError(f"has the mode {episode.mode!r}; known are {', '.join(contents.modes) or 'none'}")
    instructions = contents.attributes.get("instructions", ())
    if episode.instruction is not None and episode.instruction not in instructions:
        near = nearest_instructions(episode.instruction, instructions)
        raise StoreError(f"has the instruction {episode.instruction!r:.200}; {near}")
    data = {name: _check_rows(name, episode.data.get(name), steps, layouts) for name in choice.names}
    copied = {choice.names[name]: data[name] for name in choice.kept}
    if choice.action_name not in copied:
        copied[choice.action_name] = np.concatenate([data[name].reshape(steps, -1) for name in choice.action], axis=1)
    final = {}
    for name, row in (episode.final or {}).items():
        if name in choice.observed:
            final[choice.names[name]] = _check_rows(name, np.asarray(row)[None], 1, layouts, "the final observation ")[
                0
            ]
    return episode._replace(data=copied, final=final or None)


def _check_rows(name: str, rows: Any, steps: int, layouts: dict[str, tuple[Any, ...]], what: str = "it ") -> np.ndarray:
    """Rows of numbers as a store holds them; raises Unusable."""
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "biuf" or rows.dtype.itemsize > 8:
        raise Unusable(name, f"{what}must hold numbers; got {getattr(rows, 'dtype', 'nothing')}")
    if rows.ndim == 0 or len(rows) != steps:
        raise Unusable(name, f"{what}has {len(rows) if rows.ndim else 'no'} rows; the actions have {steps}")
    if rows.size == 0:
        raise Unusable(name, f"{what}has rows without numbers")
    rows = rows.astype(rows.dtype.newbyteorder("="), copy=False).reshape(steps, *(rows.shape[1:] or (1,)))
    layout = layouts.setdefault(name, (rows.shape[1:], rows.dtype))
    if layout != (rows.shape[1:], rows.dtype):
        raise Unusable(name, f"{what}must stay {layout[0]} of {layout[1]}; got {rows.shape[1:]} of {rows.dtype}")
    bad = nonfinite_rows(rows)
    if len(bad):
        raise Unusable(name, f"{what}has NaN or infinity in {len(bad)} of {steps} rows of an episode")
    return rows
