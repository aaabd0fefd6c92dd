import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import TimeLimit

from diffusion_policy.basics.bounds import MOST_STEPS
from diffusion_policy.cli import main
from diffusion_policy.datasets.collect import Demonstrator, DemonstratorError, collect
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.experts import AvoidExpert
from diffusion_policy.evaluation.engines import imap


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def new_store(path: Path) -> EpisodeStore:
    return EpisodeStore.create(path, {}, ["left", "right"])


def fake(seed: int) -> Demonstration:
    """Every third seed fails."""
    data = {"state": np.full((2, 1), seed, np.float32), "action": np.full((2, 1), seed, np.float32)}
    return Demonstration(data, seed, "left", seed % 3 != 0)


def make_fake():
    return fake


def always_failing(seed: int) -> Demonstration:
    return fake(0)._replace(seed=seed)


def interrupted_at_seven(seed: int) -> Demonstration:
    if seed == 7:
        raise KeyboardInterrupt
    return fake(seed)


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, make_env: partial) -> None:
    make_demonstrator = partial(Demonstrator, make_env, AvoidExpert, 0.4)
    for workers in (1, 2):
        spread = partial(imap, workers=workers)
        collect(new_store(tmp_path / f"{workers}.zarr"), make_demonstrator, 8, 3, spread)
    assert files_of(tmp_path / "1.zarr") == files_of(tmp_path / "2.zarr")


def test_episodes_take_the_modes_in_turn_and_record_the_clean_action(store: EpisodeStore) -> None:
    assert store.episode_modes() == ["left", "right"] * 6
    actions = store.read("action")
    np.testing.assert_allclose(np.linalg.norm(actions, axis=1), 0.01, rtol=1e-4)  # the expert's speed, without noise
    desired = store.read("desired_xy")
    executed = np.diff(desired[: store.episode_ends[0]], axis=0)
    disturbance = executed - actions[: store.episode_ends[0] - 1]
    assert disturbance.std() == pytest.approx(0.4 * 0.01, rel=0.3)


def test_the_first_successes_are_stored_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store.zarr")
    seen: list[int] = []
    collect(store, make_fake, 5, 0, on_episode=lambda demonstration: seen.append(demonstration.seed))
    seeds = store.read_meta("seed")
    assert seeds is not None
    assert seeds.tolist() == [1, 2, 4, 5, 7]
    assert seen == list(range(8))


