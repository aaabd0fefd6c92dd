"""What `repair` mends and what it leaves alone: each is what `validate` names."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from diffusion_policy.datasets import durable
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.repair import repair
from diffusion_policy.datasets.storage import StoreError, lock
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import validate

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata")


def foreign(path: Path, version: int, ends: tuple[int, ...], rows: int, chunk: int = 5) -> Path:
    """A store that another tool wrote."""
    group = zarr.create_group(path, zarr_format=version)  # pyright: ignore[reportArgumentType]
    for key in ("state", "action"):
        group.create_array(f"data/{key}", data=np.arange(2 * rows, dtype="f4").reshape(rows, 2), chunks=(30, 2))
    group.create_array("meta/episode_ends", data=np.array(ends), chunks=(chunk,))
    return path


def ours(path: Path, episodes: range) -> Path:
    with EpisodeStore.append_to(path) if path.exists() else EpisodeStore.create(path, {}, ["a"]) as store:
        store.append([Demonstration({k: np.full((20, 2), i, "f4") for k in ("x", "action")}, i, "a") for i in episodes])
    return path


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def notes(path: Path) -> str:
    return " | ".join(f"{finding.path}: {finding.what}" for finding in validate(path) if "checksum" not in finding.what)


@pytest.mark.parametrize("version", [2, 3])
def test_episodes_without_rows_are_dropped_from_a_store_of_another_tool(tmp_path: Path, version: int) -> None:
    path = foreign(tmp_path / "s.zarr", version, (20, 45, 45, 70, 90), 90)
    assert "episode 2 has no rows and is left out; drop it with: dataset repair" in notes(path)
    before = EpisodeStore.open(path).fingerprint(["state"])
    assert repair(path) == (("meta/episode_ends: dropped 1 episodes without rows",), ())
    assert zarr.open_group(path, mode="r")["meta/episode_ends"][:].tolist() == [20, 45, 70, 90]
    assert EpisodeStore.open(path).fingerprint(["state"]) == before
    assert notes(path) == ""
    assert repair(path) == ((), ())


def test_where_other_files_would_have_to_change_at_the_same_time_nothing_does(tmp_path: Path) -> None:
    path = foreign(tmp_path / "s.zarr", 2, (20, 45, 45, 70, 90), 90)
    zarr.open_group(path, mode="r+").create_array("meta/episode_success", data=np.ones(5, np.int8))
    before = files_of(path)
    assert "episode_success would have to change at the same time" in repair(path).mended[0]
    assert files_of(path) == before
    cut = foreign(tmp_path / "cut.zarr", 2, (20, 45, 45, 70, 90), 90, chunk=2)
    before = files_of(cut)
    assert "it lies in several files" in repair(cut).mended[0]
    assert files_of(cut) == before


@pytest.mark.parametrize("version", [2, 3])
def test_rows_behind_the_last_episode_are_dropped_where_all_arrays_have_them(tmp_path: Path, version: int) -> None:
    path = foreign(tmp_path / "s.zarr", version, (20, 45), 90)
    assert set(repair(path).mended) == {f"data/{key}: dropped 45 uncommitted rows" for key in ("state", "action")}
    assert zarr.open_group(path, mode="r")["data/state"].shape == (45, 2)
    assert EpisodeStore.open(path).read("state")[-1].tolist() == [88, 89]
    longer = foreign(tmp_path / "longer.zarr", version, (20, 45), 45)
    zarr.open_group(longer, mode="r+").create_array("data/table", data=np.arange(1000.0))  # of something else
    assert repair(longer).mended == ()


@pytest.mark.parametrize("version", [2, 3])
def test_a_stale_copy_of_the_metadata_is_dropped_and_a_true_one_kept(tmp_path: Path, version: int) -> None:
    path = foreign(tmp_path / "s.zarr", version, (20, 45), 45)
    zarr.consolidate_metadata(path)
    before = files_of(path)
    assert notes(path) == ""
    assert repair(path) == ((), ())
    assert files_of(path) == before
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    group["meta/episode_ends"].resize((3,))
    group["meta/episode_ends"][2] = 65
    for key in ("state", "action"):
        group[f"data/{key}"].resize((65, 2))
    assert len(EpisodeStore.open(path).episode_ends) == 3
    assert "the consolidated copy of the metadata is stale" in notes(path)
    assert "dropped the consolidated copy of the metadata" in repair(path).mended[0]
    assert zarr.open_group(path, mode="r")["meta/episode_ends"].shape == (3,)  # what other tools read now
    assert notes(path) == ""


def test_appending_to_a_consolidated_store_of_ours_keeps_every_episode_and_drops_the_copy(tmp_path: Path) -> None:
    path = ours(tmp_path / "s.zarr", range(2))
    for folder in ("", "data"):
        zarr.consolidate_metadata(path, path=folder or None)
    with EpisodeStore.append_to(path) as store:
        assert "dropped a consolidated copy of the metadata" in store.mended[0]
    for episodes in (range(2, 4), range(4, 5)):
        ours(path, episodes)
    assert files_of(path) == files_of(ours(ours(ours(tmp_path / "new.zarr", range(2)), range(2, 4)), range(4, 5)))
    group = zarr.open_group(path, mode="r")  # as any other tool opens it
    assert group["meta/episode_ends"][:].tolist() == [20, 40, 60, 80, 100]
    assert group["data/x"][::20, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_reader_of_a_consolidated_store_sees_what_was_appended_since(tmp_path: Path) -> None:
    path = ours(tmp_path / "s.zarr", range(2))
    copy = path / "copy.json"
    zarr.consolidate_metadata(path)
    copy.write_bytes((path / "zarr.json").read_bytes())
    ours(path, range(2, 4))
    copy.replace(path / "zarr.json")  # as an older version of ours left it
    store = EpisodeStore.open(path)
    assert [episode.seed for episode in store.episodes()] == [0, 1, 2, 3]
    assert "the consolidated copy of the metadata is stale" in notes(path)
    assert "dropped a consolidated copy of the metadata" in repair(path).mended[0]
    assert notes(path) == ""


def test_what_killed_writers_left_is_named_and_dropped(tmp_path: Path) -> None:
    path = ours(tmp_path / "s.zarr", range(2))
    before = files_of(path)
    (path / "data" / "x" / f"c.0.{'0' * 32}.partial").write_bytes(b"half")
    here = durable.place_of_processes()
    gone, running = tmp_path / f".s.zarr.{here}.999999999", tmp_path / f".s.zarr.{here}.{os.getpid()}"
    for folder in (gone, running, tmp_path / ".s.zarr.mine"):
        folder.mkdir()
    assert "1 files that a killed writer left; drop them with: dataset repair" in notes(path)
    assert any(f"{gone.name}: dropped" in sentence for sentence in repair(path).mended)
    assert files_of(path) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([running.name, ".s.zarr.mine", "s.zarr"])


def test_what_cannot_be_mended_is_said(tmp_path: Path) -> None:
    path = foreign(tmp_path / "s.zarr", 2, (20, 45, 45), 45)
    zarr.open_group(path, mode="r+")["data/state"][3] = np.nan
    repaired = repair(path)
    assert len(repaired.mended) == 1
    assert [finding.path for finding in repaired.left] == ["data/state"]
    with pytest.raises(StoreError, match="is no folder; a store elsewhere is mended in a copy"):
        repair(tmp_path / "s.zarr.zip")
    (path / "data" / "more").symlink_to(path / "data" / "state")
    with pytest.raises(StoreError, match="holds links"):
        repair(path)


def test_what_nobody_can_read_is_one_line(tmp_path: Path) -> None:
    path = foreign(tmp_path / "s.zarr", 3, (20, 45), 90)
    (path / "data" / "zarr.json").write_text('{"half')
    with pytest.raises(StoreError, match=r"cannot be mended: data/zarr.json is not JSON"):
        repair(path)
    mine = ours(tmp_path / "mine.zarr", range(2))
    (mine / "data" / "zarr.json").write_text('{"half')
    with pytest.raises(StoreError, match=r"mine.zarr: the metadata data/zarr.json is not JSON"):
        EpisodeStore.append_to(mine)


def test_repair_waits_for_no_one_who_writes(tmp_path: Path) -> None:
    path = ours(tmp_path / "s.zarr", range(2))
    with EpisodeStore.append_to(path), pytest.raises(StoreError, match="is being written by another process"):
        repair(path)
    path = foreign(tmp_path / "f.zarr", 2, (10, 10), 12)
    unlock = lock(path)
    with pytest.raises(StoreError, match="wait for it, or mend a copy: dataset convert"):
        repair(path)
    unlock()


@pytest.mark.parametrize("version", [2, 3])
def test_whichever_write_of_a_repair_is_the_last_the_episodes_stay(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for writes in range(20):
        path = foreign(tmp_path / f"{writes}.zarr", version, (20, 20, 45, 45), 90)
        zarr.consolidate_metadata(path)
        left, real = [writes], durable.put

        def put(*arguments, left=left, real=real):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "put", put)
            try:
                repair(path)
                done = True
            except OSError:
                done = False
        for group in (zarr.open_group(path, mode="r"), zarr.open_group(path, mode="r", use_consolidated=False)):
            assert set(group["meta/episode_ends"][:].tolist()) == {20, 45}  # of any reader
        assert EpisodeStore.open(path).episode_ends.tolist() == [20, 45]
        assert EpisodeStore.open(path).read("state")[-1].tolist() == [88, 89]
        if done:
            assert writes > 3
            return
    pytest.fail("repair never came to its end")


KILLED = """
import sys, time
from diffusion_policy.datasets.repair import repair
print("ready", flush=True)
sys.stdin.readline()
repair(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(15))
def test_a_killed_repair_leaves_the_store_as_it_was_or_mended(tmp_path: Path, number: int) -> None:
    path = foreign(tmp_path / "s.zarr", 2, (20, 20, 45, 45), 90)
    zarr.consolidate_metadata(path)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as it:
        assert it.stdin is not None
        assert it.stdout is not None
        it.stdout.readline()
        it.stdin.write(b"\n")
        it.stdin.flush()
        time.sleep(0.004 * number)
        it.send_signal(signal.SIGKILL)
    assert EpisodeStore.open(path).episode_ends.tolist() == [20, 45]
    assert repair(path).left == ()
    assert zarr.open_group(path, mode="r")["meta/episode_ends"][:].tolist() == [20, 45]
