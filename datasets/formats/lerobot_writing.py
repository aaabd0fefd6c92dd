"""Source → LeRobotDataset v3, whose layout `lerobot` describes. Images of bytes become PNG within the data files, which
loses nothing, or H.264 videos of many episodes each.

Knows parquet, PNG and videos.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.images import is_image
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Source, header
from diffusion_policy.datasets.formats.parquet import arrow_libraries, to_arrow
from diffusion_policy.datasets.formats.pictures import encode_png
from diffusion_policy.datasets.formats.videos import FORMATS, VideoWriter, pixel_format, video_library
from diffusion_policy.datasets.statistics import Measuring
from diffusion_policy.datasets.storage import StoreError

VERSION = "v3.0"
DEFAULTS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"} | {
    "task_index": "int64"
}
"""Columns that every dataset has."""
PREFIX = "observation."
HEADER = Path("meta/diffusion_policy.json")
KNOWN = Path("meta/diffusion_policy.parquet")
FILE = "chunk-{:03d}/file-{:03d}"
FILE_MB = 100
"""Largest size of a data file [MB] ..."""
VIDEO_MB = 200
"""... and of a video, which ends with an episode."""
FILES_PER_CHUNK = 1000
DEFAULT_FPS = 10
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def write(source: Source, path: Path) -> None:
    """Write the folder, images as PNG; raises StoreError for keys and arrays that LeRobot has no place for."""
    _write(source, path, videos=False)


def write_videos(source: Source, path: Path) -> None:
    """Write the folder, images as videos, which changes them a little; raises as `write`."""
    video_library()
    _write(source, path, videos=True)


def _write(source: Source, path: Path, videos: bool) -> None:
    writer: _Writer | None = None
    try:
        for episode in source.episodes:
            writer = writer or _Writer(source, path, episode, videos)
            writer.add(episode)
    finally:
        if writer is not None:
            writer.close()
    if writer is not None:
        writer.finish()


class _Feature(NamedTuple):
    """A key of the store as it lies in the dataset."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str
    """`image`, `video`, or that of its numbers."""

    def describe(self, names: Any, fps: float) -> dict[str, Any]:
        """As in meta/info.json."""
        if self.kind not in ("image", "video"):
            return {"dtype": self.kind, "shape": list(self.shape) or [1], "names": names}
        height, width, channels = self.shape
        of_axes = names or ["height", "width", "channels"]
        described: dict[str, Any] = {"dtype": self.kind, "shape": list(self.shape), "names": of_axes}
        if self.kind == "image":
            return described
        info = {"height": height, "width": width, "codec": "h264", "pix_fmt": pixel_format((height, width, channels))}
        info |= {"is_depth_map": False, "fps": fps, "channels": 3}
        return described | {"info": {f"video.{name}": value for name, value in info.items()} | {"has_audio": False}}


