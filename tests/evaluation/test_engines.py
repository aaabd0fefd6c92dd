import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from diffusion_policy.evaluation.engines import GivenUp, imap, require_engine, run_isolated
from diffusion_policy.evaluation.spawned import no_interrupts


def square(x: int) -> int:
    return x * x


def make_square():
    return square


def make_pid():
    return lambda _: os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(imap(make_square, range(40), workers)) == [x * x for x in range(40)]


@pytest.mark.parametrize("workers", [1, 2])
def test_endless_items_can_be_stopped(workers: int) -> None:
    results = imap(make_square, itertools.count(), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()


def test_one_worker_is_this_process_and_several_are_not() -> None:
    assert set(imap(make_pid, range(3), 1)) == {os.getpid()}
    assert os.getpid() not in set(imap(make_pid, range(8), 2))


def report(item: str) -> str | None:
    if item == "dies":
        os._exit(3)
    if item == "waits":
        time.sleep(60)
    return item if item == "fails" else None


def test_each_runs_alone_and_a_crash_is_told() -> None:
    told = dict(run_isolated(report, ["works", "dies", "fails"], 2))
    assert told == {"works": None, "dies": "its process died (exit status 3)", "fails": "fails"}


def test_stopping_early_ends_what_runs() -> None:
    started = time.monotonic()
    told = run_isolated(report, ["waits", "works"], 2)
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


# Crashes, errors, and what cannot run in workers


def make_unlucky(folder: Path | None = None):
    return partial(unlucky, folder)


def unlucky(folder: Path | None, x: int) -> int:
    """Dies once at 2 where there is a folder, always at 4 where there is none."""
    if x == 3:
        raise LookupError("3 is \x1b[2J not lucky")
    if x == 2 and folder is not None and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if x == 4 and folder is None:
        os._exit(9)
    return x


def test_an_item_whose_worker_died_is_begun_again(tmp_path: Path) -> None:
    assert list(imap(partial(make_unlucky, tmp_path), [0, 1, 2, 4, 5], 2)) == [0, 1, 2, 4, 5]
    assert (tmp_path / "died").exists()


def test_an_item_that_kills_every_worker_is_given_up_after_the_items_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diffusion_policy.evaluation.engines.RETRIES", 1)
    results = imap(make_unlucky, [1, 2, 4, 5], 2)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(GivenUp, match=r"^worker processes died 2 times at item 4 \(exit status 9\)$") as caught:
        next(results)
    assert caught.value.item == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_as_it_was_after_the_items_before_it(workers: int) -> None:
    results = imap(make_unlucky, [1, 3, 2], workers)
    assert next(results) == 1
    with pytest.raises(LookupError, match="not lucky"):
        next(results)


def make_local_error():
    class Local(Exception):
        pass

    def function(item: str) -> object:
        if item == "lambda":
            return lambda: 0
        raise Local("cannot be sent") if item == "local" else SystemExit(4)

    return function


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("local", "Local: cannot be sent"),
        ("exit", "SystemExit: 4"),
        ("lambda", "a worker's result cannot be sent"),
    ],
)
def test_what_a_worker_cannot_send_is_told(item: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        list(imap(make_local_error, [item], 2))


def test_an_error_of_one_that_runs_alone_is_told() -> None:
    assert list(run_isolated(unlucky_alone, [0])) == [(0, "ZeroDivisionError: division by zero")]


def unlucky_alone(item: int) -> str | None:
    return str(1 / item)


def test_closing_ends_what_runs() -> None:
    started = time.monotonic()
    results = imap(make_report, ["works", "waits", "works"], 2)
    assert next(results) is None
    results.close()
    assert time.monotonic() - started < 30
    assert multiprocessing.active_children() == []


def make_report():
    return report


@pytest.mark.parametrize("workers", [0, -1, 1.5])
def test_a_number_of_workers_that_cannot_be_is_refused_at_once(workers: int) -> None:
    for start in (lambda: imap(make_square, [1], workers), lambda: run_isolated(report, ["works"], workers)):
        with pytest.raises(ValueError, match="workers must be a whole number of at least 1; got"):
            start()


def test_lambdas_are_refused_at_once_where_they_would_have_to_be_sent() -> None:
    with pytest.raises(ValueError, match=r"make_function must be picklable .*: use functools.partial or a function of"):
        imap(lambda: square, [1], 2)
    with pytest.raises(ValueError, match="function must be picklable"):
        run_isolated(lambda _: None, [1])
    with pytest.raises(ValueError, match="each item must be picklable"):
        next(run_isolated(report, [lambda: 0]))  # pyright: ignore[reportArgumentType]
    assert list(imap(lambda: square, [3], 1)) == [9]


SCRIPT = """
import time
from diffusion_policy.evaluation.engines import run_isolated, imap
from diffusion_policy.evaluation.pool import EnvironmentPool

def make():
    return abs

def start():
    for run in (lambda: list(imap(make, [-1, -2], 2)), lambda: list(run_isolated(abs, [-3], 2)),
                lambda: EnvironmentPool(make, 2).reset({0: 0})):
        try:
            print("result", run())
        except ValueError as error:
            print("refused:", error)

"""


@pytest.mark.parametrize(
    ("ending", "in_a_file", "said"),
    [
        (
            "start()",
            True,
            "refused: a worker process could not begin (exit status 97); it imports your script again, so ",
        ),
        ("start()", False, "refused: a worker process cannot load what it is to run: AttributeError: "),
    ],
)
def test_a_script_that_cannot_have_workers_is_told_what_to_do(
    tmp_path: Path, ending: str, in_a_file: bool, said: str
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT + ending)
    program = ["script.py"] if in_a_file else ["-c", SCRIPT + ending]
    done = subprocess.run([sys.executable, *program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    if in_a_file:
        assert all(line.startswith(said) and "if __name__ == '__main__':" in line for line in lines)
    else:
        assert [line.startswith(said) for line in lines] == [True, False, True]
        assert lines[1] == "result [(-3, 3)]"  # a function of a module
