"""diffusion-policy collect: demonstrations from scripted experts."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from diffusion_policy.commands.environment import (
    DEFAULT_ENV,
    describe_episodes,
    make_env_spec,
    say_cap,
    signal_flags,
)
from diffusion_policy.commands.interrupts import ONE_PRESS, Interrupted, hearing
from diffusion_policy.commands.options.acting import parse_env_kwargs
from diffusion_policy.commands.terminal import console, progress_bar
from diffusion_policy.commands.trust import refuse_modules
from diffusion_policy.config import (
    ConfigError,
    SuccessAndModes,
    from_dict,
    require_at_least,
    require_numbers,
    require_seed,
)
from diffusion_policy.evaluation.engines import Engine, GivenUp, available_cores, imap, require_engine

if TYPE_CHECKING:
    import gymnasium

    from diffusion_policy.datasets.store import Demonstration, EpisodeStore
    from diffusion_policy.envs.adapters import EnvSpec


class Settings(NamedTuple):
    """What decides the course of a collection; a store keeps it, so that an interrupted collection can go on."""

    env: str = DEFAULT_ENV
    env_kwargs: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    episodes: int = 240
    seed: int = 0
    noise: float = 0.4
    expert: str | None = None
    signals: SuccessAndModes = SuccessAndModes()


@dataclass(frozen=True)
class Collect:
    """Collect demonstrations with the environment's scripted experts, every mode in turn, into a zarr store.

    Only successful episodes are stored. Ctrl-C and SIGTERM end it at once, also where a simulator hangs. Whatever ends
    it, these or a crash, the episodes that have finished are kept; --resume STORE goes on with the next seed, and ends
    with the same store as if it had never stopped.
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
    signals: Annotated[SuccessAndModes, tyro.conf.arg(name="")] = field(default_factory=SuccessAndModes)
    episodes: int | None = None
    """Successful episodes to store; by default 240, or what the interrupted collection was asked for."""
    seed: int | None = None
    """Seed of the first episode, by default 0; the next episode has the next seed."""
    noise: float | None = None
    """Standard deviation of the noise on each executed action, as a share of its length; by default 0.4. The clean
    action is recorded, so the policy learns to come back from where the noise leads."""
    workers: int = dataclasses.field(default_factory=available_cores)
    """Worker processes; the result is the same for any number. An episode whose process dies is begun again in a fresh
    one; with 1 worker it runs in the command's own process, which dies with it."""
    engine: Engine = "local"
    """Where they run: on this machine, or on the Ray cluster of the environment variable RAY_ADDRESS (without it, one
    is started here). The result is the same."""
    sync: bool = True
    """Put each commit on the disk before going on, so that a loss of power takes no committed episode. Without it the
    system writes when it sees fit, some seconds later, and short episodes are collected faster."""

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
        require_numbers(self)
        if self.env_kwargs is not None:
            parse_env_kwargs(self.env_kwargs)
        if self.signals.mode_function and not self.signals.mode_labels:
            raise ConfigError("a dataset lists all its modes: give those of --mode-function with --mode-labels")

    def run(self) -> None:
        """Collect; raises ValueError for an environment that is unknown or has no expert, an output that exists, and a
        store that cannot be gone on with."""
        from diffusion_policy.datasets.collect import uninterrupted
        from diffusion_policy.datasets.store import EpisodeStore

        store, wanted = None, None
        with interrupt_on_signal() as stop, contextlib.suppress(KeyboardInterrupt):  # what came of it is said below
            store = EpisodeStore.append_to(self.resume, self.sync) if self.resume else None
            settings = self._settings(store)
            wanted = settings.episodes
            make_env = make_env_spec(settings.env, settings.env_kwargs, settings.signals)
            with closing_quietly(make_env()) as env:
                make_expert = find_expert(settings)
                say_cap(settings.env, env)
                with uninterrupted():
                    store = store or self._create(settings, env)
            with store:
                self._collect(store, settings, make_env, make_expert, stop.is_set)
        if store is None:
            raise Interrupted("stopped before the first episode had begun")
        self._conclude(store, wanted)

    def _create(self, settings: Settings, env: gymnasium.Env) -> EpisodeStore:
        """A new store for the episodes of an environment."""
        from diffusion_policy.datasets.store import EpisodeStore

        assert self.output is not None
        attributes = describe_episodes(env)
        attributes |= {
            "noise": settings.noise,
            "collection": {"episodes": settings.episodes, "seed": settings.seed}
            | ({"expert": settings.expert} if settings.expert else {}),
        }
        return EpisodeStore.create(self.output, attributes, env.get_wrapper_attr("modes"), self.sync)

    def _collect(
        self,
        store: EpisodeStore,
        settings: Settings,
        make_env: EnvSpec,
        make_expert: Callable[[str | None], Any],
        should_stop: Callable[[], bool],
    ) -> None:
        from diffusion_policy.datasets.collect import Demonstrator, collect

        seeds = store.read_meta("seed")
        first_seed = settings.seed if seeds is None else int(seeds[-1]) + 1
        spread = partial(imap, workers=self.workers, engine=self.engine)
        make_demonstrator = partial(Demonstrator, make_env, make_expert, settings.noise)
        with progress_bar("episodes") as bar:
            task = bar.add_task("collecting", total=settings.episodes, completed=len(store.episode_ends), note="")

            def show(demonstration: Demonstration) -> None:
                bar.advance(task, bool(demonstration.success))

            try:
                collect(store, make_demonstrator, settings.episodes, first_seed, spread, show, should_stop)
            except ValueError as error:
                if self.output and len(store.episode_ends) == 0:
                    shutil.rmtree(self.output)  # so that the same command can be given again, with less noise
                    raise
                raise ValueError(f"{error}; {self._held(store, settings)}") from error
            except GivenUp as error:
                reason = (
                    f"the episode of seed {error.item} was begun {error.times} times, and its process died each time"
                )
                raise OSError(f"{reason}; {self._held(store, settings)}") from error
            except OSError as error:
                raise OSError(f"{error.strerror or error}; {self._held(store, settings)}") from error

    def _held(self, store: EpisodeStore, settings: Settings) -> str:
        """What was kept."""
        held = f"{len(store.episode_ends)} of {settings.episodes} episodes are safe in {store.location}"
        return f"{held}, go on with --resume {store.location}"

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
            "signals": from_dict(SuccessAndModes, environment.get("signals", {})),
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
        for sentence in store.mended:
            console.print(f"{store.location}: {sentence}")
        for array, rows in store.dropped.items():
            console.print(f"{store.location}: dropped {rows} uncommitted rows of {array}")
        return Settings(**{**stored, "episodes": asked.get("episodes", stored["episodes"])})

    def _conclude(self, store: EpisodeStore, wanted: int | None) -> None:
        """Say what there is now; raises Interrupted when it is less than was wanted."""
        ends = store.episode_ends
        if len(ends) == 0:
            shutil.rmtree(store.location)  # nothing is lost, and the same command can be given again
            raise Interrupted("stopped before the first episode had finished")
        if wanted is None or len(ends) < wanted:
            raise Interrupted(
                f"stopped: {len(ends)} of {wanted or 'more'} episodes are in {store.location}; go on with: "
                f"diffusion-policy collect --resume {store.location}"
            )
        console.print(f"{len(ends)} episodes, {ends[-1]} steps in {store.location}")


@contextlib.contextmanager
def closing_quietly(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """Close an environment at the end; one that fails at that has done its work."""
    try:
        yield env
    finally:
        with contextlib.suppress(Exception):
            env.close()


@contextlib.contextmanager
def interrupt_on_signal() -> Iterator[threading.Event]:
    """Within the context, Ctrl-C and SIGTERM set the event and raise KeyboardInterrupt, wherever this process is: in a
    simulator that hangs, too. The same press again (see `ONE_PRESS`) does not."""
    stop = threading.Event()
    last = -ONE_PRESS  # [s]

    def handle(_number: int, _frame: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        stop.set()
        if last - before > ONE_PRESS:
            raise KeyboardInterrupt

    with hearing(handle):
        yield stop


def find_expert(settings: Settings) -> Callable[[str | None], Any]:
    """The expert that was asked for, or ours for this environment; raises ConfigError where there is none."""
    from diffusion_policy.envs.experts import EXPERTS
    from diffusion_policy.envs.modules import load

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
    named = {name: settings[name] for name in ("env", "expert") if settings[name]}
    return [f"--{name} {shlex.quote(value)}" for name, value in named.items()] + signal_flags(settings["signals"])
