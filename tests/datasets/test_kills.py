"""`kill -9` at random moments of a collection: what was committed stays, and the resumed store ends as if nothing had
happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from diffusion_policy.commands.collect import Collect
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore

EPISODES = 40
FORKING = """
import json, os, sys
from diffusion_policy import envs
from diffusion_policy.cli import main
from diffusion_policy.datasets import collect, store
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Imports once, then runs each command line that it reads in a process of its own: its id, then its exit status."""


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted collection makes."""
    path = tmp_path_factory.mktemp("reference") / "store.zarr"
    Collect(path, env_kwargs='{"rows": 1}', episodes=EPISODES, workers=1).run()
    return path


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def kill_after(seconds: float, forking: subprocess.Popen[str], *arguments: str) -> bool:
    """Begin a collection and kill it so long after; whether it was killed and not done before."""
    assert forking.stdin is not None
    assert forking.stdout is not None
    forking.stdin.write(json.dumps(["collect", "--workers", "1", *arguments]) + "\n")
    forking.stdin.flush()
    child = int(forking.stdout.readline())
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):  # it was done before
        os.kill(child, signal.SIGKILL)
    return int(forking.stdout.readline()) == -signal.SIGKILL


def committed(path: Path, reference: EpisodeStore, expected: dict[str, np.ndarray]) -> int:
    """How many episodes a store holds, each equal to the reference's."""
    if not path.exists():
        return 0
    try:
        store = EpisodeStore.open(path)
    except StoreError as error:
        if "holds no episodes yet" not in str(error):
            raise
        return 0
    ends = store.episode_ends
    np.testing.assert_array_equal(ends, reference.episode_ends[: len(ends)])
    for key, rows in expected.items():
        np.testing.assert_array_equal(store.read(key), rows[: ends[-1]])
    seeds, wanted = store.read_meta("seed"), reference.read_meta("seed")
    assert seeds is not None
    assert wanted is not None
    np.testing.assert_array_equal(seeds, wanted[: len(ends)])
    return len(ends)


def kill_again_and_again(kills: int, folder: Path, reference: Path, seed: int) -> int:
    """Kill a collection and its resumptions; returns how many kills hit a collection at work."""
    rng = random.Random(seed)
    whole = EpisodeStore.open(reference)
    expected = {key: whole.read(key) for key in whole.keys}
    hits = known = 0
    path = folder / "first.zarr"
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forking:
        for i in range(kills):
            begin = ("--output", str(path), "--env-kwargs", '{"rows": 1}', "--episodes", str(EPISODES))
            go_on = ("--resume", str(path))
            hits += kill_after(rng.uniform(0.02, 0.4), forking, *(go_on if path.exists() else begin))
            now = committed(path, whole, expected)
            assert now >= known
            known = now
            if known == EPISODES:
                path, known = folder / f"{i}.zarr", 0
    if not path.exists():
        Collect(path, env_kwargs='{"rows": 1}', episodes=EPISODES, workers=1).run()
    else:
        Collect(resume=path, workers=1).run()
    assert files_of(path) == files_of(reference)
    return hits


def kill_in_two_places(kills: int, tmp_path: Path, reference: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as executor:
        hits = list(executor.map(kill_again_and_again, [kills // 2] * 2, folders, [reference] * 2, [1, 2]))
    assert sum(hits) > kills / 2


def test_whatever_moment_is_killed_committed_episodes_stay(tmp_path: Path, reference: Path) -> None:
    kill_in_two_places(12, tmp_path, reference)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path, reference: Path) -> None:
    kill_in_two_places(200, tmp_path, reference)
