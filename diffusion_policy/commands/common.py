"""What several verbs share: parsing --env-kwargs, workers, progress bars, fresh output folders, a checkpoint that fits
its environment. Nothing here imports torch before it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from diffusion_policy.basics.files import once_each, parse_json
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError, SampleConfig, SuccessAndModes, from_dict

if TYPE_CHECKING:
    import gymnasium

    from diffusion_policy.checkpoints.checkpoint import Checkpoint
    from diffusion_policy.datasets.store import EpisodeStore
    from diffusion_policy.envs.adapters import EnvSpec

DEFAULT_ENV = "diffusion_policy/Avoid-v0"
ONE_PRESS = 0.5
"""SuccessAndModes within this time of the first are the same press of Ctrl-C [s]."""
MOST_FILMED = 16
"""Episodes in one video: they are tiles of one picture."""


class Interrupted(Exception):
    """The user stopped the work (Ctrl-C); the message says what was kept."""


class Failed(Exception):
    """What was checked is not as it should be; the message says what. Exit status 1."""


class Keys(NamedTuple):
    """What is read of a store."""

    observations: tuple[str, ...]
    action: str

    @property
    def names(self) -> dict[str, str]:
        """What each key is called once it is read: the action is `action`."""
        return {key: key for key in self.observations} | {self.action: "action"}


def open_store(location: str | Path) -> EpisodeStore:
    """Open a dataset to read, saying what in it is not read; raises StoreError."""
    from diffusion_policy.datasets.store import EpisodeStore

    store = EpisodeStore.open(location)
    for remark in store.remarks():
        console.print(f"{location}: {remark}")
    return store


def recorded_location(source: object, location: str) -> str:
    """Where a checkpoint or a run (`source`) says that its dataset lies, which is told. Raises ConfigError for a URL:
    what only a stranger's file names is fetched from nowhere."""
    if "://" in location or "::" in location:
        raise ConfigError(
            f"{source} names its dataset by the URL {location[:200]!r}, which would be opened; if you trust it, give "
            "it yourself with --dataset"
        )
    console.print(f"the dataset is {location}, as {source} says", soft_wrap=True)
    return location


def open_recorded(source: object, location: str) -> EpisodeStore:
    """Open the dataset that only a checkpoint or a run (`source`) names: a local one, said; ConfigError for a URL, and
    StoreError as `open_store`."""
    return open_store(recorded_location(source, location))


def join_actions(names: str | Sequence[str]) -> str:
    """The one key of actions that lie in several arrays, side by side: `a+b`; empty for none."""
    return names if isinstance(names, str) else "+".join(names)


def choose_keys(store: EpisodeStore, observations: Sequence[str] = (), action: str | Sequence[str] = ()) -> Keys:
    """Keys of a store that a policy learns from: those wanted, else those that the store names, else `action` and all
    others. Raises ConfigError for keys that it does not have, and when none are left to observe."""
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
    wrong = [key for key in keys if key not in store.keys or key == action]
    if wrong or not keys:
        sought = f"no observation {wrong[0]!r}" if wrong else "no observations"
        raise ConfigError(f"{store.location} has {sought}; {has}")
    if action != "action" and "action" in keys:
        raise ConfigError(f"an observation cannot be called 'action'; choose others with --observation; {has}")
    return Keys(keys, action)


def choose_angles(store: EpisodeStore, wanted: Sequence[str], keys: Keys) -> dict[str, tuple[int, ...]]:
    """The columns that are angles, by the names of the keys once they are read: those wanted (see `parse_angles`), else
    what the store says, for the keys that are read. Where actions lie in several arrays, columns may be those of an
    array, or of all side by side."""
    parts = store.columns(keys.action)
    angles = parse_angles(wanted, {**keys.names, **parts}) if wanted else store.attributes.get("angles", {})
    chosen = {keys.names[key]: tuple(columns) for key, columns in angles.items() if key in keys.names}
    for part, first in parts.items() if len(parts) > 1 else ():
        size = math.prod(store.shape(part))
        wrong = [column for column in angles.get(part, ()) if column >= size]
        if wrong:
            raise ConfigError(f"angles must name columns of a key; {part} has {size}, got {wrong[0]}")
        columns = (first + column for column in angles.get(part, ()))
        chosen["action"] = (*chosen.get("action", ()), *columns)
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


