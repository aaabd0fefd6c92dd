"""Pictures in datasets of other formats: LeRobot's PNG and videos both ways, exactly or within what a codec loses."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from diffusion_policy.datasets import convert as conversion
from diffusion_policy.datasets.convert import convert
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats import lerobot_writing, reading
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("PIL.Image")
av = pytest.importorskip("av")

LENGTHS = 9, 14, 5
CAMERA = "observation.camera"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"
TOLERANCE = 6
"""Of a mean difference of pixels of a video, of 255."""


def film(steps: int, seed: int, shape: tuple[int, int, int] = (48, 64, 3)) -> np.ndarray:
    """A disc that moves over a smooth floor, and tells the step by where it is."""
    height, width, channels = shape
    y, x = np.mgrid[:height, :width]
    floor = (60 + 40 * np.sin(x / 9 + seed) + 30 * np.cos(y / 7))[..., None] + np.arange(channels) * 20
    frames = np.repeat(floor[None], steps, axis=0)
    for step in range(steps):
        disc = (x - width * (step + 1) / (steps + 1)) ** 2 + (y - height / 2) ** 2 < (height / 6) ** 2
        frames[step][disc] = (230, 40 + 30 * seed, 70, 128)[:channels]
    return frames.clip(0, 255).astype(np.uint8)


def make(path: Path, shape: tuple[int, int, int] = (48, 64, 3), dtype: type = np.uint8, final: bool = True) -> Path:
    rng = np.random.default_rng(0)
    attributes = {"control_frequency": 12.5, "observation_keys": ["camera", "state"], "action_key": "action"}
    with EpisodeStore.create(path, attributes, ["a", "b"], sync=False) as store:
        for seed, length in enumerate(LENGTHS):
            frames = film(length + 1, seed, shape).astype(dtype)
            data = {
                "camera": frames[:-1],
                "state": rng.normal(size=(length, 3)),
                "action": rng.normal(size=(length, 2)),
            }
            last = {"camera": frames[-1]} if final else None
            store.append([Demonstration(data, seed, "ab"[seed % 2], seed > 0, last)])
    return path


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def info_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "meta" / "info.json").read_text())


@pytest.mark.parametrize("shape", [(48, 64, 3), (17, 9, 1), (16, 16, 4)])
def test_pictures_go_to_lerobot_and_back_exactly(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    source = make(tmp_path / "a.zarr", shape)
    assert convert(source, tmp_path / "b.lerobot") == 3
    feature = info_of(tmp_path / "b.lerobot")["features"][CAMERA]
    assert feature == {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channels"]}
    convert(tmp_path / "b.lerobot", tmp_path / "c.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(source)


@pytest.mark.parametrize("shape", [(48, 64, 3), (47, 33, 3), (48, 64, 1)])
def test_videos_go_to_lerobot_and_back_within_what_the_codec_loses(
    tmp_path: Path, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_writing, "VIDEO_MB", 0 if shape[2] == 1 else 200)
    source = make(tmp_path / "a.zarr", shape)
    convert(source, tmp_path / "b.lerobot", target_format="lerobot-video")
    feature = info_of(tmp_path / "b.lerobot")["features"][CAMERA]
    assert (feature["dtype"], feature["shape"]) == ("video", list(shape))
    assert feature["info"]["video.codec"] == "h264"
    columns = parquet.read_table(tmp_path / "b.lerobot/data/chunk-000/file-000.parquet").column_names
    assert CAMERA not in columns
    convert(tmp_path / "b.lerobot", tmp_path / "c.zarr")
    before, after = EpisodeStore.open(source), EpisodeStore.open(tmp_path / "c.zarr")
    for key in ("state", "action"):
        np.testing.assert_array_equal(before.read(key), after.read(key))
    assert after.attributes == before.attributes
    assert after.read("camera").dtype == np.uint8
    difference = np.abs(before.read("camera").astype(int) - after.read("camera"))
    assert difference.mean(axis=(1, 2, 3)).max() < TOLERANCE
    neighbours = np.abs(before.read("camera")[1:].astype(int) - after.read("camera")[:-1]).mean(axis=(1, 2, 3))
    assert neighbours.min() > 1.5 * difference.mean()  # each frame is in its own place
    finals = before.finals()["camera"]
    np.testing.assert_array_equal(after.finals()["camera"], finals)  # these are exact


def test_where_the_frames_of_an_episode_lie_is_said_as_lerobot_reads_it(tmp_path: Path) -> None:
    convert(make(tmp_path / "a.zarr"), tmp_path / "b.lerobot", target_format="lerobot-video")
    table = parquet.read_table(tmp_path / "b.lerobot/meta/episodes/chunk-000/file-000.parquet").to_pydict()
    edges = np.cumsum((0, *LENGTHS)) / 12.5
    places = list(zip(table[f"videos/{CAMERA}/from_timestamp"], table[f"videos/{CAMERA}/to_timestamp"], strict=True))
    np.testing.assert_allclose(places, list(pairwise(edges)))
    with av.open(str(tmp_path / "b.lerobot" / VIDEO)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(sum(LENGTHS)) / 12.5, atol=1e-4)  # its tolerance
    stats = json.loads((tmp_path / "b.lerobot/meta/stats.json").read_text())[CAMERA]
    rows = EpisodeStore.open(tmp_path / "a.zarr").read("camera") / 255
    for name in ("min", "max", "mean", "std"):
        expected = getattr(rows, name)(axis=(0, 1, 2))[:, None, None]
        np.testing.assert_allclose(stats[name], expected, rtol=1e-6)
    assert stats["count"] == [sum(LENGTHS)]


def test_pictures_of_floats_stay_numbers(tmp_path: Path) -> None:
    source = make(tmp_path / "a.zarr", (8, 9, 3), np.float32)
    convert(source, tmp_path / "b.lerobot", target_format="lerobot-video")
    assert info_of(tmp_path / "b.lerobot")["features"][CAMERA]["dtype"] == "float32"
    convert(tmp_path / "b.lerobot", tmp_path / "c.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(source)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A dataset with a video."""
    convert(make(tmp_path / "a.zarr"), tmp_path / "b.lerobot", target_format="lerobot-video")
    return tmp_path / "b.lerobot"


