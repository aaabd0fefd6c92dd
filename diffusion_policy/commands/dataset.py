"""diffusion-policy dataset: look at demonstrations, check them, bring them in and out, join, cut and mend them."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich import box
from rich.table import Table

from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.replay import Replay
from diffusion_policy.commands.stores import choose_keys, open_store, parse_angles
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError, require_seed

if TYPE_CHECKING:
    from diffusion_policy.datasets.repair import Repaired
    from diffusion_policy.datasets.store import Demonstration, EpisodeStore
    from diffusion_policy.envs.protocols import Drawable
    from diffusion_policy.envs.scene import Scene
    from diffusion_policy.report.evaluation_figures import PlanePath

ROLES = ("observation", "action", "other")
FormatName = Literal["zarr", "robomimic", "lerobot", "minari", "npz", "aloha", "maniskill", "d4rl"]
MOST_LINES = 50
"""So many things that are left out have a line each."""
Store = tyro.conf.Positional[str]


@dataclass(frozen=True)
class Inspect:
    """What is in a dataset: keys, shapes, ranges, lengths, modes, compression."""

    store: Store
    """Path or URL of the dataset."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> dict[str, Any]:
        """Print it; returns what --json prints."""
        store = open_store(self.store)
        with console.status("reading"):
            found = inspect(store)
        for key, why in found["left_out"].items():
            if key not in store.left_out:  # those are said already
                console.print(f"{self.store}: data/{key} is left out: it {why}")
        if self.json:
            out.print_lines(json.dumps(found, indent=2))
            return found
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("key", "step", "type", "lowest", "highest", "chunk", "MB", "packed"):
            table.add_column(name, no_wrap=True)
        for key, part in found["keys"].items():
            size = ("-", "-") if part["bytes"] is None else (f"{part['bytes'] / 1e6:.2f}", f"{part['ratio']:.1f}x")
            shape, limits = "x".join(map(str, part["shape"])), (min(part["min"]), max(part["max"]))
            shape = shape if len(shape) <= 20 else f"{len(part['shape'])} axes"
            table.add_row(key, shape, part["dtype"], *(f"{n:.4g}" for n in limits), str(part["chunk_rows"]), *size)
        roles = {role: [key for key in found["keys"] if found["keys"][key]["role"] == role] for role in ROLES}
        out.print("; ".join(f"{role}: {', '.join(keys)}" for role, keys in roles.items() if keys))
        out.print(table)
        packings = {" + ".join(part["codecs"]) for part in found["keys"].values()}
        out.print(f"packed with {'; '.join(sorted(packings))}")
        lengths = found["lengths"]
        out.print(
            f"{found['episodes']} episodes, {found['steps']} steps; lengths {lengths['shortest']} to "
            f"{lengths['longest']}, median {lengths['median']:g}"
        )
        if found["modes"]:
            out.print("modes: " + ", ".join(f"{mode} {count}" for mode, count in found["modes"].items()))
        for name, value in found["attributes"].items():
            out.print(f"{name}: {json.dumps(value)}")
        return found


@dataclass(frozen=True)
class Validate:
    """Every problem of a dataset, with episode and row. Exit status 1 when there is one."""

    store: Store
    """Path or URL of the dataset."""
    json: bool = False
    """Print JSON, a list of findings."""

    def run(self) -> list[dict[str, Any]]:
        """Print the findings; raises Failed when one is serious."""
        from diffusion_policy.datasets.validate import validate

        with console.status("checking"):
            findings = validate(self.store)
        rows = [finding._asdict() for finding in findings]
        if self.json:
            out.print_lines(json.dumps(rows, indent=2))
        else:
            for finding in findings:
                out.print(f"{'problem' if finding.serious else 'note'}: {finding.path}: {finding.what}")
        serious = sum(finding.serious for finding in findings)
        if serious:
            raise Failed(f"{self.store}: {serious} problem{'s' if serious > 1 else ''}")
        console.print(f"{self.store}: no problems")
        return rows