def parse_env_kwargs(text: str) -> dict[str, Any]:
    """--env-kwargs: a JSON object; raises ConfigError."""
    try:
        arguments = parse_json(text, pairs=once_each)
        json.dumps(arguments, allow_nan=False)
    except ValueError as error:
        arguments, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(arguments, dict):
        raise ConfigError(f"--env-kwargs must be a JSON object such as '{{\"rows\": 2}}'; got {text!r:.100}{reason}")
    return arguments


def describe_episodes(env: gymnasium.Env) -> dict[str, Any]:
    """Attributes of a store of the episodes of an environment that a EnvSpec has made."""
    from diffusion_policy.envs.contract import control_rate

    rate = control_rate(env)
    return {
        "environment": dict(env.described),  # pyright: ignore[reportAttributeAccessIssue]
        **({"control_frequency": rate} if rate else {}),
        "observation_keys": sorted(env.observation_space.keys()),  # pyright: ignore[reportAttributeAccessIssue]
        "action_key": "action",
    }


def anchor(command: object) -> None:
    """Make the paths of a command absolute: a simulator may change the working folder."""
    for option in dataclasses.fields(command):  # pyright: ignore[reportArgumentType]
        value = getattr(command, option.name)
        if isinstance(value, Path):
            object.__setattr__(command, option.name, value.absolute())


def require_fresh(path: Path) -> None:
    """Raise ConfigError when an output exists and holds anything."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} already holds something; choose another --output or delete it first")


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Make an output folder, and keep other processes away from it; raises StoreError where one holds it."""
    from diffusion_policy.datasets.storage import lock

    folder.mkdir(parents=True, exist_ok=True)
    unlock = lock(folder, "choose another --output")
    try:
        yield
    finally:
        unlock()


def require_video(video: Path | None, episodes: int) -> None:
    """Raise ConfigError where so many episodes cannot be filmed into this file."""
    if video is None:
        return
    if episodes > MOST_FILMED:
        raise ConfigError(f"a --video shows at most {MOST_FILMED} episodes; got {episodes}")
    if video.suffix not in (".mp4", ".gif"):
        raise ConfigError(f"--video must end in .mp4 or .gif; got {video}")
    if video.exists():
        raise ConfigError(f"{video} already exists; choose another --video or delete it first")


def progress_bar(unit: str) -> Progress:
    """A bar with count and time left; its tasks have a field `note`, shown at the end. It fits 80 columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=18),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}"),
        console=console,
    )


def print_by_steps(title: str, samplers: Mapping[str, Mapping[str, Any]], figure: str, form: str) -> None:
    """A table of one figure: a row a sampler, a column a number of steps. Cells are {figure: number or None, or
    {"value": ...}}; a dash where there is none."""
    columns = list(dict.fromkeys(steps for cells in samplers.values() for steps in cells))
    table = Table("sampler", *columns, title=f"{title}, by steps", title_justify="left")
    for name, cells in samplers.items():
        found = [cells.get(steps, {}).get(figure) for steps in columns]
        values = [value["value"] if isinstance(value, dict) else value for value in found]
        table.add_row(name, *("-" if value is None else form.format(value) for value in values))
    console.print(table)


@contextlib.contextmanager
def hearing(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Within the context, Ctrl-C and SIGTERM call this; but only in the main thread, as they reach no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Within the context, Ctrl-C and SIGTERM set the event, so that the step under way is finished; a second Ctrl-C
    interrupts at once (but torchrun hands on the first one, which then comes twice)."""
    stop = threading.Event()
    first = math.inf  # [s]

    def handle(number: int, _frame: object) -> None:
        nonlocal first
        if number == signal.SIGINT and stop.is_set() and time.monotonic() - first > ONE_PRESS:
            raise KeyboardInterrupt
        if not stop.is_set():
            first = time.monotonic()
        stop.set()

    with hearing(handle):
        yield stop


