"""Windows of To observations and T actions, cut from episodes and gathered a batch at a time.

Knows arrays in memory. Knows no file and no policy.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """B windows."""

    observations: dict[str, Tensor]
    """Each key: (B, To, ...), the last one is *now*."""
    actions: Tensor
    """(B, T, A), from the first observed step on."""
    modes: Tensor | None = None
    """Index of the episode's mode, (B,) int64, -1 where it has none; None when the windows know no modes."""


class Windows:
    """One window for every step of the chosen episodes, with that step as *now*.

    Where a window reaches beyond its episode, the first or last step is repeated (edge padding).
    """

    def __init__(
        self,
        data: Mapping[str, np.ndarray],
        episode_ends: np.ndarray,
        episodes: Sequence[int] | np.ndarray,
        observation_horizon: int,
        prediction_horizon: int,
        device: torch.device | str = "cpu",
        modes: np.ndarray | None = None,
    ) -> None:
        """`data`: `action` and each observation key, (steps, ...); `episodes`: indices of the episodes to use; `modes`:
        index of each episode's mode, (all episodes,), −1 where it has none."""
        episodes = np.asarray(episodes)
        starts = np.concatenate([[0], episode_ends[:-1]])
        lengths = (episode_ends - starts)[episodes]
        spans = [np.arange(start, start + length) for start, length in zip(starts[episodes], lengths, strict=True)]

        def to_device(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, device=device)

        self._now = to_device(np.concatenate(spans))  # (windows,) row of *now*
        self._first = to_device(np.repeat(starts[episodes], lengths))  # (windows,) first row of its episode
        self._last = to_device(np.repeat(episode_ends[episodes] - 1, lengths))  # (windows,) last row of its episode
        self._observations = {
            key: to_device(array.astype(np.float32)) for key, array in data.items() if key != "action"
        }
        self._actions = to_device(data["action"].astype(np.float32))
        self._modes = None if modes is None else to_device(np.repeat(modes[episodes].astype(np.int64), lengths))
        self._observed = torch.arange(1 - observation_horizon, 1, device=device)  # (To,) steps from now
        self._predicted = torch.arange(prediction_horizon, device=device) + 1 - observation_horizon  # (T,)

    def __len__(self) -> int:
        return len(self._now)

    def rows(self) -> dict[str, np.ndarray]:
        """All rows of the chosen episodes: `action` and each observation key, (windows, ...)."""
        arrays = {**self._observations, "action": self._actions}
        return {key: array[self._now].cpu().numpy() for key, array in arrays.items()}

    def gather(self, indices: Tensor) -> Batch:
        """The windows with these indices, (B,) int64."""
        now, first, last = (rows[indices, None] for rows in (self._now, self._first, self._last))  # (B, 1) each
        observed = torch.clamp(now + self._observed, first, last)  # (B, To)
        predicted = torch.clamp(now + self._predicted, first, last)  # (B, T)
        observations = {key: array[observed] for key, array in self._observations.items()}
        modes = None if self._modes is None else self._modes[indices]
        return Batch(observations, self._actions[predicted], modes)

    def shuffled_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches for ever: each pass over the windows in a new order; an incomplete last batch is left out, unless
        there are fewer windows than `batch_size`."""
        batch_size = min(batch_size, len(self))
        while True:
            order = torch.randperm(len(self), generator=generator).to(self._now.device)
            for indices in order.split(batch_size):
                if len(indices) == batch_size:
                    yield self.gather(indices)


def split_episodes(count: int, validation_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and of validation episodes, each sorted; at least one of each unless the share is 0.

    Raises ValueError when there are too few episodes to split.
    """
    held_out = 0 if validation_share == 0 else max(1, round(count * validation_share))
    if held_out >= count:
        raise ValueError(
            f"cannot hold out {validation_share:.0%} of {count} episodes and still train; "
            "take more episodes or a validation share of 0"
        )
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
