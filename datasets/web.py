"""Reads stores on web servers. No answer may be larger, slower or from another server than allowed.

Only the server that the user named is asked; no redirect leads to another. An answer is read in pieces and counted,
never decompressed, and given up when it stalls or is too slow. Needs aiohttp, which is an extra.
"""

import asyncio
import atexit
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from html import unescape
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urljoin, urlsplit

import aiohttp
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

PATIENCE = 20
"""Seconds that a web server may be silent, or take longer than at the least rate."""
LEAST_RATE = 10_000
"""Bytes a second."""
MOST_REDIRECTS = 5
LISTING_BYTES = 2**24
"""Of the page that lists a folder."""
MOST_LISTINGS = 256
"""Folders within one array that are listed; where it has more, its chunks are asked for one by one."""
MOST_DEPTH = 34
"""Of folders: one for each axis of an array, and two."""
SHORT_PAGE = 2**14
NO_FILE = (401, 403, 404, 410)
LINK = re.compile(r"""href\s*=\s*(?:"([^"<>]*)"|'([^'<>]*)')""", re.IGNORECASE)


class WebError(ValueError):
    """A web server did not answer as it should; the message says what was wrong."""


class WebStore(Store):
    """A folder on a web server, to read. Where the server has no pages that list folders, nothing is listed."""

    supports_writes = False  # pyright: ignore
    supports_deletes = False  # pyright: ignore
    supports_listing = True  # pyright: ignore

    def __init__(self, url: str) -> None:
        super().__init__(read_only=True)
        self.url = url.rstrip("/")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WebStore) and self.url == other.url

    def __str__(self) -> str:
        return self.url

    async def read(self, key: str, byte_range: ByteRequest | None, most_bytes: int) -> bytes | None:
        """A file of at most `most_bytes`, or a part of it; None where there is none."""
        headers = {"Range": _range(byte_range)} if byte_range else {}
        async with _ask("GET", self._url(key), headers) as answer:
            if answer.status in NO_FILE:
                await _skip(answer)
                return None
            if answer.status == 416:  # no such part
                return b""
            _refuse_failure(answer)
            if answer.status == 206:
                return await _read_part(answer, byte_range, most_bytes)
            content = await _read(answer, most_bytes)  # all of it, though a part may have been asked for
        if isinstance(byte_range, RangeByteRequest):
            return content[byte_range.start : byte_range.end]
        if isinstance(byte_range, SuffixByteRequest):
            return content[max(0, len(content) - byte_range.suffix) :]
        return content[byte_range.offset :] if isinstance(byte_range, OffsetByteRequest) else content

    async def exists(self, key: str) -> bool:
        """Whether the server has this file."""
        async with _ask("HEAD", self._url(key), {}) as answer:
            if answer.status not in NO_FILE:
                _refuse_failure(answer)
            return answer.status not in NO_FILE

    async def getsize(self, key: str) -> int:
        """Size that the server says [bytes]."""
        async with _ask("HEAD", self._url(key), {}) as answer:
            _refuse_failure(answer)
            return _length(answer) or 0

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Names in a folder, as the server's page of it says; folders end with a slash."""
        url = f"{self._url(prefix).rstrip('/')}/"
        async with _ask("GET", url, {}) as answer:
            if answer.status != 200 or answer.content_type != "text/html":
                return
            page = (await _read(answer, LISTING_BYTES)).decode(errors="replace")
        for name in _names(page, url):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Files within a folder, at any depth; raises NotImplementedError where that is too much to ask for."""
        folders, asked = [prefix.rstrip("/")], 0
        while folders:
            folder, asked = folders.pop(), asked + 1
            if asked > MOST_LISTINGS or folder.count("/") - prefix.count("/") > MOST_DEPTH:
                raise NotImplementedError(f"{self.url} has too many folders to list")
            async for name in self.list_dir(folder):
                if name.endswith("/"):
                    folders.append(f"{folder}/{name[:-1]}")
                else:
                    yield f"{folder}/{name}"

    def list(self) -> AsyncIterator[str]:
        """All files."""
        return self.list_prefix("")

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Not without a bound: see `read`."""
        raise NotImplementedError

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Any) -> Any:
        """Not without a bound: see `read`."""
        raise NotImplementedError

    async def set(self, key: str, value: Buffer) -> None:
        """Never."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """Never."""
        raise NotImplementedError

    def _url(self, key: str) -> str:
        return f"{self.url}/{quote(key)}" if key else self.url


async def download(url: str, file: BinaryIO, most_bytes: int) -> None:
    """Write what lies behind a URL to a file, at most `most_bytes`; raises WebError."""
    async with _ask("GET", url, {}) as answer:
        if answer.status in NO_FILE:
            raise FileNotFoundError(url)
        _refuse_failure(answer)
        async for piece in _pieces(answer, most_bytes):
            file.write(piece)


@contextlib.asynccontextmanager
async def _ask(method: str, url: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
    """A server's answer, to be read within; redirects are followed within the server."""
    named, timeout = url, aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
    try:
        for _ in range(MOST_REDIRECTS + 1):
            async with asyncio.timeout(PATIENCE):  # the headers may drip, too
                answer = await _session().request(method, url, headers=headers, allow_redirects=False, timeout=timeout)
            with contextlib.closing(answer):  # what was not read to its end costs the connection
                if answer.status not in (301, 302, 303, 307, 308):
                    yield answer
                    return
                url = _follow(url, answer.headers.get("Location", ""))
    except TimeoutError as error:
        raise WebError(f"{url} was silent for {PATIENCE} s") from error
    except aiohttp.ClientError as error:
        raise WebError(f"{url} does not answer as a web server should: {error or type(error).__name__}") from error
    raise WebError(f"{named} redirects more than {MOST_REDIRECTS} times")


