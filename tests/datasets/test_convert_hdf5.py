"""HDF5 of tools whose files are only read (ALOHA, ManiSkill, D4RL, Isaac Lab), and of strangers of bad will."""

import json
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_policy.datasets import convert as conversion
from diffusion_policy.datasets.convert import convert, detect, read, write
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.durable import place_of_processes
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore

h5py = pytest.importorskip("h5py")
RNG = np.random.default_rng(0)


def episodes(location: Path, **chosen: list[str]) -> list[Demonstration]:
    return list(read(location, **chosen).episodes)  # pyright: ignore[reportArgumentType]


# MimicGen and Isaac Lab: robomimic's layout, and more


def make_isaac(path: Path) -> Path:
    """As Isaac Lab Mimic writes it, with what MimicGen keeps beside the rows."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Isaac-Stack-v0", "type": 2})
        for i, steps in enumerate((4, 6)):
            demo = data.create_group(f"demo_{i}")
            demo["actions"] = RNG.normal(size=(steps, 7)).astype("f4")
            demo["obs/joint_pos"] = RNG.normal(size=(steps, 9)).astype("f4")
            demo["obs/datagen_info/object_pose/cube_1"] = RNG.normal(size=(steps, 4, 4)).astype("f4")
            demo["initial_state/robot/joint_position"] = RNG.normal(size=(1, 9))
            demo["states/robot/joint_position"] = RNG.normal(size=(steps, 9))
            demo["src_demo_inds"] = np.array([3, 1, 2])
            demo.attrs.update(num_samples=steps, success=bool(i), seed=40 + i)
    return path


def test_groups_within_a_demo_are_joined_by_dots_and_other_lengths_are_left_out(tmp_path: Path) -> None:
    source = read(make_isaac(tmp_path / "x.hdf5"))
    cube = "datagen_info.object_pose.cube_1"
    assert source.observation_keys == (cube, "joint_pos")
    assert source.left_out == {
        "initial_state.robot.joint_position": "it has 1 rows; the actions have 4 (demo_0)",
        "src_demo_inds": "it has 3 rows; the actions have 4 (demo_0)",
    }
    assert write(source, tmp_path / "x.zarr") == 2
    store = EpisodeStore.open(tmp_path / "x.zarr")
    assert store.keys == ("action", cube, "joint_pos", "states.robot.joint_position")
    assert [(one.seed, one.success) for one in store.episodes()] == [(40, False), (41, True)]
    with h5py.File(tmp_path / "x.hdf5") as file:
        np.testing.assert_array_equal(store.read(cube)[4:], file[f"data/demo_1/obs/{cube.replace('.', '/')}"])


# What is chosen, in every format


def test_what_is_named_is_all_that_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_policy.datasets.formats import hdf5

    touched: list[str] = []
    real = hdf5.File.rows
    monkeypatch.setattr(hdf5.File, "rows", lambda *given: (touched.append(given[1].name), real(*given))[1])
    source = read(make_isaac(tmp_path / "x.hdf5"), observation=["joint_pos"])
    assert [{*one.data} for one in source.episodes] == [{"joint_pos", "action"}] * 2
    assert {name.split("/", 3)[3] for name in touched} == {"obs/joint_pos", "actions"}


@pytest.mark.parametrize("target", ["x.zarr", "x.hdf5", "x.npz"])
def test_several_arrays_become_one_action_in_every_format(target: str, tmp_path: Path) -> None:
    path = make_isaac(tmp_path / "in.hdf5")
    parts = ["states.robot.joint_position", "datagen_info.object_pose.cube_1"]
    convert(path, tmp_path / target, observation=["joint_pos"], action=parts)
    ours = read(tmp_path / target)
    assert (ours.observation_keys, ours.action_key) == (("joint_pos",), "action")
    given = episodes(path)
    for one, before in zip(ours.episodes, given, strict=True):
        assert {*one.data} == {"joint_pos", "action"}
        columns = [before.data[part].reshape(len(before.data[part]), -1) for part in parts]
        np.testing.assert_array_equal(one.data["action"], np.concatenate(columns, axis=1))
    assert next(iter(read(path, action=["+".join(parts)]).episodes)).data["action"].shape == (4, 25)


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"observation": ["src_demo_inds"]}, "src_demo_inds cannot be used: it has 3 rows"),
        ({"action": ["src_demo_inds"]}, "src_demo_inds cannot be used: it has 3 rows"),
        ({"observation": ["pose"]}, "there is no pose; there is action, datagen_info"),
        ({"observation": ["action"]}, "action cannot be both observed and the action"),
        (
            {"action": ["joint_pos", "datagen_info.object_pose.cube_1"]},
            "there is nothing to observe; name some with --observation of: action, states",
        ),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_said(chosen: dict[str, list[str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=message):
        read(make_isaac(tmp_path / "x.hdf5"), **chosen)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["zarr", "npz", "robomimic", "lerobot", "minari"])
def test_a_sensor_without_numbers_is_left_out_unless_it_is_asked_for(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"lerobot": "pyarrow", "minari": "minari"}.get(name, "numpy"))
    force = np.ones((5, 6))
    force[3:] = np.nan
    rows = {"state": np.arange(5.0), "force": force, "action": np.ones(5)}
    np.savez(tmp_path / "plain.npz", **rows, episode_ends=[2, 5])  # pyright: ignore[reportArgumentType]
    there = tmp_path / "plain.npz"
    if name != "npz":  # a writer is given what no reader of ours lets through
        there = tmp_path / ("x" if name != "zarr" else "x.zarr")
        given = read(tmp_path / "plain.npz", observation=["state"])
        two = [Demonstration({key: values[part] for key, values in rows.items()}) for part in (slice(2), slice(2, 5))]
        two = [
            one._replace(data={key: values.reshape(len(values), -1) for key, values in one.data.items()}) for one in two
        ]
        attributes = {"observation_keys": ["force", "state"], "action_key": "action"}
        bad = given._replace(episodes=two, attributes=attributes, observation_keys=("force", "state"))
        writer = conversion.FORMATS[name].write
        assert writer is not None
        if name == "zarr":
            write_zarr(there, rows)
        else:
            writer(bad, there)
    source = read(there, name)
    assert write(source, tmp_path / "copy.zarr") == 2
    assert re.search("NaN or infinity", source.left_out["force"])
    assert EpisodeStore.open(tmp_path / "copy.zarr").observation_keys == ("state",)
    limited = read(there, name, ["state"])
    assert [one.data["state"].shape for one in limited.episodes] == [(2, 1), (3, 1)]
    assert limited.left_out == {}
    with pytest.raises(StoreError, match=r"'force' cannot be used: .*NaN or infinity"):
        write(read(there, name, ["force"]), tmp_path / "other.zarr")
    assert not (tmp_path / "other.zarr").exists()


def write_zarr(path: Path, rows: dict[str, np.ndarray]) -> None:
    import zarr

    group = zarr.open_group(path, mode="w")
    for key, values in rows.items():
        group.create_array(f"data/{key}", data=values)
    group.create_array("meta/episode_ends", data=np.array([2, 5]))


def test_a_flat_column_is_a_row_of_one_number(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", angle=np.arange(6.0), action=np.ones(6), episode_ends=[2, 6])
    for name in ("x.zarr", "y.hdf5", "z.npz"):
        convert(tmp_path / "x.npz", tmp_path / name)
        assert [one.data["angle"].shape for one in episodes(tmp_path / name)] == [(2, 1), (4, 1)]
        assert [one.data["action"].shape for one in episodes(tmp_path / name)] == [(2, 1), (4, 1)]


# ALOHA


def make_aloha(folder: Path, compressed: bool = False) -> Path:
    """As ACT's record_sim_episodes.py writes it; Mobile ALOHA has `base_action` too."""
    folder.mkdir()
    for i in (10, 9, 0):
        with h5py.File(folder / f"episode_{i}.hdf5", "w") as file:
            steps = 3 + i
            file.attrs.update(sim=True, compress=compressed)
            file["action"] = RNG.normal(size=(steps, 14)).astype("f4")
            file["base_action"] = RNG.normal(size=(steps, 2)).astype("f4")
            for name in ("qpos", "qvel", "effort"):
                file[f"observations/{name}"] = RNG.normal(size=(steps, 14))
            shape = (steps, 500 + i) if compressed else (steps, 4, 5, 3)
            file["observations/images/top"] = RNG.integers(0, 255, shape).astype(np.uint8)
            file["compress_len"] = np.zeros((1, 40))
    return folder


