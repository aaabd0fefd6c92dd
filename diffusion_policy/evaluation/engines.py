"""Where independent work runs: in this process (one worker), in local worker processes, or on a Ray cluster.

What runs in local worker processes must be picklable.
"""

import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from multiprocessing import connection
from multiprocessing.connection import Connection
from numbers import Integral
from typing import Any, Generic, Literal, TypeVar

from diffusion_policy.basics.text import error_line
from diffusion_policy.evaluation.spawned import Spawned, WorkerDied, end_all, reply, require_picklable, sendable

T = TypeVar("T")
R = TypeVar("R")

Engine = Literal["local", "ray"]
"""Workers of this machine, or of a Ray cluster: that of the environment variable RAY_ADDRESS, else one started here."""
HANG_AFTER = 60.0
"""A worker that does not finish one reset or step of an environment within this time hangs [s]."""
ENDS_WITHIN = 10.0
"""A process of `run_isolated` that is told to stop is killed after this time [s]."""
RETRIES = 3
"""How often an item of `imap` is begun again, in a fresh worker, after its worker died."""
_END = object()


class GivenUp(OSError):
    """Every worker has died at an item."""

    def __init__(self, item: object, status: int | None) -> None:
        """`status`: exit status of the last one."""
        self.item, self.times = item, RETRIES + 1
        super().__init__(f"worker processes died {self.times} times at item {item!r:.100} (exit status {status})")


def require_engine(engine: Engine) -> None:
    """Raise ValueError for an engine that there is not, or that is not installed."""
    if engine not in ("local", "ray"):
        raise ValueError(f"unknown engine {engine!r}; choose from local, ray")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("the engine ray is not installed: pip install 'diffusion-policy-toolkit[ray]'")


def on_ray() -> Any:
    """The module that imports ray; it is imported where it is used."""
    from diffusion_policy.evaluation import ray_engine

    return ray_engine


def cluster(engine: Engine, workers: int) -> contextlib.AbstractContextManager[None]:
    """What an engine needs for as long as it is used: a connection to a Ray cluster, or nothing."""
    require_engine(engine)
    if engine == "local":
        return contextlib.nullcontext()
    return on_ray().connect(workers)


def require_workers(workers: int) -> None:
    """Raise ValueError for a number of workers that cannot be."""
    if not isinstance(workers, Integral) or int(workers) < 1:
        raise ValueError(f"workers must be a whole number of at least 1; got {workers!r}")


def imap(
    make_function: Callable[[], Callable[[T], R]], items: Iterable[T], workers: int = 1, engine: Engine = "local"
) -> Generator[R]:
    """Yield `function(item)` in the order of the (possibly endless) items; each process makes its own function.

    An item whose worker died is begun again. What a function raises, and OSError for an item at which every worker
    died, is raised after the results of the items before it. Close the generator to stop early: what runs is ended.
    Raises ValueError for what cannot run in worker processes.
    """
    require_engine(engine)
    require_workers(workers)
    if engine == "ray":
        return on_ray().imap(make_function, items, workers)
    if workers == 1:
        return _in_this_process(make_function, items)
    require_picklable("make_function", make_function)
    return _in_workers(make_function, items, workers)