OUR_EXAMPLES = "diffusion_policy.envs.examples"
"""The one module that a dataset or a checkpoint may name, and have imported."""


def choose_env_spec(
    source: object, recorded: Mapping[str, Any], env: str | None, env_kwargs: str | None, signals: SuccessAndModes
) -> tuple[EnvSpec, SuccessAndModes]:
    """The environment that was asked for, completed by what a file says of its own: `recorded` has id, arguments,
    signals and wrappers. Raises ConfigError where there is none, where the file alone names a module, which would be
    imported, and where it was recorded under wrappers that no file can keep."""
    env_id = env or recorded.get("id")
    if env_id is None:
        raise ConfigError(f"{source} names no environment; give one with --env")
    same = is_same_id(env_id, recorded.get("id"))
    arguments = recorded.get("arguments", {}) if same else {}
    from_file = [] if env else [env_id]
    if same and not signals.given:
        signals = from_dict(SuccessAndModes, recorded.get("signals", {}))
        from_file += [signals.success, signals.mode_function]
    refuse_modules(source, from_file, [f"--env {shlex.quote(env_id)}", *signal_flags(signals)])
    wrappers = choose_wrappers(source, recorded.get("wrappers") or (), env, env_id) if same else ()
    arguments = arguments if env_kwargs is None else parse_env_kwargs(env_kwargs)
    return make_env_spec(env_id, arguments, signals, wrappers), signals


def signal_flags(signals: SuccessAndModes) -> list[str]:
    """Flags that mean these signals, as a shell takes them."""
    flags = []
    for name, value in signals.given.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        flags.append(" ".join([f"--{name.replace('_', '-')}", *map(shlex.quote, values)]))
    return flags


def is_same_id(one: str | None, other: str | None) -> bool:
    """Whether two ids mean the same environment: `module:Id` is `Id`, which Gymnasium itself calls it."""
    return one is not None and other is not None and one.rpartition(":")[2] == other.rpartition(":")[2]


def choose_wrappers(
    source: object, wrappers: Sequence[Mapping[str, Any]], env: str | None, env_id: str
) -> Sequence[Mapping[str, Any]]:
    """The wrappers that a file says were around its environment. Where one of them cannot be put on again, or would be
    imported from a module that the user does not name with --env (`env`), raises ConfigError; but with --env the
    environment is made as it is registered, without any, which is said."""
    from diffusion_policy.envs.wrappers import foreign, is_written, lost

    if not is_written(wrappers):
        raise ConfigError(f"{source} does not say its wrappers as a list of entry points and arguments")
    named = env.partition(":")[0] if env and ":" in env else None
    strangers = [point for point in foreign(wrappers) if point.partition(":")[0] != named]
    if not strangers and not lost(wrappers):
        return wrappers
    if env is None:
        if lost(wrappers):
            raise ConfigError(
                f"{source} was recorded under what no file can keep: {', '.join(lost(wrappers))}; register an "
                "environment that is made with all of it, and give that with --env module:Id"
            )
        again = f"{strangers[0].partition(':')[0]}:{env_id.rpartition(':')[2]}"
        refuse_modules(source, strangers, [f"--env {shlex.quote(again)}"])
    names = [str(one.get("entry_point") or one.get("name")).rpartition(":")[2] for one in wrappers]
    console.print(f"{env_id} is made as it is registered, without what {source} was recorded under: {', '.join(names)}")
    return ()


