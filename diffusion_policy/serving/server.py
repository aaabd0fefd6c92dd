"""The policy server: WebSocket connections in, plans out, and what operators ask over HTTP.

Planning runs in a thread, so the event loop answers, refuses and counts meanwhile. Nothing of a stranger is run: a
request is numbers within bounds, and its error is a sentence. Knows planners by their protocol alone, so it needs no
torch.
"""

import asyncio
import contextlib
import hmac
import http
import logging
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.http11 import Request, Response

from diffusion_policy.basics.text import one_line
from diffusion_policy.control.chunking import Chunking
from diffusion_policy.control.planner import Planner
from diffusion_policy.serving.batching import Batcher, Busy, Engine, Late, LocalEngine, Stopping
from diffusion_policy.serving.protocol import MAX_TEXT, Fault, ProtocolError, Served, describe, pack, unpack
from diffusion_policy.serving.sessions import Session, Sessions, read_planning

log = logging.getLogger(__name__)

WORDS: dict[type[Exception], Fault] = {Busy: "busy", Late: "late", Stopping: "stopping"}
RECENT = 10_000
"""Requests that the quantiles of the metrics are taken from."""
PING = 20.0
"""How often a silent connection is asked whether it is still there, and how long it has to answer [s]."""
DRAIN = 30.0
"""How long requests that came before the end may take [s]."""


@dataclass(frozen=True)
class ServerOptions:
    """How a server listens and what it bears."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    """What clients must know; None: anyone may ask."""
    tls: ssl.SSLContext | None = None
    max_batch: int = 16
    max_wait: float = 0.003
    """[s]"""
    queued: int = 1024
    connections: int = 4096
    sessions: int = 4096
    idle: float = 3600.0
    """How long a session is remembered after its last request [s]."""


class Metrics:
    """Numbers for operators, as Prometheus reads them."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.total = 0.0
        self.batches: Counter[int] = Counter()
        self.connections = 0

    def write(self, **gauges: int) -> str:
        """In the text format of Prometheus, version 0.0.4; `gauges`: what is counted elsewhere."""
        lines = ["# TYPE diffusion_policy_requests_total counter"]
        lines += [f'diffusion_policy_requests_total{{answer="{kind}"}} {n}' for kind, n in sorted(self.answers.items())]
        lines.append("# TYPE diffusion_policy_batch_size histogram")
        below = 0
        for size, n in sorted(self.batches.items()):
            below += n
            lines.append(f'diffusion_policy_batch_size_bucket{{le="{size}"}} {below}')
        lines.append(f'diffusion_policy_batch_size_bucket{{le="+Inf"}} {below}')
        lines.append(f"diffusion_policy_batch_size_sum {sum(size * n for size, n in self.batches.items())}")
        lines.append(f"diffusion_policy_batch_size_count {below}")
        lines.append("# TYPE diffusion_policy_request_seconds summary")
        if self.seconds:
            for share, value in zip((0.5, 0.95, 0.99), np.quantile(self.seconds, (0.5, 0.95, 0.99)), strict=True):
                lines.append(f'diffusion_policy_request_seconds{{quantile="{share}"}} {value:.6f}')
        lines.append(f"diffusion_policy_request_seconds_sum {self.total:.6f}")
        lines.append(f"diffusion_policy_request_seconds_count {self.answers['ok']}")
        for name, value in {**gauges, "connections": self.connections}.items():
            lines += [f"# TYPE diffusion_policy_{name} gauge", f"diffusion_policy_{name} {value}"]
        return "\n".join(lines) + "\n"