class _Writer:
    """Writes data files and videos as episodes come, and the rest in the end."""

    def __init__(self, source: Source, path: Path, first: Demonstration, videos: bool) -> None:
        self._arrow, self._parquet = arrow_libraries()
        self._source = source
        self._path = path
        self._own = source.attributes.get("lerobot", {})
        self._tasks = _tasks(source)
        self._features = {
            _feature_name(source, key): _Feature(key, rows.shape[1:], rows.dtype, _kind(rows, videos))
            for key, rows in sorted(first.data.items())
        }
        for name in self._features.keys() & DEFAULTS.keys():
            if name != "task_index" or len(self._tasks) < 2:
                raise StoreError(f"LeRobot has another use for the key {name!r}; rename it")
        if len(self._features) < len(first.data):
            raise StoreError(f"two of the keys {', '.join(sorted(first.data))} would be one feature; rename one")
        for feature in self._features.values():
            if len(feature.shape) > 5:
                raise StoreError(f"LeRobot has rows of at most 5 axes; {feature.key!r} has {len(feature.shape)}")
        fps = source.attributes.get("control_frequency", DEFAULT_FPS)
        self._fps = int(fps) if float(fps).is_integer() else float(fps)
        of_video = [name for name, feature in self._features.items() if feature.kind == "video"]
        self._videos = {name: _Videos(path, name, self._features[name].shape, self._fps) for name in of_video}
        self._measured: dict[str, Measuring | _Colours] = {}
        self._episodes: list[dict[str, Any]] = []
        self._known: dict[str, list[Any]] = {}
        self._rows = 0
        self._file: Any = None
        self._file_index = -1
        self._file_bytes = 0

    def add(self, episode: Demonstration) -> None:
        """Write the rows of an episode."""
        steps = len(episode.data[self._source.action_key])
        columns = {name: episode.data[feature.key] for name, feature in self._features.items()}
        columns |= self._indices(steps)
        if "task_index" not in self._features:
            columns["task_index"] = np.full(steps, self._task_of(episode))
        tasks = np.unique(columns["task_index"])
        if tasks[0] < 0 or tasks[-1] >= len(self._tasks):
            raise StoreError(f"task_index must be from 0 to {len(self._tasks) - 1}; got {tasks.tolist()}")
        places: dict[str, Any] = {}
        table: dict[str, Any] = {}
        for name, rows in columns.items():
            kind = self._measure(name, rows)
            if kind == "video":
                places |= self._videos[name].add(rows)
            else:
                table[name] = self._pictures(rows) if kind == "image" else to_arrow(rows)
        self._write_rows(table)
        self._episodes.append(
            {
                "episode_index": len(self._episodes),
                "tasks": [self._tasks[i] for i in tasks],
                "length": steps,
                "data/chunk_index": self._file_index // FILES_PER_CHUNK,
                "data/file_index": self._file_index % FILES_PER_CHUNK,
                **places,
                "dataset_from_index": self._rows,
                "dataset_to_index": self._rows + steps,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._rows += steps
        self._remember(episode, steps)

    def _task_of(self, episode: Demonstration) -> int:
        """Index of an episode's task: its instruction, where the tasks are instructions; without one, a task more."""
        if self._tasks[0] not in self._source.attributes.get("instructions", ()):
            return 0
        text = episode.instruction or _name_of_all(self._source)
        if text not in self._tasks:
            self._tasks.append(text)
        return self._tasks.index(text)

    def _indices(self, steps: int) -> dict[str, np.ndarray]:
        """The columns that every dataset has, but for its tasks."""
        frame = np.arange(steps)
        return {
            "timestamp": (frame / self._fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(steps, len(self._episodes)),
            "index": self._rows + frame,
        }

    def _measure(self, name: str, rows: np.ndarray) -> str:
        """Take in the rows of a column; returns its kind. Raises StoreError where they are others than before."""
        feature = self._features.get(name)
        if feature is not None and (rows.dtype, rows.shape[1:]) != (feature.dtype, feature.shape):
            raise StoreError(f"{name} must stay {list(feature.shape)} of {feature.dtype}")
        kind = "" if feature is None else feature.kind
        if kind in ("image", "video"):
            self._measured.setdefault(name, _Colours(rows.shape[-1])).add(rows)
        else:
            self._measured.setdefault(name, Measuring()).add(rows.reshape(len(rows), *(rows.shape[1:] or (1,))))
        return kind

    def _remember(self, episode: Demonstration, steps: int) -> None:
        """Keep what is known of an episode, pictures packed."""
        pictures = {feature.key for feature in self._features.values() if feature.kind in ("image", "video")}
        known: dict[str, Any] = {"length": steps, "seed": episode.seed}
        known |= {"mode": episode.mode, "success": episode.success}
        known |= {"instruction": episode.instruction} if "instructions" in self._source.attributes else {}
        for key, last in (episode.final or {}).items():
            known[f"final/{key}"] = encode_png(last) if key in pictures else last
        for name, value in known.items():
            self._known.setdefault(name, []).append(value)

    def _pictures(self, rows: np.ndarray) -> Any:
        kind = self._arrow.struct([("bytes", self._arrow.binary()), ("path", self._arrow.string())])
        return self._arrow.array([{"bytes": encode_png(row), "path": None} for row in rows], kind)

    def _write_rows(self, columns: dict[str, Any]) -> None:
        table = self._arrow.table(columns)
        if self._file is None or self._file_bytes + table.nbytes > FILE_MB * 2**20:
            self._close_data()
            self._file_index += 1
            self._file_bytes = 0
            place = FILE.format(*divmod(self._file_index, FILES_PER_CHUNK))
            file = self._path / "data" / f"{place}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._parquet.ParquetWriter(file, table.schema, compression="snappy")
        self._file.write_table(table)  # one row group an episode, as LeRobot's own writer has it
        self._file_bytes += table.nbytes

    def _close_data(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the files that are being written."""
        self._close_data()
        for videos in self._videos.values():
            videos.close()

    def finish(self) -> None:
        """Write what describes the data, when all of it is written."""
        meta = self._path / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        episodes = self._arrow.Table.from_pylist(self._episodes)
        self._parquet.write_table(episodes, meta / "episodes" / f"{FILE.format(0, 0)}.parquet")
        self._parquet.write_table(_task_table(self._arrow, self._tasks), meta / "tasks.parquet")
        _write_json(meta / "stats.json", {name: _stats(measured) for name, measured in self._measured.items()})
        _write_json(meta / "info.json", self._info())
        self._parquet.write_table(self._known_table(), self._path / KNOWN)
        columns = {name: [feature.key, list(feature.shape)] for name, feature in self._features.items()}
        _write_json(self._path / HEADER, header(self._source) | {"columns": columns})

    def _info(self) -> dict[str, Any]:
        names = self._own.get("names", {})
        features = {name: one.describe(names.get(name), self._fps) for name, one in self._features.items()}
        features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in DEFAULTS.items()}
        return {
            "codebase_version": VERSION,
            "robot_type": self._own.get("robot_type"),
            "total_episodes": len(self._episodes),
            "total_frames": self._rows,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": FILE_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": VIDEO_PATH if self._videos else None,
            "features": features,
        }

    def _known_table(self) -> Any:
        columns = {}
        for name, values in self._known.items():
            if len(values) != len(self._episodes):
                raise StoreError(f"{name} is known of some episodes only; it must be of all or none")
            if name.startswith("final/") and not isinstance(values[0], bytes):
                columns[name] = to_arrow(np.stack(values))
            elif any(value is not None for value in values):
                columns[name] = self._arrow.array(values)
        return self._arrow.table(columns)


class _Videos:
    """The videos of one camera: one file after the other, each of whole episodes."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], rate: float) -> None:
        self._path, self._name, self._rate = path, name, rate
        self._shape = shape[0], shape[1], shape[2]
        self._index = -1
        self._writer: VideoWriter | None = None

    def add(self, rows: np.ndarray) -> dict[str, Any]:
        """Append the frames of an episode; says where they lie, as meta/episodes has it."""
        if self._writer is None or self._writer.bytes > VIDEO_MB * 2**20:
            self.close()
            self._index += 1
            chunk, file = divmod(self._index, FILES_PER_CHUNK)
            place = VIDEO_PATH.format(video_key=self._name, chunk_index=chunk, file_index=file)
            self._writer = VideoWriter(self._path / place, self._shape, self._rate)
        first = self._writer.frames
        self._writer.add(rows)
        place = dict(zip(("chunk_index", "file_index"), divmod(self._index, FILES_PER_CHUNK), strict=True))
        times = {"from_timestamp": first / self._rate, "to_timestamp": self._writer.frames / self._rate}
        return {f"videos/{self._name}/{name}": value for name, value in (place | times).items()}

    def close(self) -> None:
        """Close the file that is being written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Colours:
    """How often each value of each channel occurs, from which statistics of all pixels follow."""

    def __init__(self, channels: int) -> None:
        self._counts = np.zeros((channels, 256), np.int64)
        self.frames = 0
        """That came."""

    def add(self, rows: np.ndarray) -> None:
        """Take in frames (frames, height, width, channels) uint8."""
        for counts, channel in zip(self._counts, np.moveaxis(rows, -1, 0), strict=True):
            counts += np.bincount(channel.reshape(-1), minlength=256)
        self.frames += len(rows)

    def stats(self) -> dict[str, Any]:
        """As in stats.json: of each channel, white being 1."""
        values = np.arange(256) / 255
        share = self._counts / self._counts.sum(axis=1, keepdims=True)
        mean = share @ values
        std = np.sqrt(np.maximum(0, share @ values**2 - mean**2))
        there = [np.flatnonzero(counts) for counts in self._counts]
        low, high = np.array([values[one[0]] for one in there]), np.array([values[one[-1]] for one in there])
        found = {"min": low, "max": high, "mean": mean, "std": std}
        return {name: row[:, None, None].tolist() for name, row in found.items()} | {"count": [self.frames]}


def _kind(rows: np.ndarray, videos: bool) -> str:
    """How an array lies in the dataset: `image`, `video`, or as numbers of its type."""
    if rows.dtype != np.uint8 or not is_image(rows.shape[1:]):
        return str(rows.dtype)
    return "video" if videos and rows.shape[-1] in FORMATS else "image"


def _feature_name(source: Source, key: str) -> str:
    if key == source.action_key:
        return "action"
    return f"{PREFIX}{key}" if key in source.observation_keys else key


def _tasks(source: Source) -> list[str]:
    """Texts of the tasks: several that LeRobot knew, else the instructions; where there are none, one for all."""
    tasks = source.attributes.get("lerobot", {}).get("tasks") or []
    if len(tasks) < 2:
        tasks = source.attributes.get("instructions") or tasks
    return [*tasks] or [_name_of_all(source)]


def _name_of_all(source: Source) -> str:
    """The name of the environment, as far as it is known."""
    return str(source.attributes.get("environment", {}).get("id", "demonstrations"))


def _task_table(pyarrow: Any, tasks: list[str]) -> Any:
    """A table of which pandas makes the text the index."""
    column = {"field_name": "task", "name": "task", "numpy_type": "object", "pandas_type": "unicode", "metadata": None}
    number = {"field_name": "task_index", "name": "task_index", "numpy_type": "int64", "pandas_type": "int64"}
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [number | {"metadata": None}, column]}
    table = pyarrow.table({"task_index": np.arange(len(tasks)), "task": pyarrow.array(tasks, pyarrow.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _stats(measured: Measuring | _Colours) -> dict[str, Any]:
    """As in stats.json."""
    if isinstance(measured, _Colours):
        return measured.stats()
    found = measured.result()
    arrays = {"min": found.minimum, "max": found.maximum, "mean": found.mean, "std": found.std}
    return {name: array.tolist() for name, array in arrays.items()} | {"count": [found.rows]}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4))
