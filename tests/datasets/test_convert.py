import importlib
import io
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from diffusion_policy.commands.options.dataset import FormatName
from diffusion_policy.datasets import convert as conversion
from diffusion_policy.datasets.convert import FORMATS, convert
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore

LIBRARIES = {"zarr": "zarr", "robomimic": "h5py", "lerobot": "pyarrow", "minari": "minari", "npz": "numpy"}
LIBRARIES["lerobot-video"] = "av"
NAMES = {"zarr": "x.zarr", "robomimic": "x.hdf5", "lerobot": "x.lerobot", "minari": "x-v0", "npz": "x.npz"}
NAMES["lerobot-video"] = "x.video"
WRITTEN = [name for name, form in FORMATS.items() if form.write is not None]
OTHERS = [name for name in WRITTEN if name != "zarr"]
OBSERVED = ("state", "pose", "count", "image", "touch")
ATTRIBUTES = {
    "environment": {"id": "diffusion_policy/Avoid-v0", "arguments": {"rows": 1}},
    "control_frequency": 12.5,
    "observation_keys": list(OBSERVED),
    "action_key": "action",
    "noise": 0.4,
}


def episode(steps: int, i: int, known: bool = True) -> Demonstration:
    """Rows of every type and of zero to three axes; `known`: seed, success and the final observation too."""
    rng = np.random.default_rng(i)
    observed = {
        "state": rng.normal(size=(steps + 1, 3)).astype(np.float32),
        "pose": rng.normal(size=(steps + 1, 2, 2)),
        "count": rng.integers(-(2**62), 2**62, steps + 1),
        "image": rng.integers(0, 255, (steps + 1, 4, 5, 3)).astype(np.uint8),
        "touch": rng.random((steps + 1, 1)) > 0.5,
    }
    data = {key: rows[:-1] for key, rows in observed.items()}
    data |= {"action": rng.normal(size=(steps, 2)).astype(np.float32), "next.reward": rng.random(steps)}
    final = {key: rows[-1] for key, rows in observed.items()} if known else None
    return Demonstration(data, 7 * i if known else None, ("a", "b", None)[i % 3], i % 2 == 0 if known else None, final)


def make_store(path: Path, known: bool = True, attributes: dict[str, Any] = ATTRIBUTES) -> Path:
    with EpisodeStore.create(path, attributes, ["a", "b"], sync=False) as store:
        store.append([episode(steps, i, known) for i, steps in enumerate((5, 1, 7))])
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("original") / "store.zarr")


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return shutil.copytree(original, tmp_path / "store.zarr")


def assert_same_array(a: np.ndarray, b: np.ndarray) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def assert_same_episode(a: Demonstration, b: Demonstration) -> None:
    assert (a.seed, a.mode, a.success) == (b.seed, b.mode, b.success)
    for left, right in ((a.data, b.data), (a.final or {}, b.final or {})):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_array(left[key], right[key])


def assert_same_store(a: Path, b: Path) -> None:
    left, right = EpisodeStore.open(a), EpisodeStore.open(b)
    assert (left.attributes, left.modes, left.keys) == (right.attributes, right.modes, right.keys)
    np.testing.assert_array_equal(left.episode_ends, right.episode_ends)
    for one, other in zip(left.episodes(), right.episodes(), strict=True):
        assert_same_episode(one, other)


