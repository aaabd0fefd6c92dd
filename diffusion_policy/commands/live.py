"""diffusion-policy live: a page in the browser to watch a policy, steer it, and teach it.

The page and its frames come from one port of this machine. A token stands in its address: without it, or from a page of
another origin, nothing is answered.
"""

import asyncio
import contextlib
import errno
import hmac
import http
import json
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, get_args
from urllib.parse import parse_qs, urlsplit

import torch
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from diffusion_policy.basics.files import parse_json
from diffusion_policy.basics.text import error_line
from diffusion_policy.commands.interrupts import hearing
from diffusion_policy.commands.live_commands import obey
from diffusion_policy.commands.live_pictures import Frame
from diffusion_policy.commands.live_session import LiveSession
from diffusion_policy.commands.live_sights import MOST_CAMERAS, LiveSight
from diffusion_policy.commands.options.live import Live
from diffusion_policy.commands.policy_in_env import PolicyInEnv, load_with_environment
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError, SampleConfig, SamplerName
from diffusion_policy.report.page import templates
from diffusion_policy.serving.server import quiet

MOST_COMMAND = 10_000
"""Bytes of one command."""
SHOWN = "shown"
"""What a window says after each frame."""
MOVING_SHARE = 0.75
"""Of a picture's width and height while it runs, where the environment can draw it smaller: that is faster."""
AHEAD = 2
"""Frames that a window is sent before it has shown the first of them."""
Command = tuple[ServerConnection, dict[str, Any]]
"""Who asks, and for what."""
STEPS = 8
"""Of sampling, by default."""
IDLE = 0.05
"""How long a pause lasts before it is looked again [s]."""


def run(options: Live) -> None:
    """Show the page until Ctrl-C or SIGTERM. Raises ConfigError for an environment or policy that cannot be shown."""
    loaded = load_with_environment(options, options.sampling)
    sampling = choose_sampling(options.sampling, loaded)
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the other cores draw, here and in the browser
    thread = ThreadPoolExecutor(1, "simulation")
    session = thread.submit(
        LiveSession,
        loaded,
        sampling,
        options.chunking,
        delay_steps=options.delay_steps,
        action_horizon=options.action_horizon,
        fan=options.fan,
        seed=options.seed,
        record=options.record,
    ).result()
    page = LivePage(session, thread, loaded.frames_per_second, loaded.env_id, str(options.checkpoint))
    try:
        asyncio.run(show(page, options.port))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise OSError(f"cannot listen on 127.0.0.1:{options.port}: {os.strerror(error.errno)}") from error
        raise
    finally:
        thread.submit(session.close).result()
        thread.shutdown()
    if options.record is not None:
        console.print(f"demonstrations in {options.record}", soft_wrap=True)


def choose_sampling(asked: SampleConfig, loaded: PolicyInEnv) -> SampleConfig:
    """Few steps where nothing else is asked for, so that pictures keep pace."""
    if asked.sampling_steps is None and not loaded.policy.config.is_few_step:
        asked = replace(asked, sampling_steps=min(STEPS, loaded.policy.config.noise_levels - 1))
    return loaded.policy.complete(asked)