@dataclass(frozen=True)
class Convert:
    """Copy a dataset into another format: zarr (and .zarr.zip), robomimic HDF5, LeRobot v3, Minari, npz. HDF5 of ALOHA
    and ACT (a folder of episodes), of ManiSkill, and flat as of D4RL is only read."""

    store: Store
    """Dataset to copy, of any of these formats; a zarr store may be a URL."""
    output: tyro.conf.Positional[Path]
    """Where the copy goes: NAME.zarr, .zarr.zip, .hdf5, .lerobot, .minari or .npz."""
    source_format: FormatName | None = None
    """Format of the dataset, if it cannot be told from its content."""
    output_format: FormatName | None = None
    """Format of the copy, if its name does not say."""
    observation: tuple[str, ...] = ()
    """Arrays that are observed; nothing else is copied but the action. By default everything is copied that can be, and
    what the dataset names is observed."""
    action: tuple[str, ...] = ()
    """Array that is the action; by default the one that the dataset names. The columns of several are joined into an
    action of their own."""
    angles: tuple[str, ...] = ()
    """Columns that the copy declares as angles [rad], as state:4."""

    def run(self) -> int:
        """Copy; returns the number of episodes."""
        from diffusion_policy.datasets.convert import read, write

        source = read(self.store, self.source_format, self.observation, self.action)
        if self.angles:
            angles = parse_angles(self.angles, (*source.observation_keys, source.action_key))
            declared = {key: list(columns) for key, columns in angles.items()}
            source = source._replace(attributes=source.attributes | {"angles": declared})
        for remark in source.remarks:
            console.print(remark)
        try:
            with console.status("copying") as status:
                copied = itertools.count(1)

                def show(_: Demonstration) -> None:
                    status.update(f"copying, {next(copied)} episodes")

                count = write(source, self.output, self.output_format, show)
        finally:
            for name, why in itertools.islice(source.left_out.items(), MOST_LINES):
                console.print(f"left out {name}: {why}")
            if len(source.left_out) > MOST_LINES:
                console.print(f"left out {len(source.left_out) - MOST_LINES} more")
        console.print(f"{count} episodes in {self.output}")
        return count


@dataclass(frozen=True)
class Merge:
    """Join stores into a new one, one after the other: those of several collectors, of recorded rollouts too."""

    stores: tyro.conf.Positional[tuple[str, ...]]
    """Stores to join. They have the same keys, environment and rate; a type of numbers is the widest of all."""
    output: Path
    """Store to create."""

    def run(self) -> int:
        """Join; returns the number of episodes."""
        from diffusion_policy.datasets.combine import merge

        if len(self.stores) < 2:
            raise ConfigError(f"merge joins at least two stores; got {len(self.stores)}")
        for location in self.stores:
            open_store(location)  # says what is not read
        with console.status("joining"):
            merged = merge(self.stores, self.output)
        for remark in merged.remarks:
            console.print(remark)
        console.print(f"{merged.episodes} episodes in {self.output}")
        return merged.episodes


@dataclass(frozen=True)
class Split:
    """Cut a store into two new ones, by episode, at random."""

    store: Store
    """Path or URL of the dataset."""
    output: tuple[Path, Path]
    """The two stores to create."""
    share: float = 0.9
    """Share of the episodes that goes into the first."""
    seed: int = 0
    """Seed of the choice."""

    def __post_init__(self) -> None:
        require_seed(self)
        if not 0 < self.share < 1:
            raise ConfigError(f"share must be above 0 and below 1; got {self.share}")

    def run(self) -> tuple[int, int]:
        """Cut; returns the numbers of episodes."""
        from diffusion_policy.datasets.combine import split

        open_store(self.store)  # says what is not read
        with console.status("cutting"):
            counts = split(self.store, self.output, self.share, self.seed)
        for path, count in zip(self.output, counts, strict=True):
            console.print(f"{count} episodes in {path}")
        return counts


