"""The whole job in miniature, by the commands of the README."""

import json
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import pytest

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.datasets.store import EpisodeStore

COLLECT = ["--env-kwargs", '{"rows": 1}', "--episodes", "8"]
TRAIN = ["--widths", "16", "32", "--level-dim", "32", "--noise-levels", "20", "--batch-size", "64"]
TRAIN += ["--learning-rate", "4e-3", "--steps", "60"]
EVALUATE = ["--episodes", "4", "--sampling-steps", "2"]
SHORT = ["--env-kwargs", '{"rows": 1, "max_episode_steps": 40}']


def diffusion_policy(*arguments: object) -> str:
    """Run a command; returns what it prints as its result."""
    command = [sys.executable, "-m", "diffusion_policy.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations, a policy and an evaluation of the task with two modes."""
    folder = tmp_path_factory.mktemp("pipeline")
    store = folder / "demonstrations.zarr"
    diffusion_policy("collect", *COLLECT, "--output", store)
    diffusion_policy("train", "--dataset", store, "--output", folder / "policy", *TRAIN)
    evaluate = ("evaluate", "--checkpoint", folder / "policy", "--output", folder / "evaluation")
    diffusion_policy(*evaluate, *EVALUATE, "--videos", 1)
    return folder


def test_results_hold_what_the_evaluation_measured(folder: Path) -> None:
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert results["environment"] == "diffusion_policy/Avoid-v0"
    assert results["env_kwargs"] == {"rows": 1}
    assert results["episodes"] == 4
    assert results["seeds"] == list(range(100_000, 100_004))
    successes = sum(outcome["success"] for outcome in results["outcomes"])
    assert results["success_rate"]["value"] == successes / 4
    assert results["success_rate"]["low"] <= successes / 4 <= results["success_rate"]["high"]
    assert set(results["modes"]) - {"none"} == {"left", "right"}
    assert sum(count["episodes"] for count in results["modes"].values()) == 4
    assert sum(count["successes"] for count in results["modes"].values()) == successes
    assert results["demonstrations"]["modes"] == {"left": 4, "right": 4}
    assert set(results["mode_entropy"]) == set(results["mode_coverage"]) == {"value", "low", "high"}
    latency = [results["planning_latency_ms"][name]["value"] for name in ("p50", "p95", "p99")]
    assert 0 < latency[0] <= latency[1] <= latency[2]


def test_the_page_shows_paths_modes_loss_and_videos(folder: Path) -> None:
    page = (folder / "evaluation" / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert page.count("data:video/mp4") >= 1


def test_metrics_are_json_lines(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][-1] == 60
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["validation_loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_rollout_films_and_prints(folder: Path, tmp_path: Path) -> None:
    video = tmp_path / "rollout.mp4"
    printed = diffusion_policy("rollout", "--checkpoint", folder / "policy", "--episodes", 3, "--video", video, *SHORT)
    assert printed.count("seed ") == 3
    with imageio.get_reader(video) as reader:
        assert reader.get_data(0).shape == (768, 960, 3)  # two columns, two rows


@pytest.mark.slow
def test_the_same_commands_with_the_same_seeds_give_the_same(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "demonstrations.zarr"
    diffusion_policy("collect", *COLLECT, "--output", store, "--workers", 1)
    first, second = (EpisodeStore.open(path) for path in (folder / "demonstrations.zarr", store))
    assert first.fingerprint(["actual_xy", "desired_xy"]) == second.fingerprint(["actual_xy", "desired_xy"])
    diffusion_policy("train", "--dataset", store, "--output", tmp_path / "policy", *TRAIN)
    weights = [(checkpoint.find(path / "policy") / "model.safetensors").read_bytes() for path in (folder, tmp_path)]
    assert weights[0] == weights[1]
    evaluate = ("evaluate", "--checkpoint", folder / "policy", "--output", tmp_path / "evaluation")
    diffusion_policy(*evaluate, *EVALUATE, "--videos", 0, "--workers", 1)
    results = [json.loads((path / "evaluation" / "results.json").read_text()) for path in (folder, tmp_path)]
    for result in results:
        del result["planning_latency_ms"]
    assert results[0] == results[1]
