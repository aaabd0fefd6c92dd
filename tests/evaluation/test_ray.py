"""The engine ray on a real cluster of two cores: the same results as in local workers, also when workers die."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from diffusion_policy.cli import main
from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.config import SampleConfig
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.evaluation import engines
from diffusion_policy.evaluation.engines import imap, run_isolated
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.evaluation.host import EnvFailure
from diffusion_policy.evaluation.pool import EnvironmentPool

ray = pytest.importorskip("ray", reason="ray is not installed")

SEEDS = range(100_000, 100_007)
NOTHING = np.zeros((1, 1), np.float32)


@pytest.fixture(autouse=True, scope="module")
def cluster() -> Iterator[None]:
    """What the program connects to before stays connected, so all tests share it."""
    with engines.cluster("ray", 2):
        yield


def listening() -> set[str]:
    """Addresses, as Linux writes them, on which this process and those of Ray listen."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_text().lower()
            if process.name == str(os.getpid()) or "ray::" in command or "/ray/" in command:
                found |= {sockets[link] for fd in (process / "fd").iterdir() if (link := os.readlink(fd)) in sockets}
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="what listens cannot be read here")
def test_a_cluster_that_is_started_here_listens_on_this_machine_alone() -> None:
    assert list(imap(make_square, range(3), 2, "ray")) == [0, 1, 4]  # its workers listen, too
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert listening()
    assert listening() <= loopback


def square(x: int) -> int:
    return x * x


def make_square():
    return square


def make_unlucky():
    def unlucky(x: int) -> int:
        if x == 3:
            raise ValueError("3 is not lucky")
        return x

    return unlucky


def dies_once(folder: Path, x: int) -> int:
    if x == 2 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def always_dies(x: int) -> int:
    os._exit(1)


def call(function):
    """What makes a function: itself."""
    return function


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(imap(make_square, range(40), 2, "ray")) == [x * x for x in range(40)]


def test_endless_items_can_be_stopped() -> None:
    results = imap(make_square, itertools.count(), 2, "ray")
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()


def test_what_a_function_raises_is_raised_here() -> None:
    results = imap(make_unlucky, range(9), 2, "ray")
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^3 is not lucky$"):
        next(results)


def test_an_item_whose_worker_died_is_begun_again(tmp_path: Path) -> None:
    function = partial(call, partial(dies_once, tmp_path))
    assert list(imap(function, range(5), 2, "ray")) == [0, 1, 2, 3, 4]
    assert (tmp_path / "died").exists()


def test_an_item_that_kills_every_worker_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_policy.evaluation.ray_engine.RETRIES", 1)
    with pytest.raises(OSError, match="a worker of the Ray cluster died 2 times at one piece of work"):
        list(imap(partial(call, always_dies), [1], 1, "ray"))


def report(item: str) -> str | None:
    if item == "dies":
        os._exit(3)
    return f"{item} {os.getpid()}"


@pytest.mark.slow
def test_each_runs_alone_and_a_crash_is_told() -> None:
    told = dict(run_isolated(report, ["a", "dies", "b"], 2, "ray"))
    assert told.pop("dies") == "its worker process died"  # each time it was begun again
    assert told.keys() == {"a", "b"}
    assert len({str(said).split()[1] for said in told.values()}) == 2  # processes


class Counter(gymnasium.Env):
    """Counts from its seed; raises at 13, dies at 66, hangs at 99; it changes the actions that it is given."""

    observation_space = gymnasium.spaces.Dict({"count": gymnasium.spaces.Box(0, 1000, (1,))})
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.count = seed
        return {"count": np.array([seed], np.float32)}, {}

    def step(self, action):
        action += 1
        self.count += 1
        if self.count == 13:
            raise RuntimeError("unlucky")
        if self.count == 66:
            os._exit(3)
        if self.count == 99:
            time.sleep(60)
        return {"count": np.array([self.count], np.float32)}, 1.0, False, False, {"is_success": False}


def step(pool: EnvironmentPool, slots: list[int]) -> dict[int, int | tuple[str, bool]]:
    """One step of some slots: what each counts, or why it cannot and whether it is blamed."""
    answers = sorted(pool.step(dict.fromkeys(slots, NOTHING)).items())
    return {
        slot: (answer.reason, answer.blamed)
        if isinstance(answer, EnvFailure)
        else int(answer.observations["count"][-1, 0])
        for slot, answer in answers
    }