def refuse_modules(source: object, names: Iterable[str | None], flags: Sequence[str]) -> None:
    """Raise ConfigError where a name that only a file gives, `module:something`, would have a module imported that is
    not ours; `flags` are those by which the user can give it."""
    foreign = {name.partition(":")[0] for name in names if name and ":" in name} - {OUR_EXAMPLES}
    if foreign:
        raise ConfigError(
            f"{source} names its environment by the module {min(foreign)}, which would be imported; if you trust it, "
            f"give it yourself: {' '.join(flags)}"
        )


def make_env_spec(
    env_id: str, arguments: Mapping[str, Any], signals: SuccessAndModes, wrappers: Sequence[Mapping[str, Any]] = ()
) -> EnvSpec:
    """An environment factory; raises ValueError for signals that contradict each other."""
    from diffusion_policy.envs.adapters import EnvSpec

    return EnvSpec(
        env_id,
        dict(arguments),
        signals.success,
        signals.mode_function,
        signals.mode_labels,
        signals.fresh,
        tuple(wrappers),
    )


def say_cap(env_id: str, env: gymnasium.Env) -> None:
    """Say after how many steps the episodes of an environment without a time limit end."""
    from diffusion_policy.envs.adapters import capped_steps

    steps = capped_steps(env)
    if steps is not None:
        console.print(
            f"{env_id} has no time limit, so its episodes end after {steps} steps; choose another number with "
            "--env-kwargs '{\"max_episode_steps\": 5000}'"
        )


class PolicyInEnv(NamedTuple):
    """A checkpoint and the environment that it acts in."""

    checkpoint: Checkpoint
    env_id: str
    env_kwargs: dict[str, Any]
    signals: SuccessAndModes
    make_env: Callable[..., gymnasium.Env]
    """Picklable; takes `render_mode`."""
    env: gymnasium.Env
    """One instance, for modes and drawing."""
    wrappers: tuple[Mapping[str, Any], ...] = ()
    """Around the environment, as `envs.wrappers` writes them."""

    @property
    def frames_per_second(self) -> float:
        """How many control steps the environment takes in a second; 30 where it does not say."""
        from diffusion_policy.envs.contract import control_rate

        return control_rate(self.env) or 30


def load_with_environment(
    path: Path,
    env: str | None,
    env_kwargs: str | None,
    sampling: SampleConfig | None,
    device: str,
    signals: SuccessAndModes,
) -> PolicyInEnv:
    """Load a checkpoint and make its environment, or the one named instead.

    Raises ValueError when there is no environment, when its spaces do not fit the policy, or when the policy cannot
    sample as `sampling` says.
    """
    from diffusion_policy.checkpoints import checkpoint
    from diffusion_policy.policy import choose_device

    return join_environment(path, checkpoint.load(path, choose_device(device)), env, env_kwargs, sampling, signals)


def join_environment(
    path: object,
    loaded: Checkpoint,
    env: str | None,
    env_kwargs: str | None,
    sampling: SampleConfig | None,
    signals: SuccessAndModes,
) -> PolicyInEnv:
    """As `load_with_environment`, of a checkpoint that is loaded, or one without weights."""
    if sampling is not None:
        loaded.policy.resolve_sampling(sampling)
    task, signals = choose_env_spec(path, dataclasses.asdict(loaded.environment), env, env_kwargs, signals)
    instance = task()
    offered = {key: part.shape for key, part in instance.observation_space.items()}  # pyright: ignore
    needed = loaded.policy.shapes.observations
    if any(offered.get(key) != shape for key, shape in needed.items()):
        raise ConfigError(f"{path} observes {needed}; {task.env} offers {offered}")
    action = loaded.policy.shapes.action
    if math.prod(instance.action_space.shape or ()) != math.prod(action):
        raise ConfigError(f"{path} acts with shape {action}; {task.env} takes {instance.action_space.shape}")
    say_cap(task.env, instance)
    return PolicyInEnv(loaded, task.env, task.arguments, signals, task, instance, task.wrappers)
