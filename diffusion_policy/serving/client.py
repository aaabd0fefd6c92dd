"""A policy on another machine: a planner like any other, in numpy, without torch.

What it plans depends on nothing but what is sent, so a request is sent again after a break, and the results are those
of a server that never failed.
"""

import contextlib
import socket
import ssl
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_connection

from diffusion_policy.config import ChunkingName
from diffusion_policy.control.chunking import Chunking, make_chunking, split_options
from diffusion_policy.control.planner import Steering
from diffusion_policy.control.single import SingleController
from diffusion_policy.serving.protocol import ProtocolError, Served, pack, read_description, unpack

MOST_BYTES = 2**28
"""Of an answer."""
PAUSE = 0.05, 1.0
"""Before the next try, the first and the longest [s]."""
AGAIN = ("busy", "late", "stopping")
"""Errors after which the same request can succeed."""


class ServerLost(ConnectionError):
    """A server did not answer for as long as one was to wait."""


class Refused(ValueError):
    """The server refuses a request, or a client; the message says why."""


def connect(
    url: str,
    *,
    api_key: str | None = None,
    deadline: float = 10.0,
    patience: float = 60.0,
    tls: ssl.SSLContext | None = None,
    warn: Callable[[str], None] | None = None,
) -> "RemotePolicy":
    """The policy of `diffusion-policy serve` at ws://host:port (or wss://). `deadline`: how long one answer may take
    [s], the connection included where there is none; then it is said, by `warn` (a warning of Python's by default), and
    asked again, for `patience` seconds; `tls`: whom to trust, by default the system's authorities. Raises ServerLost,
    Refused for a wrong key, ProtocolError for a server of another protocol."""
    if not _is_address(url):
        raise ValueError(f"a server's address is ws://host:port or wss://host:port; got {url!r:.200}")
    if not deadline > 0 or not patience >= 0:
        raise ValueError(f"deadline must be above 0 and patience at least 0; got {deadline} and {patience}")
    return RemotePolicy(url, api_key, deadline, patience, tls, warn or _warn)


class _Link:
    """A thread's connection; it is closed when its thread ends, if not before."""

    def __init__(self, connection: ClientConnection, served: Served, stack: contextlib.ExitStack) -> None:
        """`stack` closes it."""
        self.connection, self.served = connection, served
        self.close = weakref.finalize(self, stack.close)


