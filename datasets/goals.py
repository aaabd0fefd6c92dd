"""Gives the episodes of a dataset goals: what each of them came to.

Knows stores and conversion.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_policy.datasets.convert import read, write
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError

Goals = Mapping[str, tuple[str, tuple[int, ...]]]
"""{name of the goal: (the observation that it is of, its columns; () for all)}"""


class Aimed(NamedTuple):
    """What has been written."""

    episodes: int
    remarks: tuple[str, ...]


def add_goals(location: str | Path, target: Path, goals: Goals) -> Aimed:
    """Copy a dataset into a new store, with the last thing that each episode observed as goals, the same at all its
    steps. Raises StoreError for goals that are there already, and for columns that are not."""
    source = read(location)
    for goal, (key, _) in goals.items():
        if goal in source.observation_keys or goal == source.action_key:
            raise StoreError(f"{location} has a key {goal!r} already; name the goal differently")
        if key not in source.observation_keys:
            raise StoreError(f"a goal is of an observation, {', '.join(source.observation_keys)}; got {key!r}")

    def episodes() -> Iterator[Demonstration]:
        for episode in source.episodes:
            yield _aim(episode, goals)

    keys = (*source.observation_keys, *goals)
    attributes = {**source.attributes, "observation_keys": sorted(keys)}
    made = source._replace(attributes=attributes, observation_keys=keys, episodes=episodes())
    count = write(made, Path(target), "zarr")
    return Aimed(count, source.told)


def _aim(episode: Demonstration, goals: Goals) -> Demonstration:
    """An episode with its goals; raises StoreError for columns that are not there."""
    data, final = dict(episode.data), dict(episode.final or {})
    for goal, (key, columns) in goals.items():
        last = np.asarray(episode.final[key] if episode.final else episode.data[key][-1])
        if columns and (last.ndim != 1 or max(columns) >= last.size):
            raise StoreError(f"{key} has the shape {last.shape} a step; got the columns {list(columns)}")
        reached = last[list(columns)] if columns else last
        data[goal] = np.repeat(reached[None], len(episode.data[key]), axis=0)
        final[goal] = reached
    return episode._replace(data=data, final=final if episode.final else episode.final)
