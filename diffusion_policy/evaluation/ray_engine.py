"""The engine `ray`: the same work as in local worker processes, on a Ray cluster. Beside it, only `serving.replicas`
imports ray.

Every machine of the cluster needs this package, in the same version. A cluster that is started here listens on
127.0.0.1 alone, where every user of this machine can reach it; that of RAY_ADDRESS as whoever started it has chosen.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

# Ray reads these when it is imported. A worker's death is ours to tell; the third announces a change that is then made.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed|^Task .* failed")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import ray_constants
from ray.exceptions import RayError, RayTaskError

from diffusion_policy.basics.text import error_line, one_line

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""How often an item of `imap` is begun again after its worker died."""
_END = object()


@contextlib.contextmanager
def connect(workers: int, option: str = "workers") -> Iterator[None]:
    """The Ray cluster of the environment variable RAY_ADDRESS, else a local one of so many cores. What was connected
    before stays so; what is begun here ends with the context. Raises ValueError for a cluster with fewer cores;
    `option`: what asked for so many."""
    begun = not ray.is_initialized()
    if begun:
        _initialize(workers)
    try:
        cores = int(ray.cluster_resources().get("CPU", 0))
        if cores < workers:
            raise ValueError(f"{option} must be at most {cores}, the cores of the Ray cluster; got {workers}")
        yield
    finally:
        if begun:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # of the processes that ray leaves to the system
                ray.shutdown()


def _initialize(workers: int) -> None:
    """Connect without a word; raises ValueError where RAY_ADDRESS names no cluster that answers."""
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address and (place := re.fullmatch(r"([^/]+):(\d+)", address)):  # ray itself gives up after minutes
            socket.create_connection((place[1], int(place[2])), timeout=5).close()
        with contextlib.nullcontext() if address else _on_loopback():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError) as error:
        reason = one_line(str(error))
        raise ValueError(
            f"no Ray cluster {f'at RAY_ADDRESS={address}' if address else 'could be started'}: {reason}"
        ) from error
    finally:
        if in_main_thread and handler is not None:
            signal.signal(signal.SIGTERM, handler)  # ray puts its own in its place


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray's processes that are started within the context listen on 127.0.0.1 alone: its own way on macOS and Windows,
    where it does not put them on all interfaces, as its option `_node_ip_address` cannot prevent."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def imap(make_function: Callable[[], Callable[[T], R]], items: Iterable[T], workers: int) -> Generator[R]:
    """As `engines.imap`, in tasks of the cluster, at most `workers` at a time; an item whose worker died is
    begun again. Raises OSError when that helped nothing."""
    with connect(workers):
        apply = _apply.options(max_retries=RETRIES)
        key, shared = uuid.uuid4().hex, ray.put(make_function)
        running: list[ray.ObjectRef] = []
        waiting: deque[ray.ObjectRef] = deque()
        source = iter(items)
        while True:
            while len(running) < workers and len(waiting) < 4 * workers and (item := next(source, _END)) is not _END:
                running.append(apply.remote(key, shared, item))
                waiting.append(running[-1])
            if not waiting:
                return
            if waiting[0] in running:
                _, running = ray.wait(running, num_returns=1)
            else:
                yield _result(waiting.popleft())


def _result(reference: "ray.ObjectRef") -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None  # what the function itself raised
    except RayError as error:
        raise OSError(f"a worker of the Ray cluster died {RETRIES + 1} times at one piece of work") from error


_made: dict[str, Callable[[Any], Any]] = {}
"""The function of the latest `imap` in this worker, by its key."""


@ray.remote(num_cpus=1, retry_exceptions=False)
def _apply(key: str, make_function: Callable[[], Callable[[Any], Any]], item: Any) -> Any:
    if key not in _made:
        _made.clear()
        _made[key] = make_function()
    return _made[key](item)


def run_isolated(
    function: Callable[[T], str | None], items: Iterable[T], workers: int, gpus: float
) -> Generator[tuple[T, str | None]]:
    """As `engines.run_isolated`, in tasks of the cluster that share its cores; each also takes `gpus`."""
    with connect(workers):
        offered = ray.cluster_resources().get("GPU", 0)
        if gpus > offered:  # else they are waited for
            raise ValueError(f"gpus must be at most {offered:g}, those of the Ray cluster; got {gpus:g}")
        of_nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cores = max(1, min(sum(of_nodes) // workers, max(of_nodes)))
        run = ray.remote(num_cpus=cores, num_gpus=gpus, max_calls=1, max_retries=RETRIES)(function)
        running: dict[ray.ObjectRef, T] = {}
        source = iter(items)
        while True:
            while len(running) < workers and (item := next(source, _END)) is not _END:
                running[run.remote(item)] = item  # pyright: ignore[reportArgumentType]
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            item = running.pop(done)
            try:
                said = ray.get(done)
            except RayTaskError as error:
                said = error_line(error.cause or error)
            except RayError:
                said = "its worker process died"
            yield item, said


@ray.remote(num_cpus=1, max_restarts=0)
class _Keeper:
    """Keeps a local worker, wherever Ray has put this actor: there its crash or hang is seen as on this machine."""

    def __init__(self, make_worker: Callable[[], Any]) -> None:
        self._worker = make_worker()

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        self._worker.send(method, arguments)

    def answer(self, hang_after: float) -> tuple[Any, int | None]:
        return self._worker.answer(hang_after), self._worker.culprit

    def end(self, patience: float) -> None:
        self._worker.end(patience)


class RayWorker:
    """A `pool.Worker` on the cluster."""

    def __init__(self, make_worker: Callable[[], Any]) -> None:
        """`make_worker` makes the local worker."""
        self._keeper: Any = _Keeper.remote(make_worker)  # pyright: ignore[reportAttributeAccessIssue]
        self.culprit: int | None = None

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        """Ask; a worker that is gone is noticed when it should answer."""
        self._keeper.send.remote(method, arguments)

    def answer(self, hang_after: float) -> tuple[dict[int, Any], float] | str:
        """The results and the seconds they took; why there are none, where the worker has died or hangs."""
        try:
            answer, self.culprit = ray.get(self._keeper.answer.remote(hang_after))
        except RayError as error:  # such as a module that the other machine lacks
            self.culprit = None
            return f"its worker on the Ray cluster died: {one_line(str(error).strip().splitlines()[-1])}"
        return answer

    def end(self, patience: float) -> None:
        """Ask the worker to close its environments and end, then kill it; `patience` [s] in between."""
        with contextlib.suppress(RayError):
            ray.get(self._keeper.end.remote(patience))
        ray.kill(self._keeper)
