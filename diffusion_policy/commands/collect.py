"""diffusion-policy collect: demonstrations from scripted experts."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from diffusion_policy.commands.common import (
    DEFAULT_ENV,
    Interrupted,
    available_cores,
    console,
    describe_episodes,
    make_task,
    parse_env_kwargs,
    progress_bar,
    refuse_modules,
    say_cap,
    stop_on_signal,
)
from diffusion_policy.config import ConfigError, Signals, from_dict, require_at_least, require_seed
from diffusion_policy.engines import Engine, require_engine

if TYPE_CHECKING:
    from diffusion_policy.datasets.store import Demonstration, EpisodeStore


class Settings(NamedTuple):
    """What decides the course of a collection; a store keeps it, so that an interrupted collection can go on."""

    env: str = DEFAULT_ENV
    env_kwargs: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    episodes: int = 240
    seed: int = 0
    noise: float = 0.4
    expert: str | None = None
    signals: Signals = Signals()


@dataclass(frozen=True)
class Collect:
    """Collect demonstrations with the environment's scripted experts, every mode in turn, into a zarr store.

    Only successful episodes are stored. Whatever ends it, Ctrl-C or a crash, the episodes committed so far are kept;
    --resume STORE goes on with the next seed, and ends with the same store as if it had never stopped.
    """

    output: Path | None = None
    """Store to create, such as demonstrations.zarr."""
    resume: Path | None = None
    """Store of an interrupted collection to go on with, instead of --output."""
    env: str | None = None
    """Gymnasium id of the environment; by default diffusion_policy/Avoid-v0."""
    env_kwargs: str | None = None
    """Arguments of the environment, as JSON: '{"rows": 3}'."""
    expert: str | None = None
    """module:Class of the expert, called with a mode's label (None where the environment lists no modes), if not ours
    for this environment. The module may lie in the working directory."""
    signals: Annotated[Signals, tyro.conf.arg(name="")] = field(default_factory=Signals)
    episodes: int | None = None
    """Successful episodes to store; by default 240, or what the interrupted collection was asked for."""
    seed: int | None = None
    """Seed of the first episode, by default 0; the next episode has the next seed."""
    noise: float | None = None
    """Standard deviation of the noise on each executed action, as a share of its length; by default 0.4. The clean
    action is recorded, so the policy learns to come back from where the noise leads."""
    workers: int = dataclasses.field(default_factory=available_cores)
    """Worker processes; the result is the same for any number."""
    engine: Engine = "local"
    """Where they run: on this machine, or on the Ray cluster of the environment variable RAY_ADDRESS (without it, one
    is started here). The result is the same."""

    def __post_init__(self) -> None:
        if (self.output is None) == (self.resume is None):
            raise ConfigError("collect needs either --output, a store to create, or --resume, one to go on with")
        require_at_least(self, 1, ("workers",))
        require_engine(self.engine)
        if self.episodes is not None:
            require_at_least(self, 1, ("episodes",))
        if self.noise is not None:
            require_at_least(self, 0, ("noise",))
        if self.seed is not None:
            require_seed(self)
        if self.env_kwargs is not None:
            parse_env_kwargs(self.env_kwargs)
        if self.signals.mode_function and not self.signals.mode_labels:
            raise ConfigError("a data set lists all its modes: give those of --mode-function with --mode-labels")

    def run(self) -> None:
        """Collect; raises ValueError for an environment that is unknown or has no expert, an output that exists, and a
        store that cannot be gone on with."""
        from diffusion_policy.datasets.collect import Demonstrator, collect
        from diffusion_policy.datasets.store import EpisodeStore
        from diffusion_policy.engines import ordered_map

        store = EpisodeStore.append_to(self.resume) if self.resume else None
        settings = self._settings(store)
        make_env = make_task(settings.env, settings.env_kwargs, settings.signals)
        env = make_env()
        say_cap(settings.env, env)
        make_demonstrator = partial(Demonstrator, make_env, find_expert(settings), settings.noise)

        with stop_on_signal() as stop:
            if store is None:
                assert self.output is not None
                attributes = describe_episodes(env, settings.env, settings.env_kwargs, settings.signals)
                attributes |= {
                    "noise": settings.noise,
                    "collection": {"episodes": settings.episodes, "seed": settings.seed}
                    | ({"expert": settings.expert} if settings.expert else {}),
                }
                store = EpisodeStore.create(self.output, attributes, env.get_wrapper_attr("modes"))
            with store, progress_bar("episodes") as bar:
                kept = len(store.episode_ends)
                seeds = store.read_meta("seed")
                first_seed = settings.seed if seeds is None else int(seeds[-1]) + 1
                task = bar.add_task("collecting", total=settings.episodes, completed=kept, note="")

                def show(demonstration: Demonstration) -> None:
                    bar.advance(task, bool(demonstration.success))

                spread = partial(ordered_map, workers=self.workers, engine=self.engine)
                try:
                    if kept < settings.episodes:
                        collect(store, make_demonstrator, settings.episodes, first_seed, spread, show, stop.is_set)
                except ValueError:
                    if self.output and len(store.episode_ends) == 0:
                        shutil.rmtree(self.output)  # so that the same command can be given again, with less noise
                    raise
                except OSError as error:
                    held = f"{len(store.episode_ends)} of {settings.episodes} episodes are safe in {store.location}"
                    raise OSError(f"{error.strerror or error}; {held}, go on with --resume {store.location}") from error
        env.close()
        self._conclude(store, settings.episodes)

    def _settings(self, store: EpisodeStore | None) -> Settings:
        """What was asked for, completed by what the store says; raises ConfigError where the two differ."""
        asked = {name: getattr(self, name) for name in Settings._fields if getattr(self, name) is not None}
        if self.env_kwargs is not None:
            asked["env_kwargs"] = parse_env_kwargs(self.env_kwargs)
        if not self.signals.given:
            del asked["signals"]
        if store is None:
            return Settings(**asked)
        attributes = store.attributes
        if not {"collection", "noise", "environment"} <= attributes.keys():
            raise ConfigError(f"{store.location} was not made by collect, so it cannot be gone on with")
        environment = attributes["environment"]
        stored = {
            "env": environment["id"],
            "env_kwargs": environment["arguments"],
            "noise": attributes["noise"],
            "signals": from_dict(Signals, environment.get("signals", {})),
            "expert": None,
            **attributes["collection"],
        }
        signals = stored["signals"]
        from_file = [stored[name] for name in ("env", "expert") if name not in asked]
        from_file += [] if "signals" in asked else [signals.success, signals.mode_function]
        refuse_modules(store.location, from_file, describe(stored))
        different = [name for name in asked if name != "episodes" and asked[name] != stored[name]]
        if different:
            name = different[0]
            raise ConfigError(
                f"{store.location} was begun with --{name.replace('_', '-')} {stored[name]}; got {asked[name]}"
            )
        for array, rows in store.dropped.items():
            console.print(f"{store.location}: dropped {rows} uncommitted rows of {array}")
        return Settings(**{**stored, "episodes": asked.get("episodes", stored["episodes"])})

    def _conclude(self, store: EpisodeStore, wanted: int) -> None:
        """Say what there is now; raises Interrupted when it is less than was wanted."""
        ends = store.episode_ends
        if len(ends) == 0:
            shutil.rmtree(store.location)  # nothing is lost, and the same command can be given again
            raise Interrupted("stopped before the first episode had finished")
        if len(ends) < wanted:
            raise Interrupted(
                f"stopped: {len(ends)} of {wanted} episodes are in {store.location}; go on with: "
                f"diffusion-policy collect --resume {store.location}"
            )
        console.print(f"{len(ends)} episodes, {ends[-1]} steps in {store.location}")


def find_expert(settings: Settings) -> Callable[[str | None], Any]:
    """The expert that was asked for, or ours for this environment; raises ConfigError where there is none."""
    from diffusion_policy.envs.adapters import load
    from diffusion_policy.envs.experts import EXPERTS

    if settings.expert is not None:
        return load(settings.expert)
    if settings.env not in EXPERTS:
        raise ConfigError(
            f"no expert for {settings.env!r}; experts exist for {', '.join(EXPERTS)}; name yours with --expert "
            "module:Class"
        )
    return EXPERTS[settings.env]


def describe(settings: Mapping[str, Any]) -> list[str]:
    """Flags that mean these settings."""
    flags = [f"--env {settings['env']}"]
    flags += [f"--expert {settings['expert']}"] if settings["expert"] else []
    flags += [f"--{name.replace('_', '-')} {value!r}" for name, value in settings["signals"].given.items()]
    return flags
