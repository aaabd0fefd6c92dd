"""One group of slots plans while the environments of the other one step, and no result depends on it."""

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from diffusion_policy.control.controller import Controller
from diffusion_policy.control.planner import Steering
from diffusion_policy.evaluation import rollout as rollouts
from diffusion_policy.evaluation.episode import Episode, FailedEpisode
from diffusion_policy.evaluation.host import EnvFailure, StepsResult
from diffusion_policy.evaluation.pool import EnvironmentPool
from diffusion_policy.evaluation.rollout import planning_batch, rollout

SEEDS = range(12)
FAILURES = {2: ("raises", 1), 5: ("raises", 2), 7: ("raises", 1), 11: ("raises", 1)}
"""How the environment of a seed fails, and how often."""


class Walk(gymnasium.Env):
    """Adds up its actions; an episode has 2 to 19 steps, by its seed. Its steps take random times, and in the second
    step of chosen seeds it fails, as often as `folder` lacks files that say that it has."""

    observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Box(-1e9, 1e9, (2,), np.float64)})
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)

    def __init__(self, folder: Path, failures: Mapping[int, tuple[str, int]], slowest: float = 0.0) -> None:
        self._folder, self._failures, self._slowest = folder, failures, slowest

    def reset(self, *, seed=None, options=None):
        assert seed is not None
        self._seed, self._steps = seed, 0
        self._x = np.array([float(seed), 0.0])
        return {"x": self._x}, {}

    def step(self, action):
        time.sleep(self._slowest * random.Random(os.urandom(8)).random())
        self._steps += 1
        kind, times = self._failures.get(self._seed, ("", 0))
        happened = len(list(self._folder.glob(f"{self._seed}-*")))
        if self._steps == 2 and happened < times:
            (self._folder / f"{self._seed}-{happened}").touch()
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("lost its balance")
        self._x = self._x + action
        ended = self._steps >= 2 + 37 * self._seed % 18
        return {"x": self._x}, 1.0, ended, False, {"is_success": bool(action[0] > 0)}


class Planner:
    """Plans noise."""

    observation_horizon, action_horizon, steps = 1, 4, 6
    action_shape, noise_shape = (2,), (6, 2)
    guides, longest_prefix = False, 0

    def __init__(self) -> None:
        self.observation_shapes = {"x": (2,)}
        self.sizes: set[int] = set()

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        self.sizes.add(len(noise))
        return noise.astype(np.float64)


class Mixing(Planner):
    """Each of its plans depends on all observations and all noise in the call, and on their order: as the last digits
    of a network's do, only more."""

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        order = np.arange(1, len(noise) + 1) @ (noise[:, 0, 0, 0] + observations["x"][:, 0, 0])
        return super().sample(observations, noise) + np.sin(order)


def roll_out(
    planner: Planner,
    make_env: partial,
    seeds: Sequence[int] = SEEDS,
    parallel: int = 5,
    workers: int = 1,
    threads: int = 1,
) -> tuple[list[Episode], list[FailedEpisode]]:
    lost: list[FailedEpisode] = []
    episodes = rollout(
        make_env,
        partial(Controller, planner),
        seeds,
        lambda _: None,
        parallel,
        workers=workers,
        planning_threads=threads,
        on_lost=lost.append,
    )
    return episodes, lost


def require_same(these: Sequence[Episode], those: Sequence[Episode]) -> None:
    assert [(one.seed, one.success, one.measures) for one in these] == [
        (one.seed, one.success, one.measures) for one in those
    ]
    for a, b in zip(these, those, strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.observations["x"], b.observations["x"])
        assert [plan.step for plan in a.plans] == [plan.step for plan in b.plans]
        np.testing.assert_array_equal([plan.actions for plan in a.plans], [plan.actions for plan in b.plans])