@dataclass(frozen=True)
class Repair:
    """Mend what validate names, where it can be mended in place: rows behind the last complete episode, episodes
    without rows, a stale consolidated copy of the metadata, files of killed writers. No episode is touched. Exit status
    1 where a problem stays."""

    store: tyro.conf.Positional[Path]
    """Store to mend, in place; nothing else may be writing to it."""

    def run(self) -> Repaired:
        """Mend; returns what was done and what is left; raises Failed when that is serious."""
        from diffusion_policy.datasets.repair import repair
        from diffusion_policy.datasets.store import EpisodeStore

        repaired = repair(self.store)
        for sentence in repaired.mended or ("nothing to mend",):
            console.print(sentence)
        console.print(f"{len(EpisodeStore.open(self.store).episode_ends)} episodes in {self.store}")
        for finding in repaired.left:
            console.print(f"not mended: {finding.path}: {finding.what}")
        if repaired.left:
            count = f"{len(repaired.left)} problem{'s' if len(repaired.left) > 1 else ''}"
            raise Failed(f"{self.store}: {count} cannot be mended in place; copy what is sound with: dataset convert")
        return repaired


@dataclass(frozen=True)
class Plot:
    """Pictures of a dataset: trajectories.png by mode, actions.png and lengths.png."""

    store: Store
    """Path or URL of the dataset."""
    output: Path
    """Folder for the pictures."""
    plane: str | None = None
    """Two columns of a key to draw trajectories in, as state:0,1; by default what the environment says, else the first
    two of the first observation."""
    action: tuple[str, ...] = ()
    """Key of the actions, or several, whose columns stand side by side; by default the one that the store names, else
    action."""

    def run(self) -> None:
        """Draw; raises ConfigError for columns that are not there and a folder that holds something."""
        from diffusion_policy.datasets.statistics import Measuring
        from diffusion_policy.report.figures import draw_columns, draw_lengths, draw_trajectories

        require_fresh(self.output)
        store = open_store(self.store)
        keys = choose_keys(store, action=self.action)
        plane = self._plane(store)
        actions = Measuring()
        for _, rows in store.blocks(keys.action):
            actions.add(rows)
        self.output.mkdir(parents=True, exist_ok=True)
        figures = {
            "trajectories": draw_trajectories(*plane) if plane else None,
            "actions": draw_columns(actions.sample, keys.action),
            "lengths": draw_lengths(store.episode_ends, store.attributes.get("control_frequency")),
        }
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(self.output / f"{name}.png", dpi=150)
                console.print(f"{self.output}/{name}.png")

    def _plane(self, store: EpisodeStore) -> tuple[list[PlanePath], Scene | None, tuple[str, str]] | None:
        """Episodes as paths in a plane, what stands in it, and what its axes are; None without two columns."""
        from diffusion_policy.datasets.store import StoreError
        from diffusion_policy.report.evaluation_figures import PlanePath, choose_drawn

        drawn = choose_drawn(len(store.episode_ends))
        task = self._task(store)
        if task is not None:
            episodes = store.episodes(drawn, store.observation_keys)
            paths = [PlanePath(e.mode, e.success is not False, task.path(e.data)) for e in episodes]
            return paths, task.scene, (f"x [{task.scene.unit}]", f"y [{task.scene.unit}]")
        for key, columns in self._columns(store):
            try:
                paths = [
                    PlanePath(e.mode, e.success is not False, e.data[key].reshape(len(e.data[key]), -1)[:, columns])
                    for e in store.episodes(drawn, [key])
                ]
            except StoreError as error:
                if self.plane is not None:
                    raise
                console.print(str(error))
            else:
                return paths, None, (f"{key}[{columns[0]}]", f"{key}[{columns[1]}]")
        return None

    def _task(self, store: EpisodeStore) -> Drawable | None:
        """The environment that the store names, where it is here and says how its paths are drawn."""
        from diffusion_policy import envs
        from diffusion_policy.envs.protocols import as_drawable

        recorded = store.attributes.get("environment")
        if self.plane is not None or recorded is None or recorded["id"] not in envs.ENV_IDS:
            return None
        return None if recorded.get("wrappers") else as_drawable(envs.make(recorded["id"], **recorded["arguments"]))

    def _columns(self, store: EpisodeStore) -> list[tuple[str, list[int]]]:
        """Keys and two columns of each, of which the first that can be read is drawn; raises ConfigError for others
        than there are."""
        sizes = {key: math.prod(store.shape(key)) for key in store.keys}
        if self.plane is None:
            return [(key, [0, 1]) for key in store.observation_keys if sizes.get(key, 0) >= 2]
        key, _, columns = self.plane.rpartition(":")
        chosen = [int(column) for column in columns.split(",") if column.isdigit()]
        if key not in sizes or len(chosen) != 2 or max(chosen) >= sizes[key]:
            known = ", ".join(f"{name} ({size})" for name, size in sizes.items())
            what = f"a key and two of its columns, as state:0,1, of {known}"
            raise ConfigError(f"--plane must be {what}; got {self.plane!r}")
        return [(key, chosen)]


