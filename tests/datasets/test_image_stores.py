"""How pictures lie in a store: chunks of few, files of many, and what an interrupted append leaves."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from diffusion_policy.datasets import durable, guard, guarded_store, shards, storage
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError, image_rows
from diffusion_policy.datasets.store import EpisodeStore


def pictures(count: int, seed: int, side: int = 16) -> np.ndarray:
    """A bright square that moves over a floor, (count, side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    rows = np.full((count, side, side, 3), rng.integers(60, 90, (side, side, 1)), np.uint8)
    for i, (x, y) in enumerate(rng.integers(0, side - 4, (count, 2))):
        rows[i, y : y + 4, x : x + 4] = 200, 30, 90
    return rows


def episode(length: int, seed: int, side: int = 16) -> Demonstration:
    rng = np.random.default_rng(seed)
    data = {"camera": pictures(length, seed, side), "action": rng.normal(size=(length, 2))}
    return Demonstration(data, seed, None, True, {"camera": pictures(1, seed + 100, side)[0]})


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 2 pictures of 16 x 16, and 6 in a file."""
    monkeypatch.setattr(storage, "IMAGE_CHUNK_BYTES", 2 * 768)
    monkeypatch.setattr(storage, "IMAGE_SHARD_BYTES", 6 * 768)
    monkeypatch.setattr(storage, "IMAGE_SHARD_ROWS", 1)


@pytest.mark.parametrize(
    "shape, dtype, rows, in_file",
    [
        ((96, 96, 3), np.uint8, 4, 300),
        ((96, 96, 3), np.float32, 1, 75),
        ((84, 84, 1), np.uint8, 18, 1188),
        ((224, 224, 3), np.uint8, 1, 64),
        ((480, 640, 3), np.uint8, 1, 64),
        ((1080, 1920, 3), np.uint8, 1, 10),
        ((8192, 8192, 3), np.uint8, 1, 1),
    ],
)
def test_a_chunk_holds_few_pictures_and_a_file_many(
    shape: tuple[int, ...], dtype: type, rows: int, in_file: int
) -> None:
    assert image_rows(int(np.prod(shape)) * np.dtype(dtype).itemsize) == (rows, in_file)


def test_a_million_pictures_are_some_thousand_files_and_columns_lie_as_they_did(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "store.zarr", {}, [], sync=False) as store:
        store.append([episode(3, 0, 96)])
    array = EpisodeStore.open(tmp_path / "store.zarr").arrays.raw("data/camera")
    assert (array.chunks, array.shards) == ((4, 96, 96, 3), (300, 96, 96, 3))
    assert guard.codec_names(array) == ["sharding_indexed", "bytes", "blosc", "crc32c", "bytes", "crc32c"]
    assert 10**6 / array.shards[0] < 4000
    action = EpisodeStore.open(tmp_path / "store.zarr").arrays.raw("data/action")
    assert (action.chunks, action.shards) == ((16384, 2), None)
    assert action.metadata.to_dict()["codecs"][1]["configuration"]["cname"] == "zstd"


@pytest.mark.usefixtures("small_files")
def test_pictures_are_read_as_they_were_written(tmp_path: Path) -> None:
    episodes = [episode(n, i) for i, n in enumerate((5, 1, 13, 2))]
    with EpisodeStore.create(tmp_path / "store.zarr", {}, [], sync=False) as store:
        for one in episodes:
            store.append([one])
    store, rows = EpisodeStore.open(tmp_path / "store.zarr"), np.concatenate([e.data["camera"] for e in episodes])
    np.testing.assert_array_equal(store.read("camera"), rows)
    assert store.read("camera").dtype == np.uint8
    for start in range(len(rows) - 1):
        np.testing.assert_array_equal(store.read_rows("camera", start, start + 2), rows[start : start + 2])
    finals = store.finals()["camera"]
    np.testing.assert_array_equal(finals, np.stack([e.final["camera"] for e in episodes if e.final]))
    assert len(list((tmp_path / "store.zarr" / "data" / "camera").glob("c.*"))) == 4


@pytest.mark.usefixtures("small_files")
def test_whichever_write_fails_the_pictures_that_were_committed_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = [episode(3, 0), episode(1, 1)], [episode(12, 2)], [episode(7, 3)]
    with EpisodeStore.create(tmp_path / "whole.zarr", {}, [], sync=False) as whole:
        for episodes in (first, second, third):
            whole.append(episodes)
    with EpisodeStore.create(tmp_path / "first.zarr", {}, [], sync=False) as store:
        store.append(first)
    done, files = False, 0
    while not done:
        path = shutil.copytree(tmp_path / "first.zarr", tmp_path / f"{files}.zarr")
        with EpisodeStore.append_to(path, sync=False) as store, monkeypatch.context() as patch:
            fill_disk(patch, files)
            try:
                store.append(second)
                done = True
            except OSError:
                pass
        committed = 16 if done else 4
        store = EpisodeStore.open(path)
        assert store.episode_ends[-1] == committed
        np.testing.assert_array_equal(store.read("camera"), whole.read("camera")[:committed])
        with EpisodeStore.append_to(path, sync=False) as store:
            store.append(third if done else second + third)
        assert files_of(path) == files_of(tmp_path / "whole.zarr")
        files += 1
    assert files > 10


def fill_disk(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """After so many files, nothing can be written."""
    real, left = durable.put, iter(range(files))

    def put(*arguments, **options):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(durable, "put", put)


@pytest.mark.usefixtures("small_files")
def test_a_long_append_that_was_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "store.zarr", {}, [], sync=False) as store:
        store.append([episode(3, 0)])
    before = files_of(tmp_path / "store.zarr")
    array = zarr.open_group(tmp_path / "store.zarr", mode="r+")["data/camera"]
    assert isinstance(array, zarr.Array)
    array.resize((25, 16, 16, 3))
    array[3:] = pictures(22, 5)
    assert files_of(tmp_path / "store.zarr").keys() > before.keys()
    with EpisodeStore.append_to(tmp_path / "store.zarr", sync=False) as store:
        assert store.dropped == {"data/camera": 22}
    assert files_of(tmp_path / "store.zarr") == before


@pytest.mark.usefixtures("small_files")
def test_every_bit_of_a_file_of_pictures_is_guarded(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "store.zarr", {}, [], sync=False) as store:
        store.append([episode(6, 0)])
    file = tmp_path / "store.zarr" / "data" / "camera" / "c.0.0.0.0"
    content, rows = file.read_bytes(), EpisodeStore.open(tmp_path / "store.zarr").read("camera")
    for bit in range(0, 8 * len(content), 401):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"data/camera"):
            EpisodeStore.open(tmp_path / "store.zarr").read("camera")
        with pytest.raises(StoreError, match=r"data/camera"):  # noqa: PT012  (one of the windows meets it)
            for start in range(0, 6, 2):
                EpisodeStore.open(tmp_path / "store.zarr").read_rows("camera", start, start + 2)
    file.write_bytes(content)
    np.testing.assert_array_equal(EpisodeStore.open(tmp_path / "store.zarr").read("camera"), rows)


@pytest.mark.parametrize("side", [96, 480])
def test_pictures_of_a_camera_that_was_dark_all_the_time_are_no_bomb(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_store, "ANY_STORE_BYTES", 2**18)
    dark = np.zeros((2**25 // (3 * side * side), side, side, 3), np.uint8)
    with EpisodeStore.create(tmp_path / "store.zarr", {}, [], sync=False) as store:
        store.append([Demonstration({"camera": dark, "action": np.zeros((len(dark), 1))}, 0, None, True)])
    assert not EpisodeStore.open(tmp_path / "store.zarr").read("camera").any()
    assert not EpisodeStore.open(tmp_path / "store.zarr").read_rows("camera", 5, 7).any()


def test_more_pictures_than_small_chunks_would_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_CHUNKS", 10)
    monkeypatch.setattr(storage, "IMAGE_CHUNK_BYTES", 1)
    with EpisodeStore.create(tmp_path / "store.zarr", {}, [], sync=False) as store:
        store.append([episode(12, 0, 160)])
        store.append([episode(3, 1, 160)])
    assert len(EpisodeStore.open(tmp_path / "store.zarr").read("camera")) == 15
    monkeypatch.setattr(guard, "IMAGE_CHUNK", 2**20)
    with pytest.raises(StoreError, match="has 15 chunks of some 76800 bytes; at most 10 of those are read"):
        EpisodeStore.open(tmp_path / "store.zarr").read("camera")


def blocks_of(store: EpisodeStore, key: str) -> Iterator[int]:
    """Sizes of the blocks in which an array is walked through."""
    return (stop - start for start, stop in store.block_spans(key))


def test_a_walk_through_large_pictures_holds_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EpisodeStore.create(tmp_path / "store.zarr", {}, [], sync=False) as store:
        store.append([episode(70, 0, 32)])
    opened = EpisodeStore.open(tmp_path / "store.zarr")
    assert opened.chunk_rows("camera") == 2730 - 2730 % 42
    monkeypatch.setattr("diffusion_policy.datasets.store.BLOCK_BYTES", 2**17)  # less than a file
    assert opened.chunk_rows("camera") == 42
    assert list(blocks_of(opened, "camera")) == [42, 28]


@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f4", "<i2"])
@pytest.mark.parametrize("codec", ["zstd", "lz4hc"])
def test_files_of_many_chunks_are_read_as_zarr_reads_them(tmp_path: Path, dtype: str, codec: str) -> None:
    rows = np.random.default_rng(0).integers(0, 99, (50, 8, 8, 3)).astype(dtype)
    group = zarr.create_group(tmp_path / "store.zarr")
    array = group.create_array(
        "data/camera",
        shape=rows.shape,
        dtype=dtype,
        chunks=(3, 8, 8, 3),
        shards=(24, 8, 8, 3),
        compressors=[zarr.codecs.BloscCodec(cname=codec), zarr.codecs.Crc32cCodec()],
        fill_value=7,
    )
    array[:20], array[27:] = rows[:20], rows[27:]  # the chunks between are not written
    group.create_array("data/action", data=np.zeros((50, 1)))
    group.create_array("meta/episode_ends", data=np.array([50]))
    store = EpisodeStore.open(tmp_path / "store.zarr")
    expected = np.asarray(array[:])
    assert (expected[21:24] == 7).all()
    assert shards.lies_in_shards(store.arrays.raw("data/camera"))
    for start in range(0, 50, 7):
        for stop in range(start, 51, 3):
            np.testing.assert_array_equal(store.read_rows("camera", start, stop), expected[start:stop])
    assert store.read_rows("camera", 0, 5).dtype == store.dtype("camera")


def test_a_file_of_pictures_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "store.zarr", {}, [], sync=False) as store:
        store.append([episode(6, 0)])
    file = tmp_path / "store.zarr" / "data" / "camera" / "c.0.0.0.0"
    content = file.read_bytes()
    for size in (0, 3, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(StoreError, match=r"data/camera is damaged"):
            EpisodeStore.open(tmp_path / "store.zarr").read("camera")
        with pytest.raises(StoreError, match=r"data/camera is damaged"):
            EpisodeStore.open(tmp_path / "store.zarr").read_rows("camera", 1, 3)


WRITER = """
import os, sys
import numpy as np
from diffusion_policy.datasets import storage
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore

storage.IMAGE_CHUNK_BYTES, storage.IMAGE_SHARD_BYTES, storage.IMAGE_SHARD_ROWS = 2 * 768, 6 * 768, 1

def episode(seed):
    rng = np.random.default_rng(seed)
    length = 1 + seed % 5
    frames = rng.integers(0, 256, (length, 16, 16, 3), np.uint8)
    data = {"camera": frames, "action": rng.normal(size=(length, 2))}
    return Demonstration(data, seed, None, True, {"camera": frames[0]})

def fill(path):
    store = EpisodeStore.append_to(path, False) if os.path.exists(path) else EpisodeStore.create(path, {}, [], False)
    for seed in range(len(store.episode_ends), 30):
        store.append([episode(seed)])

for path in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        fill(path.strip())
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Imports once; then appends in a process of its own to each store that is named: its id, then its exit status."""


def kill_writers(kills: int, tmp_path: Path) -> int:
    """Kill a writer of pictures again and again; returns how many kills hit one at work."""
    rng, hits = random.Random(0), 0
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        assert it.stdin is not None
        assert it.stdout is not None

        def append(path: Path, seconds: float | None) -> int:
            print(path, file=it.stdin, flush=True)
            child = int(it.stdout.readline())
            if seconds is not None:
                time.sleep(seconds)
                with contextlib.suppress(ProcessLookupError):  # it was done before
                    os.kill(child, signal.SIGKILL)
            return int(it.stdout.readline())

        assert append(tmp_path / "whole.zarr", None) == 0
        whole, known, path = EpisodeStore.open(tmp_path / "whole.zarr"), 0, tmp_path / "0.zarr"
        rows = whole.read("camera")
        for i in range(kills):
            hits += append(path, rng.uniform(0.02, 0.3)) == -signal.SIGKILL
            with contextlib.suppress(StoreError):  # it holds no episodes yet
                store = EpisodeStore.open(path)
                np.testing.assert_array_equal(store.read("camera"), rows[: store.episode_ends[-1]])
                assert len(store.episode_ends) >= known
                known = len(store.episode_ends)
            if known == 30:
                path, known = tmp_path / f"{i + 1}.zarr", 0
        assert append(path, None) == 0
        assert files_of(path) == files_of(tmp_path / "whole.zarr")
    return hits


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [5, pytest.param(150, marks=pytest.mark.slow)])
def test_whatever_moment_a_writer_of_pictures_is_killed_what_was_committed_stays(tmp_path: Path, kills: int) -> None:
    assert kill_writers(kills, tmp_path) >= kills / 3