@pytest.mark.parametrize(("workers", "threads", "cores"), [(2, 1, 2), (2, 2, 8), (3, 2, 2)])
def test_neither_workers_nor_threads_nor_their_times_change_a_bit(
    workers: int, threads: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with errors, and if every plan depends on which others are made with it."""
    monkeypatch.setattr(rollouts, "available_cores", lambda: cores)
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    alone.mkdir()
    beside.mkdir()
    episodes, lost = roll_out(Mixing(), partial(Walk, alone, FAILURES))
    assert [one.seed for one in episodes] == [seed for seed in SEEDS if seed != 5]
    assert [(one.seed, "lost its balance" in one.reason) for one in lost] == [(5, True)]
    others, lost_too = roll_out(
        Mixing(), partial(Walk, beside, FAILURES, slowest=0.004), workers=workers, threads=threads
    )
    require_same(episodes, others)
    assert lost_too == lost


@pytest.mark.parametrize(("threads", "cores"), [(1, 8), (2, 2), (2, 8)])
def test_a_crash_changes_nothing_where_a_plan_depends_on_its_own_episode_alone(
    threads: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it takes slots of both groups along, some planned for and some in the middle of their steps."""
    monkeypatch.setattr(rollouts, "available_cores", lambda: cores)
    whole, _ = roll_out(Planner(), partial(Walk, tmp_path, {}))
    failures = {0: ("dies", 1), 4: ("raises", 1), 6: ("dies", 1), 9: ("dies", 2)}
    episodes, lost = roll_out(Planner(), partial(Walk, tmp_path, failures), workers=2, threads=threads)
    assert [(one.seed, one.reason) for one in lost] == [(9, "its worker process died (exit status -9)")]
    require_same(episodes, [one for one in whole if one.seed != 9])


@pytest.mark.parametrize("parallel", [1, 2, 3, 12, 40])
def test_any_number_of_environments_gives_the_same_episodes(parallel: int, tmp_path: Path) -> None:
    planner = Planner()
    episodes, _ = roll_out(planner, partial(Walk, tmp_path, {}), parallel=parallel)
    require_same(episodes, roll_out(Planner(), partial(Walk, tmp_path, {}))[0])
    assert planner.sizes == {planning_batch(parallel)} == {(parallel + 1) // 2}  # however many episodes there are


class Waiting(Planner):
    """Its k-th call plans k for every step. Those from the second to the sixth return once an environment has taken a
    step of the plan before, which is that of the other group."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._calls = folder, 0
        self.overlapped: list[bool] = []

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        (self._folder / f"plan {self._calls}").touch()
        if 1 <= self._calls < 6:
            self.overlapped.append(appears(self._folder / f"step of plan {self._calls - 1}"))
        self._calls += 1
        return np.full((len(noise), 1, self.steps, 2), self._calls - 1.0)


class Watched(Walk):
    """Takes no step of the k-th plan before the next one has begun."""

    def step(self, action):
        k = int(action[0])
        if k < 5 and appears(self._folder / f"plan {k + 1}"):
            (self._folder / f"step of plan {k}").touch()
        return super().step(action)


def appears(path: Path) -> bool:
    """Whether a file is there within some seconds."""
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    return path.exists()


@pytest.mark.parametrize("cores", [2, 8])
def test_environments_step_while_others_are_planned_for(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "available_cores", lambda: cores)
    planner = Waiting(tmp_path)
    long = [seed for seed in range(100) if 37 * seed % 18 >= 14][:4]  # four plans each, in two groups
    roll_out(planner, partial(Watched, tmp_path, {}), seeds=long, parallel=4, workers=2)
    assert planner.overlapped == [True] * 5


# The pool


class Large(gymnasium.Env):
    """Observes 4 MB, and says in them how often it has stepped; raises at 3 and dies at 6."""

    observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Box(-1e9, 1e9, (2**19,), np.float64)})
    action_space = gymnasium.spaces.Box(-1, 1, (2**18,), np.float64)

    def reset(self, *, seed=None, options=None):
        self._count = seed or 0
        return {"x": np.full(2**19, float(self._count))}, {}

    def step(self, action):
        self._count += 1
        if self._count == 6:
            os._exit(3)
        return {"x": np.full(2**19, float(self._count))}, float(action[0]), False, False, {"is_success": False}


def counts(answers: Mapping[int, dict[str, np.ndarray] | StepsResult | EnvFailure]) -> dict[int, float | str]:
    """What each slot counts, or whether it is blamed and why."""

    def count(answer: dict[str, np.ndarray] | StepsResult | EnvFailure) -> float | str:
        if isinstance(answer, EnvFailure):
            return f"{'blamed' if answer.blamed else 'taken along'}: {answer.reason}"
        return (answer if isinstance(answer, dict) else answer.observations)["x"].flat[-1]

    return {slot: count(answer) for slot, answer in sorted(answers.items())}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0)])
def test_requests_are_answered_in_turn_however_large_they_are(workers: int, order: tuple[int, ...]) -> None:
    """Neither side waits for the other to read, though no pipe holds what is on its way; and any may be collected
    first."""
    actions = np.ones((1, 2**18))
    with EnvironmentPool(Large, workers) as pool:
        requests = [pool.begin_reset({0: 0, 1: 1}), pool.begin_reset({2: 2, 3: 3})]
        for _ in range(2):
            requests += [pool.begin_step(dict.fromkeys(slots, actions)) for slots in ([0, 1], [2, 3])]
        answers = {i: counts(pool.collect(requests[i])) for i in order}
    expected = [{0: 0, 1: 1}, {2: 2, 3: 3}, {0: 1, 1: 2}, {2: 3, 3: 4}, {0: 2, 1: 3}, {2: 4, 3: 5}]
    assert [answers[i] for i in range(6)] == expected


@pytest.mark.parametrize(("adjacent", "fallen"), [(1, {0, 2}), (2, {0, 1})])
def test_a_crash_ends_what_its_worker_was_asked_and_nothing_else(adjacent: int, fallen: set[int]) -> None:
    actions = np.ones((1, 2**18))
    with EnvironmentPool(Large, 2, adjacent=adjacent) as pool:
        pool.reset({0: 5, 1: 1, 2: 2, 3: 3})
        first, second = (pool.begin_step(dict.fromkeys(slots, actions)) for slots in ([0, 1], [2, 3]))
        died = "its worker process died (exit status 3)"
        assert counts(pool.collect(first)) == {
            0: f"blamed: {died}",
            **({} if 1 in fallen else {1: 2}),
            **dict.fromkeys(sorted(fallen - {0}), f"taken along: {died}"),
        }
        assert counts(pool.collect(second)) == {slot: slot + 1 for slot in {2, 3} - fallen}
        assert counts(pool.step(dict.fromkeys(fallen, actions))) == {}  # before they are reset
        assert counts(pool.reset(dict.fromkeys(fallen, 0))) == dict.fromkeys(sorted(fallen), 0)
        everything = counts(pool.step(dict.fromkeys(range(4), actions)))
        assert everything == {slot: 1 if slot in fallen else {1: 3, 2: 4, 3: 5}[slot] for slot in range(4)}


def test_workers_that_were_asked_much_end_after_what_they_are_at() -> None:
    with EnvironmentPool(partial(Walk, Path(), {}, slowest=0.5), 2) as pool:
        pool.reset({0: 35, 1: 53})  # of 19 steps
        for _ in range(50):
            pool.begin_step(dict.fromkeys([0, 1], np.ones((2, 2))))
        processes = [worker.spawned.process for worker in pool._workers]  # pyright: ignore[reportAttributeAccessIssue]
    assert [process.exitcode for process in processes] == [0, 0]