@pytest.mark.slow
def test_errors_crashes_and_hangs_are_faults_of_the_slot_at_work() -> None:
    with EnvironmentPool(Counter, 1, hang_after=1, engine="ray") as pool:
        first = pool.reset({0: 12, 1: 30, 2: 64})
        assert {slot: int(observation["count"][0]) for slot, observation in first.items()} == {0: 12, 1: 30, 2: 64}
        answers = step(pool, [0, 1])
        assert answers[1] == 31
        assert "RuntimeError: unlucky" in str(answers[0])
        assert 0 < pool.seconds_worked < pool.seconds_asked
        pool.reset({0: 5})
        assert step(pool, [0, 1, 2]) == {0: 6, 1: 32, 2: 65}
        died = "its worker process died (exit status 3)"
        assert step(pool, [0, 1, 2]) == {0: (died, False), 1: (died, False), 2: (died, True)}
        pool.reset({0: 7, 2: 98})
        hung = "its environment did not answer within 1 s"
        assert step(pool, [0, 2]) == {0: (hung, False), 1: (hung, False), 2: (hung, True)}
        pool.reset({0: 1, 2: 2})
        assert step(pool, [0, 2]) == {0: 2, 2: 3}


class Fragile(gymnasium.Wrapper):
    """In the tenth step of chosen seeds, once each, kills its process or the actor that keeps it."""

    def __init__(self, make_env: partial, folder: Path, victims: dict[int, str]) -> None:
        super().__init__(make_env())
        self._folder, self._victims = folder, victims

    def reset(self, *, seed=None, options=None):
        self._seed, self._steps = seed, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        self._steps += 1
        victim, killed = self._victims.get(self._seed), self._folder / str(self._seed)
        if self._steps == 10 and victim and not killed.exists():
            killed.touch()
            os.kill(os.getppid() if victim == "actor" else os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return self.env.step(action)


@pytest.mark.slow
def test_a_killed_worker_changes_no_episode(make_env: partial, run: Path, tmp_path: Path) -> None:
    from diffusion_policy.checkpoints import checkpoint  # workers import this module too, and need no torch
    from diffusion_policy.control.controller import Controller
    from diffusion_policy.control.policy_planner import PolicyPlanner
    from diffusion_policy.evaluation.rollout import rollout

    planner = PolicyPlanner(checkpoint.load(run).policy, SampleConfig("ddim", 2))
    make_controller = partial(Controller, planner, plan_batch=3)
    roll_out = partial(rollout, make_controller=make_controller, seeds=SEEDS, mode_of=make_env().unwrapped.mode)
    whole = roll_out(make_env, parallel=3)
    fragile = partial(Fragile, make_env, tmp_path, {SEEDS[1]: "environment", SEEDS[4]: "actor"})
    killed = roll_out(fragile, parallel=3, workers=2, engine="ray")
    assert len(list(tmp_path.iterdir())) == 2
    assert all(alike(a, b) for a, b in zip(whole, killed, strict=True))


def alike(a: Episode, b: Episode) -> bool:
    """Equal but for the last digits, which other neighbours in a planning batch may change."""
    named = (a.seed, a.repeat, a.mode) == (b.seed, b.repeat, b.mode)
    return named and a.actions.shape == b.actions.shape and np.allclose(a.actions, b.actions, atol=1e-4)


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def test_a_collection_has_the_same_bytes(demonstrations: Path, tmp_path: Path) -> None:
    Collect(tmp_path / "store.zarr", env_kwargs='{"rows": 1}', episodes=12, workers=2, engine="ray").run()
    assert files_of(tmp_path / "store.zarr") == files_of(demonstrations)


@pytest.mark.slow
def test_an_evaluation_has_the_same_results(run: Path, tmp_path: Path) -> None:
    results = []
    for engine in ("local", "ray"):
        out = tmp_path / engine
        Evaluate(run, out, episodes=4, sampling=SampleConfig("ddim", 2), videos=0, workers=2, engine=engine).run()
        results.append(json.loads((out / "results.json").read_text()))
        del results[-1]["planning_latency_ms"]
    assert results[0] == results[1]


def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["collect", "--output", str(tmp_path / "store.zarr"), "--engine", "ray"]
    assert main([*command, "--workers", "3"]) == 2
    assert "workers must be at most 2, the cores of the Ray cluster; got 3" in capsys.readouterr().err
    assert main([*command[:-1], "spark"]) == 2
    assert "--engine" in capsys.readouterr().err
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert main(command) == 2
    assert "pip install 'diffusion-policy-toolkit[ray]'" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_is_told_at_once(tmp_path: Path) -> None:
    command = ["collect", "--output", str(tmp_path / "store.zarr"), "--workers", "1", "--engine", "ray"]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_policy.cli", *command],
        stderr=subprocess.PIPE, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: no Ray cluster at RAY_ADDRESS=127.0.0.1:1: " in done.stderr
    assert not (tmp_path / "store.zarr").exists()


def holds_episodes(path: Path) -> bool:
    try:
        return len(EpisodeStore.open(path).episode_ends) > 0
    except ValueError:
        return False


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_episodes_of_a_cluster_begun_for_them(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    command = ["collect", "--output", str(path), "--episodes", "5000", "--workers", "1", "--engine", "ray"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "diffusion_policy.cli", *command],
        stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not holds_episodes(path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130, text
    assert re.search(r"stopped: \d+ of 5000 episodes", text)
    assert "Traceback" not in text
