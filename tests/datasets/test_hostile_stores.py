"""Stores that a stranger may hand over: mutated at random, or made to harm. Each is read, validated and converted in a
process of its own kind, and must end in our own error or in right values."""

import asyncio
import json
import os
import random
import select
import shutil
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
import zarr.codecs
from zarr.core.sync import sync

from diffusion_policy.cli import main
from diffusion_policy.datasets import guarded_store
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import validate

LENGTHS = (40, 7, 60, 93)
HOSTILE_VALUES = [
    [10**15, 2], [2**62, 2**62], [-5, 2], [0, 0], [200], [], 10**18, -1, 0, None, "", "|O", "object", "<f8", ">f4",
    "<U9", "float16", "complex128", "datetime64", "NaN", {}, {"a": 1}, [{"id": "pickle"}], {"id": "pickle"},
    [{"name": "numcodecs.pickle", "configuration": {}}], {"id": "zlib", "level": 99}, "F", 4, "../../../etc", "regular",
]  # fmt: skip
READER = """
import json, signal, sys, time
from pathlib import Path
from diffusion_policy.datasets.convert import convert
from diffusion_policy.cli import main
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import validate

def peak():  # of this process alone [KB]; getrusage counts what its parent had, too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def late(*_):
    raise SystemExit("hangs")

signal.signal(signal.SIGALRM, late)
for line in sys.stdin:
    path = line.strip()
    answer = {}
    signal.alarm(10)
    try:
        for finding in validate(path):
            answer.setdefault("findings", []).append(finding.what)
    except StoreError as error:
        answer["refused"] = str(error)
    try:
        store = EpisodeStore.open(path)
        answer["values"] = {key: store.read(key).ravel().tolist()[:3000] for key in store.keys}
        answer["ends"] = store.episode_ends.tolist()
        list(store.episodes())
        convert(path, Path(path + ".npz"))
    except StoreError as error:
        answer["error"] = str(error)
    signal.alarm(0)
    answer["resident"] = peak()
    print(json.dumps(answer), flush=True)
"""


def demonstrations() -> list[Demonstration]:
    rng = np.random.default_rng(0)
    return [
        Demonstration(
            {
                "state": rng.normal(size=(length, 3)).astype(np.float32),
                "action": rng.normal(size=(length, 2)).astype(np.float32),
                "contacts": rng.integers(0, 4, size=(length, 1)),
            },
            seed,
            ("left", "right")[seed % 2],
            True,
        )
        for seed, length in enumerate(LENGTHS)
    ]


def write_ours(path: Path) -> None:
    with EpisodeStore.create(path, {"environment": {"id": "a/B-v0", "arguments": {}}}, ["left", "right"]) as store:
        store.append(demonstrations())


def write_published(path: Path) -> None:
    """As the Push-T dataset: zarr v2, no checksums, several chunks."""
    group = zarr.create_group(path, zarr_format=2)
    for key in ("state", "action", "contacts"):
        rows = np.concatenate([episode.data[key] for episode in demonstrations()])
        group.create_array(f"data/{key}", data=rows, chunks=(61, rows.shape[1]))
    group.create_array("meta/episode_ends", data=np.cumsum(LENGTHS))


def zip_folder(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(folder))


def parse(content: bytes) -> object:
    """JSON, or None where an earlier mutation has broken it."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def mutate(store: Path, rng: random.Random) -> str:
    """Damage one file of a store, or add one; returns what was done, beginning with the kind of the file."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    file = rng.choice(files)
    metadata = file.name in ("zarr.json", ".zarray", ".zgroup", ".zattrs")
    kind = "metadata" if metadata else "chunk"
    content = file.read_bytes()
    deed = rng.choice(["flip", "cut", "delete", "noise", "swap", "edit", "edit", "edit", "add"])
    tree = parse(content) if metadata else None
    if deed == "edit" and isinstance(tree, dict | list):
        spot = tree
        while True:  # some value, at any depth
            place = rng.choice(list(spot) if isinstance(spot, dict) else range(len(spot))) if spot else None
            if place is None or not isinstance(spot[place], dict | list) or not spot[place] or rng.random() < 0.4:
                break
            spot = spot[place]
        if place is not None:
            spot[place] = rng.choice(HOSTILE_VALUES)
        file.write_text(json.dumps(tree))
    elif deed == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif deed == "delete":
        file.unlink()
    elif deed == "noise":
        file.write_bytes(rng.randbytes(rng.choice([0, 1, len(content), 10_000])))
    elif deed == "swap":
        file.write_bytes(rng.choice(files).read_bytes())
    elif deed == "add":
        kind = "stranger"
        strange = rng.choice(["data/.hidden", "data/..evil", "data/zarr.json.partial", "meta/episode_mode", "data/e e"])
        (store / strange).parent.mkdir(exist_ok=True)
        if not (store / strange).exists():
            (store / strange).write_bytes(rng.randbytes(50))
    else:
        deed = "flip"
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 20])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
    return f"{kind} {deed} {file.relative_to(store)}"


