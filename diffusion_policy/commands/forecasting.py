"""What a forecast is made of: policies that predict positions, episodes that are long enough, and who names the modes.

Knows stores, checkpoints and environments. Knows no metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion_policy import envs
from diffusion_policy.basics.images import is_image
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands.costs import led_by
from diffusion_policy.commands.interrupts import Interrupted, stop_on_signal
from diffusion_policy.commands.options.forecast import Forecast
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import progress_bar
from diffusion_policy.config import ConfigError, CostConfig, SampleConfig
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.windows import split_episodes
from diffusion_policy.envs import modules
from diffusion_policy.envs.protocols import Drawable, as_drawable, as_multimodal
from diffusion_policy.envs.scene import Scene
from diffusion_policy.evaluation.forecasts import constant_velocity
from diffusion_policy.policy import DiffusionPolicy, choose_device

CONSTANT_VELOCITY = "constant velocity"
TOGETHER = 512
"""Sequences that are sampled together."""
PROBABILITIES = "mode_probabilities"
"""Key of the true probabilities of the modes."""
MARGIN = 0.05
"""Around the data, where no environment says the plane."""


class Forecaster(NamedTuple):
    """A policy that forecasts."""

    row: str
    """What it is called."""
    path: Path
    loaded: Checkpoint
    sampling: SampleConfig

    @property
    def policy(self) -> DiffusionPolicy:
        return self.loaded.policy

    @property
    def steps(self) -> int:
        """Steps after now."""
        return self.policy.config.prediction_horizon - self.policy.config.observation_horizon


class Forecasters(NamedTuple):
    """Policies that forecast the same."""

    all: tuple[Forecaster, ...]
    action: str
    """Key of the positions."""


class Recorded(NamedTuple):
    """What is forecast of a store."""

    store: EpisodeStore
    episodes: np.ndarray
    """Indices."""
    now: int
    steps: int
    """That are forecast."""
    too_short: int
    """Episodes that are left out."""
    held_out: bool
    """Whether they are those that a training on this dataset has left out."""
    control_period: float | None
    """[s]"""


class Futures(NamedTuple):
    """What was forecast, and what came."""

    episodes: list[int]
    history: np.ndarray
    """(episodes, now + 1, agents, 2)"""
    truth: np.ndarray
    """(episodes, steps, agents, 2)"""
    samples: dict[str, np.ndarray]
    """By forecaster, (episodes, N, steps, agents, 2)."""
    probabilities: np.ndarray | None
    """True ones of the modes, (episodes, M); None where they are not recorded."""


class Judges(NamedTuple):
    """Who says what a trajectory means."""

    action: str
    modes: tuple[str, ...]
    label: Callable[[Mapping[str, np.ndarray]], Any] | None
    plane: Drawable | None

    def scene_of(self, futures: Futures) -> Scene:
        """The plane that is drawn: the environment's, else all that came, with a margin."""
        if self.plane is not None:
            return self.plane.scene
        points = np.concatenate([futures.history, futures.truth], axis=1).reshape(-1, 2)
        low, high = points.min(axis=0), points.max(axis=0)
        side = max(float((high - low).max()), 1e-6) * (1 + 2 * MARGIN)
        (left, bottom), (right, top) = (low + high - side) / 2, (low + high + side) / 2
        return Scene((float(left), float(right)), (float(bottom), float(top)), unit="")


# Policies


def find_forecasters(options: Forecast) -> Forecasters:
    """The checkpoint and those beside it. Raises ValueError for one whose action cannot be positions, that forecasts no
    step or another key than the first, and for a way to sample that the checkpoint does not know."""
    found: list[Forecaster] = []
    for path in (options.checkpoint, *options.beside):
        if any(path.resolve() == one.path.resolve() for one in found):
            raise ConfigError(f"the same checkpoint is given twice: {path}")
        loaded = checkpoint.load(path, choose_device(options.device))
        wanted = SampleConfig() if found else options.sampling
        row = _name(path, [one.row for one in found])
        found.append(Forecaster(row, path, loaded, loaded.policy.complete(wanted)))
        _require_positions(found[-1], found[0])
        if options.costs.leads and len(found) == 1:
            found.append(_lead(found[0], options.costs))
    return Forecasters(tuple(found), found[0].loaded.predicted)


def _lead(one: Forecaster, costs: CostConfig) -> Forecaster:
    """The same policy, led by costs of the places of all agents."""
    shapes = one.policy.shapes
    watched = {key: shape for key, shape in shapes.observations.items() if not is_image(shape)}
    led = led_by(one.loaded, costs, watched, shapes.row[0])
    by = " ".join([*costs.cost, *([costs.classifier_mode] if costs.classifier_mode else [])])
    return one._replace(row=f"{one.row}, led by {by}", loaded=led)


