"""LeRobotDataset v3 ↔ source: a folder of parquet files, each feature a column, all episodes one after the other, and
of videos, each of some episodes of one camera.

| in the dataset                       | in the store                                                        |
|---------------------------------------|---------------------------------------------------------------------|
| feature `observation.<key>`           | observation key `<key>`                                             |
| feature `action`                      | the action                                                          |
| any other feature (`next.reward`)     | further key                                                         |
| feature of `image` (PNG or JPEG)      | rows (height, width, channels) of uint8; back: PNG, which is exact  |
| feature of `video`                    | the same; back as H.264 (`lerobot-video`), which is not exact       |
| `fps`                                 | `control_frequency` [Hz]                                            |
| tasks, robot type, names of features  | `lerobot`; more than one task: also the further key `task_index`    |
| the task of an episode that has one   | its instruction                                                     |

`timestamp`, `frame_index`, `episode_index` and `index` are made anew, at regular times; `fps` is 10 where a store has
no control frequency. Seeds, modes, success, final observations, and what else its own fields have no room for lie in
`meta/diffusion_policy.json` and `.parquet`, which LeRobot does not look at. Images of other types than uint8 are
written as numbers.

Not carried: features of text and language, pictures in files of their own, videos of depths (the source names them),
the statistics, which are computed anew without quantiles, and splits other than `train`.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.files import read_json
from diffusion_policy.basics.images import is_channels_first
from diffusion_policy.basics.names import are_instructions
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats import videos
from diffusion_policy.datasets.formats.format import Contents, Format, Unusable, foreign, from_header
from diffusion_policy.datasets.formats.lerobot_writing import (
    DEFAULTS,
    HEADER,
    KNOWN,
    PREFIX,
    VERSION,
    VIDEO_PATH,
    write,
    write_videos,
)
from diffusion_policy.datasets.formats.parquet import TableReader, opened, to_numpy
from diffusion_policy.datasets.formats.pictures import MODES, decode_picture
from diffusion_policy.datasets.formats.reading import check_pictures, check_sizes
from diffusion_policy.datasets.formats.videos import VideoReader
from diffusion_policy.datasets.storage import StoreError

NO_NUMBERS = {"string", "language"}
CAMERAS = {"image": MODES, "video": videos.FORMATS}
"""Numbers of channels that pictures may have."""
SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
"""Names of features that may be those of folders."""
BYTES_AT_A_TIME = 2**24
JSON_BYTES = 2**26
TASK_BYTES = 2**24
"""Most bytes of the texts of all tasks."""


class _Column(NamedTuple):
    """Where a column goes and what its rows are."""

    key: str
    dtype: np.dtype
    stored_shape: tuple[int, ...]
    """As LeRobot has it: (1,) for one number."""
    shape: tuple[int, ...]
    kind: str = "numbers"
    """Or `image`, or `video`."""

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
    arrays = {column.key: _why_not(name, column, present, info) for name, column in columns.items()}

    def episodes(keys: Sequence[str]) -> Iterator[Demonstration]:
        used = {name: column for name, column in columns.items() if column.key in keys}
        told = tasks if head is None and are_instructions(tasks) else []
        return _episodes(path, files, used, float(info["fps"]) if "fps" in info else 0.0, told)

    if head is not None:
        return from_header(head, arrays, episodes, left_out)
    given = {name: features[name].get("names") for name in columns if features[name].get("names")}
    attributes: dict[str, Any] = {"lerobot": {"robot_type": info.get("robot_type"), "tasks": tasks, "names": given}}
    if isinstance(info.get("fps"), int | float) and info["fps"] > 0:
        attributes["control_frequency"] = info["fps"]
    observed = sorted(column.key for name, column in columns.items() if name.startswith(PREFIX))
    if are_instructions(tasks):
        attributes["instructions"] = tasks
    return foreign(attributes, observed, arrays, episodes, left_out)


def _columns(features: Any, carried: dict[str, list[Any]]) -> tuple[dict[str, _Column], dict[str, str]]:
    """The features of numbers and pictures, and why others are left out; `carried` says key and shape of those that we
    wrote."""
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
    """A feature of numbers or pictures, or why it is none."""
    if not isinstance(feature, dict) or "dtype" not in feature:
        return "meta/info.json does not describe it"
    if feature["dtype"] in NO_NUMBERS:
        return f"it holds no numbers but {feature['dtype']}"
    key = name.removeprefix(PREFIX) if key is None else str(key)
    try:
        stored_shape = tuple(map(int, feature["shape"]))
        if feature["dtype"] in CAMERAS:
            return _camera(feature, key, stored_shape)
        dtype = np.dtype(feature["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        return f"its type or shape is unknown: {error}"
    if dtype.kind not in "biuf" or any(size < 1 for size in stored_shape):
        return f"it holds no numbers but {dtype} of {stored_shape}"
    return _Column(key, dtype, stored_shape, stored_shape if shape is None else tuple(map(int, shape)))


def _camera(feature: Mapping[str, Any], key: str, stored_shape: tuple[int, ...]) -> _Column | str:
    """A feature of pictures, their channels last, or why it is none."""
    kind, names, shape = feature["dtype"], feature.get("names"), stored_shape
    first = names[0] in ("channel", "channels") if isinstance(names, list) and names else is_channels_first(shape)
    if len(shape) == 3 and first:
        shape = (*shape[1:], shape[0])
    if len(shape) != 3 or shape[2] not in CAMERAS[kind] or any(size < 1 for size in shape):
        known = " or ".join(map(str, CAMERAS[kind]))
        return f"its pictures are {stored_shape}; those of a {kind} have a height, a width and {known} channels"
    about = feature.get("info") or feature.get("video_info") or {}
    if isinstance(about, dict) and about.get("video.is_depth_map"):
        return "it is a video of depths"
    return _Column(key, np.dtype(np.uint8), stored_shape, shape, kind)


def _why_not(name: str, column: _Column, present: set[str], info: Mapping[str, Any]) -> str | None:
    """Why a column cannot be used; None where it can."""
    if column.kind != "video":
        return None if name in present else "the data files have no such column"
    if info.get("video_path") != VIDEO_PATH:
        return f"its videos lie at {str(info.get('video_path'))[:100]!r}; those at {VIDEO_PATH} are read"
    return None if SAFE.fullmatch(name) else "its name is none of a folder"


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


def _episodes(
    path: Path, files: list[Path], columns: dict[str, _Column], rate: float, told: Sequence[str]
) -> Iterator[Demonstration]:
    """`told`: the tasks, where they are the instructions of episodes that have one task each."""
    cameras = {name: column for name, column in columns.items() if column.kind == "video"}
    tables = {name: column for name, column in columns.items() if column.kind != "video"}
    table = _read_episodes(path, cameras)
    lengths = table["length"]
    numbers = sum(column.row_bytes for column in columns.values() if column.kind == "numbers")
    check_sizes(numbers, lengths, *files)
    row_bytes = sum(column.row_bytes for column in columns.values())
    check_pictures(row_bytes - numbers, lengths)
    known = _read_known(path, lengths, columns)
    rows = TableReader(files, [*tables, "episode_index"], max(1, BYTES_AT_A_TIME // max(1, row_bytes)))
    with contextlib.ExitStack() as stack:
        films = {name: stack.enter_context(_Films(path, name, column, rate)) for name, column in cameras.items()}
        for i, length in enumerate(lengths):
            part = rows.read(length)
            if not (to_numpy(part["episode_index"], ()) == i).all():
                raise StoreError(
                    f"the rows of episode {i} are not where meta/episodes says: in order, {length} of them"
                )
            data = {column.key: _rows(part[name], column) for name, column in tables.items()}
            data |= {column.key: films[name].read(table, i) for name, column in cameras.items()}
            final = {name.removeprefix("final/"): known[name](i) for name in known if name.startswith("final/")}
            yield Demonstration(
                data,
                seed=known["seed"](i) if "seed" in known else None,
                mode=known["mode"](i) if "mode" in known else None,
                success=known["success"](i) if "success" in known else None,
                final=final or None,
                instruction=known["instruction"](i) if "instruction" in known else _only(table["tasks"][i], told),
            )


def _only(tasks: Any, told: Sequence[str]) -> str | None:
    """The one task of an episode, where it is one of the instructions."""
    return tasks[0] if isinstance(tasks, list) and len(tasks) == 1 and tasks[0] in told else None


def _rows(stored: Any, column: _Column) -> np.ndarray:
    """The rows of a column of a table; raises Unusable, or StoreError for a damaged picture."""
    if column.kind == "image":
        return np.stack([_picture(one, column, i) for i, one in enumerate(stored.to_pylist())])
    try:
        rows = to_numpy(stored, column.stored_shape)
        return rows.astype(column.dtype, copy=False).reshape(len(rows), *column.shape)
    except (StoreError, ValueError) as error:
        raise Unusable(column.key, str(error)) from error


def _picture(packed: Any, column: _Column, step: int = 0) -> np.ndarray:
    content = packed.get("bytes") if isinstance(packed, dict) else packed
    if not isinstance(content, bytes):
        why = "a picture is not in the data file (perhaps in a file of its own, which is not read)"
        raise Unusable(column.key, why)
    try:
        return decode_picture(content, column.shape)
    except StoreError as error:
        raise StoreError(f"step {step} of {column.key}: {error}") from error


class _Films:
    """The videos of one camera, of which one is open at a time. A context manager."""

    def __init__(self, path: Path, name: str, column: _Column, rate: float) -> None:
        if not 0 < rate < math.inf:
            raise StoreError(f"meta/info.json must say the frames a second of its videos; got fps {rate}")
        height, width, channels = column.shape
        self._path, self._name, self._rate, self._shape = path, name, rate, (height, width, channels)
        self._open: tuple[str, VideoReader] | None = None

    def __enter__(self) -> "_Films":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open is not None:
            self._open[1].__exit__(*exception)

    def read(self, table: Mapping[str, list[Any]], episode: int) -> np.ndarray:
        """The frames of an episode; raises StoreError, which names the video."""
        chunk, file, start = (table[f"videos/{self._name}/{name}"][episode] for name in PLACE)
        if not isinstance(chunk, int) or not isinstance(file, int) or not isinstance(start, int | float):
            raise StoreError(f"meta/episodes does not say where the video {self._name} of episode {episode} lies")
        place = VIDEO_PATH.format(video_key=self._name, chunk_index=chunk, file_index=file)
        if self._open is None or self._open[0] != place:
            self.__exit__()
            self._open = None
            self._open = place, VideoReader(self._path / place, place, self._shape, self._rate)
        return self._open[1].read(float(start), table["length"][episode])


PLACE = ("chunk_index", "file_index", "from_timestamp")
"""Where the frames of an episode lie in the videos of a camera."""


def _read_episodes(path: Path, cameras: Mapping[str, _Column]) -> dict[str, list[Any]]:
    """Steps of each episode, and where their videos lie, by name of the column."""
    wanted = ["episode_index", "length", *(f"videos/{name}/{part}" for name in cameras for part in PLACE)]
    found: dict[str, list[Any]] = {name: [] for name in [*wanted, "tasks"]}
    for place in sorted(path.glob("meta/episodes/*/*.parquet")):
        with opened(place, [*wanted, "tasks"]) as file:
            lacking = [name for name in wanted if name not in file.schema_arrow.names]
            if lacking:
                raise StoreError(f"{place.relative_to(path)} has no column {lacking[0]}")
            table = file.read(columns=[*wanted, *({"tasks"} & {*file.schema_arrow.names})]).to_pydict()
        table.setdefault("tasks", [None] * len(table["length"]))
        before = len(found["length"])
        if table["episode_index"] != list(range(before, before + len(table["episode_index"]))):
            raise StoreError(f"{place.relative_to(path)} must go on with episode {before}")
        for name, values in table.items():
            found[name] += values
    if not found["length"] or any(not isinstance(length, int) or length < 1 for length in found["length"]):
        raise StoreError("meta/episodes must hold episodes of at least one step")
    return found


def _read_known(path: Path, lengths: list[int], columns: dict[str, _Column]) -> dict[str, Any]:
    """What is known of each episode in datasets of ours: by name, a function of the episode's index."""
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
        if column is not None and column.kind != "numbers":
            packed = table[name].to_pylist()
            known[name] = lambda i, packed=packed, column=column: _picture(packed[i], column)
        elif column is not None:
            known[name] = to_numpy(table[name], column.stored_shape).reshape(len(lengths), *column.shape).__getitem__
        elif name != "length":
            known[name] = table[name].to_pylist().__getitem__
    return known


def _detect(path: Path) -> bool:
    return (path / "meta" / "info.json").is_file()


FORMAT = Format("LeRobotDataset v3", (".lerobot",), _detect, read, write)
VIDEO_FORMAT = Format("LeRobotDataset v3 with videos", (), _detect, read, write_videos)
"""The same, when it is written: images become videos."""