def test_a_folder_of_aloha_is_read_in_order(tmp_path: Path) -> None:
    folder = make_aloha(tmp_path / "task")
    (folder / "dataset_stats.pkl").write_bytes(b"never opened")
    assert detect(folder) == "aloha"
    source = read(folder)
    assert source.observation_keys == ("effort", "images.top", "qpos", "qvel")
    assert source.left_out == {"compress_len": "it has 1 rows; the actions have 3 (episode_0.hdf5)"}
    found = list(source.episodes)
    assert [len(one.data["action"]) for one in found] == [3, 12, 13]
    with h5py.File(folder / "episode_10.hdf5") as file:
        np.testing.assert_array_equal(found[2].data["images.top"], file["observations/images/top"])
    assert episodes(folder, action=["action", "base_action"])[0].data["action"].shape == (3, 16)
    assert detect(folder / "episode_0.hdf5") == "aloha"
    assert len(episodes(folder / "episode_0.hdf5")) == 1


def test_compressed_pictures_of_aloha_are_left_out_and_damaged_files_too(tmp_path: Path) -> None:
    folder = make_aloha(tmp_path / "task", compressed=True)
    with h5py.File(folder / "episode_9.hdf5", "a") as file:
        del file["action"]
    source = read(folder)
    assert source.observation_keys == ("effort", "qpos", "qvel")
    assert source.left_out["images.top"].startswith("its pictures are JPEG")
    assert source.left_out["episode_9.hdf5"] == "its actions cannot be used: it has no action"
    assert len(list(source.episodes)) == 2


