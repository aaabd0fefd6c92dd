"""Windows of To observations and T actions, cut from episodes in memory and gathered a batch at a time.

The arrays lie on the device where they fit; then only the numbers of a batch's rows are sent to it. Else they lie in
host memory, and each batch is sent.

Knows arrays. Knows neither stores nor policies: windows of a store are made in `streaming`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_policy.basics.images import as_uint8, is_image
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.datasets.demonstration import nonfinite_rows
from diffusion_policy.datasets.statistics import as_rows


class Shard(NamedTuple):
    """One of the equal parts of a batch: that of a process, or one of several computed one after the other."""

    rank: int = 0
    """Which of them, from 0."""
    world_size: int = 1
    """How many there are."""

    def of(self, rows: int) -> tuple[int, int]:
        """Of so many rows, its first one and the one behind its last."""
        return rows * self.rank // self.world_size, rows * (self.rank + 1) // self.world_size


WHOLE = Shard()

DEVICE_SHARE = 0.5
"""Most of a GPU's free memory that windows take; the rest is for the training."""


class Batch(NamedTuple):
    """B windows."""

    observations: dict[str, Tensor]
    """Each key: (B, To, ...), the last one is *now*."""
    actions: Tensor
    """(B, T, A), from the first observed step on."""
    labels: Tensor | None = None
    """Index of what the episode is told, its mode or its instruction, (B,) int64, -1 where it has none; None when the
    windows know no labels."""
    rows: np.ndarray | None = None
    """Row of the store that is *now* in each window, (B,) int64; of the data, where they come from no store."""
    demonstrated: Tensor | None = None
    """Which actions were demonstrated, and not repeated beyond the ends of the episode, (B, T) bool; None where nobody
    asks."""

    def part(self, first: int, last: int) -> Batch:
        """Some of the windows."""
        observations = {key: values[first:last] for key, values in self.observations.items()}
        labels = None if self.labels is None else self.labels[first:last]
        rows = None if self.rows is None else self.rows[first:last]
        demonstrated = None if self.demonstrated is None else self.demonstrated[first:last]
        return Batch(observations, self.actions[first:last], labels, rows, demonstrated)


