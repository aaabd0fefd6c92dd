"""The promise of the README, at full size: some twenty minutes."""

import json
from pathlib import Path

import pytest

from diffusion_policy.commands.demo import Demo
from diffusion_policy.commands.evaluate import Evaluate


def test_a_seed_that_the_evaluation_could_not_use_is_refused_at_once() -> None:
    Demo(seed=2**32 - 1 - 100_099)
    with pytest.raises(ValueError, match=r"seed must be at most 4294867196; got 4294867197"):
        Demo(seed=2**32 - 100_099)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    Demo(folder).run()
    return folder


@pytest.mark.slow
def test_the_demo_solves_the_task_in_all_six_ways(folder: Path) -> None:
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert results["episodes"] == 100
    assert results["success_rate"]["value"] >= 0.9
    assert results["mode_coverage"]["value"] == 1
    assert results["mode_entropy"]["value"] >= 0.85


@pytest.mark.slow
def test_another_five_hundred_seeds_say_the_same(folder: Path) -> None:
    results = Evaluate(folder / "policy", folder / "more", episodes=500, seed=200_000).run()
    assert results["success_rate"]["low"] >= 0.9
    assert results["mode_entropy"]["value"] >= 0.85


@pytest.mark.slow
def test_evaluating_again_changes_nothing(folder: Path) -> None:
    Evaluate(folder / "policy", folder / "again").run()
    first, second = (json.loads((folder / name / "results.json").read_text()) for name in ("evaluation", "again"))
    assert first["outcomes"] == second["outcomes"]
