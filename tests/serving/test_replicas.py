"""Replicas on a real Ray cluster of two cores; each plans by a few sums in NumPy."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffusion_policy.evaluation import engines
from diffusion_policy.serving.batching import Busy, Job

ray = pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed", exc_type=ImportError)

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def cluster() -> Iterator[None]:
    """What the engine connects to before stays connected, so all tests share it."""
    with engines.cluster("ray", 2):
        yield


def make_sums() -> Callable[[Sequence[Job]], list[np.ndarray]]:
    """Plans that say which process has made them, in their last number."""

    def plan(jobs: Sequence[Job]) -> list[np.ndarray]:
        if any((job.noise == 13).any() for job in jobs):
            raise ArithmeticError("thirteen")
        if any((job.noise == 9).any() for job in jobs):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        plans = [job.noise.sum(axis=2) + job.observations["xy"][:, None] for job in jobs]
        return [np.concatenate([one, np.full_like(one[..., :1], os.getpid())], axis=-1) for one in plans]

    return plan


def deploy(**options: int):
    from diffusion_policy.serving import replicas

    return replicas.deploy(make_sums, **{"least": 1, "most": 1, "cores": 1, "threads": 1, "gpus": 0, **options})


def draw(rows: int = 1, fill: float | None = None) -> Job:
    noise = RNG.standard_normal((rows, 1, 3, 2))
    return Job({"xy": RNG.normal(size=(rows, 2))}, noise if fill is None else np.full_like(noise, fill))


def without_process(plans: list[np.ndarray]) -> list[np.ndarray]:
    return [plan[..., :-1] for plan in plans]


def test_a_replica_plans_to_the_bit_as_this_process_does_and_says_what_went_wrong() -> None:
    jobs = [draw(1), draw(3), draw(2)]
    with deploy() as engine:
        assert (engine.calls, engine.count_replicas()) == (1, 1)
        found = engine.plan(jobs)
        for one, other in zip(without_process(found), without_process(make_sums()(jobs)), strict=True):
            np.testing.assert_array_equal(one, other)
        assert found[0][..., -1] != os.getpid()
        with pytest.raises(ArithmeticError, match="thirteen"):
            engine.plan([draw(fill=13)])
    assert not [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == "serve"]


def test_replicas_begin_when_calls_queue_up_and_one_that_dies_costs_no_call() -> None:
    with deploy(most=2) as engine, ThreadPoolExecutor(2) as threads:

        def ask() -> set[int]:
            """The processes that plan, of which there are two before long."""
            for _ in range(100):
                jobs = [[draw(2)] for _ in range(20)]
                plans = [plan for (plan,) in threads.map(engine.plan, jobs)]
                for (job,), plan in zip(jobs, plans, strict=True):
                    expected = job.noise.sum(axis=2) + job.observations["xy"][:, None]
                    np.testing.assert_array_equal(plan[..., :-1], expected)
                used = {int(plan[0, 0, -1]) for plan in plans}
                if len(used) == 2:
                    return used
            raise AssertionError("no other replica has begun")

        assert engine.count_replicas() == 1
        killed = ask().pop()
        calls = threads.submit(ask)
        os.kill(killed, signal.SIGKILL)
        calls.result()
        assert killed not in ask()


def test_what_kills_every_replica_is_given_up_and_what_comes_after_is_planned() -> None:
    with deploy() as engine:
        with pytest.raises(OSError, match="4 replicas died at one call"):
            engine.plan([draw(fill=9)])
        assert len(engine.plan([draw()])) == 1


def test_a_call_that_no_replica_answers_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_policy.serving import replicas

    monkeypatch.setattr(replicas, "PATIENCE", 0.001)
    with deploy() as engine, pytest.raises(Busy, match=r"no replica has answered within 0.001 s"):
        engine.plan([draw()])


def make_nothing() -> None:
    raise ValueError("this machine has no such policy")


def test_a_replica_that_cannot_begin_says_why() -> None:
    from diffusion_policy.serving import replicas

    deploying = replicas.deploy(make_nothing, least=1, most=1, cores=1, threads=1, gpus=0)  # pyright: ignore
    with pytest.raises(OSError, match=r"no replica could begin: .*this machine has no such policy"), deploying:
        pass