def _name(path: Path, taken: Sequence[str]) -> str:
    """The shortest end of a path that no other forecaster has."""
    parts = [part for part in path.parts if part != path.anchor] or [str(path)]
    names = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    return next((name for name in names if name not in (*taken, CONSTANT_VELOCITY)), str(path))


def _require_positions(one: Forecaster, first: Forecaster) -> None:
    """Raise ConfigError for a policy that cannot forecast what the first one does."""
    policy = one.policy
    (columns,) = policy.shapes.row
    if columns % 2:
        raise ConfigError(
            f"{one.path} predicts {one.loaded.predicted}, {columns} columns; a forecast is pairs of x and y, one for "
            "each agent: train --target position"
        )
    if one.steps < 1:
        raise ConfigError(f"{one.path} predicts no step that it does not observe; train with a longer horizon")
    mine, its = one.loaded.predicted, first.loaded.predicted
    if (mine, policy.shapes.row) != (its, first.policy.shapes.row):
        raise ConfigError(f"{one.path} forecasts {mine} ({columns},); {first.path} {its} {first.policy.shapes.row}")


# Episodes


def find_recorded(options: Forecast, forecasters: Forecasters) -> Recorded:
    """The episodes that are forecast. Raises ValueError for a dataset without what the policies need, for a training on
    all of it, for a `now` that is too early, and for episodes that are all too short."""
    store = open_store(options.dataset)
    for one in forecasters.all:
        needed = {**one.policy.shapes.observations, forecasters.action: one.policy.shapes.row}
        lacking = [key for key in needed if any(part not in store.keys for part in store.parts(key))]
        if lacking:
            raise ConfigError(
                f"{store.location} has no {lacking[0]!r}, which {one.path} needs; it has {', '.join(store.keys)}"
            )
        wrong = [key for key, shape in needed.items() if store.shape(key) != shape]
        if wrong:
            shapes = f"the shape {store.shape(wrong[0])}; {one.path} knows {needed[wrong[0]]}"
            raise ConfigError(f"{wrong[0]} of {store.location} has {shapes}")
    least = max(one.policy.config.observation_horizon for one in forecasters.all) - 1
    now = least if options.now is None else options.now
    if now < max(least, 1):
        raise ConfigError(f"now must be at least {max(least, 1)}, as a policy observes as many steps before; got {now}")
    steps = min(one.steps for one in forecasters.all)
    lengths = np.diff(store.episode_ends, prepend=0)
    chosen, held_out = _choose_episodes(store, forecasters)
    long = chosen[lengths[chosen] > now + steps]
    if not len(long):
        raise ConfigError(
            f"no episode of {store.location} is long enough: the longest has {lengths[chosen].max()} steps; now {now} "
            f"and {steps} steps to forecast need {now + steps + 1}"
        )
    rate = store.attributes.get("control_frequency")
    period = 1 / rate if isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0 else None
    return Recorded(store, long[: options.episodes], now, steps, len(chosen) - len(long), held_out, period)


def _choose_episodes(store: EpisodeStore, forecasters: Forecasters) -> tuple[np.ndarray, bool]:
    """All episodes, but those that a policy was trained on; and whether any was trained on this dataset."""
    left, trained = np.arange(len(store.episode_ends)), False
    for one in forecasters.all:
        keys, dataset, training = tuple(one.policy.shapes.observations), one.loaded.dataset, one.loaded.training
        if (
            dataset.episodes == len(store.episode_ends)
            and store.fingerprint(keys, one.loaded.predicted) == dataset.fingerprint
        ):
            trained = True
            _, held_out = split_episodes(dataset.episodes, training.validation_share, training.seed)
            left = np.intersect1d(left, held_out)
    if not len(left):
        raise ConfigError(
            f"no episode of {store.location} is unseen: the policies were trained on it; give another dataset, or "
            "train with a --validation-share, and all with the same --seed"
        )
    return left, trained


# Modes


def find_judges(options: Forecast, store: EpisodeStore, action: str) -> Judges:
    """Who labels trajectories: the function that the user names, else the environment of the store where it is ours and
    observes the positions. Raises ValueError for a function that is not there."""
    environment = store.attributes.get("environment")
    env: Any = None
    if environment is not None and environment["id"] in envs.ENV_IDS and not environment.get("wrappers"):
        env = envs.make(environment["id"], **environment["arguments"])
    plane = None if env is None else as_drawable(env)
    if options.mode_function:
        return Judges(action, options.mode_labels, modules.load(options.mode_function), plane)
    task = None if env is None or action not in env.observation_space.spaces else as_multimodal(env)
    if task is None or not task.modes:
        return Judges(action, (), None, plane)
    return Judges(action, tuple(task.modes), task.mode, plane)


