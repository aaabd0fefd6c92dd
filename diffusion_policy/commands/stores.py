"""What is read of a dataset: where it lies, which keys, which columns are angles."""

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_policy.commands.options.train import join_actions
from diffusion_policy.commands.terminal import console
from diffusion_policy.commands.trust import recorded_location
from diffusion_policy.config import ConfigError, PolicyConfig
from diffusion_policy.datasets.store import EpisodeStore


class Keys(NamedTuple):
    """What is read of a store."""

    observations: tuple[str, ...]
    action: str
    target: str
    """Key of the columns that the network predicts, see `PolicyConfig.target_key`."""
    predicted: tuple[str, ...] = ()
    """The keys that these are of, the action called `action`; empty for the action alone."""

    @property
    def names(self) -> dict[str, str]:
        """By the name under which it is read, the key of the store: what is predicted is `action`. One key may be both,
        as where a policy forecasts what it observes."""
        return {key: key for key in self.observations} | {"action": self.target}

    def sizes(self, store: EpisodeStore) -> dict[str, int]:
        """Columns of each key that is predicted, in order; empty for the action alone."""
        stored = {key: self.action if key == "action" else key for key in self.predicted}
        return {key: math.prod(store.shape(name)) for key, name in stored.items()}


def open_store(location: str | Path) -> EpisodeStore:
    """Open a dataset to read, saying what in it is not read; raises StoreError."""
    store = EpisodeStore.open(location)
    for remark in store.remarks():
        console.print(f"{location}: {remark}")
    return store


def open_recorded(source: object, location: str) -> EpisodeStore:
    """Open the dataset that only a checkpoint or a run (`source`) names: a local one, said; ConfigError for a URL, and
    StoreError as `open_store`."""
    return open_store(recorded_location(source, location))


def choose_keys(
    store: EpisodeStore,
    observations: Sequence[str] = (),
    action: str | Sequence[str] = (),
    config: PolicyConfig = PolicyConfig(),  # noqa: B008  (immutable)
) -> Keys:
    """Keys of a store that a policy learns from: those wanted, else those that the store names, else `action` and all
    others; `config` says what is predicted. Raises ConfigError for keys that it does not have, and when none are left
    to observe."""
    action = join_actions(action) or store.action_key
    parts = store.parts(action)
    keys = tuple(observations) or tuple(key for key in store.observation_keys if key not in parts)
    has = f"it has {', '.join(store.keys)}"
    unusable = [key for key in (*parts, *keys) if key in store.left_out]
    if unusable:
        why = f"data/{unusable[0]} cannot be used: it {store.left_out[unusable[0]]}"
        raise ConfigError(f"{store.location}: {why}; {has}; choose with --observation and --action")
    lacking = [part for part in parts if part not in store.keys]
    if lacking:
        raise ConfigError(f"{store.location} has no action key {lacking[0]!r}; {has}; choose with --action")
    wrong = [key for key in keys if key not in store.keys]
    if wrong or not keys:
        sought = f"no observation {wrong[0]!r}" if wrong else "no observations"
        raise ConfigError(f"{store.location} has {sought}; {has}")
    if action != "action" and "action" in keys:
        raise ConfigError(f"an observation cannot be called 'action'; choose others with --observation; {has}")
    unknown = [key for key in config.target if key != "action" and key not in store.keys]
    if unknown:
        raise ConfigError(f"{store.location} has no {unknown[0]!r} to predict; {has}; choose with --target")
    return Keys(keys, action, config.target_key(action), config.target)


def choose_angles(store: EpisodeStore, wanted: Sequence[str], keys: Keys) -> dict[str, tuple[int, ...]]:
    """The columns that are angles, by the names of the keys once they are read: those wanted (see `parse_angles`), else
    what the store says, for the keys that are read. Where actions lie in several arrays, columns may be those of an
    array, or of all side by side."""
    parts = store.columns(keys.target)
    angles = parse_angles(wanted, {*keys.names.values(), *parts}) if wanted else store.attributes.get("angles", {})
    chosen = {name: tuple(angles[one]) for one in angles for name, key in keys.names.items() if key == one}
    for part, first in parts.items() if len(parts) > 1 else ():
        size = math.prod(store.shape(part))
        wrong = [column for column in angles.get(part, ()) if column >= size]
        if wrong:
            raise ConfigError(f"angles must name columns of a key; {part} has {size}, got {wrong[0]}")
        columns = (first + column for column in angles.get(part, ()))
        known = chosen.get("action", ())
        chosen["action"] = (*known, *(column for column in columns if column not in known))
    return {name: columns for name, columns in chosen.items() if columns}


def parse_angles(texts: Sequence[str], keys: Collection[str]) -> dict[str, tuple[int, ...]]:
    """--angles: texts such as `state:4` or `pose:3,4,5`, of these keys; raises ConfigError for others."""
    angles: dict[str, tuple[int, ...]] = {}
    for text in texts:
        key, _, columns = text.rpartition(":")
        if not re.fullmatch(r"\d+(,\d+)*", columns) or key not in keys:
            raise ConfigError(
                f"--angles must name one of the keys {', '.join(keys)} and its columns, as in state:4 or pose:3,4,5; "
                f"got {text!r}"
            )
        angles[key] = angles.get(key, ()) + tuple(int(column) for column in columns.split(","))
    return angles