class RemotePolicy:
    """See `control.planner.Planner`. Several threads may use it; each has a connection of its own."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        deadline: float,
        patience: float,
        tls: ssl.SSLContext | None,
        warn: Callable[[str], None],
    ) -> None:
        """See `connect`."""
        self.url, self._key, self._tls = url, api_key, tls
        self._deadline, self._patience, self._warn = deadline, patience, warn
        self._threads = threading.local()
        served = self.served = self._persist(self._link).served
        """What the server says of the policy."""
        self.observation_horizon, self.steps = served.observation_horizon, served.steps
        self.action_horizon = served.action_horizon
        self.observation_shapes = dict(served.observation_shapes)
        self.action_shape, self.noise_shape = served.action_shape, served.noise_shape
        self.guides, self.longest_prefix = served.guides, served.longest_prefix
        self.last_planning_ms = 0.0
        """What the server took to compute the last plans; the rest of a request is the way and the wait."""

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        """See `Planner.sample`. Raises Refused, and ServerLost after `patience` seconds without an answer."""
        observed = {key: np.asarray(observations[key]) for key in self.observation_shapes}
        request: dict[str, Any] = {"observations": observed, "noise": noise, "deadline_ms": 1000 * self._deadline}
        if steering is not None:
            request["steering"] = steering._asdict()
        frame = pack(request)
        answer = self._persist(lambda ends: self._ask(frame, ends))
        plans = answer.get("actions")
        shape = (*noise.shape[:2], self.steps, *self.action_shape)
        if not isinstance(plans, np.ndarray) or plans.shape != shape or plans.dtype.kind != "f":
            raise ProtocolError(f"{self.url} must answer plans of shape {shape}")
        timing = answer.get("server_timing")
        self.last_planning_ms = float(timing.get("infer_ms", 0)) if isinstance(timing, dict) else 0.0
        return plans

    def controller(
        self,
        seed: int = 0,
        *,
        action_horizon: int | None = None,
        delay_steps: int = 0,
        chunking: ChunkingName | Chunking = "receding",
        **options: Any,
    ) -> SingleController:
        """As `LoadedPolicy.controller`; the server samples as it was told. Raises ConfigError for what it cannot."""
        joined, sampling = split_options(chunking, options)
        if sampling:
            raise ValueError(f"the server samples as it was told; {next(iter(sampling))} is an option of serve")
        if not isinstance(joined, Chunking):
            joined = make_chunking(joined)
        return SingleController(
            self,
            seed,
            action_horizon=action_horizon,
            delay_steps=delay_steps,
            chunking=joined,
            sampling_steps=self.served.sampling.sampling_steps,
        )

    def close(self) -> None:
        """Close this thread's connection; the next request opens another."""
        link = getattr(self._threads, "link", None)
        self._threads.link = None
        if link is not None:
            link.close()

    def _persist(self, attempt: Callable[[float], Any]) -> Any:
        """What an attempt gives, or one after it while the server does not answer. An attempt is told when its deadline
        is, as `time.monotonic` counts."""
        began, pause, told = time.monotonic(), PAUSE[0], False
        while True:
            try:
                return attempt(time.monotonic() + self._deadline)
            except (OSError, WebSocketException) as error:
                waited, answered = time.monotonic() - began, isinstance(error, _TryAgain)
                reason = _explain(error)
                if not answered:
                    self._cut()
                if waited >= self._patience:
                    raise ServerLost(f"no plan from {self.url} for {waited:.0f} s: {reason}") from error
                if not told and (waited >= self._deadline or not answered):
                    self._warn(f"no plan from {self.url}: {reason}; trying again for {self._patience:g} s")
                    told = True
            time.sleep(pause)
            pause = min(2 * pause, PAUSE[1])

    def _cut(self) -> None:
        """As `close`, without a word to a server that does not answer."""
        link = getattr(self._threads, "link", None)
        if link is not None:
            _shut(link.connection)
        self.close()

    def _link(self, ends: float) -> _Link:
        """This thread's connection, made until then where there is none."""
        link = getattr(self._threads, "link", None)
        if link is None:
            stack = contextlib.ExitStack()
            connection = stack.enter_context(self._open(ends))
            try:
                served = read_description(connection.recv(timeout=_left(ends)))
                if served != getattr(self, "served", served):
                    raise Refused(f"{self.url} serves another policy now than before")
            except BaseException:
                _shut(connection)
                stack.close()
                raise
            link = self._threads.link = _Link(connection, served, stack)
        return link

    def _open(self, ends: float) -> ClientConnection:
        options: dict[str, Any] = {} if self._tls is None else {"ssl": self._tls}
        if self._key is not None:
            options["additional_headers"] = {"Authorization": f"Api-Key {self._key}"}
        try:
            return open_connection(
                self.url,
                open_timeout=_left(ends),
                close_timeout=1,
                ping_interval=None,
                compression=None,
                max_size=MOST_BYTES,
                proxy=None,
                **options,
            )
        except InvalidStatus as error:
            if error.response.status_code in (401, 403):
                said = (error.response.body or b"").decode(errors="replace").strip()
                raise Refused(f"{self.url} refuses this client: {said:.200}") from error
            raise
        except ssl.SSLCertVerificationError as error:
            raise Refused(f"{self.url} is not trusted: {error.verify_message}") from error

    def _ask(self, frame: bytes, ends: float) -> dict[str, Any]:
        link = self._link(ends)
        connection, most = link.connection, link.served.max_frame_bytes
        if len(frame) > most:
            raise Refused(f"{self.url} takes requests of {most} bytes; this one has {len(frame)}")
        with _shut_at(ends, connection):
            connection.send(frame)
        answer = connection.recv(timeout=_left(ends))
        if isinstance(answer, bytes):
            return unpack(answer)
        kind, _, sentence = answer.partition(": ")
        if kind in AGAIN:
            raise _TryAgain(answer)
        raise Refused(f"{self.url} answers: {sentence or answer:.2000}")


class _TryAgain(OSError):
    """The server asks for another attempt."""


def _left(ends: float) -> float:
    """Time until then [s]; raises TimeoutError where there is none."""
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextlib.contextmanager
def _shut_at(ends: float, connection: ClientConnection) -> Iterator[None]:
    """Raises TimeoutError unless what is sent within the context is sent until then; sending has no timeout itself."""
    timer = threading.Timer(_left(ends), _shut, [connection])
    timer.start()
    try:
        yield
    except (OSError, WebSocketException):
        _left(ends)
        raise
    finally:
        timer.cancel()


def _shut(connection: ClientConnection) -> None:
    """End a connection at once, from any thread."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)  # beneath its encryption


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


def _explain(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "its deadline passed"
    if isinstance(error, InvalidHandshake):
        return f"it is no such server ({error})"
    return str(error) or type(error).__name__


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)
