from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diffusion_policy.datasets.collect import Demonstrator, collect
from diffusion_policy.datasets.store import Demonstration, EpisodeStore
from diffusion_policy.engines import ordered_map
from diffusion_policy.envs.experts import AvoidExpert


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
        spread = partial(ordered_map, workers=workers)
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


def test_an_expert_that_always_fails_does_not_run_for_ever(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 0 of 100 episodes succeeded"):
        collect(new_store(tmp_path / "store.zarr"), lambda: always_failing, 5, 0)
