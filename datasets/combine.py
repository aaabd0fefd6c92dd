"""Stores joined, and a store cut in two, episode by episode.

Knows stores and conversion. Knows no environment and no policy.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.datasets.convert import read, write
from diffusion_policy.datasets.store import Demonstration, EpisodeStore, StoreError
from diffusion_policy.streams import derive_rng


def merge(locations: Sequence[Path | str], target: Path) -> int:
    """Write all episodes of some stores, one store after the other, into a new one; returns their number. Raises
    StoreError for stores with other keys, shapes, types, environments or rates.

    Attributes are those of the first store, its modes those of all; the noise of collecting is null where it differed.
    """
    stores = [EpisodeStore.open(location) for location in locations]
    first = stores[0]
    expected = _nature(first)
    for store in stores[1:]:
        for name, value in _nature(store).items():
            if value != expected[name]:
                raise StoreError(f"{store.location} has the {name} {value}; {first.location} has {expected[name]}")

    def episodes() -> Iterator[Demonstration]:
        for store in stores:
            yield from store.episodes()

    source = read(first.location)
    modes = tuple(dict.fromkeys(mode for store in stores for mode in store.modes))
    attributes = _of_a_part(source.attributes)
    if len({store.attributes.get("noise", 0.0) for store in stores}) > 1:
        attributes["noise"] = None
    return write(source._replace(attributes=attributes, modes=modes, episodes=episodes()), target, "zarr")


def split(location: Path | str, targets: tuple[Path, Path], share: float, seed: int) -> tuple[int, int]:
    """Write a random share of the episodes into one new store and the others into another; returns their numbers.
    Raises StoreError where one of the two would be empty, or something lies at a target."""
    store = EpisodeStore.open(location)
    count = len(store.episode_ends)
    first = round(count * share)
    if not 0 < first < count:
        raise StoreError(f"a share of {share:g} of {count} episodes leaves one of the two stores empty")
    if targets[0] == targets[1]:
        raise StoreError(f"the two parts need two outputs; got {targets[0]} twice")
    for target in targets:
        if target.exists():
            raise StoreError(f"{target} already exists; choose another output or delete it first")
    order = derive_rng("parts of a data set", seed).permutation(count)
    for target, chosen in zip(targets, (order[:first], order[first:]), strict=True):
        source = read(location)
        episodes = store.episodes(np.sort(chosen))
        write(source._replace(attributes=_of_a_part(source.attributes), episodes=episodes), target, "zarr")
    return first, count - first


def _of_a_part(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a store that is not the whole of one collection, so that no one goes on with it."""
    return {name: value for name, value in attributes.items() if name != "collection"}


def _nature(store: EpisodeStore) -> dict[str, Any]:
    """What must be the same in stores that are joined."""
    attributes = store.attributes
    return {
        "arrays": {key: (store.dtype(key).str, store.shape(key)) for key in store.keys},
        "environment": attributes.get("environment"),
        "control frequency": attributes.get("control_frequency"),
        "action key": store.action_key,
        "observation keys": sorted(store.observation_keys),
        "angles": attributes.get("angles"),
    }
