"""diffusion-policy dataset render: camera images beside recorded states, in a new store."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.commands.dataset.convert import MOST_LINES
from diffusion_policy.commands.dataset.replay import (
    choose_compared,
    choose_replay_spec,
    explain,
    replay,
    require_noise,
    what_differs,
)
from diffusion_policy.commands.environment import with_images
from diffusion_policy.commands.options.dataset import Render
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import console, progress_bar
from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.convert import read, refuse_existing, write
from diffusion_policy.datasets.demonstration import PUSHED, Demonstration
from diffusion_policy.datasets.formats.format import Source
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.protocols import as_posable
from diffusion_policy.evaluation.engines import GivenUp, imap

Images = dict[str, np.ndarray]
"""By key, (steps + 1, size, size, 3) uint8: before each action and after the last one."""


class Rendered(NamedTuple):
    """What came of an episode."""

    images: Images
    """None where it is left out."""
    why: str | None = None
    """It is left out, in a sentence."""


class Drawing(NamedTuple):
    """How a store's episodes are drawn."""

    location: str
    spec: EnvSpec
    keys: tuple[str, ...]
    """Of the images."""
    read: tuple[str, ...]
    """Recorded observations by which the scene is posed, or which must come out again."""
    posed: bool
    """Whether the environment is posed as each observation says; else actions are taken again from the seed."""
    noise: float
    """On the executed actions, see `Demonstrator`."""
    tolerance: float


def run(options: Render) -> int:
    """Draw; returns the number of episodes. Raises ConfigError for what cannot be drawn, and StoreError."""
    refuse_existing(options.output)
    store = open_store(options.store)
    drawing = choose_drawing(options, store)
    left_out: list[str] = []
    total = len(store.episode_ends)
    try:
        with progress_bar("episodes") as bar:
            task = bar.add_task("drawing", total=total, note="")

            def draw() -> Generator[Rendered]:
                bar.reset(task, total=total)
                make = partial(EpisodeRenderer, drawing)
                with contextlib.closing(imap(make, range(total), options.workers)) as all_rendered:
                    for rendered in all_rendered:
                        bar.advance(task)
                        yield rendered

            count = write(imaged(read(options.store), drawing, draw, left_out), options.output, "zarr")
    except GivenUp as error:
        raise OSError(f"episode {error.item} was begun {error.times} times, and its process died each time") from error
    finally:
        for why in left_out[:MOST_LINES]:
            console.print(f"left out {why}")
        if len(left_out) > MOST_LINES:
            console.print(f"left out {len(left_out) - MOST_LINES} more")
    console.print(f"{count} of {total} episodes in {options.output}, with {', '.join(drawing.keys)}")
    return count


def choose_drawing(options: Render, store: EpisodeStore) -> Drawing:
    """How the episodes are drawn; raises ConfigError where they cannot be."""
    keys = options.key
    there = [key for key in keys if key in (*store.keys, *store.left_out)]
    if there:
        raise ConfigError(f"{options.store} holds {there[0]} already; choose another --key, or another store")
    spec = choose_replay_spec(options.store, store, options.env, options.env_kwargs, options.signals)
    spec = with_images(spec, options.size, keys)
    env = spec()
    with contextlib.suppress(Exception), contextlib.closing(env):  # one that fails at closing has done its work
        pass
    space: Any = env.observation_space
    lacking = [key for key in keys if key not in space.spaces]
    if lacking:
        raise ConfigError(f"{spec.env} gives no {lacking[0]}; it gives {', '.join(space.spaces)}")
    compared = choose_compared(options.store, store, env, spec.env)
    posable = as_posable(env)
    posed = posable is not None and set(posable.pose_keys) <= set(compared)
    read = tuple(posable.pose_keys) if posable is not None and posed else compared
    noise = 0.0 if posed else require_noise(store, options.store)
    return Drawing(options.store, spec, keys, read, posed, noise, options.tolerance)


def imaged(source: Source, drawing: Drawing, draw: Callable[[], Generator[Rendered]], left_out: list[str]) -> Source:
    """A source with the images that are drawn of its episodes, in their order, and what it is then recorded under."""
    keys = (*source.observation_keys, *drawing.keys)
    attributes = {name: value for name, value in source.attributes.items() if name != "collection"}
    attributes |= {"environment": drawing.spec.described, "observation_keys": sorted(keys)}

    def episodes() -> Iterator[Demonstration]:
        left_out.clear()
        kept = 0
        with contextlib.closing(draw()) as all_rendered:
            for episode, rendered in zip(source.episodes, all_rendered, strict=True):
                if rendered.why is None:
                    kept += 1
                    yield add_images(episode, rendered.images)
                else:
                    left_out.append(rendered.why)
        if not kept:
            why = explain(drawing.spec, 0)
            raise ConfigError(f"no episode of {drawing.location} goes as it was recorded: {left_out[0]}{why}")

    return source._replace(
        attributes=attributes,
        observation_keys=keys,
        episodes=episodes(),
        without=lambda key, why: imaged(source.without(key, why), drawing, draw, left_out),
    )


def add_images(episode: Demonstration, images: Images) -> Demonstration:
    """An episode with its images; with the last one where what was observed last is known."""
    data = episode.data | {key: rows[:-1] for key, rows in images.items()}
    final = episode.final and episode.final | {key: rows[-1] for key, rows in images.items()}
    return episode._replace(data=data, final=final)


class EpisodeRenderer:
    """Draws one episode a call, in an environment that it keeps."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing
        self._store, self._env = EpisodeStore.open(drawing.location), drawing.spec()
        marks = (PUSHED,) if PUSHED in self._store.keys else ()
        self._read = tuple(dict.fromkeys((*drawing.read, *marks, self._store.action_key)))

    def __call__(self, index: int) -> Rendered:
        """The images of an episode, by its number."""
        episode = next(iter(self._store.episodes([index], self._read)))
        final = {key: row for key, row in (episode.final or {}).items() if key in self._drawing.read}
        episode = episode._replace(final=final)
        return self._pose(episode) if self._drawing.posed else self._replay(episode, index)

    def _pose(self, episode: Demonstration) -> Rendered:
        """Where what was observed last is not known, the observation before it stands for it."""
        posable = as_posable(self._env)
        assert posable is not None
        rows = [
            {key: episode.data[key][step] for key in posable.pose_keys}
            for step in range(len(episode.data[posable.pose_keys[0]]))
        ]
        return self._stack(map(posable.pose, [*rows, rows[-1] | (episode.final or {})]))

    def _replay(self, episode: Demonstration, index: int) -> Rendered:
        pushed = episode.data.pop(PUSHED, None)
        if pushed is not None and pushed.any():
            return Rendered({}, f"episode {index}: a person pushed a body, which no action repeats")
        seen: list[Mapping[str, np.ndarray]] = []
        drawing, action_key = self._drawing, self._store.action_key

        def keep(observation: Mapping[str, np.ndarray]) -> None:
            seen.append({key: observation[key] for key in drawing.keys})

        replayed = replay(self._env, episode, action_key, drawing.noise, keep)
        wrong = next(what_differs(index, replayed, len(episode.data[action_key]), drawing.tolerance), None)
        return Rendered({}, wrong) if wrong else self._stack(seen)

    def _stack(self, observations: Iterable[Mapping[str, np.ndarray]]) -> Rendered:
        rows = [{key: observation[key] for key in self._drawing.keys} for observation in observations]
        return Rendered({key: np.stack([row[key] for row in rows]) for key in self._drawing.keys})
