"""What the episodes of a dataset are told: their modes, or their instructions and the embeddings of these, numbered as
a policy numbers them; and instructions that are new to a policy.

Knows datasets and policies. Trains nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.config import ConfigError, PolicyConfig
from diffusion_policy.datasets.instructing import encode
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.modules import load
from diffusion_policy.evaluation.metrics import NONE


class Labels(NamedTuple):
    """What a policy learns to be told."""

    of_episodes: np.ndarray | None
    """Index of each episode's mode or instruction, (episodes,) int64, -1 for none; None where the policy is told
    nothing."""
    instructions: tuple[str, ...] = ()
    """Those that at least one episode has, where the policy is told these."""
    embeddings: np.ndarray | None = None
    """(instructions, E); None where the dataset has not one for each."""

    def tell(self, modes: Sequence[str]) -> list[Any]:
        """What of them a run's folder says; nothing where the policy is told nothing."""
        if self.of_episodes is None:
            return []
        numbers = None if self.embeddings is None else self.embeddings.tolist()
        known = [self.instructions, numbers] if self.instructions else [modes]
        return [*known, self.of_episodes.tolist()]


def read_labels(store: EpisodeStore, config: PolicyConfig) -> Labels:
    """What the episodes of a dataset are told, as a new policy numbers it. Raises ConfigError where episodes of one
    instruction have different embeddings, and StoreError where they are damaged."""
    if config.condition_on_mode:
        return Labels(store.mode_indices())
    if not config.condition_on_instruction:
        return Labels(None)
    stored, embeddings = store.instruction_indices(), store.instruction_embeddings()
    used = np.unique(stored[stored >= 0])
    texts = tuple(store.instructions[i] for i in used)
    numbers = np.where(stored < 0, -1, np.searchsorted(used, stored))
    if embeddings is None or not len(used):
        return Labels(numbers, texts)
    rows = embeddings[[int(np.argmax(stored == i)) for i in used]]
    wrong = np.flatnonzero((numbers >= 0) & (embeddings != rows[numbers]).any(axis=1))
    if len(wrong):
        raise ConfigError(
            f"{store.location}: episode {wrong[0]} has another embedding of its instruction than an earlier episode; "
            "compute them anew with: dataset instruct --instruction-encoder"
        )
    return Labels(numbers, texts, rows)


def count_instructions(store: EpisodeStore) -> dict[str, dict[str, int]]:
    """Episodes of each mode, of each instruction; `none` for those without a mode."""
    pairs = Counter(zip(store.episode_instructions(), store.episode_modes(), strict=True))
    found: dict[str, dict[str, int]] = {}
    for (text, mode), count in sorted(pairs.items(), key=str):
        if text is not None:
            found.setdefault(text, {})[mode or NONE] = count
    return found


def learn_instructions(loaded: Checkpoint, texts: Sequence[str], encoder: str | None) -> Checkpoint:
    """A checkpoint whose policy knows these instructions, of which `encoder` (module:function) makes the embeddings
    where they are new. Raises ValueError for an encoder without texts, and for one that cannot be used, or makes other
    numbers than the policy knows."""
    if encoder is None:
        return loaded
    if not texts:
        raise ConfigError("--instruction-encoder encodes an --instruction; got none")
    policy = loaded.policy
    new = [text for text in dict.fromkeys(texts) if text not in policy.instructions]
    for text, row in zip(new, encode(load(encoder), new), strict=True) if new else ():
        policy = policy.with_instruction(text, row)
    return replace(loaded, policy=policy)
