import errno
import functools
import http.server
import os
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from diffusion_policy.datasets import durable
from diffusion_policy.datasets.appending import Appender
from diffusion_policy.datasets.convert import convert
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.repair import repair
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import validate

PUSHT = Path(__file__).parents[3] / "shared" / "data" / "pusht_cchi_v7_replay.zarr"


def episode(length: int, seed: int = 0, mode: str | None = "a") -> Demonstration:
    rng = np.random.default_rng(seed)
    data = {"state": rng.normal(size=(length, 3)).astype(np.float32), "action": rng.normal(size=(length, 2))}
    return Demonstration(data, seed, mode, True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three episodes."""
    path = tmp_path_factory.mktemp("original") / "store.zarr"
    with EpisodeStore.create(path, {"control_frequency": 10}, ["a", "b"]) as store:
        store.append([episode(5, 0), episode(1, 1, "b")])
        store.append([episode(7, 2, None)])
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return shutil.copytree(original, tmp_path / "store.zarr")


def test_what_is_appended_is_read(path: Path) -> None:
    store = EpisodeStore.open(path)
    assert store.keys == ("action", "state")
    assert store.episode_ends.tolist() == [5, 6, 13]
    assert store.episode_modes() == ["a", "b", None]
    assert store.attributes["control_frequency"] == 10
    for key in store.keys:
        expected = np.concatenate([episode(n, i).data[key] for i, n in enumerate((5, 1, 7))])
        np.testing.assert_array_equal(store.read(key), expected)
        assert store.read(key).dtype == expected.dtype
    seeds = store.read_meta("seed")
    assert seeds is not None
    assert seeds.tolist() == [0, 1, 2]
    assert store.read_meta("weight") is None


def test_rows_beyond_the_commit_are_not_there(path: Path) -> None:
    before = EpisodeStore.open(path).fingerprint(["state"])
    group = zarr.open_group(path, mode="r+")
    for key, extra in (("data/state", 4), ("data/action", 9), ("meta/episode_ends", 1)):
        array = group[key]
        array.resize((array.shape[0] + extra, *array.shape[1:]))  # the first write of an interrupted append
    store = EpisodeStore.open(path)
    assert len(store.episode_ends) == 3
    assert store.read("state").shape == (13, 3)
    assert store.fingerprint(["state"]) == before


def test_the_half_written_files_of_a_killed_writer_are_no_members(path: Path) -> None:
    before = EpisodeStore.open(path).fingerprint(["state"])
    for folder in (".", "data", "meta", "data/state"):
        (path / folder / "zarr.7f474bb76c9b4dc089b35f1d0f01cf85.partial").write_text('{"zarr_form')
    store = EpisodeStore.open(path)
    assert store.keys == ("action", "state")
    assert store.fingerprint(["state"]) == before
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    (path / "meta" / "episode_ends" / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"has data, meta$"):
        EpisodeStore.open(path)


def test_appending_after_an_interruption_equals_never_having_been_interrupted(path: Path, tmp_path: Path) -> None:
    group = zarr.open_group(path, mode="r+")
    group["data/state"].resize((40, 3))
    group["data/state"][13:] = 99.0
    store = EpisodeStore.append_to(path)
    assert store.dropped == {"data/state": 27}
    store.append([episode(2, 9)])
    clean = EpisodeStore.create(tmp_path / "clean.zarr", {}, ["a", "b"])
    clean.append([episode(5, 0), episode(1, 1, "b"), episode(7, 2, None), episode(2, 9)])
    assert EpisodeStore.open(path).fingerprint(["state"]) == clean.fingerprint(["state"])


def test_the_fingerprint_sees_every_number(path: Path) -> None:
    before = EpisodeStore.open(path).fingerprint(["state"])
    group = zarr.open_group(path, mode="r+")
    group["data/state"][12, 2] += 1e-3
    del group["meta/episode_crc32c"]  # which would say so
    assert EpisodeStore.open(path).fingerprint(["state"]) != before


def test_a_damaged_chunk_is_noticed(path: Path) -> None:
    chunk = next(file for file in (path / "data" / "state").glob("c.*"))
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"data/state is damaged: .*checksum"):
        EpisodeStore.open(path).read("state")


def test_nothing_is_overwritten(path: Path) -> None:
    with pytest.raises(StoreError, match="already exists"):
        EpisodeStore.create(path, {}, [])


def test_missing_and_foreign_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no dataset at .*: there is no zarr group"):
        EpisodeStore.open(tmp_path / "nothing.zarr")
    zarr.create_group(tmp_path / "other.zarr").create_array("numbers", shape=(3,), dtype="f4")
    with pytest.raises(StoreError, match=r"is no dataset of episodes.*has numbers"):
        EpisodeStore.open(tmp_path / "other.zarr")


def test_a_store_without_episodes_is_refused(tmp_path: Path) -> None:
    EpisodeStore.create(tmp_path / "empty.zarr", {}, [])
    with pytest.raises(StoreError, match="holds no episodes"):
        EpisodeStore.open(tmp_path / "empty.zarr")


@pytest.mark.parametrize("ends", [[5, 4, 13], [5, 13, 12], [-7, 5, 13]])
def test_episode_ends_that_decrease_are_refused(path: Path, ends: list[int]) -> None:
    zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = ends
    with pytest.raises(StoreError, match=r"must increase; episode .* would reach from .*; write the right ends there"):
        EpisodeStore.open(path)


@pytest.mark.parametrize(
    "ends, seeds", [([5, 5, 13], [0, 2]), ([0, 5, 13], [1, 2]), ([5, 13, 13], [0, 1]), ([0, 0, 13], [2])]
)
def test_episodes_without_rows_are_left_out_and_said(path: Path, ends: list[int], seeds: list[int]) -> None:
    group = zarr.open_group(path, mode="r+")
    group["meta/episode_ends"][:] = ends
    del group["meta/episode_crc32c"]
    store = EpisodeStore.open(path)
    assert store.episode_ends.tolist() == sorted(set(ends) - {0})
    assert [episode.seed for episode in store.episodes()] == seeds
    assert store.arrays.uncommitted() == {}
    assert f"{3 - len(seeds)} of 3 episodes have no rows and are left out" in store.remarks()[-1]
    with pytest.raises(StoreError, match=r"have no rows .*; make a copy to append to with: dataset convert"):
        EpisodeStore.append_to(path)


def test_missing_rows_are_refused(path: Path) -> None:
    zarr.open_group(path, mode="r+")["data/action"].resize((9, 2))
    with pytest.raises(StoreError, match="data/action has 9 rows; meta/episode_ends needs 13"):
        EpisodeStore.open(path).read("action")


def test_nan_is_refused_with_its_place(path: Path) -> None:
    zarr.open_group(path, mode="r+")["data/state"][8, 1] = np.nan
    with pytest.raises(StoreError, match=r"data/state has NaN or infinity in 1 rows, first in episode 2 \(row 8\)"):
        EpisodeStore.open(path).read("state")


def test_an_unknown_mode_is_refused_before_anything_is_written(path: Path) -> None:
    store = EpisodeStore.append_to(path)
    with pytest.raises(StoreError, match="knows the modes a, b; got c"):
        store.append([episode(3, 9, "c")])
    assert zarr.open_group(path, mode="r")["data/state"].shape == (13, 3)


def test_a_url_without_its_library_is_one_sentence() -> None:
    with pytest.raises(StoreError, match=r"cannot open s3://bucket/store.zarr"):
        EpisodeStore.open("s3://bucket/store.zarr")


def test_a_store_in_memory_opens_by_its_url(path: Path) -> None:
    files = {f"/store.zarr/{file.relative_to(path)}": file.read_bytes() for file in path.rglob("*") if file.is_file()}
    fsspec.filesystem("memory").pipe(files)
    store = EpisodeStore.open("memory://store.zarr")
    assert store.fingerprint(["state"]) == EpisodeStore.open(path).fingerprint(["state"])


def test_absent_keys_list_what_there_is(path: Path) -> None:
    with pytest.raises(StoreError, match="has no data/pose; it has action, state"):
        EpisodeStore.open(path).read("pose")


def test_the_published_layout_of_zarr_v2_opens_as_it_is(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "v2.zarr", zarr_format=2)
    group.create_array("data/state", data=np.arange(10, dtype=np.float32).reshape(5, 2))
    group.create_array("data/action", data=np.zeros((5, 2), np.float32))
    group.create_array("meta/episode_ends", data=np.array([2, 5]))
    store = EpisodeStore.open(tmp_path / "v2.zarr")
    assert store.episode_ends.tolist() == [2, 5]
    assert store.read("state")[4].tolist() == [8, 9]
    assert store.episode_modes() == [None, None]
    assert store.attributes == {}


@pytest.mark.skipif(not PUSHT.exists(), reason=f"the published Push-T demonstrations are not at {PUSHT}")
def test_the_published_push_t_demonstrations_open() -> None:
    store = EpisodeStore.open(PUSHT)
    assert len(store.episode_ends) == 206
    assert store.read("state").shape == (25650, 5)
    assert store.read("action").shape == (25650, 2)


# Written by one, whole or not at all


def test_only_one_can_write_at_a_time(path: Path) -> None:
    with EpisodeStore.append_to(path) as store:
        with pytest.raises(StoreError, match="is being written by another process; wait for it, or collect into"):
            EpisodeStore.append_to(path)
        assert len(EpisodeStore.open(path).episode_ends) == 3  # reading is free
        store.append([episode(2, 9)])
    assert len(EpisodeStore.append_to(path).episode_ends) == 4


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


class FullDisk:
    """From the n-th file on, nothing can be written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
        real = durable.put

        def put(*arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        self.left = files
        monkeypatch.setattr(durable, "put", put)


def test_whichever_write_fails_what_was_committed_stays_and_the_rest_can_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = [episode(5, 0), episode(1, 1, "b")], [episode(16_500, 2)], [episode(7, 3, None)]
    with EpisodeStore.create(tmp_path / "whole.zarr", {}, ["a", "b"], sync=False) as whole:
        for episodes in (first, second, third):
            whole.append(episodes)
    with EpisodeStore.create(tmp_path / "first.zarr", {}, ["a", "b"], sync=False) as store:
        store.append(first)
    done = False
    for files in range(100):
        path = shutil.copytree(tmp_path / "first.zarr", tmp_path / f"{files}.zarr")
        with EpisodeStore.append_to(path, sync=False) as store:
            with monkeypatch.context() as patch:
                FullDisk(patch, files)
                try:
                    store.append(second)
                    done = True
                except OSError:  # no space left
                    pass
            assert len(store.episode_ends) == (3 if done else 2)
        store = EpisodeStore.open(path)
        committed = 16_506 if done else 6
        assert store.episode_ends[-1] == committed
        np.testing.assert_array_equal(store.read("state"), whole.read("state")[:committed])
        with EpisodeStore.append_to(path, sync=False) as store:
            assert EpisodeStore.open(path).arrays.uncommitted() == {}
            store.append(third if done else second + third)
        assert files_of(path) == files_of(tmp_path / "whole.zarr")
        if done:
            break
    assert files > 10  # so many files are written in one append


def test_a_first_append_that_fails_leaves_an_empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EpisodeStore.create(tmp_path / "whole.zarr", {}, ["a"], sync=False) as whole:
        whole.append([episode(5)])
    for files in range(18):
        path = tmp_path / f"{files}.zarr"
        with EpisodeStore.create(path, {}, ["a"], sync=False) as store, monkeypatch.context() as patch:
            FullDisk(patch, files)
            with pytest.raises(OSError, match="No space left"):
                store.append([episode(5)])
        with pytest.raises(StoreError, match="holds no episodes yet"):
            EpisodeStore.open(path)
        with EpisodeStore.append_to(path, sync=False) as store:
            store.append([episode(5)])
        assert files_of(path) == files_of(tmp_path / "whole.zarr")


def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 2)
    with pytest.raises(OSError, match="No space left"):
        EpisodeStore.create(tmp_path / "store.zarr", {}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            Demonstration({"state": np.zeros((4, 3), np.float32)}, 9, "a", True),
            "needs float64 of shape .* in data/action",
        ),
        (
            episode(4)._replace(final={"state": np.zeros(3)}),
            "needs nothing in meta/episode_final_state",
        ),
        (Demonstration({**episode(4).data, "more": np.zeros(4)}, 9, "a", True), "needs nothing in data/more"),
        (Demonstration({**episode(4).data, "action": np.zeros((4, 3))}, 9, "a", True), r"has float64 of shape \(3,\)"),
        (Demonstration({**episode(4).data, "action": np.zeros((5, 2))}, 9, "a", True), "as many rows of each array"),
        (Demonstration({**episode(4).data, "action": np.full((4, 2), np.nan)}, 9), "finite numbers; got NaN"),
        (Demonstration({**episode(4).data, "action": np.array([["a"]] * 4)}, 9), "finite numbers; got <U1"),
        (Demonstration({}, 9), "got no arrays"),
        (episode(4, 0)._replace(seed=2**63), r"of seed 9223372036854775808: a seed is None or .* 0 to 2\*\*63 - 1"),
        (episode(4, 0)._replace(seed=-1), "of seed -1: a seed is None or a whole number from 0"),
        (episode(4, 0)._replace(seed=1.5), "of seed 1.5: a seed is None or a whole number from 0"),  # pyright: ignore[reportArgumentType]
        (Demonstration({**episode(4).data, "action": np.zeros((4, 0))}, 9), "finite numbers; got no numbers"),
    ],
)
def test_episodes_that_do_not_fit_are_refused_before_anything_is_written(
    path: Path, wrong: Demonstration, message: str
) -> None:
    before = files_of(path)
    with EpisodeStore.append_to(path) as store, pytest.raises(StoreError, match=message):
        store.append([episode(3), wrong])
    assert files_of(path) == before