# ManiSkill


def make_maniskill(path: Path, nested: bool = True) -> Path:
    """As ManiSkill's RecordEpisode writes it; `nested`: with observations and states in groups, as version 3."""
    described = {
        "env_info": {"env_id": "PickCube-v1", "env_kwargs": {"obs_mode": "state_dict"}, "max_episode_steps": 50},
        "episodes": [{"episode_id": 10, "episode_seed": 7}, {"episode_id": 0, "episode_seed": [1, 2]}],
    }
    path.with_suffix(".json").write_text(json.dumps(described))
    with h5py.File(path, "w") as file:
        for i in (10, 0):
            group, steps = file.create_group(f"traj_{i}", track_order=True), 3 + i
            for name in ("obs/agent/qpos", "obs/sensor_data/cam/rgb") if nested else ("obs",):
                group.create_dataset(name, data=RNG.integers(0, 99, (steps + 1, 9)), compression="gzip")
            group["env_states/actors/cube" if nested else "env_states"] = RNG.normal(size=(steps + 1, 13))
            group["actions"] = RNG.normal(size=(steps, 8)).astype("f4")
            group["success"] = np.arange(steps) == (steps - 1 if i else 0)
            for name in ("terminated", "truncated"):
                group[name] = np.zeros(steps, bool)
    return path