def inspect(store: EpisodeStore) -> dict[str, Any]:
    """What `dataset inspect` says, as JSON."""
    import numpy as np

    from diffusion_policy.datasets.guard import codec_names
    from diffusion_policy.datasets.store import StoreError
    from diffusion_policy.evaluation.metrics import NONE

    lengths = np.diff(store.episode_ends, prepend=0)
    keys: dict[str, Any] = {}
    left_out = dict(store.left_out)
    for key in store.keys:
        try:
            lowest, highest = _limits(store, key)
        except StoreError as error:  # what it holds cannot be used
            left_out[key] = str(error).removeprefix(f"{store.location}: data/{key} ")
            continue
        size = store.stored_bytes(key)
        raw = int(store.episode_ends[-1]) * int(np.prod(store.shape(key), dtype=np.int64)) * store.dtype(key).itemsize
        keys[key] = {
            "role": ROLES[0 if key in store.observation_keys else 1 if key in store.parts(store.action_key) else 2],
            "shape": store.shape(key),
            "dtype": str(store.dtype(key)),
            "min": lowest,
            "max": highest,
            "chunk_rows": store.chunk_rows(key),
            "codecs": codec_names(store.raw_array(f"data/{key}")),
            "bytes": size,
            "ratio": raw / size if size else None,
        }
    modes = Counter(mode or NONE for mode in store.episode_modes())
    return {
        "location": store.location,
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "lengths": {
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
            "median": float(np.median(lengths)),
        },
        "modes": {mode: modes[mode] for mode in (*store.modes, NONE) if mode in modes} if store.modes else {},
        "keys": keys,
        "left_out": left_out,
        "attributes": {name: value for name, value in store.attributes.items() if name != "modes"},
    }


def _limits(store: EpisodeStore, key: str) -> tuple[list[float], list[float]]:
    """Smallest and largest value of each column, in the order of memory."""
    import numpy as np

    lowest, highest = np.inf, -np.inf
    for _, rows in store.blocks(key):
        flat = rows.reshape(len(rows), -1)
        lowest, highest = np.minimum(lowest, flat.min(axis=0)), np.maximum(highest, flat.max(axis=0))
    return np.asarray(lowest).tolist(), np.asarray(highest).tolist()


@dataclass(frozen=True)
class Dataset:
    """Look at demonstrations, check them, bring them in and out, join, cut and mend them."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Validate, tyro.conf.subcommand("validate")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Merge, tyro.conf.subcommand("merge")]
        | Annotated[Split, tyro.conf.subcommand("split")]
        | Annotated[Repair, tyro.conf.subcommand("repair")]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
        | Annotated[Replay, tyro.conf.subcommand("replay")]
    ]

    def run(self) -> Any:
        """Do it."""
        return self.command.run()
