"""One pass over a store: the fingerprint of its rows, and statistics of the chosen episodes.

Knows stores. Knows no policy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_policy.datasets.statistics import Measuring, Statistics
from diffusion_policy.datasets.store import EpisodeStore


class Summary(NamedTuple):
    """What one pass over a store has found."""

    fingerprint: str
    """Of all rows, see `EpisodeStore.fingerprint`."""
    statistics: dict[str, Statistics]
    """Of the rows of the chosen episodes, by key; the action is `action`."""


def summarize(
    store: EpisodeStore, observation_keys: Sequence[str], action_key: str, episodes: Sequence[int] | np.ndarray
) -> Summary:
    """Fingerprint of a store and statistics of some of its episodes, in one pass with bounded memory."""
    names = {key: key for key in observation_keys} | {"action": action_key}
    measuring = {name: Measuring() for name in names}
    ends = store.episode_ends
    chosen = np.zeros(len(ends), bool)
    chosen[episodes] = True

    def add(key: str, start: int, rows: np.ndarray) -> None:
        episode_of = np.searchsorted(ends, np.arange(start, start + len(rows)), side="right")
        used = chosen[episode_of]
        for name in (name for name, read in names.items() if read == key):
            measuring[name].add(rows if used.all() else rows[used])

    fingerprint = store.fingerprint(observation_keys, action_key, add)
    return Summary(fingerprint, {name: part.result() for name, part in measuring.items()})