def _in_this_process(make_function: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Generator[R]:
    function = make_function()
    for item in items:
        yield function(item)


class _WorkersOfItems(Generic[T]):
    """Worker processes that take one item at a time; an item whose worker died is begun again, in another one."""

    def __init__(self, make_function: Callable[[], Callable[[T], Any]], items: Iterable[T]) -> None:
        self._make_function = make_function
        self._source = enumerate(items)
        self._again: list[tuple[int, T]] = []
        self._free: list[Spawned] = []
        self.busy: dict[Connection, tuple[Spawned, int, T]] = {}
        self.answers: dict[int, tuple[bool, Any]] = {}
        """By the item's number: whether it has a result; that, or the error."""
        self._deaths: Counter[int] = Counter()

    def begin_item(self) -> bool:
        """Give a worker the next item; False where none is left."""
        number, item = self._again.pop() if self._again else next(self._source, (-1, _END))
        if item is _END:
            return False
        worker = self._free.pop() if self._free else Spawned(_serve, (self._make_function,))
        self.busy[worker.connection] = worker, number, item  # pyright: ignore[reportArgumentType]
        worker.send(item)
        return True

    def wait(self) -> None:
        """Wait until a worker answers or dies."""
        for ready in connection.wait(list(self.busy)):
            worker, number, item = self.busy[ready]  # pyright: ignore[reportArgumentType]
            try:
                self.answers[number] = worker.receive()
                self._free.append(worker)
            except WorkerDied as death:
                end_all([worker], patience=0)
                self._deaths[number] += 1
                if self._deaths[number] <= RETRIES:
                    self._again.append((number, item))
                else:
                    self.answers[number] = False, GivenUp(item, death.status)
            del self.busy[ready]  # pyright: ignore[reportArgumentType]

    def end(self) -> None:
        end_all([*self._free, *(worker for worker, *_ in self.busy.values())], patience=1)


def _in_workers(make_function: Callable[[], Callable[[T], R]], items: Iterable[T], workers: int) -> Generator[R]:
    running = _WorkersOfItems(make_function, items)
    first = 0  # number of the item whose result is due
    try:
        while True:
            while len(running.busy) < workers and len(running.busy) + len(running.answers) < 4 * workers:
                if not running.begin_item():
                    break
            if first in running.answers:
                has_result, answer = running.answers.pop(first)
                if not has_result:
                    raise answer
                yield answer
                first += 1
            elif running.busy:
                running.wait()
            else:
                return
    finally:
        running.end()


def run_isolated(
    function: Callable[[T], str | None],
    items: Iterable[T],
    workers: int = 1,
    engine: Engine = "local",
    gpus: float = 0.0,
) -> Generator[tuple[T, str | None]]:
    """Call the function once for each item, in a process of its own, so many at a time, which share the cores: yields
    items as they end, with what the function returned (None, or what went wrong) or how its process died.

    `gpus`: how many each takes of a Ray cluster. Close the generator to stop early: processes that run are ended.
    Raises ValueError for what cannot run in worker processes.
    """
    require_engine(engine)
    require_workers(workers)
    if engine == "ray":
        return on_ray().run_isolated(function, items, workers, gpus)
    require_picklable("function", function)
    return _run_isolated(function, items, workers)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_isolated(
    function: Callable[[T], str | None], items: Iterable[T], workers: int
) -> Generator[tuple[T, str | None]]:
    threads = max(1, available_cores() // workers)
    running: dict[Connection, tuple[Spawned, T]] = {}
    source = iter(items)
    try:
        while True:
            while len(running) < workers and (item := next(source, _END)) is not _END:
                require_picklable("each item", item)
                worker = Spawned(_run_alone, (function, item, threads))
                running[worker.connection] = worker, item  # pyright: ignore[reportArgumentType]
            if not running:
                return
            for ready in connection.wait(list(running)):
                worker, item = running[ready]  # pyright: ignore[reportArgumentType]
                try:
                    has_result, said = worker.receive()
                    said = said if has_result else error_line(said)
                    worker.process.join()
                except WorkerDied as death:
                    said = f"its process died (exit status {death.status})"
                end_all([worker], patience=0)
                del running[ready]  # pyright: ignore[reportArgumentType]
                yield item, said
    finally:
        end_all([worker for worker, _ in running.values()], patience=0, grace=ENDS_WITHIN)


# In the worker


def _serve(pipe: Connection, make_function: Callable[[], Callable[[Any], Any]]) -> None:
    """Items in, (True, result) or (False, error) out."""
    function = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            try:
                function = function or make_function()
                answer = True, function(item)
            except BaseException as error:  # a simulator may also call sys.exit
                answer = False, sendable(error)
            reply(pipe, answer)


def _run_alone(pipe: Connection, function: Callable[[Any], str | None], item: Any, threads: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before anything imports torch
    try:
        answer = True, function(item)
    except BaseException as error:
        answer = False, sendable(error)
    reply(pipe, answer)