def _follow(url: str, location: str) -> str:
    """Where a redirect leads; raises WebError where that is another server."""
    target = urljoin(url, location)
    old, new = urlsplit(url), urlsplit(target)
    same = old.netloc == new.netloc and old.scheme == new.scheme
    if not same and (old.hostname != new.hostname or (old.scheme, new.scheme) != ("http", "https")):
        raise WebError(
            f"{url} redirects to {target[:200]}, which is another server; if you trust it, open that instead"
        )
    return target


def _refuse_failure(answer: aiohttp.ClientResponse) -> None:
    if answer.status not in (200, 206):
        raise WebError(f"{answer.url} cannot be read: {answer.status} {answer.reason}")


def _length(answer: aiohttp.ClientResponse) -> int | None:
    """What the answer says of its size [bytes]."""
    said = answer.headers.get("Content-Length", "")
    return int(said) if said.isdecimal() else None


async def _read(answer: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    return b"".join([piece async for piece in _pieces(answer, most_bytes)])


async def _skip(answer: aiohttp.ClientResponse) -> None:
    """Read a short page that nobody wants, so that the connection can be used again."""
    if (_length(answer) or SHORT_PAGE) < SHORT_PAGE:
        await _read(answer, SHORT_PAGE)


async def _read_part(answer: aiohttp.ClientResponse, byte_range: ByteRequest | None, most_bytes: int) -> bytes:
    """What a server sends that keeps to the range it was asked for."""
    found = re.match(r"bytes (\d{1,18})-", answer.headers.get("Content-Range", ""))
    if isinstance(byte_range, RangeByteRequest):
        if found is None or int(found[1]) != byte_range.start:
            raise WebError(f"{answer.url} sent another part than it was asked for")
        most_bytes = min(most_bytes, byte_range.end - byte_range.start)
    elif isinstance(byte_range, SuffixByteRequest):
        most_bytes = min(most_bytes, byte_range.suffix)
    return await _read(answer, most_bytes)


async def _pieces(answer: aiohttp.ClientResponse, most_bytes: int) -> AsyncIterator[bytes]:
    """The body of an answer as it comes; raises WebError where it is packed, too large, or too slow."""
    packed, length = answer.headers.get("Content-Encoding", "identity"), _length(answer)
    if packed not in ("", "identity"):
        raise WebError(f"{answer.url} is sent packed ({packed[:20]}), though this was not asked for")
    if length is not None and length > most_bytes:
        raise WebError(f"{answer.url} has {length} bytes; at most {most_bytes} are read")
    started, count = time.monotonic(), 0
    async for piece in answer.content.iter_any():
        count += len(piece)
        if count > most_bytes:
            raise WebError(f"{answer.url} has no end: more than {most_bytes} bytes came, the most that are read")
        if time.monotonic() - started > PATIENCE + count / LEAST_RATE:
            raise WebError(f"{answer.url} is too slow: {count} bytes in {time.monotonic() - started:.0f} s")
        yield piece


def _range(byte_range: ByteRequest) -> str:
    if isinstance(byte_range, RangeByteRequest):
        return f"bytes={byte_range.start}-{byte_range.end - 1}"
    return f"bytes=-{byte_range.suffix}" if isinstance(byte_range, SuffixByteRequest) else f"bytes={byte_range.offset}-"


def _names(page: str, url: str) -> Iterator[str]:
    """Names of the links of a page to what lies within its folder."""
    seen = set()
    for match in LINK.finditer(page):
        target = urljoin(url, unescape(match[1] or match[2] or "")).partition("?")[0].partition("#")[0]
        name, slash, _ = target.removeprefix(url).partition("/")
        name = unquote(name)
        if target.startswith(url) and name and "/" not in name and name not in seen:
            seen.add(name)
            yield name + slash


_sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}


def _session() -> aiohttp.ClientSession:
    """The one session of a loop, which keeps connections."""
    loop = asyncio.get_running_loop()
    if loop not in _sessions:
        _sessions[loop] = aiohttp.ClientSession(
            auto_decompress=False, headers={"Accept-Encoding": "identity"}, cookie_jar=aiohttp.DummyCookieJar()
        )
    return _sessions[loop]


@atexit.register
def _close_sessions() -> None:
    for loop, session in _sessions.items():
        if loop.is_running():
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(session.close(), loop).result(1)
