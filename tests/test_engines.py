import itertools
import os
import signal
import threading
import time

import pytest

from diffusion_policy.engines import each_alone, ordered_map, require_engine
from diffusion_policy.spawned import no_interrupts


def square(x: int) -> int:
    return x * x


def make_square():
    return square


def make_pid():
    return lambda _: os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(ordered_map(make_square, range(40), workers)) == [x * x for x in range(40)]


@pytest.mark.parametrize("workers", [1, 2])
def test_endless_items_can_be_stopped(workers: int) -> None:
    results = ordered_map(make_square, itertools.count(), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()


def test_one_worker_is_this_process_and_several_are_not() -> None:
    assert set(ordered_map(make_pid, range(3), 1)) == {os.getpid()}
    assert os.getpid() not in set(ordered_map(make_pid, range(8), 2))


def report(item: str) -> str | None:
    if item == "dies":
        os._exit(3)
    if item == "waits":
        time.sleep(60)
    return item if item == "fails" else None


def test_each_runs_alone_and_a_crash_is_told() -> None:
    told = dict(each_alone(report, ["works", "dies", "fails"], 2))
    assert told == {"works": None, "dies": "its process died (exit status 3)", "fails": "fails"}


def test_stopping_early_ends_what_runs() -> None:
    started = time.monotonic()
    told = each_alone(report, ["waits", "works"], 2)
    assert next(told) == ("works", None)
    told.close()
    assert time.monotonic() - started < 30


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown engine 'spark'; choose from local, ray"):
        require_engine("spark")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals have no masks here")
@pytest.mark.parametrize("to_another_thread", [False, True])
def test_ctrl_c_waits_until_a_process_has_started(to_another_thread: bool) -> None:
    ending = threading.Event()
    other = threading.Thread(target=ending.wait, daemon=True)
    other.start()
    target = other.ident if to_another_thread else threading.main_thread().ident
    assert target is not None
    started = False
    try:
        with pytest.raises(KeyboardInterrupt), no_interrupts():  # noqa: PT012
            signal.pthread_kill(target, signal.SIGINT)
            time.sleep(0.05)
            started = True
    finally:
        ending.set()
        other.join()
    assert started
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