@pytest.mark.parametrize("nested", [True, False])
def test_trajectories_of_maniskill_are_read_with_their_final_observation(nested: bool, tmp_path: Path) -> None:
    path = make_maniskill(tmp_path / "trajectory.h5", nested)
    assert detect(path) == "maniskill"
    source = read(path)
    first = "agent.qpos" if nested else "observation"
    assert source.observation_keys == ((first, "sensor_data.cam.rgb") if nested else (first,))
    arguments = {"obs_mode": "state_dict", "max_episode_steps": 50}
    assert source.attributes["environment"] == {"id": "PickCube-v1", "arguments": arguments}
    found = list(source.episodes)
    assert [(one.seed, one.success, len(one.data["action"])) for one in found] == [(None, False, 3), (7, True, 13)]
    with h5py.File(path) as file:
        rows = file["traj_10/obs/agent/qpos" if nested else "traj_10/obs"][()]
    np.testing.assert_array_equal(found[1].data[first], rows[:-1])
    assert found[1].final is not None
    np.testing.assert_array_equal(found[1].final[first], rows[-1])
    states = "env_states.actors.cube" if nested else "env_states"
    assert found[0].data[states].shape == (3, 13)
    assert {*(found[0].final or {}), states} == {*source.observation_keys, states}


def test_a_file_of_maniskill_without_observations_says_how_to_get_them(tmp_path: Path) -> None:
    path = make_maniskill(tmp_path / "trajectory.h5")
    path.with_suffix(".json").unlink()
    with h5py.File(path, "a") as file:
        for name in [*file]:
            del file[name]["obs"]
    with pytest.raises(StoreError, match=r"nothing to observe.*replay_trajectory.*env_states\.actors\.cube"):
        read(path)
    assert episodes(path, observation=["env_states.actors.cube"])[0].final is not None


# D4RL


def make_d4rl(path: Path, **more: Any) -> Path:
    """As D4RL's own files are."""
    steps = 20
    with h5py.File(path, "w") as file:
        file.create_dataset("observations", data=RNG.normal(size=(steps, 4)).astype("f4"), compression="gzip")
        file["next_observations"] = RNG.normal(size=(steps, 4)).astype("f4")
        file["actions"] = RNG.normal(size=(steps, 2)).astype("f4")
        file["rewards"] = np.zeros(steps, "f4")
        file["terminals"] = np.arange(steps) == 4
        file["timeouts"] = np.arange(steps) == 14
        file["infos/qpos"] = RNG.normal(size=(steps, 3))
        file["metadata/algorithm"] = "SAC"
        for name, rows in more.items():
            file[name] = rows
    return path


def test_a_flat_file_is_cut_at_terminals_and_timeouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_policy.datasets.formats import d4rl

    path = make_d4rl(tmp_path / "x.hdf5", wrong=np.zeros(7))
    monkeypatch.setattr(d4rl, "BLOCK_BYTES", 6 * 8)  # a row or so at a time
    assert detect(path) == "d4rl"
    source = read(path)
    assert source.remarks == ("the last 5 steps have no end in the file; they are kept as an episode",)
    assert source.left_out == {
        "metadata": "it is not carried",
        "wrong": "it has 7 rows; the actions have 20 (the file)",
    }
    assert source.observation_keys == ("observation",)
    found = list(source.episodes)
    assert [len(one.data["action"]) for one in found] == [5, 10, 5]
    assert {*found[0].data} == {"observation", "action", "rewards", "terminals", "timeouts", "infos.qpos"}
    with h5py.File(path) as file:
        joined = np.concatenate([one.data["observation"] for one in found])
        np.testing.assert_array_equal(joined, file["observations"])
        for one, end in zip(found, (4, 14, 19), strict=True):
            assert one.final is not None
            np.testing.assert_array_equal(one.final["observation"], file["next_observations"][end])


def test_a_flat_file_without_ends_is_refused(tmp_path: Path) -> None:
    with h5py.File(make_d4rl(tmp_path / "x.hdf5"), "a") as file:
        del file["terminals"], file["timeouts"]
    with pytest.raises(StoreError, match="nothing to tell episodes by: terminals or timeouts, a number for each of 20"):
        read(tmp_path / "x.hdf5")


# Formats that are only read, and layouts of no format