class PolicyServer:
    """Serves one planner to many clients."""

    def __init__(
        self,
        planner: Planner,
        served: Served,
        chunking: Chunking | None = None,
        options: ServerOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        """`chunking`: how a session's plan is joined to the one it executes; `engine`: where that is computed, by
        default here, by `planner`. Raises ValueError for a policy that observes what the protocol calls an option,
        ConfigError for a chunking that the planner cannot follow."""
        taken = sorted({*served.options, "observations"} & set(served.observation_shapes))
        if taken:
            raise ValueError(f"the policy observes {taken[0]!r}, which is the name of an option of the protocol")
        self.options, self._served = options or ServerOptions(), served
        chunking = chunking or Chunking()
        self._first = describe(served)
        chunking.require(planner, 0)
        self._sessions = Sessions(served, planner, chunking, self.options.sessions, self.options.idle)
        self._engine = engine or LocalEngine(planner, chunking)
        self.metrics = Metrics()
        self.port: int | None = None
        """Where it listens, once it does."""
        self._draining = False
        self._busy = 0

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`, then answer what has come, and close. Raises OSError where it cannot listen."""
        options = self.options
        self._batcher = Batcher(
            self._engine, max_batch=options.max_batch, max_wait=options.max_wait, queued=options.queued
        )
        planning = asyncio.create_task(self._batcher.run())
        try:
            async with serve(
                self._serve,
                options.host,
                options.port,
                process_request=self._before_upgrade,
                origins=[None],  # a page in a browser says where it comes from; robots do not
                compression=None,
                max_size=self._served.max_frame_bytes,
                max_queue=2,
                write_limit=2**16,
                ping_interval=PING,
                ping_timeout=PING,
                open_timeout=10,
                close_timeout=2,
                ssl=options.tls,
                server_header=None,
                logger=quiet(),
            ) as server:
                self.port = server.sockets[0].getsockname()[1]
                ready()
                await stop.wait()
                self._draining = True
                await self._until_answered(DRAIN)
                planning.cancel()  # whoever waits still is told
                await self._until_answered(1)
        finally:
            planning.cancel()

    async def _until_answered(self, seconds: float) -> None:
        """Wait so long at most for the answers to what has come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._busy:
                    await asyncio.sleep(0.01)

    async def _before_upgrade(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers what operators ask, and refuses whoever does not know the key, before anything else is done."""
        try:
            return await self._answer_http(request)
        except ValueError:  # two headers where one may be, say
            return _say(http.HTTPStatus.BAD_REQUEST, "this is no request\n")

    async def _answer_http(self, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return _say(http.HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            if self._draining:
                return _say(http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n")
            return _say(http.HTTPStatus.OK, "OK\n")
        if not self._knows_key(request.headers):
            return _say(http.HTTPStatus.UNAUTHORIZED, "this server asks for a key: Authorization: Api-Key KEY\n")
        if path == "/metrics":
            return _say(http.HTTPStatus.OK, await self._write_metrics())
        if self._draining:
            return _say(http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n")
        if self.metrics.connections >= self.options.connections:
            return _say(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{self.options.connections} clients are connected\n")
        return None

    async def _write_metrics(self) -> str:
        replicas = await asyncio.to_thread(self._engine.count_replicas)  # which asks other processes
        queue, calls, sessions = self._batcher.waiting, self._batcher.calls, len(self._sessions)
        return self.metrics.write(queue=queue, calls=calls, replicas=replicas, sessions=sessions)

    def _knows_key(self, headers: Headers) -> bool:
        key = self.options.api_key
        if key is None:
            return True
        given = headers.get_all("Authorization")
        if len(given) != 1:
            return False
        scheme, _, said = given[0].partition(" ")
        same = hmac.compare_digest(said.strip().encode(errors="replace"), key.encode())  # in constant time
        return same and scheme.lower() in ("api-key", "bearer")

    async def _serve(self, connection: ServerConnection) -> None:
        """One client: the description, then an answer to each request."""
        self.metrics.connections += 1
        session, before = Session(self._served), None
        try:
            await connection.send(self._first)
            async for frame in connection:
                started = time.perf_counter()
                self._busy += 1
                try:
                    answer, kind = await self._answer_while_there(connection, frame, session, before)
                    await connection.send(answer)
                finally:
                    self._busy -= 1
                self.metrics.answers[kind] += 1
                if kind == "stopping":
                    await connection.close(1001, "the server stops")
                before = time.perf_counter() - started
                if kind == "ok":
                    self.metrics.seconds.append(before)
                    self.metrics.total += before
        except ConnectionClosed:
            pass  # of its own will, by its silence, or by a frame that is too large
        finally:
            self.metrics.connections -= 1

    async def _answer_while_there(
        self, connection: ServerConnection, frame: bytes | str, session: Session, before: float | None
    ) -> tuple[bytes | str, str]:
        """As `_answer`, given up when the client goes. Raises ConnectionClosed then."""
        answering = asyncio.create_task(self._answer(frame, session, before))
        gone = asyncio.create_task(connection.wait_closed())
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ConnectionClosedError(None, None)
            return answering.result()
        finally:
            answering.cancel()
            gone.cancel()

    async def _answer(self, frame: bytes | str, session: Session, before: float | None) -> tuple[bytes | str, str]:
        """What a frame is answered, and what kind of answer that is. `before`: what the request before took [s]."""
        undo: Callable[[], None] = lambda: None  # noqa: E731
        fault: Fault
        if self._draining:
            return _fault("stopping", "the server stops"), "stopping"
        try:
            if isinstance(frame, str):
                raise ProtocolError("a request is a binary frame of msgpack")
            request = unpack(frame)
            deadline = _deadline(request)
            by_planner = "observations" in request
            if by_planner:
                job = read_planning(request, self._served)
            else:
                job, observed, undo = self._sessions.read(request, session)
                if job is None:
                    return pack({"observed": observed}), "observed"
            found = await self._batcher.plan(job, deadline)
            self.metrics.batches[found.batch] += 1
            plans = found.plans if by_planner else found.plans[0]
            one = not by_planner and request.get("samples") is None
            timing = {"infer_ms": found.milliseconds, **({} if before is None else {"prev_total_ms": 1000 * before})}
            return pack({"actions": plans[0] if one else plans, "server_timing": timing}), "ok"
        except ProtocolError as error:
            fault, said = "invalid", error
        except (Busy, Late, Stopping) as error:
            undo()
            fault, said = WORDS[type(error)], error
        except asyncio.CancelledError:  # the client is gone; it may come back, and ask again
            undo()
            raise
        except Exception as error:
            undo()
            log.warning("planning failed", exc_info=True)
            fault, said = "failed", error
        return _fault(fault, str(said)), fault


def _fault(kind: Fault, sentence: str) -> str:
    return f"{kind}: {one_line(sentence, MAX_TEXT)}"


def _deadline(request: dict[str, Any]) -> float | None:
    """When an answer is no longer wanted, as `time.monotonic` counts."""
    milliseconds = request.get("deadline_ms")
    if milliseconds is None:
        return None
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, int | float) or not 0 < milliseconds < 1e9:
        raise ProtocolError(f"deadline_ms must be above 0; got {milliseconds!r:.60}")
    return time.monotonic() + milliseconds / 1000


def _say(status: http.HTTPStatus, text: str) -> Response:
    headers = Headers({"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(text.encode()))})
    headers["Connection"] = "close"
    return Response(status.value, status.phrase, headers, text.encode())


def quiet() -> logging.Logger:
    """What the library would say of each stranger that speaks no WebSocket."""
    quiet = logging.getLogger("diffusion_policy.connections")
    quiet.setLevel(logging.CRITICAL)
    return quiet