def test_many_small_episodes_do_not_become_many_files(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "store.zarr", {}, ["a"]) as store:
        store.append([episode(3, seed) for seed in range(2000)])
    assert len(files_of(tmp_path / "store.zarr")) < 20
    assert max(len(content) for content in files_of(tmp_path / "store.zarr").values()) < 200_000


def test_a_store_of_a_later_version_is_refused(path: Path) -> None:
    group = zarr.open_group(path, mode="r+")
    group.attrs["format_version"] = 3
    with pytest.raises(StoreError, match="has format version 3; this package reads 1 to 2"):
        EpisodeStore.open(path)


def test_stores_of_others_are_not_appended_to(path: Path, tmp_path: Path) -> None:
    zarr.open_group(path, mode="r+").attrs["format"] = "theirs"
    with pytest.raises(StoreError, match="was not written by this toolkit; copy it with: dataset convert"):
        EpisodeStore.append_to(path)
    zarr.create_group(tmp_path / "v2.zarr", zarr_format=2)
    with pytest.raises(StoreError, match="can only be read"):
        EpisodeStore.append_to(tmp_path / "v2.zarr")


# Read in parts and from elsewhere


def test_episodes_come_one_after_the_other_or_as_they_are_asked_for(path: Path) -> None:
    store = EpisodeStore.open(path)
    everything = list(store.episodes())
    for found, (length, seed, mode) in zip(everything, ((5, 0, "a"), (1, 1, "b"), (7, 2, None)), strict=True):
        expected = episode(length, seed, mode)
        assert found[1:] == expected[1:]
        for key, rows in expected.data.items():
            np.testing.assert_array_equal(found.data[key], rows)
    assert [found.seed for found in store.episodes([2, 0, 1])] == [2, 0, 1]


