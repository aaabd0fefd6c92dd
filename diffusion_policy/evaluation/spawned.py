"""A worker process and the pipe to it. Its death, and a program that cannot have workers, are told in one line.

Workers are spawned, ignore Ctrl-C (their parent ends them), end with their parent, and import no torch of themselves.
Knows processes. Knows nothing of what runs in them.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

from diffusion_policy.basics.text import error_line, error_line_with_place

UNGUARDED = 97
"""Exit status of a worker that was about to start workers while it imported the script that had started it."""
MOST_ERROR_BYTES = 2**20
"""An error that takes more is sent as one line."""

_running: set["Spawned"] = set()


class SpawnError(ValueError):
    """Something cannot run in a worker process; the message says what to do."""


class WorkerDied(OSError):
    """A worker process has ended before it answered."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"its worker process died (exit status {status})")
        self.status = status


class _Unreadable(NamedTuple):
    """What a worker answers that could not load what it was sent."""

    reason: str


class Spawned:
    """A worker process that runs `serve(connection, *shared, *arguments)`.

    `serve` gets messages until the connection's other end is closed (EOFError), and ends then.
    """

    def __init__(self, serve: Callable[..., None], arguments: tuple[Any, ...], shared: tuple[Any, ...] = ()) -> None:
        """`shared`: memory that both processes see; `arguments`: picklable, see `require_picklable`."""
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            os._exit(UNGUARDED)
        content = ForkingPickler.dumps(arguments)
        context = multiprocessing.get_context("spawn")
        self.owner = os.getpid()
        """The process that started it; others may be forked from that one."""
        self._begun = context.RawValue("b", 0)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_begin, args=(serve, theirs, self._begun, shared))
        with no_interrupts():
            self.process.start()
            _running.add(self)
        theirs.close()
        self._send_bytes(content)

    def send(self, message: Any) -> None:
        """Send a message; a worker that is gone is noticed when it should answer. Raises SpawnError for what cannot be
        sent."""
        require_picklable("what is sent to a worker", message)
        self._send_bytes(ForkingPickler.dumps(message))

    def wait(self, seconds: float) -> bool:
        """Whether `receive` has something to say within so many seconds."""
        try:
            return self.connection.poll(seconds)
        except OSError:
            return True

    def receive(self) -> Any:
        """The next answer. Raises WorkerDied where none can come, and SpawnError where the worker could not begin."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._explain_death() from None
        if isinstance(answer, _Unreadable):
            raise SpawnError(
                f"a worker process cannot load what it is to run: {answer.reason}; define it in a module, or in your "
                "script before and not within: if __name__ == '__main__':"
            )
        return answer

    def _send_bytes(self, content: Any) -> None:
        with contextlib.suppress(OSError):
            self.connection.send_bytes(content)

    def _explain_death(self) -> Exception:
        self.process.join(timeout=5)
        status = self.process.exitcode
        if self._begun.value or status is None or status < 0:
            return WorkerDied(status)
        return SpawnError(
            f"a worker process could not begin (exit status {status}); it imports your script again, so what that does "
            "must be protected by: if __name__ == '__main__':"
        )


def require_picklable(name: str, value: object) -> None:
    """Raise SpawnError for what cannot be sent to a worker process, such as a lambda."""
    try:
        ForkingPickler.dumps(value)
    except Exception as error:
        raise SpawnError(
            f"{name} must be picklable to run in a worker process: use functools.partial or a function of a module; "
            f"{error_line(error)}"
        ) from error


def end_all(workers: Iterable[Spawned], patience: float, grace: float = 2.0) -> None:
    """Close the pipes, end (SIGTERM) those that have not ended within `patience` [s], and kill those that have not
    ended `grace` [s] later."""
    workers = list(workers)
    for worker in workers:
        worker.connection.close()
    _join(workers, patience)
    for worker in workers:
        worker.process.terminate()
    _join(workers, grace)
    for worker in workers:
        worker.process.kill()
        worker.process.join()
        _running.discard(worker)


def _join(workers: Iterable[Spawned], patience: float) -> None:
    deadline = time.monotonic() + patience
    for worker in workers:
        worker.process.join(timeout=max(0.0, deadline - time.monotonic()))


@atexit.register  # before multiprocessing's own, which would wait for them
def _end_the_rest() -> None:
    end_all([worker for worker in _running if worker.owner == os.getpid()], patience=0)


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Processes started within the context never hear Ctrl-C, not even while they import (where signals have masks);
    here it acts once the context ends, so that no process is started by half."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # starting it, as the first worker would, unblocks the signal again
    heard = []  # another thread of ours may take the signal, and Python handles it in this one
    handler = signal.signal(signal.SIGINT, lambda *signal_and_frame: heard.append(signal_and_frame))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if heard and callable(handler):
            handler(*heard[0])


# In the worker


def reply(connection: Connection, answer: Any) -> None:
    """Send an answer, or where it cannot be sent what hinders it: (False, an error)."""
    try:
        content = ForkingPickler.dumps(answer)
    except Exception as error:
        content = ForkingPickler.dumps((False, RuntimeError(f"a worker's result cannot be sent: {error_line(error)}")))
    with contextlib.suppress(OSError):  # nobody waits for it
        connection.send_bytes(content)


def sendable(error: BaseException) -> Exception:
    """An error as it can be raised in the parent: itself, with where it was raised, or its description."""
    if isinstance(error, Exception):
        try:
            error.add_note("In a worker process:\n" + "".join(traceback.format_exception(error)))
            content = ForkingPickler.dumps(error)
            again = ForkingPickler.loads(content)  # pyright: ignore[reportAttributeAccessIssue]
            if len(content) <= MOST_ERROR_BYTES and type(again) is type(error):
                return error
        except Exception:  # it is described instead
            pass
    return RuntimeError(error_line_with_place(error))


def _begin(serve: Callable[..., None], connection: Connection, begun: Any, shared: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    try:
        arguments = connection.recv()
    except (EOFError, OSError):
        return
    except Exception as error:
        reply(connection, _Unreadable(error_line(error)))
        return
    begun.value = 1
    serve(connection, *shared, *arguments)


def _end_with_parent() -> None:
    """Have this worker end when its parent does: a killed parent cannot end its workers, and they would wait for it for
    ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