class Hindsight(NamedTuple):
    """Goals that come from what an episode came to (Andrychowicz et al. 2017, arXiv 1707.01495, section 4.5, `future`):
    some windows get a later observation of their own episode as goal, each of those that are left as likely."""

    sources: Mapping[str, tuple[str, tuple[int, ...]]]
    """Of each goal key, the key that it comes from, and its columns; () for all."""
    share: float
    """Of the windows."""


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
        *,
        device: torch.device | str = "cpu",
        labels: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        hindsight: Hindsight | None = None,
        mark_padding: bool = False,
    ) -> None:
        """`data`: `action` and each observation key, (steps, ...); `episodes`: indices of the episodes to use;
        `labels`: index of each episode's mode or instruction, (all episodes,), −1 where it has none; `rows`: where in
        the store each row of the data comes from, (steps,). Raises ValueError for data that cannot be cut so, and for
        NaN and infinity."""
        self._device = torch.device(device)
        held = {key: _hold(key, array, self._device) for key, array in data.items()}
        episode_ends, episodes = np.asarray(episode_ends), np.asarray(episodes)
        _require_episodes(held, episode_ends, episodes)
        starts = np.concatenate([[0], episode_ends[:-1]])
        lengths = (episode_ends - starts)[episodes]
        before = np.cumsum(lengths) - lengths  # windows of the episodes before
        self._now = np.arange(lengths.sum()) + np.repeat(starts[episodes] - before, lengths)  # (windows,) row of *now*
        self._first = np.repeat(starts[episodes], lengths)  # (windows,) first row of its episode
        self._last = np.repeat(episode_ends[episodes] - 1, lengths)  # (windows,) last row of its episode
        self._labels = None if labels is None else np.repeat(labels[episodes].astype(np.int64), lengths)
        self._rows = self._now if rows is None else rows[self._now]
        self._hindsight, self._mark_padding = hindsight, mark_padding
        self._horizons = observation_horizon, prediction_horizon
        self._steps = np.arange(max(self._horizons)) + 1 - observation_horizon  # from now
        _require_sources(held, hindsight)
        place = self._device if _fits(held.values(), self._device) else "cpu"
        self._data = {key: torch.as_tensor(array, device=place) for key, array in held.items()}

    def __len__(self) -> int:
        return len(self._now)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What a batch holds of each window, (To, ...) of each observation key and (T, A) of `action`."""
        To, T = self._horizons
        return {key: (T if key == "action" else To, *array.shape[1:]) for key, array in self._data.items()}

    def rows(self) -> dict[str, np.ndarray]:
        """All rows of the chosen episodes: `action` and each observation key, (windows, ...)."""
        return {key: array.cpu().numpy()[self._now] for key, array in self._data.items()}

    @property
    def held_rows(self) -> int:
        """Rows of each key that are held, those of windows that are not chosen too."""
        return len(self._data["action"])

    def with_rows(self, key: str, change: Callable[[Tensor], Tensor]) -> Windows:
        """The same windows with other rows of a key, made of its rows (rows, ...) at once."""
        changed = copy.copy(self)
        changed._data = {**self._data, key: change(self._data[key])}
        return changed

    def subset(self, indices: np.ndarray) -> Windows:
        """Some of the windows, on the same data."""
        chosen = copy.copy(self)
        chosen._now, chosen._first, chosen._last = (rows[indices] for rows in (self._now, self._first, self._last))
        chosen._labels = None if self._labels is None else self._labels[indices]
        chosen._rows = self._rows[indices]
        return chosen

    def whole(self) -> Windows:
        """The windows that lie within their episodes; raises ValueError where none does."""
        first, last = self._now + self._steps[0], self._now + self._steps[self._horizons[1] - 1]
        indices = np.flatnonzero((first >= self._first) & (last <= self._last))
        if not len(indices):
            raise ValueError(f"no window of {self._horizons[1]} steps lies within its episode")
        return self.subset(indices)

    def gather(self, indices: Sequence[int] | np.ndarray | Tensor, draws: np.ndarray | None = None) -> Batch:
        """The windows with these indices, (B,) int64 on the CPU. `draws`: from 0 to below 1, which of them take a goal
        in hindsight and of which step, (B, 2); by default none does."""
        indices = np.asarray(indices)
        now, first, last = (rows[indices, None] for rows in (self._now, self._first, self._last))  # (B, 1) each
        rows = np.minimum(np.maximum(now + self._steps, first), last)  # (B, the longer of To and T)
        taken = self._take(rows)
        if draws is not None and self._hindsight is not None:
            self._take_goals(taken, now[:, 0], last[:, 0], draws)
        labels = None if self._labels is None else send(torch.from_numpy(self._labels[indices]), self._device)
        there = (now + self._steps == rows)[:, : self._horizons[1]] if self._mark_padding else None
        demonstrated = None if there is None else send(torch.from_numpy(there), self._device)
        return Batch(taken, taken.pop("action"), labels, self._rows[indices], demonstrated)

    def _take(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Of rows (B, the longer of To and T): the first To of each observation key, the first T of `action`, on the
        device."""
        To, T = self._horizons
        horizons = {key: T if key == "action" else To for key in self._data}
        if self._data["action"].device.type == "cpu":  # NumPy needs a third of torch's time for so few rows
            taken = {key: array.numpy().take(rows[:, : horizons[key]], axis=0) for key, array in self._data.items()}
            return {key: send(torch.from_numpy(array), self._device) for key, array in taken.items()}
        there = send(torch.from_numpy(rows), self._device)
        return {key: array[there[:, : horizons[key]]] for key, array in self._data.items()}

    def _take_goals(self, taken: dict[str, Tensor], now: np.ndarray, last: np.ndarray, draws: np.ndarray) -> None:
        """Put later observations in the place of some goals (B, To, ...)."""
        assert self._hindsight is not None
        chosen = (draws[:, 0] < self._hindsight.share) & (now < last)
        later = now + 1 + (draws[:, 1] * (last - now)).astype(np.int64)  # each of now + 1 ... last as likely
        for goal, (source, columns) in self._hindsight.sources.items():
            array = self._data[source]
            found = array[torch.from_numpy(later[chosen]).to(array.device)].to(self._device)
            found = found[:, list(columns)] if columns else found
            taken[goal][torch.from_numpy(chosen).to(self._device)] = found[:, None].to(taken[goal])

    def batches(self, batch_size: int, seed: int, first_step: int = 0, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Batches for ever, from the one of step `first_step` on: each pass over the windows in a new order that the
        seed fixes; an incomplete last batch is left out, unless there are fewer windows than `batch_size`. Of each
        batch, the rows of this `shard`."""
        draws, drawn_for = None, -1
        for number, indices in passes(len(self), batch_size, seed, first_step, shard):
            if self._hindsight is not None and number != drawn_for:
                draws, drawn_for = derive_rng("hindsight", seed, number).random((len(self), 2)), number
            yield self.gather(indices, None if draws is None else draws[indices])


def orders(count: int, batch_size: int, seed: int, first_step: int = 0, shard: Shard = WHOLE) -> Iterator[np.ndarray]:
    """Indices of batches of `count` rows, for ever; see `Windows.batches`."""
    return (indices for _, indices in passes(count, batch_size, seed, first_step, shard))


def passes(
    count: int, batch_size: int, seed: int, first_step: int = 0, shard: Shard = WHOLE
) -> Iterator[tuple[int, np.ndarray]]:
    """As `orders`, each with the number of the pass over all rows."""
    batch_size = min(batch_size, count)
    first, stop = shard.of(batch_size)
    number, done = divmod(first_step, count // batch_size)
    while True:
        order = derive_rng("order of windows", seed, number).permutation(count)
        for start in range(done * batch_size, count - batch_size + 1, batch_size):
            yield number, order[start + first : start + stop]
        number, done = number + 1, 0


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. On a GPU it comes from pinned memory, so that nothing waits for what the GPU still does."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def held_type(dtype: np.dtype, shape: tuple[int, ...]) -> np.dtype:
    """The type in which rows of this type and shape are held: uint8 of images, else float32 where that holds all
    numbers exactly, else float64."""
    if is_image(shape):
        return np.dtype(np.uint8)
    return np.dtype(np.float32 if np.can_cast(dtype, np.float32) else np.float64)


def _hold(key: str, array: np.ndarray, device: torch.device) -> np.ndarray:
    """An array as it is held, float32 on MPS, which has no float64; raises ValueError for NaN and infinity, and for
    what is no number."""
    rows = as_rows(np.asarray(array))
    if is_image(rows.shape[1:]):
        return np.ascontiguousarray(as_uint8(rows, key))
    bad = nonfinite_rows(rows)
    if len(bad):
        raise ValueError(f"{key} has NaN or infinity in {len(bad)} rows, first in row {bad[0]}")
    return np.ascontiguousarray(rows, np.float32 if device.type == "mps" else held_type(rows.dtype, rows.shape[1:]))


def _require_episodes(data: Mapping[str, np.ndarray], episode_ends: np.ndarray, episodes: np.ndarray) -> None:
    """Raise ValueError unless these are the actions and observations of all steps, and these some of the episodes."""
    rows = {key: len(array) for key, array in data.items()}
    if "action" not in rows or len(rows) == 1:
        raise ValueError(f"windows need `action` and at least one observation; got {', '.join(rows) or 'nothing'}")
    rising = episode_ends.ndim == 1 and len(episode_ends) and (np.diff(episode_ends, prepend=0) > 0).all()
    if not rising or min(rows.values()) < episode_ends[-1]:
        raise ValueError(
            f"episode ends must rise from above 0 to at most the number of rows {rows}; got {episode_ends}"
        )
    if not len(episodes) or not np.isin(episodes, np.arange(len(episode_ends))).all():
        raise ValueError(f"windows need some of the {len(episode_ends)} episodes, from 0 on; got {episodes}")


def _require_sources(data: Mapping[str, np.ndarray], hindsight: Hindsight | None) -> None:
    """Raise ValueError for goals that cannot come from where hindsight takes them."""
    for goal, (source, columns) in () if hindsight is None else hindsight.sources.items():
        for key in (goal, source):
            if key not in data or key == "action":
                known = ", ".join(name for name in data if name != "action")
                raise ValueError(f"hindsight takes goals from observations, {known}; got {key!r}")
        shape = data[source].shape[1:]
        if columns and (len(shape) != 1 or max(columns) >= shape[0]):
            raise ValueError(f"hindsight: {source} has the shape {shape} a step; got the columns {list(columns)}")
        found = (len(columns),) if columns else shape
        if found != data[goal].shape[1:]:
            raise ValueError(f"hindsight: the goal {goal} has the shape {data[goal].shape[1:]}, its source {found}")


def _fits(arrays: Iterable[np.ndarray], device: torch.device) -> bool:
    """Whether arrays can lie on a device and leave room for a training."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(array.nbytes for array in arrays) <= DEVICE_SHARE * free


def split_episodes(
    count: int, validation_share: float, seed: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training (at most so many) and of validation episodes, each sorted; at least one of each unless the
    share is 0.

    Raises ValueError when there are too few episodes to split.
    """
    held_out = 0 if validation_share == 0 else max(1, round(count * validation_share))
    if held_out >= count:
        raise ValueError(
            f"cannot hold out {validation_share:.0%} of {count} episodes and still train; "
            "take more episodes or a validation share of 0"
        )
    order = np.random.default_rng(seed).permutation(count)  # by no name, so that runs of earlier versions go on
    return np.sort(order[held_out:][:most]), np.sort(order[:held_out])