def test_final_observations_are_kept(tmp_path: Path) -> None:
    final = {"state": np.array([1.0, 2.0, 3.0], np.float32)}
    with EpisodeStore.create(tmp_path / "store.zarr", {}, ["a"]) as store:
        store.append([episode(4)._replace(final=final), episode(2)._replace(final=final)])
    for found in EpisodeStore.open(tmp_path / "store.zarr").episodes():
        assert found.final is not None
        np.testing.assert_array_equal(found.final["state"], final["state"])


def zip_of(store: Path, folder: str) -> Path:
    path = store.with_suffix(".zarr.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in store.rglob("*"):
            if file.is_file():
                archive.write(file, Path(folder) / file.relative_to(store))
    return path


@pytest.mark.parametrize("folder", [".", "dataset/store.zarr"])
def test_a_zip_opens_wherever_the_store_lies_in_it(path: Path, folder: str) -> None:
    store = EpisodeStore.open(zip_of(path, folder))
    assert store.fingerprint(["state"]) == EpisodeStore.open(path).fingerprint(["state"])
    assert [episode.seed for episode in store.episodes()] == [0, 1, 2]
    with pytest.raises(StoreError, match="can only be read"):
        EpisodeStore.append_to(path.with_suffix(".zarr.zip"))


@pytest.fixture
def server(tmp_path: Path):
    """A web server for the folder of `path`; gives its address."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args) -> None:
        pass

    def list_directory(self, path):
        if type(self).lists:
            return super().list_directory(path)
        self.send_error(404)
        return None

    lists = True


@pytest.mark.parametrize("lists", [True, False])
def test_a_web_server_is_read_whether_it_lists_folders_or_not(
    path: Path, server: str, lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(QuietHandler, "lists", lists)
    zarr.open_group(path, mode="r+").attrs["observation_keys"] = ["state"]
    store = EpisodeStore.open(f"{server}/store.zarr")
    assert store.keys == ("action", "state")
    assert store.fingerprint(["state"]) == EpisodeStore.open(path).fingerprint(["state"])
    assert store.episode_modes() == ["a", "b", None]
    zip_of(path, ".")
    assert EpisodeStore.open(f"{server}/store.zarr.zip").keys == ("action", "state")


def test_a_place_that_cannot_be_reached_is_one_sentence(server: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(StoreError, match=r"no dataset at .*: there is no zarr group"):
        EpisodeStore.open(f"{server}/nothing.zarr")
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:1/x\.zarr.*Cannot connect to host"):
        EpisodeStore.open("http://127.0.0.1:1/x.zarr")


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    web = pytest.importorskip("diffusion_policy.datasets.web", exc_type=ImportError)
    monkeypatch.setattr(web, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"http://.* was silent for 0.3 s"):
            EpisodeStore.open(f"http://127.0.0.1:{silent.getsockname()[1]}/store.zarr")
        assert time.monotonic() - started < 10


# What must not be appended to, or made


def test_a_commit_of_which_only_the_second_chunk_was_written_is_none(tmp_path: Path) -> None:
    ends = np.concatenate([np.arange(1, 16_383), [-1, -1, 16_385, 16_386]])  # the chunk ends after 16,384
    path = tmp_path / "store.zarr"
    with EpisodeStore.create(path, {}, ["a"]) as store:
        store.append([episode(1, i) for i in range(16_386)])
    before = EpisodeStore.open(path).episode_ends
    zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = ends
    assert len(EpisodeStore.open(path).episode_ends) == 16_382
    with EpisodeStore.append_to(path) as store:
        store.append([episode(1, i) for i in range(16_382, 16_386)])
    np.testing.assert_array_equal(EpisodeStore.open(path).episode_ends, before)


def test_a_store_that_has_lost_rows_is_not_appended_to(path: Path) -> None:
    zarr.open_group(path, mode="r+")["data/state"].resize((9, 3))
    with pytest.raises(StoreError, match="data/state has 9 rows; meta/episode_ends needs 13"):
        EpisodeStore.append_to(path)


def test_links_that_lead_out_of_a_store_are_not_followed_in_writing(path: Path, tmp_path: Path) -> None:
    before = files_of(path)
    evil = tmp_path / "evil.zarr"
    with EpisodeStore.create(evil, {}, ["a"]) as store:
        store.append([episode(3)])
    shutil.rmtree(evil / "data" / "state")
    (evil / "data" / "state").symlink_to(path / "data" / "state")
    with pytest.raises(StoreError, match="holds links"):
        EpisodeStore.append_to(evil)
    assert files_of(path) == before


@pytest.mark.parametrize(
    "name, attributes, message",
    [
        ("x.zarr.zip", {}, "cannot be appended to"),
        ("x.zarr", {"control_frequency": 0}, r"the attribute control_frequency must be a rate above 0 \[Hz\]; got 0"),
        ("x.zarr", {"angles": {"state": "4"}}, "the attribute angles must be lists of columns by key"),
        ("x.zarr", {"mine": np.float32(1)}, "attributes must be JSON"),
        ("x.zarr", {"format": "x"}, "the attribute format is the store's own; give it another name"),
        ("x.zarr", {"format_version": 7}, "the attribute format_version is the store's own"),
        ("x.zarr", {"modes": ["a"]}, "the attribute modes is the store's own"),
    ],
)
def test_a_store_that_could_not_be_used_is_not_made(tmp_path: Path, name: str, attributes: dict, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        EpisodeStore.create(tmp_path / name, attributes, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["zarr.json", ".hidden", "a/b", "", "x" * 300, "a b"])
def test_keys_that_are_no_names_are_refused(tmp_path: Path, key: str) -> None:
    with (
        EpisodeStore.create(tmp_path / "store.zarr", {}, []) as store,
        pytest.raises(StoreError, match="a key is made of"),
    ):
        store.append([Demonstration({key: np.zeros((3, 1)), "action": np.zeros((3, 1))})])


def test_a_key_may_look_like_a_temporary_file(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "store.zarr", {}, []) as store:
        store.append([Demonstration({"x.partial": np.zeros((3, 1)), "action": np.zeros((3, 1))})])
    assert EpisodeStore.open(tmp_path / "store.zarr").keys == ("action", "x.partial")


def test_dropping_a_tail_keeps_chunks_that_hold_nothing_but_zeros(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "store.zarr", {}, ["a"]) as store:
        zeros = {key: np.zeros((4, 2), np.int64) for key in ("state", "action")}
        store.append([Demonstration(zeros, 0, "a", False)])
    before = files_of(tmp_path / "store.zarr")
    group = zarr.open_group(tmp_path / "store.zarr", mode="r+")
    for path in ("data/state", "data/action", "meta/episode_seed", "meta/episode_mode", "meta/episode_success"):
        array = group[path]
        array.resize((array.shape[0] + 3, *array.shape[1:]))
    EpisodeStore.append_to(tmp_path / "store.zarr").close()
    assert files_of(tmp_path / "store.zarr") == before
    assert (EpisodeStore.open(tmp_path / "store.zarr").read("state") == 0).all()


def test_a_first_append_killed_before_an_array_was_one_can_be_made_again(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        EpisodeStore.create(tmp_path / f"{name}.zarr", {}, ["a"]).close()
    (tmp_path / "killed.zarr" / "data" / "state").mkdir()  # as zarr makes it
    (tmp_path / "killed.zarr" / "data" / "state" / "zarr.7f474bb76c9b4dc089b35f1d0f01cf85.partial").write_text("{")
    for name in ("whole", "killed"):
        with EpisodeStore.append_to(tmp_path / f"{name}.zarr") as store:
            store.append([episode(5)])
    assert files_of(tmp_path / "killed.zarr") == files_of(tmp_path / "whole.zarr")


# Checksums that know their array and their place


def two_chunks(path: Path, seed: int = 0) -> Path:
    """A store whose arrays have chunks of equal shape, two of each."""
    rng = np.random.default_rng(seed)
    with EpisodeStore.create(path, {}, ["a", "b"], sync=False) as store:
        for i in range(2):
            data = {key: rng.normal(size=(16_384, 2)).astype("f4") for key in ("x", "y", "action")}
            store.append([Demonstration(data, i, "ab"[i], True, {"x": rng.normal(size=2)})])
    return path


def exchange(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("place", ["data/y/c.0.0", "data/x/c.1.0", "../other.zarr/data/x/c.0.0"])
def test_whole_chunks_in_the_wrong_place_are_noticed(tmp_path: Path, place: str) -> None:
    path = two_chunks(tmp_path / "s.zarr")
    two_chunks(tmp_path / "other.zarr", 1)
    exchange(path / "data/x/c.0.0", path / place)
    said = r"data/x: rows of episode 0 are not those that were written"
    with pytest.raises(StoreError, match=said):
        EpisodeStore.open(path).fingerprint(["x"])
    with pytest.raises(StoreError, match=r"rows of episode 0 are not those that were written"):
        list(EpisodeStore.open(path).episodes())
    EpisodeStore.open(path).fingerprint([])  # of the action alone, which is whole
    texts = [f"{finding.path}: {finding.what}" for finding in validate(path) if finding.serious]
    assert any(text.startswith(said) for text in texts)
    assert len(texts) == (2 if place.startswith("data/y") else 1), texts


def test_what_is_known_of_an_episode_is_checked_too(tmp_path: Path) -> None:
    path = two_chunks(tmp_path / "s.zarr")
    assert validate(path) == []
    group = zarr.open_group(path, mode="r+")
    for name, value in (("seed", 7), ("success", 0), ("mode", -1), ("final_x", 1.0)):
        before = group[f"meta/episode_{name}"][1]
        group[f"meta/episode_{name}"][1] = value
        (finding,) = validate(path)
        assert finding.what == "what is known of 1 episodes, first of episode 1, is not what was written"
        group[f"meta/episode_{name}"][1] = before
    del group["meta/episode_crc32c"]
    (finding,) = validate(path)
    assert finding.path == "meta/episode_crc32c"
    assert finding.what.startswith("is missing")


def test_a_store_whose_checksums_are_of_other_arrays_is_read_and_not_appended_to(tmp_path: Path) -> None:
    path = two_chunks(tmp_path / "s.zarr")
    zarr.open_group(path, mode="r+").create_array("data/mine", data=np.ones((2 * 16_384, 1)))
    assert EpisodeStore.open(path).keys == ("action", "mine", "x", "y")
    assert len(list(EpisodeStore.open(path).episodes())) == 2
    texts = [finding.what for finding in validate(path) if finding.path == "meta/episode_crc32c"]
    assert "of other arrays than those in data/" in texts[0]
    with pytest.raises(StoreError, match=r"of other arrays .*; make a copy to append to with: dataset convert"):
        EpisodeStore.append_to(path)


def test_a_foreign_array_of_the_name_of_our_checksums_is_none(tmp_path: Path) -> None:
    path = umi_like(tmp_path / "s.zarr")
    group = zarr.open_group(path, mode="r+")
    group.create_array("meta/episode_crc32c", data=np.zeros((3, 5), np.uint32))
    group.attrs["format_version"] = 2
    assert len(list(EpisodeStore.open(path).episodes())) == 3


def test_a_store_of_version_1_is_read_and_goes_on_as_one(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    with EpisodeStore.create(path, {}, ["a"]) as store:
        store.append([episode(5)])
    group = zarr.open_group(path, mode="r+")
    group.attrs["format_version"] = 1
    del group["meta/episode_crc32c"]
    with EpisodeStore.append_to(path) as store:
        store.append([episode(7, 1)])
    assert [found.seed for found in EpisodeStore.open(path).episodes()] == [0, 1]
    assert not (path / "meta" / "episode_crc32c").exists()
    (note,) = (finding for finding in validate(path) if finding.path == "meta/episode_crc32c")
    assert (note.serious, "a copy has them: dataset convert" in note.what) == (False, True)
    assert convert(path, tmp_path / "copy.zarr") == 2
    assert EpisodeStore.open(tmp_path / "copy.zarr").checksums().keys() == {"action", "state", "meta"}


# Several arrays as one, and arrays that cannot be used


def umi_like(path: Path) -> Path:
    """As stores of UMI: no `action`, poses instead, and pictures under a codec that only another library knows."""
    rng = np.random.default_rng(0)
    group = zarr.create_group(path, zarr_format=2)
    for key, dtype in {"pos": "f4", "rot": "f8", "width": "f4"}.items():
        shape = (60,) if key == "width" else (60, 3)
        group.create_array(f"data/{key}", data=rng.normal(size=shape).astype(dtype))
    group.create_array("meta/episode_ends", data=np.array([20, 45, 60]))
    (path / "data/rgb").mkdir()
    (path / "data/rgb/.zarray").write_text(
        '{"zarr_format": 2, "shape": [60, 8, 8, 3], "chunks": [1, 8, 8, 3], "dtype": "|u1", "fill_value": 0, '
        '"order": "C", "filters": null, "compressor": {"id": "imagecodecs_jpegxl", "level": 99}}'
    )
    return path


def test_the_columns_of_several_arrays_are_one_key(tmp_path: Path) -> None:
    store = EpisodeStore.open(umi_like(tmp_path / "s.zarr"))
    key = "pos+rot+width"
    assert store.shape(key) == (7,)
    assert store.dtype(key) == np.float64
    assert store.columns(key) == {"pos": 0, "rot": 3, "width": 6}
    rows = store.read(key)
    for part, columns in (("pos", slice(0, 3)), ("rot", slice(3, 6)), ("width", slice(6, 7))):
        np.testing.assert_array_equal(rows[:, columns], store.read(part))
    np.testing.assert_array_equal(np.concatenate([block for _, block in store.blocks(key)]), rows)
    found = list(store.episodes(keys=["pos", key]))
    assert [episode.data[key].shape for episode in found] == [(20, 7), (25, 7), (15, 7)]
    assert store.fingerprint(["pos"], key) != store.fingerprint(["pos"], "pos+rot")
    with pytest.raises(StoreError, match="has no data/pose; it has pos, rgb, rot, width"):
        store.read("pos+pose")


def test_an_array_that_has_a_plus_in_its_name_is_one_array(tmp_path: Path) -> None:
    path = umi_like(tmp_path / "s.zarr")
    zarr.open_group(path, mode="r+").create_array("data/pos+rot", data=np.ones((60, 2)))
    assert EpisodeStore.open(path).shape("pos+rot") == (2,)


def test_a_number_a_step_is_a_row_of_one(tmp_path: Path) -> None:
    store = EpisodeStore.open(umi_like(tmp_path / "s.zarr"))
    assert store.shape("width") == (1,)
    assert store.read("width").shape == (60, 1)
    with EpisodeStore.create(tmp_path / "new.zarr", {}, []) as new:
        for episode in store.episodes(keys=["width"]):
            new.append([episode._replace(final={"width": np.float32(1)})])
            new.append([Demonstration({"width": episode.data["width"][:, 0]}, final={"width": np.ones(1, "f4")})])
    assert EpisodeStore.open(tmp_path / "new.zarr").read("width").shape == (120, 1)


def test_an_array_that_cannot_be_used_is_left_out_and_named(tmp_path: Path) -> None:
    path = umi_like(tmp_path / "s.zarr")
    group = zarr.open_group(path, mode="r+")
    group.create_array("data/short", data=np.zeros((9, 2)))
    group.create_array("data/words", data=np.array(["a"] * 60))
    group.create_array("data/within/deep", data=np.zeros((60, 2)))
    group.create_array("data/two\nlines", data=np.zeros((60, 2)))
    group.create_array("data/" + "x" * 201, data=np.zeros((60, 2)))
    store = EpisodeStore.open(path)
    assert store.keys == ("pos", "rot", "width")
    assert store.left_out.keys() == {"rgb", "short", "words", "within", "two\nlines", "x" * 201}
    assert "imagecodecs_jpegxl" in store.left_out["rgb"]
    assert store.left_out["short"] == "has 9 rows; meta/episode_ends needs 60"
    assert sum("left out: " in remark for remark in store.remarks()) == 5  # two for the same reason
    assert [len(episode.data) for episode in store.episodes()] == [3, 3, 3]
    for key in ("rgb", "short", "words", "within"):
        with pytest.raises(StoreError, match=rf"data/{key}"):
            store.read(key)
    named = {finding.path for finding in validate(path) if finding.serious}
    assert named >= {f"data/{key}" for key in store.left_out}


def test_attributes_of_another_meaning_are_passed_over_and_named(tmp_path: Path) -> None:
    path = umi_like(tmp_path / "s.zarr")
    labels = ["good", "two\nlines"]
    zarr.open_group(path, mode="r+").attrs.update({"modes": labels, "angles": 7, "fps": 10})
    store = EpisodeStore.open(path)
    assert store.modes == ()
    assert store.arrays.passed_over == ("modes", "angles")
    assert "attributes of another meaning are passed over: modes, angles" in store.remarks()
    assert {"modes", "angles"} <= {finding.path for finding in validate(path)}
    for wrong in (labels, ["x" * 201], ["\x1b[31m"], [""]):
        with pytest.raises(StoreError, match="modes must be a list of labels, each one line"):
            EpisodeStore.create(tmp_path / "new.zarr", {}, wrong)


# A loss of power


def test_what_is_committed_is_on_the_disk_before_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays what a disk that forgets all that was not synced would hold after each append."""
    synced: dict[str, bytes] = {}
    names: dict[str, set[str]] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            names[path] = set(os.listdir(path))
        else:
            synced[str(os.fstat(descriptor).st_ino)] = Path(path).read_bytes()
        real(descriptor)

    def lost(folder: Path) -> list[str]:
        """Files whose name or content would not be there."""
        gone = [str(path) for path in folder.rglob("*") if path.name not in names.get(str(path.parent), ())]
        whole = (path for path in folder.rglob("*") if path.is_file())
        return gone + [str(p) for p in whole if synced.get(str(p.stat().st_ino)) != p.read_bytes()]

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "new" / "store.zarr"
    for sync in (True, False):
        with EpisodeStore.create(path, {}, ["a"], sync=sync) as store:
            store.append([episode(5)])
            assert (lost(path) == []) == sync
            store.append([episode(5, 1)])
            assert (lost(path) == []) == sync
        assert "store.zarr" in names[str(path.parent)]
        assert "new" in names[str(tmp_path)]
        path = tmp_path / "new" / "other.zarr"


def test_a_store_half_made_by_a_process_that_is_gone_is_cleared_away(tmp_path: Path) -> None:
    here = durable.place_of_processes()
    running, another = f".store.zarr.{here}.{os.getppid()}", f".another.zarr.{here}.999999999"
    for name in (f".store.zarr.{here}.999999999", running, another):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text("{")
    EpisodeStore.create(tmp_path / "store.zarr", {}, []).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([another, running, "store.zarr"])


def test_what_another_host_has_begun_is_left_alone_until_it_has_not_changed_for_long(tmp_path: Path) -> None:
    begun = tmp_path / ".store.zarr.0123abcd.999999999"
    (begun / "data").mkdir(parents=True)
    os.utime(begun, (0, 0))
    assert durable.remove_leftovers(tmp_path / "store.zarr") == []
    os.utime(begun / "data", (0, 0))
    assert durable.remove_leftovers(tmp_path / "store.zarr") == [begun]
    assert list(tmp_path.iterdir()) == []
    mine = tmp_path / ".store.zarr.20240101"
    mine.mkdir()
    assert durable.remove_leftovers(tmp_path / "store.zarr") == []
    assert durable.unfinished_path(tmp_path / "store.zarr").name.split(".")[3] == durable.place_of_processes()


# Where the store lies


def test_a_program_that_changes_its_folder_goes_on_with_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    with EpisodeStore.create("store.zarr", {}, ["a"]) as store:
        assert store.location == "store.zarr"
        store.append([episode(5, 0)])
        monkeypatch.chdir(elsewhere)
        store.append([episode(7, 1)])
    monkeypatch.chdir(tmp_path)
    with EpisodeStore.append_to("store.zarr") as store:
        reader = EpisodeStore.open("store.zarr")
        monkeypatch.chdir(elsewhere)
        store.append([episode(2, 2)])
        assert reader.read("state").shape == (12, 3)
    assert EpisodeStore.open(tmp_path / "store.zarr").episode_ends.tolist() == [5, 12, 14]
    zip_of(tmp_path / "store.zarr", ".")
    monkeypatch.chdir(tmp_path)
    reader = EpisodeStore.open("store.zarr.zip")
    monkeypatch.chdir(elsewhere)
    assert reader.read("state").shape == (14, 3)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("change", ["moved", "deleted", "replaced"])
def test_a_store_that_no_longer_lies_where_it_was_opened_is_not_begun_anew(path: Path, change: str) -> None:
    with EpisodeStore.append_to(path) as store:
        if change == "deleted":
            shutil.rmtree(path)
        else:
            path.rename(path.with_name("moved.zarr"))
        if change == "replaced":
            path.mkdir()
        before = files_of(path.parent)
        with pytest.raises(StoreError, match=r"is no longer the folder that was opened .*put it back and append again"):
            store.append([episode(3, 9)])
        assert files_of(path.parent) == before
        if change == "moved":
            path.with_name("moved.zarr").rename(path)
            store.append([episode(3, 9)])
            assert EpisodeStore.open(path).episode_ends.tolist() == [5, 6, 13, 16]


# Metadata that are older than the episodes


@pytest.fixture
def copies(tmp_path: Path, path: Path) -> dict[str, bytes]:
    """Files of a store of three episodes as they were before more were appended."""
    before = files_of(path)
    with EpisodeStore.append_to(path) as store:
        store.append([episode(9, 3), episode(4, 4)])
        store.append([episode(6, 5)])
    return before


@pytest.mark.parametrize("early", [False, True])
def test_an_older_length_of_the_ends_drops_no_episodes(path: Path, copies: dict[str, bytes], early: bool) -> None:
    whole = files_of(path)
    older = copies["meta/episode_ends/zarr.json"]
    older = older.replace(b"3\n  ]", b"0\n  ]", 1) if early else older
    (path / "meta/episode_ends/zarr.json").write_bytes(older)
    stale = files_of(path)
    with pytest.raises(StoreError, match=r"metadata older than its episodes .*nothing was changed; .* dataset repair"):
        EpisodeStore.append_to(path)
    assert files_of(path) == stale
    findings = [(finding.serious, finding.path) for finding in validate(path)]
    assert findings[0] == (True, "meta/episode_ends")
    assert not any("uncommitted" in finding.what or "beyond" in finding.what for finding in validate(path))
    repaired = repair(path)
    assert f"{6 if early else 3} episodes more than its older metadata said" in repaired.mended[0]
    assert repaired.left == ()
    assert files_of(path) == whole


def test_an_older_length_of_the_ends_is_not_mended_where_rows_are_missing(path: Path, copies: dict[str, bytes]) -> None:
    for name in ("meta/episode_ends/zarr.json", "data/state/zarr.json"):
        (path / name).write_bytes(copies[name])
    stale = files_of(path)
    with pytest.raises(StoreError, match=r"older than its episodes .*data/state has not their rows; put all newest"):
        repair(path)
    assert files_of(path) == stale


@pytest.mark.parametrize("array", ["data/state", "meta/episode_seed", "meta/episode_crc32c"])
def test_an_older_length_of_another_array_is_refused_and_drops_nothing(
    path: Path, copies: dict[str, bytes], array: str
) -> None:
    (path / array / "zarr.json").write_bytes(copies[f"{array}/zarr.json"])
    stale = files_of(path)
    with pytest.raises(StoreError, match=rf"{array} has \d+ rows; meta/episode_ends needs"):
        EpisodeStore.append_to(path)
    assert files_of(path) == stale
    assert array in {finding.path for finding in validate(path) if finding.serious}


def test_after_an_append_that_was_interrupted_at_its_end_a_shorter_one_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Appender._write

    def write(appender: Appender, name: str, *rest) -> None:
        real(appender, name, *rest)
        if name == "meta/episode_ends":
            raise KeyboardInterrupt

    with EpisodeStore.append_to(path) as store:
        monkeypatch.setattr(Appender, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            store.append([episode(9, 3), episode(4, 4)])
        monkeypatch.setattr(Appender, "_write", real)
        store.append([episode(6, 5)])
    with EpisodeStore.append_to(path) as store:
        assert store.episode_ends.tolist() == [5, 6, 13, 19]
    assert [finding for finding in validate(path) if finding.serious] == []


def test_a_conversion_is_on_the_disk_too(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        known.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("copy.zarr", "copy.zarr.zip"):
        convert(path, tmp_path / "new" / name)
        everything = [tmp_path, tmp_path / "new", tmp_path / "new" / name, *(tmp_path / "new" / name).rglob("*")]
        assert known >= {item.stat().st_ino for item in everything}