def assert_same_tree(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Nested dicts of arrays."""
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same_tree(a[key], b[key])
        else:
            assert_same_array(np.asarray(a[key]), np.asarray(b[key]))


# Round trips


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_store_comes_back_from_every_format_as_it_was(name: str, known: bool, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[name])
    source = make_store(tmp_path / "source.zarr", known)
    there, back = tmp_path / "there" / NAMES[name], tmp_path / "back.zarr"
    heard: list[Demonstration] = []
    assert convert(source, there, target_format=name, on_episode=heard.append) == 3
    assert [len(one.data["action"]) for one in heard] == [5, 1, 7]
    assert conversion.detect(there) == name.removesuffix("-video")
    assert convert(there, back) == 3
    assert_same_store(source, back)


@pytest.mark.parametrize("name", OTHERS)
def test_a_store_of_another_tool_without_attributes_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[name])
    source = make_store(tmp_path / "source.zarr", known=False, attributes={})
    convert(source, tmp_path / NAMES[name], target_format=name)
    convert(tmp_path / NAMES[name], tmp_path / "back.zarr")
    assert_same_store(source, tmp_path / "back.zarr")


def test_a_store_comes_back_from_a_walk_through_all_formats(store: Path, tmp_path: Path) -> None:
    place = store
    for i, name in enumerate([*OTHERS, *OTHERS[::-1][1:]]):
        pytest.importorskip(LIBRARIES[name])
        following = tmp_path / str(i) / NAMES[name]
        convert(place, following, target_format=name)
        place = following
    convert(place, tmp_path / "back.zarr")
    assert_same_store(store, tmp_path / "back.zarr")


@pytest.mark.parametrize("name", OTHERS)
def test_an_action_of_another_name_keeps_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[name])
    attributes = {"observation_keys": ["state"], "action_key": "command"}
    with EpisodeStore.create(tmp_path / "source.zarr", attributes, [], sync=False) as store:
        store.append([Demonstration({"state": np.ones((2, 3)), "command": np.ones((2, 1))})])
    convert(tmp_path / "source.zarr", tmp_path / NAMES[name], target_format=name)
    convert(tmp_path / NAMES[name], tmp_path / "back.zarr")
    assert_same_store(tmp_path / "source.zarr", tmp_path / "back.zarr")


def test_a_zip_holds_the_files_of_a_store_as_they_are(store: Path, tmp_path: Path) -> None:
    convert(store, tmp_path / "x.zarr.zip")
    with zipfile.ZipFile(tmp_path / "x.zarr.zip") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    group = zarr.open_group(ZipStore(tmp_path / "x.zarr.zip", mode="r"), mode="r")
    for key in EpisodeStore.open(store).keys:
        rows = group[f"data/{key}"]
        assert isinstance(rows, zarr.Array)
        assert_same_array(np.asarray(rows[:]), EpisodeStore.open(store).read(key))
    convert(tmp_path / "x.zarr.zip", tmp_path / "back.zarr")
    assert_same_store(store, tmp_path / "back.zarr")


# robomimic


def make_robomimic(path: Path) -> Path:
    """As robomimic's own scripts write it, with twelve demos."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for i in (*range(11, -1, -1),):
            demo, steps = data.create_group(f"demo_{i}"), i + 1
            positions = rng.normal(size=(steps + 1, 3))
            pictures = rng.integers(0, 255, (steps + 1, 8, 8, 3)).astype(np.uint8)
            for key, rows in (("eef_pos", positions), ("agentview_image", pictures)):
                demo.create_dataset(f"obs/{key}", data=rows[:-1])
                demo.create_dataset(f"next_obs/{key}", data=rows[1:])
            demo.create_dataset("actions", data=rng.normal(size=(steps, 7)))
            demo.create_dataset("rewards", data=rng.normal(size=steps))
            demo.create_dataset("dones", data=np.arange(steps) == steps - 1, dtype=np.int32)
            demo.create_dataset("states", data=rng.normal(size=(steps, 9)))
            demo.attrs["num_samples"] = steps
            demo.attrs["model_file"] = "<mujoco/>"
        data.attrs["total"] = sum(range(1, 13))
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        file["mask/train"] = np.array(["demo_0", "demo_3"], dtype="S")
    return path


def tree_of(group: Any) -> dict[str, Any]:
    return {name: member[()] if hasattr(member, "dtype") else tree_of(member) for name, member in group.items()}


def test_a_robomimic_file_opens_and_comes_back_as_it_was(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = make_robomimic(tmp_path / "demo.hdf5")
    source = conversion.read(path)
    assert source.left_out == {"mask": "filter keys are not carried"}
    assert source.observation_keys == ("agentview_image", "eef_pos")
    assert source.attributes["environment"] == {"id": "Lift", "arguments": {"control_freq": 20}}
    assert source.attributes["control_frequency"] == 20
    assert [len(one.data["action"]) for one in source.episodes] == [*range(1, 13)]  # demo_10 after demo_9
    convert(path, tmp_path / "x.zarr")
    convert(tmp_path / "x.zarr", tmp_path / "back.hdf5")
    with h5py.File(path) as before, h5py.File(tmp_path / "back.hdf5") as after:
        assert_same_tree(tree_of(before["data"]), tree_of(after["data"]))
        assert after["data"].attrs["total"] == 78
        assert json.loads(after["data"].attrs["env_args"]) == json.loads(before["data"].attrs["env_args"])
        assert all(demo.attrs["num_samples"] == len(demo["actions"]) for demo in after["data"].values())


def test_a_robomimic_file_of_ours_has_what_its_loader_asks_for(store: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    convert(store, tmp_path / "x.hdf5")
    with h5py.File(tmp_path / "x.hdf5") as file:
        demo = file["data/demo_0"]
        np.testing.assert_array_equal(demo["rewards"][()], [0, 0, 0, 0, 1])  # it succeeded
        np.testing.assert_array_equal(demo["dones"][()], [0, 0, 0, 0, 1])
        np.testing.assert_array_equal(demo["next_obs/state"][:-1], demo["obs/state"][1:])
        expected = {"env_name": "diffusion_policy/Avoid-v0", "type": 2, "env_kwargs": {"rows": 1}}
        assert json.loads(file["data"].attrs["env_args"]) == expected


# LeRobot


def png(episode: int, step: int) -> bytes:
    """A picture of 8 x 8."""
    image, file = pytest.importorskip("PIL.Image"), io.BytesIO()
    image.fromarray(np.random.default_rng([episode, step]).integers(0, 256, (8, 8, 3), np.uint8)).save(
        file, "PNG", compress_level=3
    )
    return file.getvalue()


def make_lerobot(path: Path) -> Path:
    """As LeRobot's own writer lays it out: what LeRobotDataset.create, add_frame and save_episode leave behind."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    lengths, tasks = (4, 6, 3), ("push", "pull")
    scalar = {"shape": [1], "names": None}
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        "observation.grid": {"dtype": "float64", "shape": [2, 4], "names": None},
        "action": {"dtype": "float32", "shape": [2], "names": ["a", "b"]},
        "next.reward": {"dtype": "float32", **scalar},
        "next.done": {"dtype": "bool", **scalar},
        "observation.image": {"dtype": "image", "shape": [8, 8, 3], "names": ["height", "width", "channels"]},
        "note": {"dtype": "string", **scalar},
        "timestamp": {"dtype": "float32", **scalar},
        **{name: {"dtype": "int64", **scalar} for name in ("frame_index", "episode_index", "index", "task_index")},
    }
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (path / folder).mkdir(parents=True)
    rows, episodes = 0, []
    writers: dict[int, Any] = {}
    for i, steps in enumerate(lengths):
        frame = np.arange(steps)
        task = (frame > 2) * (i == 1)
        file_index = i // 2
        columns = {
            "observation.state": pa.FixedSizeListArray.from_arrays(rng.normal(size=3 * steps).astype(np.float32), 3),
            "observation.grid": pa.array(rng.normal(size=(steps, 2, 4)).tolist(), pa.list_(pa.list_(pa.float64()))),
            "action": pa.FixedSizeListArray.from_arrays(rng.normal(size=2 * steps).astype(np.float32), 2),
            "next.reward": rng.normal(size=steps).astype(np.float32),
            "next.done": frame == steps - 1,
            "observation.image": pa.array([{"bytes": png(i, step), "path": None} for step in range(steps)]),
            "note": pa.array(["hi"] * steps),
            "timestamp": (frame / 20).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(steps, i),
            "index": rows + frame,
            "task_index": task.astype(np.int64),
        }
        table = pa.table(columns)
        if file_index not in writers:
            file = path / f"data/chunk-000/file-{file_index:03d}.parquet"
            writers[file_index] = parquet.ParquetWriter(file, table.schema)
        writers[file_index].write_table(table)
        episodes.append(
            {
                "episode_index": i,
                "tasks": [tasks[k] for k in sorted({*task.tolist()})],
                "length": steps,
                "data/chunk_index": 0,
                "data/file_index": file_index,
                "dataset_from_index": rows,
                "dataset_to_index": rows + steps,
                "stats/action/min": [0.0, 0.0],
            }
        )
        rows += steps
    for writer in writers.values():
        writer.close()
    parquet.write_table(pa.Table.from_pylist(episodes), path / "meta/episodes/chunk-000/file-000.parquet")
    index = pa.table({"task_index": [0, 1], "__index_level_0__": list(tasks)})
    parquet.write_table(index, path / "meta/tasks.parquet")
    info = {
        "codebase_version": "v3.0",
        "robot_type": "arm",
        "total_episodes": 3,
        "total_frames": rows,
        "total_tasks": 2,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 20,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": features,
    }
    (path / "meta/info.json").write_text(json.dumps(info))
    (path / "meta/stats.json").write_text("{}")
    return path


def columns_of(path: Path, names: list[str]) -> dict[str, list[Any]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    tables = [parquet.read_table(file) for file in sorted(path.glob("data/*/*.parquet"))]
    return {name: [row for table in tables for row in table[name].to_pylist()] for name in names}


def test_a_lerobot_data_set_opens_and_comes_back_as_it_was(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = make_lerobot(tmp_path / "set")
    source = conversion.read(path)
    assert source.left_out == {"note": "it holds no numbers but string"}
    assert source.observation_keys == ("grid", "image", "state")
    assert source.attributes["control_frequency"] == 20
    assert source.attributes["lerobot"]["tasks"] == ["push", "pull"]
    episodes = list(source.episodes)
    assert [one.data["action"].shape for one in episodes] == [(4, 2), (6, 2), (3, 2)]
    assert {key: rows.dtype.name for key, rows in episodes[1].data.items()} == {
        "state": "float32",
        "grid": "float64",
        "image": "uint8",
        "action": "float32",
        "next.reward": "float32",
        "next.done": "bool",
        "task_index": "int64",
    }
    assert episodes[1].data["task_index"].ravel().tolist() == [0, 0, 0, 1, 1, 1]
    convert(path, tmp_path / "x.zarr")
    convert(tmp_path / "x.zarr", tmp_path / "back", target_format="lerobot")
    before, after = (json.loads((folder / "meta/info.json").read_text()) for folder in (path, tmp_path / "back"))
    for name in source.left_out:
        del before["features"][name]
    assert before == after
    assert columns_of(path, [*after["features"]]) == columns_of(tmp_path / "back", [*after["features"]])
    tasks = parquet.read_table(tmp_path / "back/meta/tasks.parquet").to_pydict()
    assert tasks == {"task_index": [0, 1], "task": ["push", "pull"]}
    names = ["episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"]
    kept = [parquet.read_table(folder / "meta/episodes", columns=names) for folder in (path, tmp_path / "back")]
    assert kept[0].to_pydict() == kept[1].to_pydict()


def test_a_lerobot_data_set_of_ours_has_the_types_that_its_features_state(store: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    convert(store, tmp_path / "x.lerobot")
    info = json.loads((tmp_path / "x.lerobot/meta/info.json").read_text())
    assert info["fps"] == 12.5
    assert info["features"]["observation.count"] == {"dtype": "int64", "shape": [1], "names": None}
    assert info["features"]["observation.pose"]["shape"] == [2, 2]
    schema = parquet.read_schema(tmp_path / "x.lerobot/data/chunk-000/file-000.parquet")
    assert {*schema.names} == {*info["features"]}
    assert str(schema.field("action").type).startswith("fixed_size_list<")
    assert schema.field("action").type.list_size == 2
    assert str(schema.field("observation.count").type) == "int64"
    pandas = json.loads(parquet.read_schema(tmp_path / "x.lerobot/meta/tasks.parquet").metadata[b"pandas"])
    assert pandas["index_columns"] == ["task"]


def test_statistics_of_a_lerobot_data_set_are_those_of_all_its_rows(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    convert(store, tmp_path / "x.lerobot")
    stats = json.loads((tmp_path / "x.lerobot/meta/stats.json").read_text())
    for key in ("state", "pose"):
        rows = EpisodeStore.open(store).read(key).astype(np.float64)
        of_key = stats[f"observation.{key}"]
        assert of_key["count"] == [13]
        for name, expected in {
            "min": rows.min(0),
            "max": rows.max(0),
            "mean": rows.mean(0),
            "std": rows.std(0),
        }.items():
            np.testing.assert_allclose(of_key[name], expected, rtol=1e-12)


def test_lerobot_data_goes_on_in_a_new_file_when_one_is_full(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    from diffusion_policy.datasets.formats import lerobot_writing

    monkeypatch.setattr(lerobot_writing, "FILE_MB", 1e-3)
    monkeypatch.setattr(lerobot_writing, "FILES_PER_CHUNK", 2)
    convert(store, tmp_path / "x.lerobot")
    files = sorted(file.relative_to(tmp_path / "x.lerobot/data") for file in tmp_path.glob("x.lerobot/data/*/*"))
    assert [str(file) for file in files] == [
        "chunk-000/file-000.parquet",
        "chunk-000/file-001.parquet",
        "chunk-001/file-000.parquet",
    ]
    convert(tmp_path / "x.lerobot", tmp_path / "back.zarr")
    assert_same_store(store, tmp_path / "back.zarr")


# Minari


def make_minari(root: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> Path:
    """As Minari's own function writes it."""
    minari = pytest.importorskip("minari")
    spaces = pytest.importorskip("gymnasium").spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    rng = np.random.default_rng(0)
    vector = spaces.Box(-2, 2, (3,), np.float32)
    inner = spaces.Dict({"grid": spaces.Box(0, 9, (2, 2), np.int64), "gear": spaces.Discrete(4)})
    buffers = []
    for i, steps in enumerate((4, 1, 6)):
        observations: Any = rng.uniform(-1, 1, (steps + 1, 3)).astype(np.float32)
        if nested:
            gears, grids = rng.integers(0, 4, steps + 1), rng.integers(0, 9, (steps + 1, 2, 2))
            observations = {"hand": observations, "room": {"grid": grids, "gear": gears}}
        buffers.append(
            EpisodeBuffer(
                seed=5 * i,
                observations=observations,
                actions=rng.normal(size=(steps, 2)),  # pyright: ignore[reportArgumentType]
                rewards=rng.normal(size=steps),  # pyright: ignore[reportArgumentType]
                terminations=np.arange(steps) == steps - 1,  # pyright: ignore[reportArgumentType]
                truncations=np.zeros(steps, bool),  # pyright: ignore[reportArgumentType]
                infos={"force": rng.normal(size=steps + 1)},
            )
        )
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of everything that is not described
        minari.create_dataset_from_buffers(
            "lab/reach-v3",
            buffer=buffers,
            observation_space=spaces.Dict({"hand": vector, "room": inner}) if nested else vector,
            action_space=spaces.Box(-9, 9, (2,), np.float64),
            author={"Ada"},
            description="reaching",
        )
    return root / "lab/reach-v3"


@pytest.mark.parametrize("nested", [True, False])
def test_a_minari_data_set_opens_and_comes_back_as_it_was(
    nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minari = pytest.importorskip("minari")
    path = make_minari(tmp_path / "minari", monkeypatch, nested)
    source = conversion.read(path)
    assert source.observation_keys == (("hand", "room.gear", "room.grid") if nested else ("observation",))
    assert source.left_out == {"infos": "those of other tools are not carried"}
    episodes = list(source.episodes)
    assert [one.seed for one in episodes] == [0, 5, 10]
    assert all(one.final is not None for one in episodes)
    assert {*episodes[0].data} == {*source.observation_keys, "action", "rewards", "terminations", "truncations"}
    convert(path, tmp_path / "x.zarr")
    convert(tmp_path / "x.zarr", tmp_path / "minari/back-v0", target_format="minari")
    before, after = minari.load_dataset("lab/reach-v3"), minari.load_dataset("back-v0")
    assert before.observation_space == after.observation_space
    assert before.action_space == after.action_space
    assert before.total_steps == after.total_steps == 11
    assert (after.storage.metadata["author"], after.storage.metadata["description"]) == ({"Ada"}, "reaching")
    for one, other in zip(before, after, strict=True):
        fields = ("observations", "actions", "rewards", "terminations", "truncations")
        assert_same_tree(*({name: getattr(episode, name) for name in fields} for episode in (one, other)))


def test_a_minari_data_set_of_ours_opens_in_minari(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    convert(store, tmp_path / "avoid-v1", target_format="minari")
    data_set = minari.load_dataset("avoid-v1")
    assert (data_set.id, data_set.total_episodes, data_set.total_steps) == ("avoid-v1", 3, 13)
    for ours, theirs in zip(EpisodeStore.open(store).episodes(), data_set, strict=True):
        assert ours.final is not None
        for key in OBSERVED:
            assert_same_array(theirs.observations[key][:-1], ours.data[key])
            assert_same_array(theirs.observations[key][-1], np.asarray(ours.final[key]))
            assert data_set.observation_space[key].contains(np.asarray(theirs.observations[key][0]))
        assert_same_array(theirs.actions, ours.data["action"])
        assert theirs.rewards.sum() == theirs.terminations.sum() == bool(ours.success)
        assert theirs.terminations[-1] != theirs.truncations[-1]


def test_seeds_of_some_episodes_only_are_no_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py")
    path = make_minari(tmp_path, monkeypatch, nested=False)
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        del file["episode_1"].attrs["seed"]
    assert [one.seed for one in conversion.read(path).episodes] == [None] * 3


def test_actions_that_are_no_box_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_minari(tmp_path, monkeypatch, nested=False)
    change_json(path / "data/metadata.json", action_space='{"type": "Discrete", "dtype": "int64", "start": 0, "n": 3}')
    with pytest.raises(StoreError, match="actions must be a Box; they are Discrete"):
        conversion.read(path)


def test_no_environment_is_made_to_read_a_minari_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_minari(tmp_path, monkeypatch, nested=False)
    spec = {"id": "x-v0", "entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "made")}}
    change_json(path / "data/metadata.json", env_spec=json.dumps(spec), observation_space=None)
    with pytest.raises(StoreError, match="has no observation_space"):
        conversion.read(path)
    assert not (tmp_path / "made").exists()


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# npz


def test_an_npz_of_plain_names_opens_and_comes_back_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "state": rng.normal(size=(9, 3)).astype(">f4"),
        "grid": np.asfortranarray(rng.normal(size=(9, 2, 2))),
        "actions": rng.normal(size=(9, 2)),
    }
    arrays |= {"episode_ends": np.array([4, 9]), "seed_of_nothing": np.arange(9)}
    np.savez_compressed(tmp_path / "x.npz", **arrays)  # pyright: ignore[reportArgumentType]
    source = conversion.read(tmp_path / "x.npz")
    assert source.observation_keys == ("grid", "seed_of_nothing", "state")
    assert [len(one.data["action"]) for one in source.episodes] == [4, 5]
    convert(tmp_path / "x.npz", tmp_path / "x.zarr")
    convert(tmp_path / "x.zarr", tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as back:
        np.testing.assert_array_equal(back["meta/episode_ends"], [4, 9])
        assert_same_array(back["data/state"], arrays["state"].astype(np.float32))
        assert_same_array(back["data/grid"], np.ascontiguousarray(arrays["grid"]))
        assert_same_array(back["data/action"], arrays["actions"])


def test_an_npz_of_ours_opens_in_numpy(store: Path, tmp_path: Path) -> None:
    convert(store, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as archive:
        for key in EpisodeStore.open(store).keys:
            assert_same_array(archive[f"data/{key}"], EpisodeStore.open(store).read(key))
        assert archive["meta/episode_seed"].tolist() == [0, 7, 14]
        assert archive["meta/episode_mode"].tolist() == [0, 1, -1]
        assert archive["meta/episode_success"].tolist() == [True, False, True]
        assert archive["meta/episode_final_pose"].shape == (3, 2, 2)
        assert json.loads(str(archive["meta/attributes"]))["attributes"] == ATTRIBUTES


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["data/state", "meta/episode_ends", "meta/episode_seed", "meta/attributes"])
def test_objects_in_an_npz_are_never_unpickled(name: str, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"meta/episode_ends": np.array([1])}
    arrays |= {key: np.ones((1, 2)) for key in ("data/action", "data/pose")}
    arrays[name] = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "x.npz", **arrays)
    if name in ("data/state", "meta/episode_seed"):
        source = conversion.read(tmp_path / "x.npz")
        assert len(list(source.episodes)) == 1
        why = source.left_out[name.removeprefix("data/")]
        assert re.search("it must hold numbers; got object|Object arrays cannot be loaded", why)
    else:
        with pytest.raises(StoreError, match="Object arrays cannot be loaded"):
            convert(tmp_path / "x.npz", tmp_path / "x.zarr")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.npz"]


def test_what_cannot_be_used_of_an_npz_is_left_out_and_named(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "action": np.ones((3, 2)),
        "actions": np.zeros(3),
        "state": np.arange(3.0),
        "data/state": np.zeros(3),
        "text": np.array(["a", "b", "c"]),
        "map": np.zeros((7, 7)),
        "none": np.zeros((3, 0)),
        "wrong": np.array([1, np.nan, 2]),
        "episode_ends": np.array([0, 2, 2, 3]),
        "meta/episode_seed": np.ones(2, np.int64),
        "meta/episode_success": np.ones(7),
        "meta/episode_note": np.ones(2),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    source = conversion.read(tmp_path / "x.npz")
    assert conversion.write(source, tmp_path / "y.npz") == 2
    assert source.remarks == ("2 of 4 episodes have no rows and are left out",)
    assert source.left_out == {
        "data/state": "another array is called state",
        "text": "it must hold numbers; got <U1",
        "map": "it has 7 rows; the last episode ends at 3",
        "none": "it has rows without numbers",
        "wrong": "it has NaN or infinity in 1 of 2 rows of an episode",
        "meta/episode_success": "it has 7 rows; there are 2 episodes",
        "meta/episode_note": "it is unknown what it says of an episode",
    }
    with np.load(tmp_path / "y.npz") as copy:
        assert {name for name in copy.files if name.startswith("data/")} == {
            "data/action",
            "data/actions",
            "data/state",
        }
        assert copy["data/state"].tolist() == [[0], [1], [2]]
        assert copy["meta/episode_seed"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"action": np.ones((3, 2))}, "there is no meta/episode_ends; the archive has action"),
        ({"episode_ends": np.array([3]), "state": np.ones((3, 2))}, "there is no action; there is state"),
        (
            {"episode_ends": np.array([3]), "action": np.ones((2, 2))},
            "action cannot be used: it has 2 rows; the last episode ends at 3",
        ),
        ({"episode_ends": np.array([2, 1]), "action": np.ones((2, 2))}, "must be whole numbers that increase"),
        ({"episode_ends": np.array([0, 0]), "action": np.ones((2, 2))}, "episode_ends has no episodes"),
        (
            {"episode_ends": np.array([2]), "action": np.array(["a", "b"])},
            "action cannot be used: it must hold numbers",
        ),
        (
            {"episode_ends": np.array([2]), "action": np.ones((2, 0))},
            "action cannot be used: it has rows without numbers",
        ),
        ({"episode_ends": np.array([2]), "action": np.ones(2)}, "there is nothing to observe"),
        (
            {"episode_ends": np.array([2]), "action": np.ones(2), "meta/attributes": np.ones(2)},
            "must be a text of JSON",
        ),
        (
            {"episode_ends": np.array([2]), "action": np.ones(2), "meta/attributes": np.array("{")},
            "cannot be read as npz archive: Expecting property name",
        ),
    ],
)
def test_an_npz_that_does_not_hold_together_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(StoreError, match=message) as error:
        convert(tmp_path / "x.npz", tmp_path / "x.zarr")
    assert str(tmp_path / "x.npz") in str(error.value)
    assert "\n" not in str(error.value)


# Strangers' files


@pytest.mark.parametrize(
    "key, name",
    [
        ("a b", "a_b"),
        ("a\\b", "a_b"),
        ("arm/left", "arm.left"),
        ("é1", "_1"),
        ("../x", None),
        ("/etc/x", None),
        ("..", None),
        (".hidden", None),
        ("-x", None),
        ("zarr.json", None),
        ("x" * 201, None),
    ],
)
def test_a_key_that_no_store_has_gets_one_name_in_the_copy_or_is_left_out(
    key: str, name: str | None, tmp_path: Path
) -> None:
    arrays: dict[str, Any] = {"action": np.ones((2, 1)), "pose": np.ones((2, 1)), "episode_ends": [2]}
    np.savez(tmp_path / "x.npz", **{f"data/{key}": np.ones((2, 1)), **arrays})
    source = conversion.read(tmp_path / "x.npz")
    assert conversion.write(source, tmp_path / "x.zarr") == 1
    assert EpisodeStore.open(tmp_path / "x.zarr").keys == tuple(sorted({"action", "pose", name} - {None}, key=str))
    if name is None:
        assert source.left_out[key].startswith("a store has no arrays of such a name")
        with pytest.raises(StoreError, match="cannot be used: a store has no arrays of such a name"):
            conversion.read(tmp_path / "x.npz", observation=[key])
    else:
        assert source.remarks == (f"renamed: {key} -> {name}",)
        assert conversion.read(tmp_path / "x.npz", observation=[name]).observation_keys == (name,)
        assert conversion.read(tmp_path / "x.npz", observation=[key]).observation_keys == (name,)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.npz", "x.zarr"]


def test_two_arrays_that_would_get_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    rows = {"a b": np.zeros((2, 1)), "a_b": np.ones((2, 1)), "a-b c": np.ones((2, 1)), "a-b?c": np.ones((2, 1))}
    np.savez(tmp_path / "x.npz", **rows, action=np.ones((2, 1)), episode_ends=[2])  # pyright: ignore[reportArgumentType]
    source = conversion.read(tmp_path / "x.npz")
    assert next(iter(source.episodes)).data["a_b"].tolist() == [[1], [1]]
    assert source.left_out == {
        "a b": "another array is called a_b, which is its name in a store",
        "a-b?c": "another array is called a-b_c, which is its name in a store",
    }


def unsafe_robomimic(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(make_robomimic(path / "x.hdf5"), "a") as file:
        for demo in file["data"].values():
            demo["obs"][".."] = demo["obs/eef_pos"][()]
    return path / "x.hdf5"


def unsafe_lerobot(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = make_lerobot(path / "set")
    for file in folder.glob("data/*/*"):
        table = parquet.read_table(file)
        parquet.write_table(table.rename_columns([n.replace("n.state", "n.../../x") for n in table.column_names]), file)
    info = folder / "meta/info.json"
    info.write_text(info.read_text().replace("observation.state", "observation.../../x"))
    return folder


def unsafe_minari(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    h5py = pytest.importorskip("h5py")
    folder = make_minari(path, monkeypatch, nested=True)
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        for group in file.values():
            group["observations"].move("hand", "..")
    metadata = folder / "data/metadata.json"
    metadata.write_text(metadata.read_text().replace("hand", ".."))
    return folder


@pytest.mark.parametrize("make", [unsafe_robomimic, unsafe_lerobot, unsafe_minari])
def test_unsafe_keys_are_left_out_in_every_format(
    make: Callable[[Path, pytest.MonkeyPatch], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    source = conversion.read(make(tmp_path / "in", monkeypatch))
    assert conversion.write(source, tmp_path / "x.npz") > 0
    assert "a store has no arrays of such a name: it begins with a letter, digit or '_'" in source.left_out.values()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "x.npz"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(name: str, store: Path, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[name])
    path = tmp_path / NAMES[name]
    convert(store, path, target_format=name)
    rng = np.random.default_rng(0)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.name != "stats.json"]  # which is not read
    for file in files:
        whole = file.read_bytes()
        flipped = bytearray(whole)
        for place in rng.integers(0, len(whole), max(3, len(whole) // 50)):
            flipped[place] ^= 0xFF
        for damaged in (b"", whole[: len(whole) // 2], bytes(flipped)):
            file.write_bytes(damaged)
            error = error_of(path, tmp_path / "back.zarr", name)
            if error is None:  # where nothing checks the numbers themselves
                assert damaged == bytes(flipped)
                shutil.rmtree(tmp_path / "back.zarr")
            else:
                assert str(path) in error
                assert "\n" not in error
                assert not (tmp_path / "back.zarr").exists()
        file.write_bytes(whole)


def error_of(source: Path, target: Path, name: str) -> str | None:
    """What convert says; None if it succeeds."""
    try:
        convert(source, target, source_format=name)
    except StoreError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file.move("data", "other"), "no known layout: read are data/demo_0 .*; it has mask, other"),
        (
            lambda file: [file["data"].pop(name) for name in [*file["data"]]],
            "there is no data/demo_0; data has nothing",
        ),
        (
            lambda file: [demo.pop("actions") for demo in file["data"].values()],
            "no demo can be used; data/demo_0: it has no actions, but dones, next_obs, obs, rewards, states",
        ),
        (
            lambda file: [demo.pop("obs") for demo in file["data"].values()],
            "there is nothing to observe; name some with --observation of: dones, rewards, states",
        ),
    ],
)
def test_a_robomimic_file_of_which_nothing_can_be_used_is_refused(
    damage: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(make_robomimic(tmp_path / "x.hdf5"), "a") as file:
        damage(file)
    with pytest.raises(StoreError, match=message):
        convert(tmp_path / "x.hdf5", tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    "damage, left_out, why",
    [
        (lambda file: file.pop("data/demo_3/actions"), "data/demo_3", "it has no actions, but dones, next_obs, obs"),
        (lambda file: empty(file, "data/demo_3"), "data/demo_3", "its actions cannot be used: it has no steps"),
        (
            lambda file: file["data/demo_2"].attrs.update(num_samples=9),
            "data/demo_2",
            "it has 3 actions; its num_samples says 9",
        ),
        (lambda file: file.pop("data/demo_5/rewards"), "rewards", "1 of 12 episodes do not have it"),
        (lambda file: file.pop("data/demo_0/rewards"), "rewards", r"it is not in those before \(demo_1\)"),
        (
            lambda file: cut(file, "data/demo_4/obs/eef_pos", 2),
            "eef_pos",
            r"it has 2 rows; the actions have 5 \(demo_4\)",
        ),
        (lambda file: texts(file, "data/demo_0/obs/words"), "words", "it holds no numbers but texts or references"),
        (lambda file: reference(file, "data/demo_0/obs/other"), "other", "it holds no numbers but texts"),
        (lambda file: compound(file, "data/demo_0/pairs"), "pairs", "it holds no numbers but texts or references"),
        (lambda file: nothing(file, "data/demo_0/none"), "none", "it has no rows of numbers"),
        (
            lambda file: elsewhere(file, "data/demo_0/obs/secret"),
            "secret",
            "its numbers lie in another file or array",
        ),
        (lambda file: virtual(file, "data/demo_0/obs/secret"), "secret", "its numbers lie in another file or array"),
        (lambda file: links(file, "data/demo_0/obs/secret"), "secret", "it is a link, which may lead out of the file"),
        (lambda file: within(file, "data/demo_0"), "self", "it is a group within itself"),
        (lambda file: huge(file, "data/demo_0/obs/huge"), "huge", r"it unpacks into 8388608 MB; at most 256 are read"),
        (lambda file: wide_chunks(file, "data/demo_0/obs/wide"), "wide", "its chunks have more than 256 MB"),
        (lambda file: filtered(file, "data/demo_0/obs/packed"), "packed", "it is packed with filter 6; known are gzip"),
        (lambda file: invalid(file, "data/demo_7/obs/eef_pos"), "eef_pos", "it has NaN or infinity in 1 of 8 rows"),
        (lambda file: other_type(file, "data/demo_6/obs/eef_pos"), "eef_pos", "its rows are .* float32; before"),
    ],
)
def test_what_cannot_be_used_of_a_robomimic_file_is_left_out_and_named(
    damage: Callable[[Any], object], left_out: str, why: str, tmp_path: Path
) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(make_robomimic(tmp_path / "x.hdf5"), "a") as file:
        damage(file)
    source = conversion.read(tmp_path / "x.hdf5")
    count = conversion.write(source, tmp_path / "x.npz")
    assert count == (11 if left_out.startswith("data/") else 12)
    assert re.match(why, source.left_out.pop(left_out))
    assert source.left_out == {"mask": "filter keys are not carried"}
    with np.load(tmp_path / "x.npz") as copy:
        expected = {"agentview_image", "eef_pos", "action", "rewards", "dones", "states"} - {left_out}
        assert {name[5:] for name in copy.files if name.startswith("data/")} == expected


def test_a_next_observation_that_does_not_fit_is_no_final_one(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(make_robomimic(tmp_path / "x.hdf5"), "a") as file:
        cut(file, "data/demo_4/next_obs/eef_pos", 2)
    assert all(
        {*one.final} == {"agentview_image"} for one in conversion.read(tmp_path / "x.hdf5").episodes if one.final
    )


def cut(file: Any, name: str, rows: int) -> None:
    kept = file[name][:rows]
    del file[name]
    file[name] = kept


def texts(file: Any, name: str) -> None:
    file[name] = ["one"]


def elsewhere(file: Any, name: str) -> None:
    file.create_dataset(name, (1, 8), np.uint8, external=[(file.filename, 0, 8)])


def huge(file: Any, name: str) -> None:
    file.create_dataset(name, (1, 2**20, 2**20), np.float64, chunks=(1, 2**10, 2**10))


def wide_chunks(file: Any, name: str) -> None:
    file.create_dataset(name, (1, 4), np.float64, chunks=(2**15, 2**11), maxshape=(None, None))


def empty(file: Any, demo: str) -> None:
    for member in ("actions", "obs/eef_pos"):
        cut(file, f"{demo}/{member}", 0)


def reference(file: Any, name: str) -> None:
    file[name] = file["data"].ref


def compound(file: Any, name: str) -> None:
    file[name] = np.zeros(1, [("a", "f4"), ("b", "i4")])


def nothing(file: Any, name: str) -> None:
    file.create_dataset(name, shape=None, dtype=np.float32)


def virtual(file: Any, name: str) -> None:
    h5py = pytest.importorskip("h5py")
    layout = h5py.VirtualLayout((1, 3), np.float64)
    layout[:] = h5py.VirtualSource("/dev/zero", "x", (1, 3))
    file.create_virtual_dataset(name, layout)


def links(file: Any, name: str) -> None:
    file[name] = pytest.importorskip("h5py").ExternalLink("/dev/zero", "x")


def within(file: Any, demo: str) -> None:
    file[f"{demo}/obs/self"] = file[demo]


def filtered(file: Any, name: str) -> None:
    file.create_dataset(name, data=np.zeros((1, 4), np.int32), chunks=(1, 4), scaleoffset=1)


def invalid(file: Any, name: str) -> None:
    file[name][3, 1] = np.inf


def other_type(file: Any, name: str) -> None:
    rows = file[name][()].astype(np.float32)
    del file[name]
    file[name] = rows


def test_lerobot_data_sets_of_older_versions_are_told_how_to_become_new(tmp_path: Path) -> None:
    path = make_lerobot(tmp_path / "set")
    change_json(path / "meta/info.json", codebase_version="v2.1")
    with pytest.raises(StoreError, match=r"it is LeRobotDataset v2\.1; v3\.0 is read: convert it first"):
        conversion.read(path)


def test_lerobot_rows_that_are_not_where_the_episodes_say_are_refused(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = make_lerobot(tmp_path / "set")
    file = path / "meta/episodes/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    place = table.column_names.index("length")
    for lengths, message in (([5, 5, 3], "episode 0 are not where"), ([4, 6, 9], "data/ ends within an episode")):
        parquet.write_table(table.set_column(place, "length", [lengths]), file)
        with pytest.raises(StoreError, match=message):
            convert(path, tmp_path / "x.zarr")


def test_what_we_knew_of_other_episodes_of_a_lerobot_data_set_is_not_taken_for_these(
    store: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    convert(store, tmp_path / "x.lerobot")
    make_store(tmp_path / "other.zarr")
    with EpisodeStore.append_to(tmp_path / "other.zarr") as other:
        other.append([episode(2, 9)])
    convert(tmp_path / "other.zarr", tmp_path / "other.lerobot")
    known = "meta/diffusion_policy.parquet"
    (tmp_path / "x.lerobot" / known).write_bytes((tmp_path / "other.lerobot" / known).read_bytes())
    with pytest.raises(StoreError, match="is of other episodes; delete it"):
        convert(tmp_path / "x.lerobot", tmp_path / "back.zarr")


# What no format has a place for


@pytest.mark.parametrize(
    "name, key, message",
    [
        ("robomimic", "next_obs", "have another use for the key 'next_obs'"),
        ("lerobot", "timestamp", "has another use for the key 'timestamp'"),
        ("lerobot", "observation.state", "would be one feature"),
    ],
)
def test_keys_that_a_format_uses_itself_are_refused(name: str, key: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[name])
    attributes = {"observation_keys": ["state"], "action_key": "action"}
    with EpisodeStore.create(tmp_path / "source.zarr", attributes, [], sync=False) as store:
        store.append([Demonstration({name: np.ones((2, 1)) for name in ("state", "action", key)})])
    with pytest.raises(StoreError, match=message):
        convert(tmp_path / "source.zarr", tmp_path / NAMES[name], target_format=name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source.zarr"]


# Files


@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_is_written_over(name: str, store: Path, tmp_path: Path) -> None:
    target = tmp_path / NAMES[name]
    target.write_text("mine")
    with pytest.raises(StoreError, match="already exists; choose another output or delete it first"):
        convert(store, target, target_format=name)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("name", WRITTEN)
def test_an_interrupted_conversion_leaves_nothing(
    name: str, error: type[BaseException], store: Path, tmp_path: Path
) -> None:
    pytest.importorskip(LIBRARIES[name])

    def interrupt(one: Demonstration) -> None:
        if one.seed == 14:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        convert(store, tmp_path / NAMES[name], target_format=name, on_episode=interrupt)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["store.zarr"]


def test_a_disk_that_is_full_leaves_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_policy.datasets.formats import npz

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(npz, "_add", full)
    with pytest.raises(StoreError, match=r"x\.npz cannot be written: .*No space left"):
        convert(store, tmp_path / "x.npz")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["store.zarr"]


def test_formats_are_told_from_content_and_suffix(store: Path, tmp_path: Path) -> None:
    assert conversion.detect(store) == "zarr"
    assert conversion.detect("https://example.com/x") == "zarr"
    convert(store, tmp_path / "x.npz")
    (tmp_path / "x.npz").rename(tmp_path / "renamed.hdf5")
    assert conversion.detect(tmp_path / "renamed.hdf5") == "npz"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("missing.zarr", "x.npz"), "no dataset at .*missing.zarr: there is no such file or folder"),
        (("notes.txt", "x.npz"), r"notes.txt is of no known format; known are zarr \(zarr store\), robomimic"),
        (
            ("store.zarr", "x"),
            "format of .* cannot be told from its name; name one of zarr, robomimic, lerobot, minari",
        ),
        (("store.zarr", "x", None, "hdf5"), "unknown format 'hdf5'; choose from zarr, robomimic, lerobot, minari, npz"),
        (("store.zarr", "x.npz", "hdf"), "unknown format 'hdf'; choose from zarr"),
        (("store.zarr", "x.zarr", "npz"), "store.zarr is no regular file"),
    ],
)
def test_what_cannot_be_told_is_said(
    arguments: tuple[str | None, ...], message: str, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    source, target, source_format, target_format = (*arguments, None, None)[:4]
    with pytest.raises(StoreError, match=message):
        convert(tmp_path / str(source), tmp_path / str(target), source_format, target_format)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "store.zarr"]


@pytest.mark.parametrize("name", ["robomimic", "lerobot", "minari"])
def test_a_library_that_is_missing_is_named(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> Any:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    needed = {"robomimic": "h5py", "lerobot": "pyarrow", "minari": "h5py"}[name]
    with pytest.raises(StoreError, match=rf"need {needed}: pip install 'diffusion-policy-toolkit\[formats\]'"):
        convert(store, tmp_path / NAMES[name], target_format=name)


def test_spaces_of_minari_are_observed_as_the_environment_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minari = pytest.importorskip("minari")
    spaces = pytest.importorskip("gymnasium").spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    joints = spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3])))
    parts = {"joints": joints, "view": spaces.Box(0, 255, (32, 40, 3), np.uint8), "word": spaces.Text(5)}
    values = np.array([[0, 2], [1, 0], [1, 1]])
    observations = {
        "joints": (np.ones((3, 2), np.float32), values),
        "view": np.full((3, 32, 40, 3), 90, np.uint8),
        "word": ["a", "b", "c"],
    }
    moves: Any = {"arm": np.ones((2, 2), np.float32), "base": np.zeros((2, 1), np.float32)}
    rewards, ended = np.zeros(2), np.array([False, True])
    buffer = EpisodeBuffer(
        observations=observations,
        actions=moves,
        rewards=rewards,  # pyright: ignore[reportArgumentType]
        terminations=ended,  # pyright: ignore[reportArgumentType]
        truncations=ended,  # pyright: ignore[reportArgumentType]
    )
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        minari.create_dataset_from_buffers(
            "mixed-v0",
            buffer=[buffer],
            observation_space=spaces.Dict(parts),
            action_space=spaces.Dict({"arm": spaces.Box(-1, 1, (2,)), "base": spaces.Box(-1, 1, (1,))}),
        )
    with pytest.raises(StoreError, match=r"there is no action; there is action\.arm, action\.base, .* with --action"):
        conversion.read(tmp_path / "mixed-v0")
    source = conversion.read(tmp_path / "mixed-v0", action=["action.arm", "action.base"])
    assert source.observation_keys == ("joints.0", "joints.1", "view")
    assert source.left_out["word"].startswith("it is a space of Text, not of numbers")
    (one,) = source.episodes
    assert one.data["joints.1"].tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]  # one-hot
    assert one.data["view"].shape == (2, 32, 40, 3)
    assert abs(one.data["view"].astype(int) - 90).max() < 3  # it was JPEG
    assert one.data["action"].tolist() == [[1, 1, 0]] * 2
    assert one.final is not None
    assert one.final["joints.1"].tolist() == [0, 1, 0, 1, 0]


def test_names_of_bad_will_stay_within_one_printable_line(tmp_path: Path) -> None:
    evil = "a\x1b[31m\nerror: all is well"
    np.savez(tmp_path / "x.npz", **{evil: np.ones(3)}, action=np.ones(2), state=np.ones(2), episode_ends=[2])  # pyright: ignore[reportArgumentType]
    for chosen in ({"observation": ["other"]}, {"observation": [evil]}, {"action": [evil]}):
        with pytest.raises(StoreError) as error:
            conversion.read(tmp_path / "x.npz", **chosen)  # pyright: ignore[reportArgumentType]
        assert str(error.value).isprintable()


def test_the_command_line_names_every_format() -> None:
    assert {*get_args(FormatName)} == FORMATS.keys()