def label_all(judges: Judges, history: np.ndarray, futures: np.ndarray) -> list[list[str | None]]:
    """The mode of each sample (episodes, N, steps, agents, 2) behind what was observed (episodes, now + 1, agents, 2).
    Raises ValueError where the function fails or gives another label than it should."""
    assert judges.label is not None
    found = []
    for before, samples in zip(history, futures, strict=True):
        labels = []
        for sample in samples:
            rows = np.concatenate([before, sample]).reshape(len(before) + len(sample), -1)
            label = modules.call(judges.label, {judges.action: rows})
            if label is not None and label not in judges.modes:
                raise ConfigError(f"the mode function gave {label!r:.60}; the modes are {', '.join(judges.modes)}")
            labels.append(label)
        found.append(labels)
    return found


# Samples


def sample_futures(
    options: Forecast, forecasters: Forecasters, recorded: Recorded
) -> tuple[Futures, Interrupted | FloatingPointError | ValueError | None]:
    """What all forecasters say of the episodes; and what ended it early, with what was done until then: a stop, a
    forecast that is not finite, or data that are not."""
    size = max(1, TOGETHER // options.samples)
    chunks = [recorded.episodes[i : i + size] for i in range(0, len(recorded.episodes), size)]
    done: list[Futures] = []
    ended = None
    with progress_bar("episodes") as bar, stop_on_signal() as stop:
        task = bar.add_task("forecasting", total=len(recorded.episodes), note="")
        for chunk in chunks:
            try:
                done.append(_sample_chunk(options, forecasters, recorded, chunk))
            except (FloatingPointError, ValueError) as error:
                ended = error
                break
            bar.advance(task, len(chunk))
            if stop.is_set():
                ended = Interrupted("stopped")
                break
    return _join(done), ended if len(done) < len(chunks) else None


def _sample_chunk(options: Forecast, forecasters: Forecasters, recorded: Recorded, chunk: np.ndarray) -> Futures:
    """Some episodes."""
    store, now, stop = recorded.store, recorded.now, recorded.now + recorded.steps + 1
    keys = {part for one in forecasters.all for key in one.policy.shapes.observations for part in store.parts(key)}
    keys |= {*store.parts(forecasters.action)} | ({PROBABILITIES} & {*store.keys})
    rows = [{key: part[:stop] for key, part in episode.data.items()} for episode in store.episodes(chunk, tuple(keys))]
    positions = np.stack([_read(store, one, forecasters.action) for one in rows]).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(positions).reshape(len(chunk), -1).all(axis=1))
    if len(bad):
        raise ConfigError(f"{forecasters.action} of {store.location} holds NaN or infinity in episode {chunk[bad[0]]}")
    positions = positions.reshape(len(chunk), stop, -1, 2)
    history, truth = positions[:, : now + 1], positions[:, now + 1 :]
    straight = constant_velocity(history, recorded.steps)
    samples = {one.row: _sample(options, one, recorded, chunk, rows) for one in forecasters.all}
    samples[CONSTANT_VELOCITY] = np.broadcast_to(straight[:, None], (len(chunk), options.samples, *straight.shape[1:]))
    known = np.stack([one[PROBABILITIES][now] for one in rows]) if PROBABILITIES in store.keys else None
    return Futures(chunk.tolist(), history, truth, samples, known)


def _sample(
    options: Forecast, one: Forecaster, recorded: Recorded, chunk: np.ndarray, rows: Sequence[Mapping[str, np.ndarray]]
) -> np.ndarray:
    """Futures of one forecaster, (episodes, N, steps, agents, 2)."""
    horizon, now = one.policy.config.observation_horizon, recorded.now
    observations = {
        key: torch.from_numpy(
            np.stack([_read(recorded.store, each, key)[now + 1 - horizon : now + 1] for each in rows])
        ).to(one.policy.device)
        for key in one.policy.shapes.observations
    }
    generators = [derive_rng("forecast", options.seed, int(episode)) for episode in chunk]
    drawn = one.policy.sample(observations, generators, options.samples, one.sampling).cpu().numpy()
    futures = drawn[:, :, horizon : horizon + recorded.steps].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(futures).reshape(len(chunk), -1).all(axis=1))
    if len(bad):
        raise FloatingPointError(f"{one.path} forecasts NaN or infinity in episode {chunk[bad[0]]}")
    return futures.reshape(*futures.shape[:3], -1, 2)


def _read(store: EpisodeStore, rows: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    """A key of an episode, which may lie in several arrays."""
    parts = [rows[part] for part in store.parts(key)]
    return parts[0] if len(parts) == 1 else np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _join(done: Sequence[Futures]) -> Futures:
    if not done:
        return Futures([], np.empty(0), np.empty(0), {}, None)
    known = [one.probabilities for one in done if one.probabilities is not None]
    return Futures(
        [episode for one in done for episode in one.episodes],
        np.concatenate([one.history for one in done]),
        np.concatenate([one.truth for one in done]),
        {row: np.concatenate([one.samples[row] for one in done]) for row in done[0].samples},
        np.concatenate(known) if known else None,
    )
