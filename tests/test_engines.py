import itertools
import os
import signal
import threading
import time
from functools import partial

import gymnasium
import numpy as np
import pytest

from diffusion_policy.engines import EnvironmentPool, _no_interrupts, ordered_map


def square(x: int) -> int:
    return x * x


def make_square():
    return square


def make_pid():
    return lambda _: os.getpid()


class Counter(gymnasium.Env):
    """Counts from its seed; breaks at 13."""

    observation_space = gymnasium.spaces.Dict({"count": gymnasium.spaces.Box(0, 1000, (1,))})
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.count = seed
        return {"count": np.array([seed], np.float32)}, {}

    def step(self, action):
        self.count += 1
        if self.count == 13:
            raise RuntimeError("unlucky")
        if self.count == 66:
            os._exit(3)
        return {"count": np.array([self.count], np.float32)}, 0.0, False, False, {"is_success": False}


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


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_slot_keeps_its_environment(workers: int) -> None:
    with EnvironmentPool(Counter, workers) as pool:
        assert {slot: int(o["count"][0]) for slot, o in pool.reset({0: 20, 1: 30, 4: 40}).items()} == {
            0: 20,
            1: 30,
            4: 40,
        }
        for _ in range(2):
            transitions = pool.step({slot: np.zeros(1) for slot in (0, 4)})
        assert {slot: int(t.observation["count"][0]) for slot, t in transitions.items()} == {0: 22, 4: 42}


def test_an_error_in_a_worker_is_raised_here_with_its_place() -> None:
    with EnvironmentPool(Counter, 2) as pool:
        pool.reset({0: 0, 1: 12})
        with pytest.raises(RuntimeError, match=r"(?s)failed in its worker process.*unlucky"):
            pool.step({0: np.zeros(1), 1: np.zeros(1)})


def test_a_worker_that_dies_is_noticed() -> None:
    with EnvironmentPool(partial(Counter), 2) as pool:
        pool.reset({0: 0, 1: 65})
        with pytest.raises(RuntimeError, match="worker process died"):
            pool.step({0: np.zeros(1), 1: np.zeros(1)})


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
        with pytest.raises(KeyboardInterrupt), _no_interrupts():  # noqa: PT012
            signal.pthread_kill(target, signal.SIGINT)
            time.sleep(0.05)
            started = True
    finally:
        ending.set()
        other.join()
    assert started
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