async def show(page: "LivePage", port: int) -> None:
    """Show until a signal; says where, once it listens."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end(_number: int, _frame: object) -> None:
        loop.call_soon_threadsafe(stop.set)

    with hearing(end):
        await page.run(port, stop, lambda address: out.print(f"open {address} ; Ctrl-C ends it", soft_wrap=True))


class Sent(NamedTuple):
    """A frame as windows are sent it."""

    sights: tuple[LiveSight, ...]
    message: bytes
    """For a window that has these images."""
    whole: bytes
    """For any other."""


class LivePage:
    """The page's server: one simulation, any number of windows."""

    def __init__(
        self, session: LiveSession, thread: ThreadPoolExecutor, rate: float, title: str, checkpoint: str
    ) -> None:
        """`thread`: the one that the session lives in; `rate`: control steps in a second at most."""
        self._session, self._thread, self._period = session, thread, 1 / rate
        self._token = secrets.token_urlsafe(24)
        self._html = (
            templates()
            .get_template("live.html.jinja")
            .render(
                title=title,
                checkpoint=checkpoint,
                samplers=get_args(SamplerName),
                cameras=len(session.policy.cameras),
                most_cameras=MOST_CAMERAS,
            )
        )
        self._viewers: dict[ServerConnection, asyncio.Event] = {}
        self._latest: Sent | None = None
        self._commands: list[Command] = []
        self._said: dict[ServerConnection, str] = {}
        """What each window is still to be told."""

    async def run(self, port: int, stop: asyncio.Event, ready: Callable[[str], None]) -> None:
        """Serve on 127.0.0.1 until `stop`."""
        running: asyncio.Task[None] | None = None
        async with serve(
            self._serve,
            "127.0.0.1",
            port,
            process_request=self._before_upgrade,
            compression=None,
            max_size=MOST_COMMAND,
            server_header=None,
            logger=quiet(),
        ) as server:
            self._port = server.sockets[0].getsockname()[1]
            running = asyncio.create_task(self._simulate())
            running.add_done_callback(lambda _: stop.set())
            ready(f"http://127.0.0.1:{self._port}/?token={self._token}")
            await stop.wait()
            if running.done():
                running.result()  # what went wrong
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    async def _simulate(self) -> None:
        """Step and show, at the environment's rate at most; nothing moves while nobody looks."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if self._viewers:
                frame, refused = await loop.run_in_executor(self._thread, self._next, self._take_commands())
                if frame is not None:
                    message = encode(frame)
                    whole = encode(frame, frame.sights) if self._session.policy.cameras else message
                    self._latest = Sent(frame.sights, message, whole)
                for connection, said in refused:
                    if connection in self._viewers:
                        self._said[connection] = said
                for fresh in self._viewers.values() if self._latest else ():
                    fresh.set()
            due = max(due + (self._period if self._session.running else IDLE), loop.time())
            await asyncio.sleep(due - loop.time())

    def _take_commands(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def _next(self, commands: Sequence[Command]) -> tuple[Frame | None, list[tuple[ServerConnection, str]]]:
        """What has been asked for since the last frame, then a step; the frame, and what was refused to whom."""
        refused = []
        for connection, command in commands:
            try:
                obey(self._session, command)
            except ConfigError as error:
                refused.append((connection, str(error)))
        try:
            if self._session.running:
                self._session.advance()
        except Exception as error:  # of the simulator, of a policy that is not finite, of a full disk
            self._session.running = False
            sentence = f"stopped: {error_line(error)}; Begin again may go on"
            refused += [(viewer, sentence) for viewer in self._viewers]
        return self._session.look(MOVING_SHARE if self._session.running else 1.0), refused

    def _before_upgrade(self, connection: ServerConnection, request: Request) -> Response | None:
        """The page itself, and who may have it."""
        try:
            return self._answer_http(request)
        except ValueError:  # an address that is none
            return _answer(http.HTTPStatus.BAD_REQUEST, "this is no request\n")

    def _answer_http(self, request: Request) -> Response | None:
        parts = urlsplit(request.path)
        given = parse_qs(parts.query).get("token", [""])[0]
        here = {f"127.0.0.1:{self._port}", f"localhost:{self._port}"}
        origin, host = request.headers.get("Origin"), request.headers.get("Host")
        allowed = hmac.compare_digest(given.encode(), self._token.encode())
        if host not in here or (origin is not None and origin not in {f"http://{one}" for one in here}):
            return _answer(http.HTTPStatus.FORBIDDEN, "this page belongs to this machine\n")
        if not allowed:
            return _answer(http.HTTPStatus.FORBIDDEN, "the address needs the token that `live` has printed\n")
        if parts.path == "/live":
            return None
        if parts.path != "/":
            return _answer(http.HTTPStatus.NOT_FOUND, "there is only one page\n")
        return _answer(http.HTTPStatus.OK, self._html, "text/html")

    async def _serve(self, connection: ServerConnection) -> None:
        """One window: the newest frame as often as it can take one, and its commands."""
        fresh = self._viewers[connection] = asyncio.Event()
        ahead = asyncio.Semaphore(AHEAD)

        async def show_frames() -> None:
            known: tuple[LiveSight, ...] = ()
            while True:
                await ahead.acquire()
                await fresh.wait()
                fresh.clear()
                latest = self._latest
                assert latest is not None
                await connection.send(latest.message if latest.sights == known else latest.whole)
                known = latest.sights
                if connection in self._said:
                    await connection.send(json.dumps({"refused": self._said.pop(connection)}))

        showing = asyncio.create_task(show_frames())
        try:
            async for text in connection:
                if text == SHOWN:
                    ahead.release()
                    continue
                try:
                    self._commands.append((connection, read_command(text)))
                except ConfigError as error:
                    await connection.send(json.dumps({"refused": str(error)}))
        except ConnectionClosed:
            pass
        finally:
            showing.cancel()
            del self._viewers[connection]
            self._said.pop(connection, None)
            self._thread.submit(self._session.mouse.release)  # a button may have been held in it


def read_command(text: str | bytes) -> dict[str, Any]:
    """A command of the page; raises ConfigError for what is none."""
    try:
        command = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"a command is JSON: {error}") from error
    if not isinstance(command, dict):
        raise ConfigError("a command is a JSON object")
    return command


def encode(frame: Frame, sights: Sequence[LiveSight] | None = None) -> bytes:
    """One message: the length of the state, the state as JSON, the images that the policy saw, the picture. `sights`:
    those images, None where the window has them."""
    told = {} if sights is None else {"sights": [sight.tell() for sight in sights]}
    state = json.dumps(frame.state | told, allow_nan=False).encode()
    return b"".join([struct.pack("<I", len(state)), state, *(sight.jpeg for sight in sights or ()), frame.picture])


def _answer(status: http.HTTPStatus, text: str, kind: str = "text/plain") -> Response:
    body = text.encode()
    headers = Headers({"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))})
    headers["Connection"] = "close"
    headers["Cache-Control"] = "no-store"
    headers["Referrer-Policy"] = "no-referrer"
    headers["X-Frame-Options"] = "DENY"
    headers["Content-Security-Policy"] = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    )
    return Response(status.value, status.phrase, headers, body)
