from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from diffusion_policy.datasets.store import Demonstration, EpisodeStore, StoreError

PUSHT = Path(__file__).parents[2] / "shared" / "data" / "pusht_cchi_v7_replay.zarr"


def episode(length: int, seed: int = 0, mode: str | None = "a") -> Demonstration:
    rng = np.random.default_rng(seed)
    data = {"state": rng.normal(size=(length, 3)).astype(np.float32), "action": rng.normal(size=(length, 2))}
    return Demonstration(data, seed, mode, True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of three episodes."""
    store = EpisodeStore.create(tmp_path / "store.zarr", {"control_frequency": 10}, ["a", "b"])
    store.append([episode(5, 0), episode(1, 1, "b")])
    store.append([episode(7, 2, None)])
    return tmp_path / "store.zarr"


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
    with pytest.raises(StoreError, match=r"no data set at .*: there is no zarr group"):
        EpisodeStore.open(tmp_path / "nothing.zarr")
    zarr.create_group(tmp_path / "other.zarr").create_array("numbers", shape=(3,), dtype="f4")
    with pytest.raises(StoreError, match=r"is no data set of episodes.*has numbers"):
        EpisodeStore.open(tmp_path / "other.zarr")


def test_a_store_without_episodes_is_refused(tmp_path: Path) -> None:
    EpisodeStore.create(tmp_path / "empty.zarr", {}, [])
    with pytest.raises(StoreError, match="holds no episodes"):
        EpisodeStore.open(tmp_path / "empty.zarr")


@pytest.mark.parametrize("ends", [[5, 5, 13], [5, 4, 13], [0, 5, 13], [-7, 5, 13]])
def test_episode_ends_that_do_not_increase_are_refused(path: Path, ends: list[int]) -> None:
    zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = ends
    with pytest.raises(StoreError, match="must increase"):
        EpisodeStore.open(path)


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
