"""Web servers of bad will, and of good will but unlike the usual ones: each answer has its bounds of bytes and time,
and nobody is asked but the server that the user named."""

import contextlib
import gzip
import http.server
import os
import socket
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import zarr

from diffusion_policy.datasets import locations
from diffusion_policy.datasets.consolidated import consolidated_is_stale
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore

web = pytest.importorskip("diffusion_policy.datasets.web", exc_type=ImportError)


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of a folder, unless `evil` answers."""

    protocol_version = "HTTP/1.1"
    root: Path
    evil: Callable[["Handler"], bool]
    asked: list[str]

    def log_message(self, format, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        type(self).asked.append(f"{self.command} {self.path}")
        with contextlib.suppress(OSError):  # the client has gone
            if not type(self).evil(self):
                self.serve()
            return
        self.close_connection = True

    def serve(self) -> None:
        file = type(self).root / self.path.lstrip("/")
        if file.is_file():
            self.send(file.read_bytes())
        else:
            self.send(b"", status=404)

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def send_endlessly(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        piece = b"100000\r\n" + bytes(2**20) + b"\r\n"
        while self.command == "GET":
            self.wfile.write(piece)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts servers for `tmp_path`; gives their addresses."""
    servers = []

    def start(evil: Callable[[Handler], bool] = lambda handler: False) -> str:
        handler = type("One", (Handler,), {"root": tmp_path, "evil": staticmethod(evil), "asked": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of the published layout."""
    path = tmp_path / "store.zarr"
    group = zarr.create_group(path, zarr_format=2)
    for key in ("state", "action"):
        rows = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
        group.create_array(f"data/{key}", data=rows, chunks=(50, 2))
    group.create_array("meta/episode_ends", data=np.array([40, 100]))
    group.attrs["observation_keys"] = ["state"]
    return path


def of(name: str, deed: Callable[[Handler], object]) -> Callable[[Handler], bool]:
    """Do something instead of serving files of this name."""

    def evil(handler: Handler) -> bool:
        if not handler.path.endswith(name):
            return False
        deed(handler)
        return True

    return evil


@pytest.mark.parametrize("name", ["/.zgroup", "/.zarray", "/state/1.0", ".zip"])
def test_an_answer_without_end_is_given_up(path: Path, serve, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "LARGEST_FETCHED", 2**23)
    url = serve(of(name, Handler.send_endlessly))
    before = set(os.listdir(tempfile.gettempdir()))
    with pytest.raises(StoreError, match=r"has no end: more than \d+ bytes came"):
        EpisodeStore.open(f"{url}/store.zarr{name if name == '.zip' else ''}").read("state")
    assert not {entry for entry in set(os.listdir(tempfile.gettempdir())) - before if entry.startswith("tmp")}


@pytest.mark.parametrize("name", ["/.zgroup", "/state/0.0", ".zip"])
def test_an_answer_that_drips_is_given_up(path: Path, serve, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(handler: Handler) -> None:
        handler.send(b"", Content_Length="1000")
        while handler.command == "GET":
            handler.wfile.write(b" ")
            time.sleep(0.05)

    monkeypatch.setattr(web, "PATIENCE", 0.3)
    url = serve(of(name, drip))
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"is too slow: \d+ bytes in"):
        EpisodeStore.open(f"{url}/store.zarr{name if name == '.zip' else ''}").read("state")
    assert time.monotonic() - started < 20


def test_headers_that_drip_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def drip() -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while True:
                connection.sendall(b"X: y\r\n")
                time.sleep(0.05)

    monkeypatch.setattr(web, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        accept = threading.Thread(target=drip, daemon=True)
        accept.start()
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"was silent for 0\.3 s"):
            EpisodeStore.open(f"http://127.0.0.1:{server.getsockname()[1]}/store.zip")
        assert time.monotonic() - started < 20
        accept.join(3)


def test_what_is_sent_packed_is_never_unpacked(path: Path, serve) -> None:
    url = serve(of("/state/0.0", lambda handler: handler.send(gzip.compress(bytes(2**20)), Content_Encoding="gzip")))
    with pytest.raises(StoreError, match=r"state/0\.0 is sent packed \(gzip\), though this was not asked for"):
        EpisodeStore.open(f"{url}/store.zarr").read("state")


@pytest.mark.parametrize(
    "where, name",
    [
        *(("another server", name) for name in ("/.zgroup", "/state/0.0", ".zip")),
        ("a file", ".zip"),
        ("a loop", "/0.0"),
    ],
)
def test_no_redirect_leads_to_anything_that_the_user_did_not_name(path: Path, serve, where: str, name: str) -> None:
    asked: list[str] = []
    other = serve(lambda handler: asked.append(handler.path) is None and False)
    target, said = {
        "another server": (f"{other}/store.zarr/.zgroup", "is another server; if you trust it, open that instead"),
        "a file": ("file:///etc/passwd", "is another server"),
        "a loop": ("/store.zarr/data/state/0.0", "redirects more than 5 times"),
    }[where]
    url = serve(of(name, lambda handler: handler.send(b"", status=302, Location=target)))
    with pytest.raises(StoreError, match=said):
        EpisodeStore.open(f"{url}/store.zarr{name if name == '.zip' else ''}").read("state")
    assert asked == []


def test_a_redirect_within_the_server_is_followed(path: Path, serve) -> None:
    def move(handler: Handler) -> bool:
        if handler.path.startswith("/old"):
            handler.send(b"", status=301, Location=handler.path.replace("/old", "/store.zarr", 1))
        return handler.path.startswith("/old")

    assert EpisodeStore.open(f"{serve(move)}/old").keys == ("action", "state")


@pytest.mark.parametrize("deed", ["too long", "too short", "no number", "huge header", "no HTTP", "error 500"])
def test_answers_that_are_none_are_one_sentence(path: Path, serve, deed: str) -> None:
    def answer(handler: Handler) -> None:
        content = (path / "data" / "state" / "0.0").read_bytes()
        if deed == "too long":
            handler.send(content, Content_Length=str(2**40))
        elif deed == "too short":
            handler.send(content, Content_Length=str(len(content) + 9))
            handler.close_connection = True
        elif deed == "no number":
            handler.send(content, Content_Length="-5")
        elif deed == "huge header":
            handler.send(content, X="x" * 100_000)
        elif deed == "no HTTP":
            handler.wfile.write(b"\x00" * 50 + b"\r\n\r\n")
            handler.close_connection = True
        else:
            handler.send(b"", status=500)

    with pytest.raises(StoreError, match=r"state/0\.0") as raised:
        EpisodeStore.open(f"{serve(of('/state/0.0', answer))}/store.zarr").read("state")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ranges", ["kept to", "ignored", "exchanged", "exceeded"])
def test_a_part_of_a_shard_is_read_whatever_the_server_makes_of_ranges(tmp_path: Path, serve, ranges: str) -> None:
    group = zarr.create_group(tmp_path / "store.zarr")
    rows = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    for key in ("state", "action"):
        group.create_array(f"data/{key}", data=rows, chunks=(10, 2), shards=(200, 2))
    group.create_array("meta/episode_ends", data=np.array([200]))
    group.attrs["observation_keys"] = ["state"]

    def answer(handler: Handler) -> bool:
        asked = handler.headers.get("Range")
        if asked is None or ranges == "ignored":
            return False
        content = (tmp_path / handler.path.lstrip("/")).read_bytes()
        first, last = asked.removeprefix("bytes=").split("-")
        start = int(first) if first else len(content) - int(last)
        stop = int(last) + 1 if first else len(content)
        if ranges == "exchanged" and first:
            start, stop = start + 1, stop + 1
        if ranges == "exceeded" and first:
            stop += 1
        said = f"bytes {start}-{stop - 1}/{len(content)}"
        handler.send(content[start:stop], status=206, Content_Range=said)
        return True

    store = EpisodeStore.open(f"{serve(answer)}/store.zarr")
    if ranges in ("kept to", "ignored"):
        np.testing.assert_array_equal(store.read_rows("state", 35, 62), rows[35:62])
    else:
        with pytest.raises(StoreError, match=r"sent another part|bytes; at most \d+ are read"):
            store.read_rows("state", 35, 62)


@pytest.mark.parametrize("page", ["endless", "links elsewhere", "too many names", "folders without end"])
def test_pages_that_list_folders_have_bounds(path: Path, serve, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "LISTING_BYTES", 2**22)
    elsewhere = "".join(f'<a href="{link}">x</a>' for link in ("http://a.test/x", "//b.test/y", "/../z", "../up", "?q"))

    def answer(handler: Handler) -> bool:
        if not handler.path.endswith("/"):
            return False
        if page == "endless":
            handler.send(b"<a" * 2**22, Content_Type="text/html")
        elif page == "links elsewhere":
            handler.send(f'{elsewhere}<a href="data/">d</a>'.encode(), Content_Type="text/html")
        elif page == "too many names":
            handler.send(b"".join(b"<a href='%d'>" % i for i in range(9000)), Content_Type="text/html")
        elif handler.path.endswith("/state/"):
            handler.send(b'<a href="a/"><a href="b/">', Content_Type="text/html")
        else:
            return False
        return True

    if page in ("endless", "too many names"):
        with pytest.raises(StoreError, match=r"at most 4194304 are read|more than 8192 names"):
            EpisodeStore.open(f"{serve(answer)}/store.zarr")
    elif page == "links elsewhere":
        with pytest.raises(StoreError, match="has no"):
            EpisodeStore.open(f"{serve(answer)}/store.zarr").read("nothing")
    else:
        started = time.monotonic()
        assert len(EpisodeStore.open(f"{serve(answer)}/store.zarr").read("state")) == 100
        assert time.monotonic() - started < 20


def test_a_zip_behind_a_url_that_is_a_bomb_is_not_unpacked(tmp_path: Path, path: Path, serve) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in path.rglob("*"):
            if file.is_file() and file.name != "0.0":
                archive.write(file, file.relative_to(path))
        archive.writestr("data/state/0.0", bytes(2**24))
    with pytest.raises(StoreError, match=r"data/state/0\.0 has 16777216 bytes; at most \d+ are read"):
        EpisodeStore.open(f"{serve()}/s.zip").read("state")


def test_a_zip_larger_than_is_fetched_says_what_to_do(path: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "LARGEST_FETCHED", 10)
    (path.parent / "s.zip").write_bytes(bytes(20))
    with pytest.raises(StoreError, match=r"s\.zip has 20 bytes; at most 10 are read"):
        EpisodeStore.open(f"{serve()}/s.zip")


# Other places


@pytest.mark.parametrize("url", ["zip://store.zarr::/tmp/x.zip", "simplecache::http://127.0.0.1:9/x.zarr", "a::b.zip"])
def test_a_chain_of_file_systems_is_refused_in_one_sentence(url: str) -> None:
    with pytest.raises(StoreError, match=r"is a chain of file systems \(::\), which is not read; make a copy"):
        EpisodeStore.open(url)


def test_a_file_system_of_fsspec_says_the_size_of_a_file_before_it_is_read(path: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.put(str(path), "/size.zarr", recursive=True)
    assert len(EpisodeStore.open("memory://size.zarr").read("state")) == 100
    memory.pipe_file("/size.zarr/data/state/0.0", bytes(2**16))
    with pytest.raises(StoreError, match=r"data/state/0\.0 has 65536 bytes; at most \d+ are read"):
        EpisodeStore.open("memory://size.zarr").read("state")
    memory.pipe_file("/size.zip", bytes(2**10))
    with pytest.raises(StoreError, match=r"cannot open memory://size\.zip"):
        EpisodeStore.open("memory://size.zip")
    memory.rm("/size.zarr", recursive=True)
    assert len(EpisodeStore.open(f"file://{path}").read("state")) == 100


# Consolidated metadata


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_stale_copy_of_metadata_is_not_believed_where_the_files_can_be_seen(
    tmp_path: Path, serve, version: Literal[2, 3]
) -> None:
    path = tmp_path / "store.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=version)
    for key in ("state", "action"):
        group.create_array(f"data/{key}", data=np.zeros((50, 2), np.float32), chunks=(10, 2))
    group.create_array("meta/episode_ends", data=np.array([20, 50]), chunks=(10,))
    zarr.consolidate_metadata(path, zarr_format=version)
    group = zarr.open_group(path, mode="r+", zarr_format=version, use_consolidated=False)
    assert consolidated_is_stale(locations.open_group(str(path), "r")) == []
    for key in ("state", "action"):
        array = group[f"data/{key}"]
        assert isinstance(array, zarr.Array)
        array.resize((90, 2))
        array[50:] = 1
    ends = group["meta/episode_ends"]
    assert isinstance(ends, zarr.Array)
    ends.resize((4,))
    ends[2:] = [70, 90]
    group.create_array("data/new", data=np.zeros((90, 1)))
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for file in path.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(path))
    for place in (path, tmp_path / "s.zip"):
        store = EpisodeStore.open(place)
        assert store.episode_ends.tolist() == [20, 50, 70, 90]
        assert store.keys == ("action", "new", "state")
        stale = consolidated_is_stale(store.arrays.group)
        assert stale == ["data/action", "data/new", "data/state", "meta/episode_ends"]
    unseen = EpisodeStore.open(f"{serve()}/store.zarr")  # a server that lists nothing: the copy is all there is
    assert unseen.keys == ("action", "state")
    assert consolidated_is_stale(unseen.arrays.group) == []


def test_a_server_that_lists_nothing_is_asked_for_no_more_than_it_takes(path: Path, serve) -> None:
    demonstration = Demonstration({"state": np.zeros((5, 2), np.float32), "action": np.zeros((5, 2), np.float32)})
    with EpisodeStore.create(path.parent / "ours.zarr", {"observation_keys": ["state"]}, []) as store:
        store.append([demonstration])
    assert len(EpisodeStore.open(f"{serve()}/ours.zarr").read("state")) == 5