class Reader:
    """A process that reads stores, one after the other. Each must be refused or read within ten seconds and a gigabyte,
    and nothing may be written beside it, or said on stderr."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> "Reader":
        self._said = (self._folder.parent / "said").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", READER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip
        return self

    def read(self, store: Path, what: object) -> dict:
        """What is in a store, or why not; `what`: was done to it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{store}\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], 25)
        line = self._process.stdout.readline() if ready else ""
        self._said.seek(0)
        said = self._said.read()
        assert line, f"the reader died or hung: {what}: {said[-3000:]}"
        assert said == "", (what, said)
        answer = json.loads(line)
        assert answer["resident"] < 1e6, what  # [KB]
        for path in self._folder.iterdir():
            assert path.name.startswith(store.name.partition(".")[0]), f"{what} wrote {path}"
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return answer

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()


def mutate_and_read(count: int, tmp_path: Path, seed: int = 0) -> None:
    """Mutations of our own store, of the published layout, and of both in zips."""
    outside = tmp_path / "outside"
    outside.mkdir()
    originals = {"ours": outside / "ours.zarr", "published": outside / "published.zarr"}
    write_ours(originals["ours"])
    write_published(originals["published"])
    expected = {
        key: np.concatenate([e.data[key] for e in demonstrations()]).ravel().tolist()
        for key in demonstrations()[0].data
    }
    rng = random.Random(seed)
    folder = tmp_path / "stores"
    folder.mkdir()
    before = sorted(str(path) for path in outside.rglob("*"))
    with Reader(folder) as reader:
        for i in range(count):
            name = ("ours", "published")[i % 2]
            store = folder / f"{i}.zarr"
            shutil.copytree(originals[name], store)
            deeds = [mutate(store, rng) for _ in range(rng.choice([1, 1, 2]))]
            if i % 5 == 4:
                zip_folder(store, folder / f"{i}.zarr.zip")
                store = folder / f"{i}.zarr.zip"
            judge(name, deeds, reader.read(store, deeds), expected)
    assert sorted(str(path) for path in outside.rglob("*")) == before


def judge(name: str, deeds: list[str], answer: dict, expected: dict[str, list[float]]) -> None:
    """In our own stores, data whose chunks alone were damaged are refused or right."""
    damaged = [deed for deed in deeds if deed.startswith("chunk")]
    if name == "ours" and len(damaged) == len(deeds) and "values" in answer and "error" not in answer:
        assert answer["values"] == expected, deeds
        assert answer["ends"] == np.cumsum(LENGTHS).tolist(), deeds
    if "values" in answer and "error" not in answer:
        for values in answer["values"].values():
            assert np.isfinite(values).all(), deeds
        assert (np.diff(answer["ends"], prepend=0) > 0).all(), deeds