@pytest.mark.parametrize("name", ["aloha", "maniskill", "d4rl"])
def test_a_format_that_is_only_read_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match="is only read; formats that are written are zarr, robomimic, lerobot, minari, npz"
    ):
        convert(make_d4rl(tmp_path / "x.hdf5"), tmp_path / "y", target_format=name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.hdf5"]


def test_another_layout_is_told_which_are_read_and_the_way_there(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["steps/pose"] = np.zeros((3, 2))
    known = r"traj_0 \(ManiSkill\), action beside observations \(ALOHA.*D4RL\); it has steps; .*write a zarr store or"
    with pytest.raises(StoreError, match=known):
        read(tmp_path / "x.hdf5")
    for name in ("robomimic", "aloha", "maniskill", "d4rl"):
        with pytest.raises(StoreError, match=r"x\.hdf5: "):
            read(tmp_path / "x.hdf5", name)


# A full disk, and what killed conversions leave


@pytest.mark.parametrize("name", ["x.hdf5", "x.minari"])
def test_a_full_disk_is_one_line_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("minari")
    np.savez(tmp_path / "x.npz", state=RNG.normal(size=(9000, 9)), action=np.ones(9000), episode_ends=[3000, 9000])
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from diffusion_policy.datasets.convert import convert\n"
        "from diffusion_policy.datasets.storage import StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # a write beyond the limit then fails, as on a full disk
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try:\n    convert(sys.argv[1], Path(sys.argv[2]))\nexcept StoreError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.npz"), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf".*{name} cannot be written: .*File too large\n", done.stdout)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.npz"]


def test_what_a_killed_conversion_left_is_gone_after_the_next(tmp_path: Path) -> None:
    ended = subprocess.run(["true"], check=False)
    assert ended.returncode == 0
    gone = next(number for number in range(2**22 - 1, 1, -1) if not Path(f"/proc/{number}").exists())
    here = place_of_processes()
    for number in (gone, os.getppid()):
        (tmp_path / f".x.npz.{here}.{number}").mkdir()
        (tmp_path / f".x.npz.{here}.{number}" / "x.npz").write_text("half")
    (tmp_path / ".x.npz.mine").write_text("of the user")
    convert(make_d4rl(tmp_path / "in.hdf5"), tmp_path / "x.npz")
    left = {f".x.npz.{here}.{os.getppid()}", ".x.npz.mine", "in.hdf5", "x.npz"}
    assert {file.name for file in tmp_path.iterdir()} == left


# Bad will: each is refused, or left out, in one line, at once, within a gigabyte


def pack_bomb(path: Path) -> Path:
    """A chunk that unpacks into 300 MB, though it should have 8 MB."""
    packed = zlib.compress(bytes(300 * 2**20), 1)
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = np.ones((2**20, 1))
        chunked = file.create_dataset("data/demo_0/obs/state", (2**20, 1), "f8", chunks=(2**20, 1), compression="gzip")
        chunked.id.write_direct_chunk((0, 0), packed)
    return path


def group_bomb(path: Path) -> Path:
    """Groups that hold themselves and each other many times over."""
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = np.ones((3, 1))
        groups = [demo.create_group(f"obs/{i}") for i in range(8)]
        for group in groups:
            for i, other in enumerate(groups):
                group[f"to{i}"] = other
    return path


def many_demos(path: Path) -> Path:
    """Thousands of demos that are all the same one."""
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = np.ones((3, 1))
        for i in range(1, 2500):
            file["data"][f"demo_{i}"] = demo
    return path


def repeated(path: Path) -> Path:
    """Two hundred demos that are one of 100 MB of nothing."""
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo.create_dataset("actions", (10**7, 1), "f8", chunks=(2**16, 1), compression="gzip")
        demo.create_dataset("obs/state", (10**7, 1), "u1", chunks=(2**16, 1), compression="gzip")
        for i in range(1, 200):
            file["data"][f"demo_{i}"] = demo
    return path


def large_members(path: Path) -> Path:
    """An npz of some hundred kB that unpacks into 280 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in (
            ("data/action.npy", (1, 35 * 10**6)),
            ("data/state.npy", (1, 1)),
            ("meta/episode_ends.npy", None),
        ):
            with archive.open(name, "w") as member:
                if shape is None:
                    np.lib.format.write_array(member, np.array([1]))
                else:
                    described = {"descr": "<f8", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(member, described)
                    for _ in range(shape[1] // 10**6 or 1):
                        member.write(bytes(8 * min(shape[1], 10**6)))
    return path


def large_rows(path: Path) -> Path:
    """A LeRobot dataset whose one row has a list of 35 million numbers, in a file of some kB."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (path / folder).mkdir(parents=True)
    numbers = pa.array(np.zeros(35 * 10**6, np.float32))
    columns = {"action": pa.ListArray.from_arrays([0, 35 * 10**6], numbers), "episode_index": [0]}
    columns["observation.state"] = pa.array([1.0], pa.float32())
    parquet.write_table(pa.table(columns), path / "data/chunk-000/file-000.parquet")
    episodes = {"episode_index": [0], "length": [1]}
    parquet.write_table(pa.table(episodes), path / "meta/episodes/chunk-000/file-000.parquet")
    features = {name: {"dtype": "float32", "shape": [1]} for name in ("action", "observation.state")}
    info = {"codebase_version": "v3.0", "fps": 10, "features": features}
    (path / "meta/info.json").write_text(json.dumps(info))
    return path


def absurd_spaces(path: Path) -> Path:
    """A Minari dataset whose spaces are of 10^12 numbers."""
    (path / "data").mkdir(parents=True)
    with h5py.File(path / "data/main_data.hdf5", "w") as file:
        group = file.create_group("episode_0")
        group["actions"], group["rewards"], group["observations"] = np.ones((2, 1)), np.ones(2), np.ones(3, int)
    box = json.dumps({"type": "Box", "dtype": "float32", "shape": [10**6, 10**6], "low": 0, "high": 1})
    spaces = {"observation_space": json.dumps({"type": "Discrete", "start": 0, "n": 10**12}), "action_space": box}
    (path / "data/metadata.json").write_text(json.dumps(spaces))
    return path


@pytest.mark.parametrize(
    "make, message",
    [
        (pack_bomb, "a chunk that unpacks into more than its 8388608 bytes"),
        (group_bomb, "there is nothing to observe .*it is a group within itself"),
        (many_demos, "more groups and arrays than its size has room for"),
        (repeated, "its rows would be 18.0 GB, more than files of its size hold"),
        pytest.param(
            large_members,
            "an episode is too large: it unpacks into 267 MB; at most 256 are read",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            large_rows, "file-000.parquet: action.* is too large in its group of rows 0", marks=pytest.mark.slow
        ),
        (absurd_spaces, r"nothing to observe \(observation: its space has the shape"),
    ],
)
def test_what_would_unpack_without_end_is_refused(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = make(tmp_path / "x")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from diffusion_policy.datasets.convert import convert\n"
        "from diffusion_policy.datasets.storage import StoreError\n"
        "try:\n    convert(sys.argv[1], Path(sys.argv[2]))\nexcept StoreError as error:\n    print(error)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "y.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    said, kilobytes = done.stdout.splitlines()
    assert re.search(message, said)
    assert str(path) in said
    assert int(kilobytes) < 700_000
    assert not (tmp_path / "y.npz").exists()


PLACES = {
    "zarr": "x.zarr.zip",
    "robomimic": "x.hdf5",
    "npz": "x.npz",
    "d4rl": "x.hdf5",
    "maniskill": "x.h5",
    "aloha": "x/episode_0.hdf5",
    "lerobot": "x/meta/info.json",
    "minari": "x/data/metadata.json",
}


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse", "folder", "empty"])
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_regular_file_of_a_sane_size_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    place = tmp_path / PLACES[name]
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "folder":
        place.mkdir()
    else:
        place.write_bytes(b"")
        os.truncate(place, 5 * 2**30 if kind == "sparse" else 0)
    location = tmp_path / PLACES[name].partition("/")[0]
    for given in (None, name):
        with pytest.raises(StoreError) as error:
            read(location, given)
        assert str(location) in str(error.value)
        assert "\n" not in str(error.value)
