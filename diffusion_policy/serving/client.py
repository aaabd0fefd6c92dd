"""A policy on another machine: a planner like any other, in numpy, without torch.

What it plans depends on nothing but what is sent, so a request is sent again after a break, and the results are those
of a server that never failed.
"""

import contextlib
import socket
import ssl
import struct
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
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
    [s]; then it is said, by `warn` (a warning of Python's by default), and asked again, for `patience` seconds;
    `tls`: whom to trust, by default the system's authorities. Raises ServerLost, Refused for a wrong key, ProtocolError
    for a server of another protocol."""
    if not _is_address(url):
        raise ValueError(f"a server's address is ws://host:port or wss://host:port; got {url!r:.200}")
    if not deadline > 0 or not patience >= 0:
        raise ValueError(f"deadline must be above 0 and patience at least 0; got {deadline} and {patience}")
    return RemotePolicy(url, api_key, deadline, patience, tls, warn or _warn)


class _Link(NamedTuple):
    """A thread's connection."""

    connection: ClientConnection
    served: Served
    stack: contextlib.ExitStack
    """Closes it."""


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
        answer = self._persist(lambda: self._ask(frame))
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
            link.stack.close()

    def _persist(self, attempt: Callable[[], Any]) -> Any:
        """What an attempt gives, or one after it while the server does not answer."""
        began, pause, told = time.monotonic(), PAUSE[0], False
        while True:
            try:
                return attempt()
            except (OSError, WebSocketException) as error:
                waited, answered = time.monotonic() - began, isinstance(error, _TryAgain)
                reason = _explain(error)
                if not answered:
                    self.close()
                if waited >= self._patience:
                    raise ServerLost(f"no plan from {self.url} for {waited:.0f} s: {reason}") from error
                if not told and (waited >= self._deadline or not answered):
                    self._warn(f"no plan from {self.url}: {reason}; trying again for {self._patience:g} s")
                    told = True
            time.sleep(pause)
            pause = min(2 * pause, PAUSE[1])

    def _link(self) -> _Link:
        """This thread's connection, made where there is none."""
        link = getattr(self._threads, "link", None)
        if link is None:
            headers = {} if self._key is None else {"Authorization": f"Api-Key {self._key}"}
            options: dict[str, Any] = {} if self._tls is None else {"ssl": self._tls}
            try:
                stack = contextlib.ExitStack()
                opening = open_connection(
                    self.url,
                    additional_headers=headers,
                    open_timeout=self._deadline,
                    close_timeout=1,
                    ping_interval=None,
                    compression=None,
                    max_size=MOST_BYTES,
                    proxy=None,
                    **options,
                )
                connection = stack.enter_context(opening)
            except InvalidStatus as error:
                if error.response.status_code in (401, 403):
                    said = (error.response.body or b"").decode(errors="replace").strip()
                    raise Refused(f"{self.url} refuses this client: {said:.200}") from error
                raise
            except ssl.SSLCertVerificationError as error:
                raise Refused(f"{self.url} is not trusted: {error.verify_message}") from error
            try:
                timeout = struct.pack("ll", int(self._deadline), int(1e6 * (self._deadline % 1)))
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
                served = read_description(connection.recv(timeout=self._deadline))
                if served != getattr(self, "served", served):
                    raise Refused(f"{self.url} serves another policy now than before")
            except BaseException:
                stack.close()
                raise
            link = self._threads.link = _Link(connection, served, stack)
        return link

    def _ask(self, frame: bytes) -> dict[str, Any]:
        connection, served, _ = self._link()
        if len(frame) > served.max_frame_bytes:
            raise Refused(f"{self.url} takes requests of {served.max_frame_bytes} bytes; this one has {len(frame)}")
        connection.send(frame)
        answer = connection.recv(timeout=self._deadline)
        if isinstance(answer, bytes):
            return unpack(answer)
        kind, _, sentence = answer.partition(": ")
        if kind in AGAIN:
            raise _TryAgain(answer)
        raise Refused(f"{self.url} answers: {sentence or answer:.2000}")


class _TryAgain(OSError):
    """The server asks for another attempt."""


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