def test_mutated_stores_are_refused_or_read(tmp_path: Path) -> None:
    mutate_and_read(30, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_mutated_stores(tmp_path: Path, seed: int) -> None:
    mutate_and_read(100, tmp_path, seed)


# Every codec, filter, type and byte order, mutated

TYPES = ["b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"]
FOREIGN_TYPES = ["<U5", "|S5", "|O", "<M8[s]", "<m8[s]", "<c8", ">c16", "|V8", [["x", "<f4"], ["y", "<i4"]], "<f16"]
COMPRESSORS_V2 = [
    None, numcodecs.GZip(1), numcodecs.Zlib(1), numcodecs.Zstd(1), numcodecs.Zstd(1, checksum=True), numcodecs.LZ4(),
    *(numcodecs.Blosc(name, shuffle=shuffle) for name in numcodecs.blosc.list_compressors() for shuffle in (0, 1, 2)),
]  # fmt: skip
COMPRESSORS_V3 = [
    None, zarr.codecs.GzipCodec(level=1), zarr.codecs.ZstdCodec(level=1), zarr.codecs.ZstdCodec(checksum=True),
    *(zarr.codecs.BloscCodec(cname=name) for name in ("blosclz", "lz4", "lz4hc", "zlib", "zstd")),
]  # fmt: skip


def write_packed(path: Path, rng: random.Random) -> tuple[str, np.ndarray]:
    """A small store of any codecs, filters, type and byte order; returns what they are, and its state."""
    dtype = np.dtype(rng.choice("<>") + rng.choice(TYPES))
    rows = (np.random.default_rng(rng.randrange(2**32)).integers(0, 100, (200, 3)) > 50).astype(dtype)
    group, said = zarr.create_group(path, zarr_format=rng.choice([2, 3])), [dtype.str]
    chosen: dict = {"chunks": (rng.choice([30, 61, 200]), rng.choice([2, 3]))}
    if group.metadata.zarr_format == 2:
        filters = [
            numcodecs.Delta(dtype.str) if dtype.kind in "iuf" and dtype.itemsize > 2 else None,
            numcodecs.Shuffle(dtype.itemsize), numcodecs.CRC32(), numcodecs.Fletcher32(),
        ]  # fmt: skip
        chosen["compressors"] = rng.choice(COMPRESSORS_V2)
        chosen["filters"] = [one for one in filters if one is not None and rng.random() < 0.25] or None
        chosen["order"] = rng.choice("CF")
    else:
        compressor = rng.choice(COMPRESSORS_V3)
        checked = [zarr.codecs.Crc32cCodec()] if rng.random() < 0.5 else []
        chosen["compressors"] = ([] if compressor is None else [compressor]) + checked
        if rng.random() < 0.3:
            chosen["filters"] = [zarr.codecs.TransposeCodec(order=(1, 0))]
        if rng.random() < 0.4:
            chosen |= {"chunks": (10, 3), "shards": (rng.choice([50, 200, 210]), 3)}
    said += [str(one) for one in chosen.values()]
    for key in ("state", "action"):
        group.create_array(f"data/{key}", data=rows, **chosen)
    group.create_array("meta/episode_ends", data=np.array([70, 200]))
    return " ".join(said), rows


def give_a_foreign_type(store: Path, rng: random.Random) -> str:
    """Say another type of an array, one that is no number or a name that zarr knows for one."""
    file = store / "data" / "state" / ("zarr.json" if (store / "zarr.json").exists() else ".zarray")
    metadata = json.loads(file.read_text())
    names = ["string", "variable_length_bytes", "complex64", "r16", "float128", "bfloat16", "int2", "numpy.datetime64"]
    name, dtype = ("data_type", rng.choice(names)) if file.name == "zarr.json" else ("dtype", rng.choice(FOREIGN_TYPES))
    file.write_text(json.dumps(metadata | {name: dtype}))
    return f"metadata type {dtype}"


def pack_and_read(count: int, tmp_path: Path, seed: int = 0) -> None:
    """Stores of every codec: as they are, with a foreign type, or mutated."""
    rng = random.Random(seed)
    folder = tmp_path / "stores"
    folder.mkdir()
    with Reader(folder) as reader:
        for i in range(count):
            store = folder / f"{i}.zarr"
            what, rows = write_packed(store, rng)
            deeds = [] if i % 4 == 0 else [give_a_foreign_type(store, rng) if i % 4 == 1 else mutate(store, rng)]
            answer = reader.read(store, (what, deeds))
            if not deeds:
                assert answer["values"]["state"] == rows.ravel().tolist(), (what, answer)
            elif i % 4 == 1:
                assert "state" not in answer.get("values", {}), (what, deeds)


@pytest.mark.filterwarnings("ignore")  # zarr has its own ideas of what a reader should know
def test_stores_of_every_codec_and_type_are_read_and_their_mutations_refused_or_read(tmp_path: Path) -> None:
    pack_and_read(12, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_thousand_stores_of_every_codec_and_type(tmp_path: Path, seed: int) -> None:
    pack_and_read(100, tmp_path, seed)


# Every file type in every place


def write_sharded(path: Path) -> None:
    group = zarr.create_group(path)
    for key in ("state", "action"):
        rows = np.concatenate([episode.data[key] for episode in demonstrations()])
        group.create_array(f"data/{key}", data=rows, chunks=(10, rows.shape[1]), shards=(150, rows.shape[1]))
    group.create_array("meta/episode_ends", data=np.cumsum(LENGTHS))


def put_link(file: Path, target: str) -> None:
    file.symlink_to(target)


def put_sparse(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(5 * 2**30)


FILE_TYPES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link that leads nowhere": lambda file: put_link(file, "nowhere"),
    "link to a device": lambda file: put_link(file, "/dev/zero"),
    "link to itself": lambda file: put_link(file, file.name),
    "link to the folder above": lambda file: put_link(file, ".."),
    "link to a pipe": lambda file: (os.mkfifo(f"{file}.pipe"), put_link(file, f"{file.name}.pipe")),
    "socket": lambda file: os.mknod(file, stat.S_IFSOCK | 0o600),
    "sparse file": put_sparse,
    "empty file": Path.touch,
    "unreadable file": lambda file: (file.touch(), file.chmod(0)),
}
LAYOUTS = {"ours": write_ours, "published": write_published, "sharded": write_sharded}


def exchange_and_read(cases: list[tuple[str, str, str]], tmp_path: Path) -> None:
    """Stores of a layout in which a file or folder is replaced by what is none; for `zip`, the whole store."""
    for layout, write in LAYOUTS.items():
        write(tmp_path / layout)
    folder = tmp_path / "stores"
    folder.mkdir()
    with Reader(folder) as reader:
        for i, (layout, name, kind) in enumerate(cases):
            store = folder / (f"{i}.zip" if name == "zip" else f"{i}.zarr")
            place = store if name == "zip" else store / name
            if name != "zip":
                shutil.copytree(tmp_path / layout, store)
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            FILE_TYPES[kind](place)
            answer = reader.read(store, (layout, name, kind))
            missing = (tmp_path / layout / name).is_dir() and "folder" in kind  # which stands for the fill value
            if name[-1].isdigit() and not missing and kind != "unreadable file":  # an administrator reads those
                assert "error" in answer or name.split("/")[1] not in answer["values"], (layout, name, kind, answer)


def all_exchanges(tmp_path: Path) -> list[tuple[str, str, str]]:
    cases = [("none", "zip", kind) for kind in FILE_TYPES if kind != "folder"]
    for layout, write in LAYOUTS.items():
        write(tmp_path / f"{layout}.once")
        names = [
            str(path.relative_to(tmp_path / f"{layout}.once")) for path in (tmp_path / f"{layout}.once").rglob("*")
        ]
        cases += [(layout, name, kind) for name in sorted(names) for kind in FILE_TYPES]
    return cases


def test_whatever_lies_in_a_files_place_is_refused_at_once_or_read(tmp_path: Path) -> None:
    cases = all_exchanges(tmp_path)
    exchange_and_read(random.Random(0).sample(cases, 15), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_file_type_in_every_place(tmp_path: Path, part: int) -> None:
    exchange_and_read(all_exchanges(tmp_path)[part::8], tmp_path)


@pytest.mark.parametrize(
    "file", ["data/state/c.0.0", "data/action/c.0.0", "data/contacts/c.0.0", "meta/episode_mode/c.0"]
)
def test_every_bit_of_our_chunks_is_guarded(tmp_path: Path, file: str) -> None:
    write_ours(tmp_path / "store.zarr")
    chunk = tmp_path / "store.zarr" / file
    content = chunk.read_bytes()
    rng = random.Random(1)
    for place in rng.sample(range(8 * len(content)), 20):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        chunk.write_bytes(flipped)
        store = EpisodeStore.open(tmp_path / "store.zarr")
        with pytest.raises(StoreError, match=r"checksum|would unpack into"):
            list(store.episodes())
    chunk.unlink()
    with pytest.raises(StoreError, match=r"is damaged: its chunk c\.0.* is missing"):
        list(EpisodeStore.open(tmp_path / "store.zarr").episodes())


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_pickle_payload_is_never_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "store.zarr", tmp_path / "ran"
    write_published(path)
    rows = np.empty((200, 1), object)
    rows[:] = Payload(str(mark))
    chunk = numcodecs.Pickle().encode(rows)
    for dtype, filters, compressor in (
        ("|O", [{"id": "pickle"}], None),
        ("<f4", [{"id": "pickle"}], None),
        ("<f4", None, {"id": "pickle"}),
        ("|O", None, None),
    ):
        metadata = json.loads((path / "data" / "state" / ".zarray").read_text())
        metadata |= {
            "dtype": dtype,
            "filters": filters,
            "compressor": compressor,
            "chunks": [200, 1],
            "shape": [200, 1],
        }
        (path / "data" / "state" / ".zarray").write_text(json.dumps(metadata))
        (path / "data" / "state" / "0.0").write_bytes(chunk)
        with pytest.raises(StoreError):
            EpisodeStore.open(path).read("state")
        assert any("data/state" in finding.path + finding.what for finding in validate(path))
    assert not mark.exists()


def test_absurd_shapes_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    write_published(path)
    metadata = json.loads((path / "data" / "state" / ".zarray").read_text())
    for change, message in (
        ({"shape": [10**15, 3]}, "chunks of some 731 bytes; at most 1048576 of those are read"),
        ({"chunks": [10**9, 3]}, "has chunks of 11444 MB"),
        ({"shape": [200, 10**12]}, "chunks of some 599 bytes; at most 1048576 of those are read"),
        ({"shape": [200, 10**5]}, "is damaged: its chunk"),
    ):
        (path / "data" / "state" / ".zarray").write_text(json.dumps(metadata | change))
        ends = json.loads((path / "meta" / "episode_ends" / ".zarray").read_text())
        assert ends["shape"] == [4]
        if "shape" in change and change["shape"][0] > 200:
            zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = [40, 47, 107, change["shape"][0]]
        with pytest.raises(StoreError, match=message):
            EpisodeStore.open(path).read("state")
        zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = np.cumsum(LENGTHS)


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    write_ours(tmp_path / "store.zarr")
    store = EpisodeStore.open(tmp_path / "store.zarr")
    for key in ("../meta/episode_ends", "..", "/etc/passwd", "state/../action", ".hidden", "a\\b"):
        with pytest.raises(StoreError, match="it has action, contacts, state"):
            store.read(key)
    data = {"../evil": np.zeros((3, 1)), "action": np.zeros((3, 1))}
    with EpisodeStore.create(tmp_path / "new.zarr", {}, []) as new, pytest.raises(StoreError, match=r"got '\.\./evil'"):
        new.append([Demonstration(data)])
    assert not list(tmp_path.rglob("evil"))


def test_links_to_folders_and_to_regular_files_are_followed_to_read(tmp_path: Path) -> None:
    write_ours(tmp_path / "real.zarr")
    (tmp_path / "store.zarr").symlink_to("real.zarr")
    state = tmp_path / "real.zarr" / "data" / "state"
    for place in (state / "c.0.0", state / "zarr.json", tmp_path / "real.zarr" / "meta"):
        place.rename(tmp_path / place.name)
        place.symlink_to(tmp_path / place.name)
    expected = np.concatenate([episode.data["state"] for episode in demonstrations()])
    np.testing.assert_array_equal(EpisodeStore.open(tmp_path / "store.zarr").read("state"), expected)


def test_a_zip_whose_members_lead_outside_writes_nothing(tmp_path: Path) -> None:
    write_ours(tmp_path / "store.zarr")
    zip_folder(tmp_path / "store.zarr", tmp_path / "store.zarr.zip")
    with zipfile.ZipFile(tmp_path / "store.zarr.zip", "a") as archive:
        archive.writestr("../evil", "x")
        archive.writestr("/tmp/evil-of-a-test", "x")
        archive.writestr("data/../../evil/zarr.json", "{}")
    store = EpisodeStore.open(tmp_path / "store.zarr.zip")
    assert store.keys == ("action", "contacts", "state")
    assert store.fingerprint(["state"]) == EpisodeStore.open(tmp_path / "store.zarr").fingerprint(["state"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.zarr", "store.zarr.zip"]


def test_a_zip_member_that_would_fill_the_memory_is_never_unpacked(tmp_path: Path) -> None:
    write_ours(tmp_path / "store.zarr")
    for member in ("data/bomb/zarr.json", "data/state/c.0.0"):
        shutil.rmtree(tmp_path / "copy.zarr", ignore_errors=True)
        shutil.copytree(tmp_path / "store.zarr", tmp_path / "copy.zarr")
        (tmp_path / "copy.zarr" / member).unlink(missing_ok=True)
        zip_folder(tmp_path / "copy.zarr", tmp_path / "store.zarr.zip")
        with zipfile.ZipFile(tmp_path / "store.zarr.zip", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, bytes(2**23))
        with pytest.raises(StoreError, match=rf"{member} has 8388608 bytes; at most \d+ are read"):
            EpisodeStore.open(tmp_path / "store.zarr.zip").read(member.split("/")[1])
        for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            zip_folder(tmp_path / "copy.zarr", tmp_path / "store.zarr.zip")
            with zipfile.ZipFile(tmp_path / "store.zarr.zip", "a", method) as archive:
                archive.writestr(member, b"{}")
            with pytest.raises(StoreError, match=f"{member} is neither stored nor deflated in its zip"):
                EpisodeStore.open(tmp_path / "store.zarr.zip").read(member.split("/")[1])


# Small files that would unpack into large ones


def bomb(path: Path, compressor: dict, packed: bytes) -> None:
    """The published layout, with the chunks of `state` replaced."""
    write_published(path)
    metadata = json.loads((path / "data" / "state" / ".zarray").read_text())
    metadata |= {"compressor": compressor, "filters": None}
    (path / "data" / "state" / ".zarray").write_text(json.dumps(metadata))
    for i in range(4):
        (path / "data" / "state" / f"{i}.0").write_bytes(packed)


@pytest.mark.parametrize(
    "codec",
    [
        numcodecs.Zlib(9),
        numcodecs.GZip(9),
        numcodecs.Zstd(9),
        numcodecs.LZ4(),
        numcodecs.Blosc("zstd"),
    ],
    ids=lambda codec: codec.codec_id,
)
def test_a_chunk_that_unpacks_into_more_than_a_chunk_is_refused_before_it_does(tmp_path: Path, codec) -> None:
    packed = codec.encode(bytes(2**20))
    bomb(tmp_path / "store.zarr", codec.get_config(), bytes(packed))
    started = time.monotonic()
    with pytest.raises(
        StoreError, match=r"would unpack into .* it should have 732|0 has \d+ bytes; at most 4833 are read"
    ):
        EpisodeStore.open(tmp_path / "store.zarr").read("state")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("codec", [numcodecs.GZip(9), numcodecs.Zstd(9)], ids=lambda codec: codec.codec_id)
def test_a_second_stream_behind_a_harmless_one_is_refused(tmp_path: Path, codec) -> None:
    packed = bytes(codec.encode(bytes(732))) + bytes(codec.encode(bytes(2**20)))
    bomb(tmp_path / "store.zarr", codec.get_config(), packed)
    with pytest.raises(StoreError, match=r"more than one stream|would unpack into 1049308 bytes"):
        EpisodeStore.open(tmp_path / "store.zarr").read("state")


def test_deltas_in_a_row_do_not_grow_without_bound(tmp_path: Path) -> None:
    write_published(tmp_path / "store.zarr")
    file = tmp_path / "store.zarr" / "data" / "state" / ".zarray"
    metadata = json.loads(file.read_text())
    delta = {"id": "delta", "dtype": "<f8", "astype": "|i1"}
    for filters, said in (([delta] * 9, "more than one delta that changes the size"), ([delta], "it should have 91")):
        file.write_text(json.dumps(metadata | {"filters": filters, "compressor": None, "dtype": "<f4"}))
        for i in range(4):
            (tmp_path / "store.zarr" / "data" / "state" / f"{i}.0").write_bytes(bytes(732))
        with pytest.raises(StoreError, match=said):
            EpisodeStore.open(tmp_path / "store.zarr").read("state")


def test_every_known_codec_is_read(tmp_path: Path) -> None:
    for codec in (numcodecs.Zlib(), numcodecs.GZip(), numcodecs.Zstd(), numcodecs.LZ4(), numcodecs.Blosc("lz4"), None):
        path = tmp_path / f"{codec.codec_id if codec else 'none'}.zarr"
        group = zarr.create_group(path, zarr_format=2)
        rows = np.random.default_rng(0).normal(size=(200, 3)).round(1)
        group.create_array("data/state", data=rows, chunks=(61, 3), compressors=codec)
        group.create_array("data/action", data=rows, compressors=codec, filters=[numcodecs.Delta("<f8")])
        group.create_array("meta/episode_ends", data=np.array([200]))
        steps = np.arange(200, dtype=np.int32)[:, None].repeat(3, axis=1)
        group.create_array("data/steps", data=steps, compressors=codec, filters=[numcodecs.Delta("<i4", astype="|i1")])
        np.testing.assert_array_equal(EpisodeStore.open(path).read("steps"), steps)
        np.testing.assert_array_equal(EpisodeStore.open(path).read("state"), rows)
        np.testing.assert_allclose(EpisodeStore.open(path).read("action"), rows, atol=1e-12)


def test_shards_are_read_and_guarded_chunk_by_chunk(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "store.zarr")
    rows = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    blosc = zarr.codecs.BloscCodec(cname="zstd")
    for key in ("state", "action"):
        group.create_array(f"data/{key}", data=rows, chunks=(10, 3), shards=(100, 3), compressors=blosc)
    group.create_array("meta/episode_ends", data=np.array([70, 200]))
    store = EpisodeStore.open(tmp_path / "store.zarr")
    np.testing.assert_array_equal(store.read("state"), rows)
    np.testing.assert_array_equal(store.read_rows("state", 95, 103), rows[95:103])
    shard = next((tmp_path / "store.zarr" / "data" / "state" / "c").rglob("0/0"))
    content = bytearray(shard.read_bytes())
    content[4:8] = (2**30).to_bytes(4, "little")  # what the first chunk says of itself
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="would unpack into 1073741824 bytes"):
        EpisodeStore.open(tmp_path / "store.zarr").read("state")


def test_a_chunk_of_a_shard_that_is_read_in_part_is_guarded_too(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "store.zarr")
    for key in ("state", "action"):
        rows = np.ones((210, 2), np.float32)
        group.create_array(
            f"data/{key}", data=rows, chunks=(20, 2), shards=(300, 2), compressors=zarr.codecs.BloscCodec()
        )
    group.create_array("meta/episode_ends", data=np.array([100, 200]))
    shard = tmp_path / "store.zarr" / "data" / "state" / "c" / "0" / "0"
    packed = bytes(numcodecs.Blosc("zstd").encode(np.zeros(2**22, "u1")))
    for size, said in (
        (len(packed), "would unpack into 4194304 bytes or more; it should have 160"),
        (2**40, "no chunk"),
    ):
        index = np.zeros((15, 2), "<u8")
        index[:, 1] = size
        shard.write_bytes(packed + index.tobytes() + struct.pack("<I", google_crc32c.value(index.tobytes())))
        with pytest.raises(StoreError, match=said):
            EpisodeStore.open(tmp_path / "store.zarr").read_rows("state", 25, 30)
        with pytest.raises(StoreError, match=said):
            EpisodeStore.open(tmp_path / "store.zarr").read("state")


@pytest.mark.parametrize("form", ["folder", "sparse", "deflated", "left out"])
def test_a_small_store_unpacks_into_little_however_it_is_made(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_store, "ANY_STORE_BYTES", 2**22)
    path = tmp_path / "store.zarr"
    group = zarr.create_group(path, zarr_format=2)
    rows, compressor = (100, 3125), numcodecs.Zstd(9) if form == "folder" else None
    for key in ("action", "b", "c", "d"):  # 1.25 MB each
        array = group.create_array(f"data/{key}", shape=rows, chunks=rows, dtype="<f4", compressors=compressor)
        if form == "folder":
            array[:] = np.float32(1)
        elif form != "left out":
            with (path / "data" / key / "0.0").open("wb") as file:
                file.truncate(1_250_000)
    group.create_array("data/few", data=np.ones((100, 1)))
    group.create_array("meta/episode_ends", data=np.array([100]))
    if form == "deflated":
        with zipfile.ZipFile(tmp_path / "store.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in path.rglob("*"):
                if file.is_file():
                    archive.write(file, file.relative_to(path))
        path = tmp_path / "store.zip"
    store = EpisodeStore.open(path)
    for key in ("action", "b", "c", "few"):
        store.read(key)
    with pytest.raises(StoreError, match=r"data/d/0\.0 would unpack into 1250000 bytes, and with .* no data do"):
        store.read("d")
    store.read("c")  # what was counted is not counted again


def test_more_metadata_than_any_store_has_are_not_kept(tmp_path: Path) -> None:
    write_ours(tmp_path / "store.zarr")
    for i in range(6):
        shutil.copytree(tmp_path / "store.zarr" / "data" / "state", tmp_path / "store.zarr" / "data" / f"state{i}")
        file = tmp_path / "store.zarr" / "data" / f"state{i}" / "zarr.json"
        file.write_text(file.read_text() + " " * (4 * 2**20 - 2**12))
    left_out = EpisodeStore.open(tmp_path / "store.zarr").left_out
    assert sorted(left_out) == ["state4", "state5"]
    assert "data/state4/zarr.json is one metadata file too many" in left_out["state4"]


@pytest.mark.parametrize(
    "text", ["[" * 30_000, '{"a":' * 100 + "1" + "}" * 100, "[{}" + ",{}" * 30_000 + "]", '"\\ud800"']
)
def test_metadata_that_would_take_memory_are_not_parsed(tmp_path: Path, text: str) -> None:
    write_ours(tmp_path / "store.zarr")
    (tmp_path / "store.zarr" / "data" / "state" / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match=r"data/state/zarr\.json is not JSON that can be read: it "):
        EpisodeStore.open(tmp_path / "store.zarr").read("state")


def test_folders_that_are_no_arrays_are_named_in_few_words_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_store, "MOST_NAMES", 150)
    write_ours(tmp_path / "store.zarr")
    for i in range(100):
        (tmp_path / "store.zarr" / "data" / f"k{i}").mkdir()
    store = EpisodeStore.open(tmp_path / "store.zarr")
    assert store.keys == ("action", "contacts", "state")
    assert "and 80 more are left out: each is no array of zarr" in store.remarks()[0]
    for i in range(100, 200):
        (tmp_path / "store.zarr" / "data" / f"k{i}").mkdir()
    with pytest.raises(StoreError, match="has a folder data of more than 150 names"):
        _ = EpisodeStore.open(tmp_path / "store.zarr").keys


def test_a_zip_whose_list_of_members_would_take_memory_is_not_read(tmp_path: Path) -> None:
    write_ours(tmp_path / "store.zarr")
    zip_folder(tmp_path / "store.zarr", tmp_path / "store.zip")
    with (tmp_path / "store.zip").open("rb+") as file:
        end = file.read().rfind(b"PK\5\6")
        file.seek(end + 12)
        file.write((2**26).to_bytes(4, "little"))
    with pytest.raises(StoreError, match="has a list of members of 67108864 bytes; at most 33554432 are read"):
        EpisodeStore.open(tmp_path / "store.zip")


def test_when_a_file_of_an_array_cannot_be_read_nothing_of_that_read_goes_on(tmp_path: Path) -> None:
    rows = np.zeros((4000, 2), np.float32)
    group = zarr.create_group(tmp_path / "store.zarr", zarr_format=2)
    for key in ("state", "action"):
        group.create_array(f"data/{key}", data=rows, chunks=(10, 2), config={"write_empty_chunks": True})
    group.create_array("meta/episode_ends", data=np.array([4000]))
    file = tmp_path / "store.zarr" / "data" / "state" / "3.0"
    file.unlink()
    os.mkfifo(file)
    store = EpisodeStore.open(tmp_path / "store.zarr")
    with pytest.raises(StoreError, match=r"data/state/3\.0 is no regular file"):
        store.read("state")

    async def count() -> int:
        return len(asyncio.all_tasks())

    assert sync(count()) == 1


def test_shards_of_more_chunks_than_anyone_has_are_not_read(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "store.zarr")
    for key, shards in (("state", 2**15), ("action", 2**14)):
        group.create_array(f"data/{key}", shape=(2**17, 1), dtype="u1", chunks=(1, 1), shards=(shards, 1))
    group.create_array("meta/episode_ends", data=np.array([2**17]))
    store = EpisodeStore.open(tmp_path / "store.zarr")
    with pytest.raises(StoreError, match="has shards of more than 16384 chunks"):
        store.read("state")
    with pytest.raises(StoreError, match="has 131072 chunks of some 1 bytes; at most 65536 of those are read"):
        store.read("action")


@pytest.mark.parametrize(
    "array, shape, chunks", [("meta/episode_ends", [2**25], [1]), ("data/state", [2**28, 1], [1, 1])]
)
def test_more_chunks_than_anyone_has_are_not_walked_through(tmp_path: Path, array: str, shape, chunks) -> None:
    path = tmp_path / "store.zarr"
    write_published(path)
    metadata = json.loads((path / array / ".zarray").read_text())
    (path / array / ".zarray").write_text(json.dumps(metadata | {"shape": shape, "chunks": chunks, "dtype": "|i1"}))
    if array == "data/state":
        zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = [1, 2, 3, 2**28]
    for file in (path / array).iterdir():
        if file.name[0].isdigit():
            file.unlink()
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"has \d+ chunks of some 1 bytes; at most 65536 of those are read"):
        EpisodeStore.open(path).read("state")
    assert time.monotonic() - started < 30


def test_metadata_of_absurd_size_are_not_parsed(tmp_path: Path) -> None:
    write_ours(tmp_path / "store.zarr")
    with (tmp_path / "store.zarr" / "data" / "state" / "zarr.json").open("a") as file:
        file.write(" " * 20_000_000)
    with pytest.raises(StoreError, match=r"data/state/zarr\.json has 20000756 bytes; at most 4194304 are read"):
        EpisodeStore.open(tmp_path / "store.zarr").read("state")


def test_the_environment_that_a_store_names_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attributes = {"environment": {"id": "this:Zen-v0", "arguments": {}}, "observation_keys": ["state"]}
    with EpisodeStore.create(tmp_path / "store.zarr", attributes, ["left", "right"]) as store:
        store.append(demonstrations())
    assert main(["dataset", "plot", str(tmp_path / "store.zarr"), "--output", str(tmp_path / "plots")]) == 0
    assert main(["dataset", "replay", str(tmp_path / "store.zarr")]) == 2
    said = capsys.readouterr()
    assert (
        "by the module this, which would be imported; if you trust it, give it yourself: --env this:Zen-v0" in said.err
    )
    assert "Beautiful" not in said.out