def test_an_interrupt_keeps_what_has_finished(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store.zarr")
    with pytest.raises(KeyboardInterrupt):
        collect(store, lambda: interrupted_at_seven, 50, 0)
    seeds = EpisodeStore.open(tmp_path / "store.zarr").read_meta("seed")
    assert seeds is not None
    assert seeds.tolist() == [1, 2, 4, 5]


def test_large_episodes_are_written_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long writing has taken before."""
    written: list[int] = []
    append = EpisodeStore.append

    def slow(self: EpisodeStore, episodes: list[Demonstration]) -> None:
        written.append(len(episodes))
        append(self, episodes)

    monkeypatch.setattr(EpisodeStore, "append", slow)
    size = sum(rows.nbytes for rows in fake(1).data.values())
    for most, expected in ((3 * size, [1, 3, 3]), (2**30, [1, 6])):
        monkeypatch.setattr("diffusion_policy.datasets.collect.MOST_HELD_BYTES", most)
        written.clear()
        collect(new_store(tmp_path / f"{most}.zarr"), make_fake, 7, 0, writing_share=1e-9)
        assert [count for count in written if count] == expected


def test_an_expert_that_always_fails_does_not_run_for_ever(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 0 of 100 episodes succeeded"):
        collect(new_store(tmp_path / "store.zarr"), lambda: always_failing, 5, 0)


# What cannot be is refused before any work


class Point(gymnasium.Env):
    """A number that grows by the action; the third episode of an `ill` one goes wrong."""

    observation_space = Dict({"x": Box(-1e9, 1e9, (1,), np.float64)})
    action_space = Box(-1, 1, (1,), np.float32)
    modes = ("left", "right")

    def __init__(self, ill: str = "", marks: Path | None = None) -> None:
        self._ill, self._marks = ill, marks

    def reset(self, *, seed=None, options=None):
        self._seed, self._steps = seed, 0
        self._x = np.array([seed], np.float64)
        return {"x": self._x}, {}

    def step(self, action):
        self._steps += 1
        self._x += action  # in place, as some do
        info = {"is_success": True}
        if self._seed == 2 and self._steps == 2:
            if self._ill == "raises":
                raise RuntimeError("lost\x1b[2J\nits balance " + "x" * 10_000)
            if self._ill == "exits":
                sys.exit(3)
            if self._ill == "dies" and self._marks and not self._marks.exists():
                self._marks.touch()
                os._exit(7)
            if self._ill == "observes NaN":
                self._x[:] = np.nan
        if self._ill == "says nothing" and self._seed == 2:
            info = {}
        if self._ill == "wanders":
            os.chdir("/")
        return {"x": self._x}, 0.0, self._steps == 3 and self._ill != "goes on", False, info

    def mode(self, observations):
        if self._ill == "has no mode" and self._seed == 2:
            raise KeyError("mode")
        return self.modes[(self._seed or 0) % 2]


class Pusher:
    def __init__(self, mode: str | None) -> None:
        pass

    def act(self, observation):
        return np.ones(1, np.float32)


class Says:
    """An expert that always gives the same."""

    def __init__(self, action: Any) -> None:
        self._action = action

    def act(self, observation):
        return self._action


def never() -> Any:
    raise AssertionError("no work was to be done")


def collect_points(path: Path, make_env: Callable[[], Any], episodes: int = 6, **options: Any) -> list[int]:
    """Seeds that are in the store afterwards."""
    store = EpisodeStore.create(path, {}, ["left", "right"])
    try:
        collect(store, partial(Demonstrator, make_env, Pusher, 0.1), episodes, 0, **options)
    finally:
        store.close()
        kept = EpisodeStore.append_to(path)
        kept.close()
    return [] if len(kept.episode_ends) == 0 else kept.seeds().tolist()


@pytest.mark.parametrize("episodes", [5, 3])
def test_nothing_is_done_where_nothing_is_missing(tmp_path: Path, episodes: int) -> None:
    store = new_store(tmp_path / "store.zarr")
    collect(store, make_fake, 5, 0)
    collect(store, never, episodes, 100)
    assert len(store.episode_ends) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"episodes": 0}, "episodes must be a whole number of at least 1; got 0"),
        ({"episodes": -3}, "episodes must be"),
        ({"episodes": 2.5}, "episodes must be"),
        ({"first_seed": -1}, "first_seed must be a whole number of at least 0 and at most 4294967295; got -1"),
        ({"first_seed": 2**32}, "first_seed must be"),
        ({"writing_share": 0}, "writing_share must be above 0"),
        ({"writing_share": float("nan")}, "writing_share must be above 0"),
    ],
)
def test_impossible_arguments_are_refused_before_any_work(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(new_store(tmp_path / "store.zarr"), never, **{"episodes": 5, "first_seed": 0, **arguments})


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf"), "0.4"])
def test_impossible_noise_is_refused(noise: Any) -> None:
    with pytest.raises(ValueError, match="noise must be a finite number of at least 0; got"):
        Demonstrator(Point, Pusher, noise)


def fail_to_start() -> Any:
    raise RuntimeError("no display")


class Plain(Point):
    observation_space = Box(0, 1, (1,))


class Modeless(Point):
    modes, mode = None, "train"  # pyright: ignore


class Wider(Point):
    observation_space = Dict({"x": Box(-1e9, 1e9, (2,), np.float64)})


class Forked(Point):
    modes = ("left", "middle")


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (Plain, "must observe a dict of arrays; got Box"),
        (Modeless, r"must have modes and mode\(observations\)"),
        (object, "must observe a dict of arrays; got None"),
        (fail_to_start, "the environment cannot be made: RuntimeError: no display"),
    ],
)
def test_an_environment_of_another_kind_is_refused(make_env: Any, message: str) -> None:
    with pytest.raises(DemonstratorError, match=message):
        Demonstrator(make_env, Pusher, 0.1)


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (Wider, r"holds {'action': \(1,\), 'x': \(1,\)}; the environment gives {'action': \(1,\), 'x': \(2,\)}"),
        (Forked, "knows the modes left, right; the environment has left, middle"),
    ],
)
def test_a_store_of_other_episodes_is_refused_before_any_work(tmp_path: Path, make_env: type, message: str) -> None:
    path = tmp_path / "store.zarr"
    assert collect_points(path, Point, 2) == [0, 1]
    with EpisodeStore.append_to(path) as store, pytest.raises(DemonstratorError, match=message):
        collect(store, partial(Demonstrator, make_env, Pusher, 0.1), 4, 2, lambda *_: never())  # pyright: ignore


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.ones((1, 1)), r"float64 of shape \(1, 1\)"),
        (0.5, r"float64 of shape \(\)"),
        (None, "object"),
        (np.array([np.nan]), r"float64 of shape \(1,\), with NaN or infinity"),
    ],
)
def test_an_expert_that_gives_no_action_is_told_with_the_seed(action: Any, message: str) -> None:
    demonstrator = Demonstrator(Point, lambda _: Says(action), 0.1)
    must = r"^the episode of seed 4 failed: the expert must give finite numbers of shape \(1,\); got "
    with pytest.raises(DemonstratorError, match=must + message):
        demonstrator(4)


def test_an_expert_may_give_whole_numbers() -> None:
    demonstration = Demonstrator(Point, lambda _: Says([1]), 0.1)(0)
    assert demonstration.data["action"].dtype == np.float32
    assert (np.diff(demonstration.data["x"], axis=0) % 1 != 0).all()  # noise was added to it


# What goes wrong on the way


@pytest.mark.parametrize(
    ("ill", "message"),
    [
        ("raises", r"the episode of seed 2 failed: RuntimeError: lost\\x1b\[2J its balance x+ \.\.\. \(.*test_collect"),
        ("exits", "the episode of seed 2 failed: SystemExit: 3"),
        ("says nothing", r"the episode of seed 2 failed: the environment must give info\['is_success'\]"),
        ("observes NaN", "an episode of seed 2: data/x must hold finite numbers; got NaN"),
        ("has no mode", "the episode of seed 2 failed: KeyError: 'mode'"),
    ],
)
def test_an_episode_that_fails_is_told_in_a_line_and_those_before_are_kept(
    tmp_path: Path, ill: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        collect_points(tmp_path / "store.zarr", partial(Point, ill))
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()
    assert EpisodeStore.open(tmp_path / "store.zarr").seeds().tolist() == [0, 1]


def test_several_workers_keep_and_tell_the_same_of_a_failure(tmp_path: Path) -> None:
    told = []
    for workers in (1, 2):
        spread = partial(imap, workers=workers)
        with pytest.raises(DemonstratorError) as caught:
            collect_points(tmp_path / f"{workers}.zarr", partial(Point, "raises"), imap=spread)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert files_of(tmp_path / "1.zarr") == files_of(tmp_path / "2.zarr")


def test_a_worker_that_dies_changes_no_byte(tmp_path: Path) -> None:
    collect_points(tmp_path / "whole.zarr", Point)
    dying = partial(Point, "dies", tmp_path / "died")
    collect_points(tmp_path / "died.zarr", dying, imap=partial(imap, workers=2))
    assert (tmp_path / "died").exists()
    assert files_of(tmp_path / "whole.zarr") == files_of(tmp_path / "died.zarr")


def test_an_episode_without_an_end_ends() -> None:
    demonstration = Demonstrator(partial(Point, "goes on"), Pusher, 0.0)(0)
    assert len(demonstration.data["action"]) == MOST_STEPS
    limited = lambda: TimeLimit(Point("goes on"), MOST_STEPS + 7)  # noqa: E731
    assert len(Demonstrator(limited, Pusher, 0.0)(0).data["action"]) == MOST_STEPS + 7


def test_an_environment_may_change_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert collect_points(Path("store.zarr"), partial(Point, "wanders")) == list(range(6))
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_the_episodes_are_written(tmp_path: Path, number: int) -> None:
    store = new_store(tmp_path / "store.zarr")
    append, before = store.append, signal.getsignal(number)

    def interrupted(episodes: Any) -> None:
        signal.raise_signal(number)
        append(episodes)

    store.append = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            collect(store, make_fake, 5, 0, writing_share=1)
    finally:
        signal.signal(number, before)
    store.close()
    assert EpisodeStore.open(tmp_path / "store.zarr").seeds().tolist() == [1]


HANGING = """
import os
import time
import gymnasium, numpy as np
from gymnasium.spaces import Box

class Hanging(gymnasium.Env):
    observation_space = action_space = Box(-1, 1, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        self.seed_ = seed
        return np.zeros(1, np.float32), {}
    def step(self, action):
        if self.seed_ == 2:
            while not (os.path.exists("0") and os.path.exists("1")):
                time.sleep(0.01)
            open("hangs", "w").close()
            time.sleep(1000)
        open(str(self.seed_), "w").close()
        return np.zeros(1, np.float32), 0.0, True, False, {"is_success": True}

class Expert:
    def __init__(self, mode): pass
    def act(self, observation): return np.ones(1, np.float32)

gymnasium.register("hanging/Hanging-v0", entry_point=Hanging)
"""


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, 1), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow), (signal.SIGINT, 2)],
)
def test_signals_end_a_simulator_that_hangs_and_keep_what_has_finished(
    tmp_path: Path, number: int, workers: int
) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    command = ["collect", "--env", "hanging:hanging/Hanging-v0", "--expert", "hanging:Expert", "--episodes", "9"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusion_policy.cli", *command, "--workers", str(workers), "--output", "store.zarr"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # so that the other episodes reach the command
    process.send_signal(number)
    _, text = process.communicate(timeout=30)  # also waits for the workers, which hold the pipe
    assert process.returncode == 130, text
    assert re.search(r"stopped: [12] of 9 episodes are in store.zarr; go on with: ", text)
    assert EpisodeStore.open(tmp_path / "store.zarr").seeds().tolist() in ([0], [0, 1])


def test_the_episodes_before_a_crash_are_told_and_can_be_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text(
        HANGING.replace("time.sleep(1000)", "os._exit(5)").replace("hanging/", "crashing/")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("diffusion_policy.evaluation.engines.RETRIES", 1)
    command = ["collect", "--env", "crashing:crashing/Hanging-v0", "--expert", "crashing:Expert", "--episodes", "4"]
    assert main([*command, "--workers", "2", "--output", "store.zarr"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the episode of seed 2 was begun 2 times, and its process died each time" in said
    assert "2 of 4 episodes are safe in store.zarr, go on with --resume store.zarr" in said


def test_what_is_committed_is_on_the_disk_unless_it_need_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor))
    command = ["collect", "--env-kwargs", '{"rows": 1}', "--episodes", "2", "--workers", "1", "--output"]
    assert main([*command, str(tmp_path / "quick.zarr"), "--no-sync"]) == 0
    assert synced == []
    assert main([*command, str(tmp_path / "safe.zarr")]) == 0
    assert synced != []
    assert files_of(tmp_path / "quick.zarr") == files_of(tmp_path / "safe.zarr")
