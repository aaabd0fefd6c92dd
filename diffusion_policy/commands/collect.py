"""diffusion-policy collect: demonstrations from scripted experts."""

import contextlib
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import gymnasium

from diffusion_policy.commands.environment import (
    choose_wrappers,
    describe_episodes,
    make_env_spec,
    say_cap,
    signal_flags,
    with_images,
)
from diffusion_policy.commands.interrupts import ONE_PRESS, Interrupted, hearing
from diffusion_policy.commands.options.acting import parse_env_kwargs
from diffusion_policy.commands.options.collect import Collect
from diffusion_policy.commands.terminal import console, progress_bar
from diffusion_policy.commands.trust import refuse_modules
from diffusion_policy.config import ConfigError, SuccessAndModes, from_dict
from diffusion_policy.datasets.collect import Demonstrator, collect, uninterrupted
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.experts import EXPERTS
from diffusion_policy.envs.modules import load
from diffusion_policy.evaluation.engines import GivenUp, imap

DEFAULT_ENV = "diffusion_policy/Avoid-v0"


class Settings(NamedTuple):
    """What decides the course of a collection; a store keeps it, so that an interrupted collection can go on."""

    env: str = DEFAULT_ENV
    env_kwargs: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    episodes: int = 240
    seed: int = 0
    noise: float = 0.4
    expert: str | None = None
    signals: SuccessAndModes = SuccessAndModes()
    wrappers: tuple[dict[str, Any], ...] = ()
    """Around the environment: that which gives the image of one that is not ours."""


def run(options: Collect) -> None:
    """Collect; raises ValueError for an environment that is unknown or has no expert, an output that exists, and a
    store that cannot be gone on with."""
    store, wanted = None, None
    with interrupt_on_signal() as stop, contextlib.suppress(KeyboardInterrupt):  # what came of it is said below
        store = EpisodeStore.append_to(options.resume, options.sync) if options.resume else None
        settings = choose_settings(options, store)
        wanted = settings.episodes
        make_env = make_env_spec(settings.env, settings.env_kwargs, settings.signals, settings.wrappers)
        with closing_quietly(make_env()) as env:
            make_expert = find_expert(settings)
            say_cap(settings.env, env)
            with uninterrupted():
                store = store or create_store(options, settings, env)
        with store:
            fill(store, options, settings, partial(Demonstrator, make_env, make_expert, settings.noise), stop.is_set)
    if store is None:
        raise Interrupted("stopped before the first episode had begun")
    conclude(store, wanted)


def create_store(options: Collect, settings: Settings, env: gymnasium.Env) -> EpisodeStore:
    """A new store for the episodes of an environment."""
    assert options.output is not None
    attributes = describe_episodes(env)
    attributes |= {
        "noise": settings.noise,
        "collection": {"episodes": settings.episodes, "seed": settings.seed}
        | ({"expert": settings.expert} if settings.expert else {}),
    }
    return EpisodeStore.create(options.output, attributes, env.get_wrapper_attr("modes"), options.sync)


def fill(
    store: EpisodeStore,
    options: Collect,
    settings: Settings,
    make_demonstrator: Callable[[], Demonstrator],
    should_stop: Callable[[], bool],
) -> None:
    """Add what is still missing to the store. What stops it is raised with what was kept."""
    seeds = store.read_meta("seed")
    first_seed = settings.seed if seeds is None else int(seeds[-1]) + 1
    spread = partial(imap, workers=options.workers, engine=options.engine)
    with progress_bar("episodes") as bar:
        task = bar.add_task("collecting", total=settings.episodes, completed=len(store.episode_ends), note="")

        def show(demonstration: Demonstration) -> None:
            bar.advance(task, bool(demonstration.success))

        try:
            collect(
                store,
                make_demonstrator,
                settings.episodes,
                first_seed,
                spread,
                on_episode=show,
                should_stop=should_stop,
            )
        except ValueError as error:
            if options.output and len(store.episode_ends) == 0:
                shutil.rmtree(options.output)  # so that the same command can be given again, with less noise
                raise
            raise ValueError(f"{error}; {say_held(store, settings)}") from error
        except GivenUp as error:
            reason = f"the episode of seed {error.item} was begun {error.times} times, and its process died each time"
            raise OSError(f"{reason}; {say_held(store, settings)}") from error
        except OSError as error:
            raise OSError(f"{error.strerror or error}; {say_held(store, settings)}") from error


def say_held(store: EpisodeStore, settings: Settings) -> str:
    """What was kept."""
    held = f"{len(store.episode_ends)} of {settings.episodes} episodes are safe in {store.location}"
    return f"{held}, go on with --resume {store.location}"


def choose_settings(options: Collect, store: EpisodeStore | None) -> Settings:
    """What was asked for, completed by what the store says; raises ConfigError where the two differ."""
    asked = {name: value for name in Settings._fields if (value := getattr(options, name, None)) is not None}
    if options.env_kwargs is not None:
        asked["env_kwargs"] = parse_env_kwargs(options.env_kwargs)
    if not options.signals.given:
        del asked["signals"]
    if store is None:
        return observe_image(Settings(**asked), options.image_size)
    stored = read_settings(store)
    signals = stored["signals"]
    from_file = [stored[name] for name in ("env", "expert") if name not in asked]
    from_file += [] if "signals" in asked else [signals.success, signals.mode_function]
    refuse_modules(store.location, from_file, setting_flags(stored))
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


def observe_image(settings: Settings, size: int | None) -> Settings:
    """The settings with an image of a size [px] among what is observed, None for none."""
    if size is None:
        return settings
    spec = with_images(make_env_spec(settings.env, settings.env_kwargs, settings.signals), size)
    return settings._replace(env_kwargs=spec.arguments, wrappers=tuple(map(dict, spec.wrappers)))


def read_settings(store: EpisodeStore) -> dict[str, Any]:
    """The settings of the collection that has begun a store; raises ConfigError where none has."""
    attributes = store.attributes
    if not {"collection", "noise", "environment"} <= attributes.keys():
        raise ConfigError(f"{store.location} was not made by collect, so it cannot be gone on with")
    environment = attributes["environment"]
    return {
        "env": environment["id"],
        "env_kwargs": environment["arguments"],
        "noise": attributes["noise"],
        "signals": from_dict(SuccessAndModes, environment.get("signals", {})),
        "wrappers": tuple(choose_wrappers(store.location, environment.get("wrappers") or (), None, environment["id"])),
        "expert": None,
        **attributes["collection"],
    }


def conclude(store: EpisodeStore, wanted: int | None) -> None:
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
    if settings.expert is not None:
        return load(settings.expert)
    if settings.env not in EXPERTS:
        raise ConfigError(
            f"no expert for {settings.env!r}; experts exist for {', '.join(EXPERTS)}; name yours with --expert "
            "module:Class"
        )
    return EXPERTS[settings.env]


def setting_flags(settings: Mapping[str, Any]) -> list[str]:
    """Flags that mean these settings."""
    named = {name: settings[name] for name in ("env", "expert") if settings[name]}
    return [f"--{name} {shlex.quote(value)}" for name, value in named.items()] + signal_flags(settings["signals"])