def as_foreign(path: Path) -> None:
    """Without what only we write."""
    (path / lerobot_writing.HEADER).unlink()
    (path / lerobot_writing.KNOWN).unlink()


def change_info(path: Path, **changes: Any) -> None:
    info = info_of(path)
    info["features"][CAMERA] |= changes
    (path / "meta" / "info.json").write_text(json.dumps(info))


def encode(path: Path, frames: np.ndarray, rate: int = 25, codec: str = "libx264", size: int = 1) -> None:
    """Another video in the place of one."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1] * size, frames.shape[2] * size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_a_dataset_of_others_opens_with_its_videos(videos: Path, tmp_path: Path) -> None:
    as_foreign(videos)
    source = conversion.read(videos)
    assert source.observation_keys == ("camera", "state")
    assert source.attributes["control_frequency"] == 12.5
    convert(videos, tmp_path / "c.zarr")
    assert EpisodeStore.open(tmp_path / "c.zarr").shape("camera") == (48, 64, 3)
    convert(videos, tmp_path / "d.zarr", observation=["state"])
    assert EpisodeStore.open(tmp_path / "d.zarr").keys == ("action", "state")


def test_pictures_whose_channels_come_first_are_turned(tmp_path: Path) -> None:
    convert(make(tmp_path / "a.zarr", final=False), tmp_path / "b.lerobot")
    as_foreign(tmp_path / "b.lerobot")
    for names in (["channels", "height", "width"], None):
        change_info(tmp_path / "b.lerobot", shape=[3, 48, 64], names=names)
        (episode, *_) = conversion.read(tmp_path / "b.lerobot").episodes
        np.testing.assert_array_equal(episode.data["camera"], film(10, 0)[:-1])


@pytest.mark.parametrize("codec, rate", [("libsvtav1", 25), ("mpeg4", 25), ("libx264", 25)])
def test_videos_of_other_codecs_and_with_frames_that_depend_on_later_ones_are_read(
    videos: Path, codec: str, rate: int
) -> None:
    as_foreign(videos)
    frames = np.concatenate([film(length, seed, (64, 64, 3)) for seed, length in enumerate(LENGTHS)])
    encode(videos / VIDEO, np.repeat(frames, 2, axis=0), rate, codec)  # twice as many as are used
    change_info(videos, shape=[64, 64, 3])
    found = np.concatenate([episode.data["camera"] for episode in conversion.read(videos).episodes])
    difference = np.abs(found.astype(int) - frames).mean()
    assert difference < 2 * TOLERANCE
    assert difference < 0.7 * np.abs(found[1:].astype(int) - frames[:-1]).mean()  # each frame is in its own place


def test_a_video_that_is_shorter_than_its_episode_is_an_error(videos: Path, tmp_path: Path) -> None:
    encode(videos / VIDEO, np.repeat(film(15, 0), 2, axis=0), 25)
    said = (
        r"episode 1: videos/observation\.camera/chunk-000/file-000\.mp4 is shorter than its episode: 14 frames are "
        r"needed from 0\.720 s on, one every 0\.080 s; 6 were found"
    )
    with pytest.raises(StoreError, match=said):
        convert(videos, tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


def test_videos_that_cannot_be_decoded_are_errors_that_name_them(videos: Path, tmp_path: Path) -> None:
    content, place = (videos / VIDEO).read_bytes(), r"episode 0: videos/observation\.camera/chunk-000/file-000\.mp4"
    for changed, said in (
        (b"", "cannot be opened"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "cannot be opened"),
        (content[: len(content) // 2], "cannot be opened"),
        (None, "cannot be opened"),
    ):
        (videos / VIDEO).unlink(missing_ok=True)
        if changed is not None:
            (videos / VIDEO).write_bytes(changed)
        with pytest.raises(StoreError, match=f"{place} {said}"):
            convert(videos, tmp_path / "c.zarr")
    middle = content.index(b"mdat") + 4
    (videos / VIDEO).write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    with pytest.raises(StoreError, match=f"{place} (cannot be decoded|is shorter than)"):
        convert(videos, tmp_path / "c.zarr")
    shutil.rmtree(videos / "videos")
    convert(videos, tmp_path / "d.zarr", observation=["state"])


def test_a_video_of_another_size_or_an_unknown_codec_is_refused_before_it_is_decoded(
    videos: Path, tmp_path: Path
) -> None:
    encode(videos / VIDEO, film(40, 0), 25, size=2)
    with pytest.raises(StoreError, match=r"file-000\.mp4 has frames of 96 x 128; meta/info\.json says 48 x 64"):
        convert(videos, tmp_path / "c.zarr")
    encode(videos / VIDEO, film(40, 0), 25, codec="mpeg2video")
    with pytest.raises(StoreError, match=r"file-000\.mp4 is encoded with mpeg2video; known are av1, h264, hevc"):
        convert(videos, tmp_path / "c.zarr")


def test_pictures_of_an_episode_take_bounded_memory(videos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "PICTURE_BYTES", 2**16)
    said = r"the pictures of an episode would take 0 MB; at most 0 are read; choose fewer arrays \(--observation\)"
    with pytest.raises(StoreError, match=said):
        convert(videos, tmp_path / "c.zarr")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"shape": [48, 64]}, r"its pictures are (48, 64); those of a video have a height, a width and 1 or 3"),
        ({"shape": [48, 64, 4]}, r"its pictures are (48, 64, 4); those of a video have a height, a width and 1 or 3"),
        ({"shape": [48, 64, 3], "info": {"video.is_depth_map": True}}, "it is a video of depths"),
    ],
)  # fmt: skip
def test_cameras_that_cannot_be_read_are_left_out_and_named(videos: Path, changes, said: str) -> None:
    as_foreign(videos)
    change_info(videos, **changes)
    assert conversion.read(videos).left_out[CAMERA].startswith(said)


def test_names_and_places_of_videos_lead_nowhere_else(videos: Path) -> None:
    as_foreign(videos)
    info = info_of(videos)
    info["features"]["observation.../x"] = info["features"].pop(CAMERA)
    (videos / "meta" / "info.json").write_text(json.dumps(info))
    assert conversion.read(videos).left_out["../x"] == "its name is none of a folder"
    info["video_path"] = "../{video_key}.mp4"
    (videos / "meta" / "info.json").write_text(json.dumps(info))
    assert "its videos lie at '../{video_key}.mp4'; those at videos/" in conversion.read(videos).left_out["../x"]


def change_pictures(path: Path, change) -> None:
    """Other bytes of the pictures of a dataset."""
    file = path / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    column = [change(i, one["bytes"]) for i, one in enumerate(table[CAMERA].to_pylist())]
    place = table.column_names.index(CAMERA)
    parquet.write_table(table.set_column(place, CAMERA, pa.array(column, table.schema.field(CAMERA).type)), file)


def test_damaged_and_swollen_pictures_are_errors_that_name_them(tmp_path: Path) -> None:
    convert(make(tmp_path / "a.zarr"), tmp_path / "whole.lerobot")
    other = film(1, 0, (2000, 3000, 3))[0]
    big = lerobot_writing.encode_png(other)
    for change, said in (
        (lambda i, packed: {"bytes": packed[:-40] if i == 11 else packed}, "episode 1: step 2 of camera: a picture"),
        (lambda i, packed: {"bytes": b"GIF89a" if i == 3 else packed}, "episode 0: step 3 of camera: a picture"),
        (lambda i, packed: {"bytes": big if i == 3 else packed}, "a picture is 2000 x 3000 in RGB; it should be 48 x"),
    ):  # fmt: skip
        path = shutil.copytree(tmp_path / "whole.lerobot", tmp_path / "changed.lerobot", dirs_exist_ok=True)
        change_pictures(path, change)
        with pytest.raises(StoreError, match=said):
            convert(path, tmp_path / "c.zarr")


def test_pictures_in_files_of_their_own_are_left_out(tmp_path: Path) -> None:
    convert(make(tmp_path / "a.zarr"), tmp_path / "b.lerobot")
    as_foreign(tmp_path / "b.lerobot")
    change_pictures(tmp_path / "b.lerobot", lambda i, _: {"bytes": None, "path": f"images/{i}.png"})
    convert(tmp_path / "b.lerobot", tmp_path / "c.zarr")
    assert EpisodeStore.open(tmp_path / "c.zarr").keys == ("action", "state")


# Formats of arrays, in which pictures are rows like others


@pytest.mark.parametrize("name", ["x.hdf5", "x-v0", "x.npz", "x.zarr.zip"])
def test_pictures_come_back_from_every_other_format_exactly(tmp_path: Path, name: str) -> None:
    pytest.importorskip({"x.hdf5": "h5py", "x-v0": "minari"}.get(name, "numpy"))
    source = make(tmp_path / "a.zarr", (40, 48, 3))  # so large that Minari would pack them as JPEG
    convert(source, tmp_path / name, target_format="minari" if name == "x-v0" else None)
    convert(tmp_path / name, tmp_path / "c.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(source)


def test_cameras_of_maniskill_keep_their_names(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "trajectory.h5", "w") as file:
        for i, length in enumerate(LENGTHS):
            frames = film(length + 1, i, (32, 32, 3))
            file[f"traj_{i}/obs/sensor_data/base_camera/rgb"] = frames
            file[f"traj_{i}/obs/sensor_data/base_camera/depth"] = frames[..., :1].astype(np.int16)
            file[f"traj_{i}/obs/agent/qpos"] = np.zeros((length + 1, 9), np.float32)
            file[f"traj_{i}/actions"] = np.zeros((length, 8), np.float32)
    convert(tmp_path / "trajectory.h5", tmp_path / "c.zarr")
    store = EpisodeStore.open(tmp_path / "c.zarr")
    camera = "sensor_data.base_camera"
    assert store.observation_keys == ("agent.qpos", f"{camera}.depth", f"{camera}.rgb")
    np.testing.assert_array_equal(store.read(f"{camera}.rgb")[:9], film(10, 0, (32, 32, 3))[:-1])
    np.testing.assert_array_equal(store.finals()[f"{camera}.rgb"][0], film(10, 0, (32, 32, 3))[-1])
    assert store.dtype(f"{camera}.depth") == np.int16


@pytest.mark.parametrize("codec", ["imagecodecs_jpegxl", "imagecodecs_jpeg2k"])
def test_pictures_of_umi_in_a_codec_that_is_not_read_are_left_out_and_named(tmp_path: Path, codec: str) -> None:
    group = zarr.create_group(tmp_path / "umi.zarr", zarr_format=2)
    for key in ("robot0_eef_pos", "action"):
        group.create_array(f"data/{key}", data=np.zeros((50, 3), np.float32))
    for key in ("camera0_rgb", "camera1_rgb"):
        group.create_array(f"data/{key}", data=film(50, 0, (32, 32, 3)), chunks=(1, 32, 32, 3))
    group.create_array("meta/episode_ends", data=np.array([20, 50]))
    place = tmp_path / "umi.zarr/data/camera0_rgb/.zarray"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"compressor": {"id": codec, "level": 99}}))
    store = EpisodeStore.open(tmp_path / "umi.zarr")
    assert store.keys == ("action", "camera1_rgb", "robot0_eef_pos")  # its other camera is in a codec of zarr's own
    np.testing.assert_array_equal(store.read("camera1_rgb"), film(50, 0, (32, 32, 3)))
    assert store.left_out == {
        "camera0_rgb": f"is packed with the codec {codec}, which is not read; write it anew with another where that "
        "one is installed"
    }
    convert(tmp_path / "umi.zarr", tmp_path / "c.zarr")
    assert EpisodeStore.open(tmp_path / "c.zarr").keys == ("action", "camera1_rgb", "robot0_eef_pos")
    with pytest.raises(StoreError, match=f"camera0_rgb cannot be used: is packed with the codec {codec}"):
        convert(tmp_path / "umi.zarr", tmp_path / "d.zarr", observation=["camera0_rgb"])
