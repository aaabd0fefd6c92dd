"""Stores that a stranger may hand over: mutated at random, or made to harm. Each is read, validated and converted in a
process of its own kind, and must end in our own error or in right values."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr

from diffusion_policy.cli import main
from diffusion_policy.datasets.store import Demonstration, EpisodeStore, StoreError
from diffusion_policy.datasets.validate import validate

LENGTHS = (40, 7, 60, 93)
HOSTILE_VALUES = [
    [10**15, 2], [2**62, 2**62], [-5, 2], [0, 0], [200], [], 10**18, -1, 0, None, "", "|O", "object", "<f8", ">f4",
    "<U9", "float16", "complex128", "datetime64", "NaN", {}, {"a": 1}, [{"id": "pickle"}], {"id": "pickle"},
    [{"name": "numcodecs.pickle", "configuration": {}}], {"id": "zlib", "level": 99}, "F", 4, "../../../etc", "regular",
]  # fmt: skip
READER = """
import json, resource, signal, sys, time
from pathlib import Path
from diffusion_policy.datasets.convert import convert
from diffusion_policy.cli import main
from diffusion_policy.datasets.store import EpisodeStore, StoreError
from diffusion_policy.datasets.validate import validate

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
    answer["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
    """As the Push-T data set: zarr v2, no checksums, several chunks."""
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


def mutate_and_read(count: int, tmp_path: Path) -> None:
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
    rng = random.Random(0)
    folder = tmp_path / "stores"
    folder.mkdir()
    before = sorted(str(path) for path in outside.rglob("*"))
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for i in range(count):
            name = ("ours", "published")[i % 2]
            store = folder / f"{i}.zarr"
            shutil.copytree(originals[name], store)
            deeds = [mutate(store, rng) for _ in range(rng.choice([1, 1, 2]))]
            if i % 5 == 4:
                zip_folder(store, folder / f"{i}.zarr.zip")
                store = folder / f"{i}.zarr.zip"
            reader.stdin.write(f"{store}\n")
            reader.stdin.flush()
            line = reader.stdout.readline()
            assert line, f"the reader died or hung at {i}: {deeds}"
            answer = json.loads(line)
            assert answer["resident"] < 2e6, deeds  # [KB]
            judge(name, deeds, answer, expected)
            for path in folder.iterdir():
                assert path.name.startswith(str(i)), f"{deeds} wrote {path}"
                shutil.rmtree(path) if path.is_dir() else path.unlink()
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
    mutate_and_read(50, tmp_path)


@pytest.mark.slow
def test_a_thousand_mutated_stores(tmp_path: Path) -> None:
    mutate_and_read(1000, tmp_path)


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
        assert any("data/state" in finding.what for finding in validate(path))
    assert not mark.exists()


def test_absurd_shapes_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    write_published(path)
    metadata = json.loads((path / "data" / "state" / ".zarray").read_text())
    for change, message in (
        ({"shape": [10**15, 3]}, "is damaged: its chunk"),
        ({"chunks": [10**9, 3]}, "has chunks of 11444 MB"),
        ({"shape": [200, 10**12]}, "is damaged: its chunk"),
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
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("codec", [numcodecs.GZip(9), numcodecs.Zstd(9)], ids=lambda codec: codec.codec_id)
def test_a_second_stream_behind_a_harmless_one_is_refused(tmp_path: Path, codec) -> None:
    packed = bytes(codec.encode(bytes(732))) + bytes(codec.encode(bytes(2**20)))
    bomb(tmp_path / "store.zarr", codec.get_config(), packed)
    with pytest.raises(StoreError, match="more than one stream|would unpack into 1049308 bytes"):
        EpisodeStore.open(tmp_path / "store.zarr").read("state")


def test_every_known_codec_is_read(tmp_path: Path) -> None:
    for codec in (numcodecs.Zlib(), numcodecs.GZip(), numcodecs.Zstd(), numcodecs.LZ4(), numcodecs.Blosc("lz4"), None):
        path = tmp_path / f"{codec.codec_id if codec else 'none'}.zarr"
        group = zarr.create_group(path, zarr_format=2)
        rows = np.random.default_rng(0).normal(size=(200, 3)).round(1)
        group.create_array("data/state", data=rows, chunks=(61, 3), compressors=codec)
        group.create_array("data/action", data=rows, compressors=codec, filters=[numcodecs.Delta("<f8")])
        group.create_array("meta/episode_ends", data=np.array([200]))
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
    with pytest.raises(StoreError, match=r"is damaged: its chunk .* is missing"):
        EpisodeStore.open(path).read("state")
    assert time.monotonic() - started < 5


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
