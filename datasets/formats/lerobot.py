"""LeRobotDataset v3 ↔ source: a folder of parquet files, each feature a column, all episodes one after the other.

| in the dataset                       | in the store                                                        |
|---------------------------------------|---------------------------------------------------------------------|
| feature `observation.<key>`           | observation key `<key>`                                             |
| feature `action`                      | the action                                                          |
| any other feature (`next.reward`)     | further key                                                         |
| `fps`                                 | `control_frequency` [Hz]                                            |
| tasks, robot type, names of features  | `lerobot`; more than one task: also the further key `task_index`    |

`timestamp`, `frame_index`, `episode_index` and `index` are made anew, at regular times; `fps` is 10 where a store has
no control frequency. Seeds, modes, success, final observations, and what else its own fields have no room for lie in
`meta/diffusion_policy.json` and `.parquet`, which LeRobot does not look at. Images of a store are written as numbers,
not as LeRobot's pictures.

Not carried: features of video, image, text and language (the source names them), the statistics, which are computed
anew without quantiles, and splits other than `train`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.files import read_json
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Contents, Format, Source, Unusable, foreign, from_header, header
from diffusion_policy.datasets.formats.parquet import TableReader, arrow_libraries, opened, to_arrow, to_numpy
from diffusion_policy.datasets.formats.reading import check_sizes
from diffusion_policy.datasets.statistics import Measuring
from diffusion_policy.datasets.storage import StoreError

VERSION = "v3.0"
DEFAULTS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"} | {
    "task_index": "int64"
}
"""Columns that every dataset has."""
NO_NUMBERS = {"image", "video", "string", "language"}
PREFIX = "observation."
HEADER = Path("meta/diffusion_policy.json")
KNOWN = Path("meta/diffusion_policy.parquet")
FILE = "chunk-{:03d}/file-{:03d}.parquet"
FILE_MB = 100
"""Largest size of a data file [MB]."""
FILES_PER_CHUNK = 1000
BYTES_AT_A_TIME = 2**24
JSON_BYTES = 2**26
TASK_BYTES = 2**24
"""Most bytes of the texts of all tasks."""
DEFAULT_FPS = 10


# Reading


class _Column(NamedTuple):
    """Where a column goes and what its rows are."""

    key: str
    dtype: np.dtype
    stored_shape: tuple[int, ...]
    """As LeRobot has it: (1,) for one number."""
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read(path: Path) -> Contents:
    """What is in the folder; raises StoreError, or what pyarrow raises."""
    info = read_json(path / "meta/info.json", JSON_BYTES)
    if not str(info["codebase_version"]).startswith("v3."):
        hint = "convert it first with LeRobot's own convert_dataset_v21_to_v30"
        raise StoreError(f"it is LeRobotDataset {info['codebase_version']}; {VERSION} is read: {hint}")
    features = info["features"]
    tasks = _read_tasks(path)
    head = read_json(path / HEADER, JSON_BYTES) if (path / HEADER).exists() else None
    carried = (
        {name: list(column) for name, column in head["columns"].items()} if head else {name: [] for name in features}
    )
    hidden = [] if head else [name for name in DEFAULTS if name != "task_index" or len(tasks) < 2]
    files = _data_files(path)
    with opened(files[0]) as file:
        present = {*file.schema_arrow.names}
    columns, left_out = _columns(features, {name: carried[name] for name in carried.keys() - {*hidden}})
    absent = "the data files have no such column"
    arrays = {column.key: None if name in present else absent for name, column in columns.items()}

    def episodes(keys: Sequence[str]) -> Iterator[Demonstration]:
        return _episodes(path, files, {name: column for name, column in columns.items() if column.key in keys})

    if head is not None:
        return from_header(head, arrays, episodes, left_out)
    given = {name: features[name].get("names") for name in columns if features[name].get("names")}
    attributes = {"lerobot": {"robot_type": info.get("robot_type"), "tasks": tasks, "names": given}}
    if isinstance(info.get("fps"), int | float) and info["fps"] > 0:
        attributes["control_frequency"] = info["fps"]
    observed = sorted(column.key for name, column in columns.items() if name.startswith(PREFIX))
    return foreign(attributes, observed, arrays, episodes, left_out)


def _columns(features: Any, carried: dict[str, list[Any]]) -> tuple[dict[str, _Column], dict[str, str]]:
    """The features of numbers, and why others are left out; `carried` says key and shape of those that we wrote."""
    columns: dict[str, _Column] = {}
    left_out: dict[str, str] = {}
    for name in sorted(carried):
        column = _column(features.get(name), name, *carried[name])
        if isinstance(column, str):
            left_out[name] = column
        elif column.key in {one.key for one in columns.values()}:
            left_out[name] = f"another feature is called {column.key}"
        else:
            columns[name] = column
    return columns, left_out


def _column(feature: Any, name: str, key: str | None = None, shape: list[int] | None = None) -> _Column | str:
    """A feature of numbers, or why it is none."""
    if not isinstance(feature, dict) or "dtype" not in feature:
        return "meta/info.json does not describe it"
    if feature["dtype"] in NO_NUMBERS:
        return f"it holds no numbers but {feature['dtype']}"
    try:
        stored_shape = tuple(map(int, feature["shape"]))
        dtype = np.dtype(feature["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        return f"its type or shape is unknown: {error}"
    if dtype.kind not in "biuf" or any(size < 1 for size in stored_shape):
        return f"it holds no numbers but {dtype} of {stored_shape}"
    key = name.removeprefix(PREFIX) if key is None else str(key)
    return _Column(key, dtype, stored_shape, stored_shape if shape is None else tuple(map(int, shape)))


def _data_files(path: Path) -> list[Path]:
    files = sorted(path.glob("data/*/*.parquet"))  # as LeRobot's own reader does
    if not files:
        raise StoreError("there is no data/chunk-000/file-000.parquet")
    return files


def _read_tasks(path: Path) -> list[str]:
    """Texts of the tasks, by their index."""
    place = path / "meta/tasks.parquet"
    if not place.exists():
        return []
    found: dict[int, str] = {}
    with opened(place) as file:
        names = [name for name in file.schema_arrow.names if name != "task_index"]
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
        if not names or "task_index" not in file.schema_arrow.names or sum(sizes) > TASK_BYTES:
            raise StoreError(f"meta/tasks.parquet must hold task_index and texts, of at most {TASK_BYTES} bytes")
        length = 0
        for batch in file.iter_batches(16, columns=["task_index", names[0]]):
            texts = [str(text) for text in batch.column(names[0]).to_pylist()]
            length += sum(map(len, texts))
            if length > TASK_BYTES:
                raise StoreError(f"the texts of meta/tasks.parquet have more than {TASK_BYTES} characters")
            found |= zip(batch.column("task_index").to_pylist(), texts, strict=True)
    return [found[i] for i in sorted(found)]


def _episodes(path: Path, files: list[Path], columns: dict[str, _Column]) -> Iterator[Demonstration]:
    lengths = _lengths(path)
    row_bytes = sum(column.row_bytes for column in columns.values())
    check_sizes(row_bytes, lengths, *files)
    known = _read_known(path, lengths, columns)
    rows = TableReader(files, [*columns, "episode_index"], max(1, BYTES_AT_A_TIME // max(1, row_bytes)))
    for i, length in enumerate(lengths):
        table = rows.read(length)
        if not (to_numpy(table["episode_index"], ()) == i).all():
            raise StoreError(f"the rows of episode {i} are not where meta/episodes says: in order, {length} of them")
        data: dict[str, np.ndarray] = {}
        for name, column in columns.items():
            try:
                stored = to_numpy(table[name], column.stored_shape)
                data[column.key] = stored.astype(column.dtype, copy=False).reshape(length, *column.shape)
            except (StoreError, ValueError) as error:
                raise Unusable(column.key, str(error)) from error
        final = {name.removeprefix("final/"): known[name][i] for name in known if name.startswith("final/")}
        yield Demonstration(
            data,
            seed=known["seed"][i] if "seed" in known else None,
            mode=known["mode"][i] if "mode" in known else None,
            success=known["success"][i] if "success" in known else None,
            final=final or None,
            instruction=known["instruction"][i] if "instruction" in known else None,
        )


def _lengths(path: Path) -> list[int]:
    """Steps of each episode."""
    lengths: list[int] = []
    for place in sorted(path.glob("meta/episodes/*/*.parquet")):
        with opened(place, ["episode_index", "length"]) as file:
            table = file.read(columns=["episode_index", "length"]).to_pydict()
        if table["episode_index"] != list(range(len(lengths), len(lengths) + len(table["episode_index"]))):
            raise StoreError(f"{place.relative_to(path)} must go on with episode {len(lengths)}")
        lengths += table["length"]
    if not lengths or any(not isinstance(length, int) or length < 1 for length in lengths):
        raise StoreError("meta/episodes must hold episodes of at least one step")
    return lengths


def _read_known(path: Path, lengths: list[int], columns: dict[str, _Column]) -> dict[str, Any]:
    """What is known of each episode, by name, in datasets of ours."""
    if not (path / KNOWN).exists():
        return {}
    of_key = {column.key: column for column in columns.values()}
    with opened(path / KNOWN) as file:
        finals = {name: of_key.get(name.removeprefix("final/")) for name in file.schema_arrow.names if "final/" in name}
        wanted = [name for name in file.schema_arrow.names if finals.get(name, name) is not None]
    with opened(path / KNOWN, wanted) as file:
        table = file.read(columns=wanted)
    if table["length"].to_pylist() != lengths:
        raise StoreError(f"{KNOWN} is of other episodes; delete it and {HEADER.name} to read the dataset without")
    known: dict[str, Any] = {}
    for name in wanted:
        column = finals.get(name)
        if column is not None:
            known[name] = to_numpy(table[name], column.stored_shape).reshape(len(lengths), *column.shape)
        elif name != "length":
            known[name] = table[name].to_pylist()
    return known


# Writing


def write(source: Source, path: Path) -> None:
    """Write the folder; raises StoreError for keys and arrays that LeRobot has no place for."""
    writer: _Writer | None = None
    try:
        for episode in source.episodes:
            writer = writer or _Writer(source, path, episode)
            writer.add(episode)
    finally:
        if writer is not None:
            writer.close()
    if writer is not None:
        writer.finish()


class _Writer:
    """Writes data files as episodes come, and the rest in the end."""

    def __init__(self, source: Source, path: Path, first: Demonstration) -> None:
        self._arrow, self._parquet = arrow_libraries()
        self._source = source
        self._path = path
        self._own = source.attributes.get("lerobot", {})
        self._names = {_feature_name(source, key): key for key in sorted(first.data)}
        self._tasks = _tasks(source)
        for name in self._names.keys() & DEFAULTS.keys():
            if name != "task_index" or len(self._tasks) < 2:
                raise StoreError(f"LeRobot has another use for the key {name!r}; rename it")
        if len(self._names) < len(first.data):
            raise StoreError(f"two of the keys {', '.join(sorted(first.data))} would be one feature; rename one")
        self._shapes = {name: list(first.data[key].shape[1:]) for name, key in self._names.items()}
        self._dtypes = {name: first.data[key].dtype for name, key in self._names.items()}
        for name, shape in self._shapes.items():
            if len(shape) > 5:
                raise StoreError(f"LeRobot has rows of at most 5 axes; {self._names[name]!r} has {len(shape)}")
        self._fps = source.attributes.get("control_frequency", DEFAULT_FPS)
        self._measured: dict[str, Measuring] = {}
        self._episodes: list[dict[str, Any]] = []
        self._known: dict[str, list[Any]] = {}
        self._rows = 0
        self._file: Any = None
        self._file_index = -1
        self._file_bytes = 0

    def add(self, episode: Demonstration) -> None:
        """Write the rows of an episode."""
        steps = len(episode.data[self._source.action_key])
        columns = {name: episode.data[key] for name, key in self._names.items()}
        frame = np.arange(steps)
        columns |= {
            "timestamp": (frame / self._fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(steps, len(self._episodes)),
            "index": self._rows + frame,
            "task_index": columns.get("task_index", np.zeros(steps, np.int64)),
        }
        tasks = np.unique(columns["task_index"])
        if tasks[0] < 0 or tasks[-1] >= len(self._tasks):
            raise StoreError(f"task_index must be from 0 to {len(self._tasks) - 1}; got {tasks.tolist()}")
        for name, rows in columns.items():
            if name in self._dtypes and (rows.dtype, [*rows.shape[1:]]) != (self._dtypes[name], self._shapes[name]):
                raise StoreError(f"{name} must stay {self._shapes[name]} of {self._dtypes[name]}")
            self._measured.setdefault(name, Measuring()).add(rows.reshape(len(rows), *(rows.shape[1:] or (1,))))
        self._write({name: to_arrow(rows) for name, rows in columns.items()})
        self._episodes.append(
            {
                "episode_index": len(self._episodes),
                "tasks": [self._tasks[i] for i in tasks],
                "length": steps,
                "data/chunk_index": self._file_index // FILES_PER_CHUNK,
                "data/file_index": self._file_index % FILES_PER_CHUNK,
                "dataset_from_index": self._rows,
                "dataset_to_index": self._rows + steps,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._rows += steps
        known = {"length": steps, "seed": episode.seed, "mode": episode.mode, "success": episode.success}
        known |= {"instruction": episode.instruction} if "instructions" in self._source.attributes else {}
        known |= {f"final/{key}": last for key, last in (episode.final or {}).items()}
        for name, value in known.items():
            self._known.setdefault(name, []).append(value)

    def _write(self, columns: dict[str, Any]) -> None:
        table = self._arrow.table(columns)
        if self._file is None or self._file_bytes + table.nbytes > FILE_MB * 2**20:
            self.close()
            self._file_index += 1
            self._file_bytes = 0
            file = self._path / "data" / FILE.format(*divmod(self._file_index, FILES_PER_CHUNK))
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._parquet.ParquetWriter(file, table.schema, compression="snappy")
        self._file.write_table(table)  # one row group an episode, as LeRobot's own writer has it
        self._file_bytes += table.nbytes

    def close(self) -> None:
        """Close the data file that is being written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Write what describes the data, when all of it is written."""
        meta = self._path / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        episodes = self._arrow.Table.from_pylist(self._episodes)
        self._parquet.write_table(episodes, meta / "episodes" / FILE.format(0, 0))
        self._parquet.write_table(_task_table(self._arrow, self._tasks), meta / "tasks.parquet")
        _write_json(meta / "stats.json", {name: _stats(measured) for name, measured in self._measured.items()})
        _write_json(meta / "info.json", self._info())
        self._parquet.write_table(self._known_table(), self._path / KNOWN)
        columns = {name: [key, self._shapes[name]] for name, key in self._names.items()}
        _write_json(self._path / HEADER, header(self._source) | {"columns": columns})

    def _info(self) -> dict[str, Any]:
        names = self._own.get("names", {})
        features = {
            name: {"dtype": str(self._dtypes[name]), "shape": shape or [1], "names": names.get(name)}
            for name, shape in self._shapes.items()
        }
        features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in DEFAULTS.items()}
        return {
            "codebase_version": VERSION,
            "robot_type": self._own.get("robot_type"),
            "total_episodes": len(self._episodes),
            "total_frames": self._rows,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": FILE_MB,
            "video_files_size_in_mb": 200,
            "fps": int(self._fps) if float(self._fps).is_integer() else self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": None,
            "features": features,
        }

    def _known_table(self) -> Any:
        columns = {}
        for name, values in self._known.items():
            if len(values) != len(self._episodes):
                raise StoreError(f"{name} is known of some episodes only; it must be of all or none")
            if name.startswith("final/"):
                columns[name] = to_arrow(np.stack(values))
            elif any(value is not None for value in values):
                columns[name] = self._arrow.array(values)
        return self._arrow.table(columns)


def _feature_name(source: Source, key: str) -> str:
    if key == source.action_key:
        return "action"
    return f"{PREFIX}{key}" if key in source.observation_keys else key


def _tasks(source: Source) -> list[str]:
    """Texts of the tasks; where there are none, the name of the environment."""
    tasks = source.attributes.get("lerobot", {}).get("tasks")
    return tasks or [str(source.attributes.get("environment", {}).get("id", "demonstrations"))]


def _task_table(pyarrow: Any, tasks: list[str]) -> Any:
    """A table of which pandas makes the text the index."""
    column = {"field_name": "task", "name": "task", "numpy_type": "object", "pandas_type": "unicode", "metadata": None}
    number = {"field_name": "task_index", "name": "task_index", "numpy_type": "int64", "pandas_type": "int64"}
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [number | {"metadata": None}, column]}
    table = pyarrow.table({"task_index": np.arange(len(tasks)), "task": pyarrow.array(tasks, pyarrow.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _stats(measured: Measuring) -> dict[str, Any]:
    """As in stats.json."""
    found = measured.result()
    arrays = {"min": found.minimum, "max": found.maximum, "mean": found.mean, "std": found.std}
    return {name: array.tolist() for name, array in arrays.items()} | {"count": [found.rows]}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4))


FORMAT = Format("LeRobotDataset v3", (".lerobot",), lambda path: (path / "meta" / "info.json").is_file(), read, write)
