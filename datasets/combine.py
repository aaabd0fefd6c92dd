"""Merges stores, and splits a store into two, episode by episode.

Knows stores and conversion. Knows no environment and no policy.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.datasets.convert import read, refuse_existing, write
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore

INSTRUCTION_ATTRIBUTES = ("instructions", "instruction_embedding")


class Merged(NamedTuple):
    """What a merge has made."""

    episodes: int
    remarks: tuple[str, ...]
    """What not all stores know, so that it is left out, a sentence each."""


def merge(locations: Sequence[Path | str], target: Path) -> Merged:
    """Write all episodes of some stores, one store after the other, into a new one. Raises StoreError for stores of
    other keys, shapes, environments (their wrappers among that), rates or angles, or of types of numbers that have none
    in common without a loss.

    Attributes are those of the first store, its modes and instructions those of all; the noise of collecting is null
    where it differed. Embeddings of instructions stay where all are of one encoder.
    """
    stores = [EpisodeStore.open(location) for location in locations]
    first = stores[0]
    expected = _nature(first)
    for store in stores[1:]:
        for name, value in _nature(store).items():
            if value != expected[name]:
                raise StoreError(f"{store.location} has the {name} {value}; {first.location} has {expected[name]}")
    types = {key: _common_type(key, stores) for key in first.keys}
    known = [{*store.final_keys} for store in stores]
    finals, lost = set.intersection(*known), sorted(set.union(*known) - set.intersection(*known))
    source = read(first.location)
    attributes, remarks = _of_all(source.attributes, stores)
    if lost:
        remarks.append(f"final observations of {', '.join(lost)} are left out: not all stores know them")

    def episodes() -> Iterator[Demonstration]:
        for store in stores:
            for episode in store.episodes():
                data = {key: rows.astype(types[key], copy=False) for key, rows in episode.data.items()}
                final = {
                    key: row.astype(types.get(key, row.dtype))
                    for key, row in (episode.final or {}).items()
                    if key in finals
                }
                told = episode.instruction_embedding if "instruction_embedding" in attributes else None
                yield episode._replace(data=data, final=final or None, instruction_embedding=told)

    modes = tuple(dict.fromkeys(mode for store in stores for mode in store.modes))
    count = write(source._replace(attributes=attributes, modes=modes, episodes=episodes()), target, "zarr")
    return Merged(count, tuple(remarks))


def _common_type(key: str, stores: Sequence[EpisodeStore]) -> np.dtype:
    """A type that holds the numbers of a key of all stores as they are; raises StoreError where there is none."""
    types = {store.dtype(key) for store in stores}
    common = np.result_type(*types)
    bits = np.finfo(common).nmant + 1 if common.kind == "f" else 64
    if any(kind.kind in "iu" and 8 * kind.itemsize > bits for kind in types):
        found = ", ".join(f"{store.dtype(key)} in {store.location}" for store in stores)
        raise StoreError(f"data/{key} is {found}; these types have none in common without a loss")
    return common


def _of_all(attributes: Mapping[str, Any], stores: Sequence[EpisodeStore]) -> tuple[dict[str, Any], list[str]]:
    """Attributes of a store of the episodes of all, where those of the first are given, and what is left out."""
    attributes, remarks = _of_a_part(attributes), []
    attributes = {name: value for name, value in attributes.items() if name not in INSTRUCTION_ATTRIBUTES}
    if len({store.attributes.get("noise", 0.0) for store in stores}) > 1:
        attributes["noise"] = None
    signals = [store.attributes.get("environment", {}).get("signals", {}) for store in stores]
    told = [one for one in signals if one]
    if told:
        environment = {name: value for name, value in attributes["environment"].items() if name != "signals"}
        agree = all(one == told[0] for one in told)
        attributes["environment"] = environment | ({"signals": told[0]} if agree else {})
        remarks += [] if agree else ["the signals of success and modes are left out: the stores differ in them"]
    instructions, left_out = _instructions_of_all(stores)
    return attributes | instructions, remarks + left_out


def _instructions_of_all(stores: Sequence[EpisodeStore]) -> tuple[dict[str, Any], list[str]]:
    """Attributes of the instructions of all stores, and what is left out: embeddings that are not of one encoder."""
    texts = list(dict.fromkeys(text for store in stores for text in store.instructions))
    if not texts:
        return {}, []
    embeddings = [store.attributes.get("instruction_embedding") for store in stores if store.instructions]
    if any(one != embeddings[0] for one in embeddings):
        why = "not all stores have them of the same encoder; dataset instruct computes them anew"
        return {"instructions": texts}, [f"the embeddings of instructions are left out: {why}"]
    return {"instructions": texts} | ({"instruction_embedding": embeddings[0]} if embeddings[0] else {}), []


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
        refuse_existing(target)
    order = derive_rng("parts of a dataset", seed).permutation(count)
    for target, chosen in zip(targets, (order[:first], order[first:]), strict=True):
        source = read(location)
        episodes = store.episodes(np.sort(chosen))
        write(source._replace(attributes=_of_a_part(source.attributes), episodes=episodes), target, "zarr")
    return first, count - first


def _of_a_part(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a store that is not the whole of one collection, so that no one goes on with it."""
    return {name: value for name, value in attributes.items() if name != "collection"}


def _nature(store: EpisodeStore) -> dict[str, Any]:
    """What must be the same in stores that are joined."""
    attributes = store.attributes
    environment, angles = attributes.get("environment", {}), attributes.get("angles", {})
    return {
        "keys": ", ".join(store.keys),
        "shapes": {key: store.shape(key) for key in store.keys},
        "environment": environment.get("id"),
        "arguments": environment.get("arguments", {}),
        "wrappers": environment.get("wrappers", []),
        "control frequency": attributes.get("control_frequency"),
        "action key": store.action_key,
        "observation keys": ", ".join(sorted(store.observation_keys)),
        "angles": {key: sorted(columns) for key, columns in angles.items() if columns},
    }
