"""Other people's environments through the commands: collected, trained, evaluated, compared."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from diffusion_policy.cli import main
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.datasets.store import EpisodeStore

SMALL = ["--widths", "32", "64", "--level-dim", "32", "--batch-size", "64", "--learning-rate", "2e-3"]
EXAMPLES = "diffusion_policy.envs.examples"
MOUNTAIN_CAR = [
    *("--env", "MountainCarContinuous-v0", "--success", "return>=90"),
    *("--mode-function", f"{EXAMPLES}:mountain_car_mode", "--mode-labels", "left", "right"),
]


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake is answered with."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def car(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations and a policy of Gymnasium's mountain car, whose first swing is to the left or to the right."""
    folder = tmp_path_factory.mktemp("car")
    expert = ("--expert", f"{EXAMPLES}:MountainCarExpert")
    run("collect", *MOUNTAIN_CAR, *expert, "--episodes", 12, "--output", folder / "car.zarr", "--workers", 1)
    run("train", "--dataset", folder / "car.zarr", "--output", folder / "policy", "--steps", 100, *SMALL)
    return folder


def test_what_was_said_of_an_environment_is_kept_with_its_data_and_its_policy(car: Path) -> None:
    store = EpisodeStore.open(car / "car.zarr")
    assert store.episode_modes() == ["left", "right"] * 6
    results = Evaluate(car / "policy", car / "evaluation", episodes=4, workers=1, videos=0).run()
    assert results["signals"]["success"] == "return>=90"
    assert results["mode_base"] == "environment"
    assert {outcome["mode"] for outcome in results["outcomes"]} <= {"left", "right", None}
    for outcome in results["outcomes"]:
        assert outcome["success"] == (outcome["measures"]["return"] >= 90)


def test_delays_and_repeats_are_measured(car: Path) -> None:
    evaluate = Evaluate(car / "policy", car / "delays", episodes=3, repeats=2, delay_steps=(0, 4), workers=1, videos=0)
    results = evaluate.run()
    assert [(one["seed"], one["repeat"]) for one in results["outcomes"]] == [
        (100_000 + seed, repeat) for seed in range(3) for repeat in (0, 1)
    ]
    assert [row["steps"] for row in results["delay"]] == [0, 4]
    assert results["delay"][0]["success_rate"] == results["success_rate"]
    page = (car / "delays" / "report.html").read_text()
    assert "delay" in page


def test_two_evaluations_are_compared_seed_by_seed(car: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (2, 4):
        run("evaluate", "--checkpoint", car / "policy", "--output", car / f"steps{steps}", "--episodes", 6,
            "--sampling-steps", steps, "--workers", 1, "--videos", 0)  # fmt: skip
    capsys.readouterr()
    run("compare", car / "steps2", car / "steps4", "--output", car / "comparison")
    assert f"A is {car}/steps2" in capsys.readouterr().out
    comparison = json.loads((car / "comparison" / "comparison.json").read_text())
    assert sum(comparison[name] for name in ("both", "only_a", "only_b", "neither")) == 6
    assert comparison["sentence"] in (car / "comparison" / "comparison.html").read_text().replace("&#39;", "'")
    text = fails(capsys, "compare", car / "steps2", car / "nothing")
    assert "there is no results.json of an evaluation at" in text


def test_evaluations_of_different_tasks_are_not_compared(
    car: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Evaluate(car / "policy", tmp_path / "a", episodes=2, workers=1, videos=0).run()
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(results | {"environment": "Other-v0"}))
    assert "are of different tasks: environment" in fails(capsys, "compare", tmp_path / "a", tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"outcomes": [{"seed": 1}]}')
    assert "holds no outcomes" in fails(capsys, "compare", tmp_path / "a", tmp_path / "c.json")


def test_a_task_without_a_success_signal_says_how_to_give_one(
    car: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = ("--expert", f"{EXAMPLES}:MountainCarExpert", "--output", tmp_path / "s.zarr", "--workers", 1)
    mode = ("--mode-function", f"{EXAMPLES}:mountain_car_mode", "--mode-labels", "left", "right")
    text = fails(capsys, "collect", "--env", "MountainCarContinuous-v0", *mode, "--episodes", 2, *expert)
    assert "say what success is with --success 'return>=NUMBER'" in text
    arguments = ("--checkpoint", car / "policy", "--output", tmp_path / "e", "--episodes", 2, "--workers", 1)
    text = fails(capsys, "evaluate", *arguments, "--env-kwargs", '{"goal_velocity": 0.0}',
                 "--mode-function", f"{EXAMPLES}:mountain_car_mode")  # fmt: skip
    assert "say what success is" in text


def test_a_mode_function_that_raises_is_named(car: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--checkpoint", car / "policy", "--output", tmp_path / "e", "--episodes", 2, "--workers", 1)
    text = fails(capsys, "evaluate", *arguments, "--success", "none", "--mode-function", "json:loads")
    assert "json:loads failed: TypeError" in text


def test_without_any_success_the_entropy_is_undefined_and_said_so(
    car: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Evaluate(car / "policy", tmp_path / "e", episodes=2, env_kwargs='{"max_episode_steps": 20}').run()
    assert results["success_rate"]["value"] == 0
    assert results["mode_entropy"] == {"value": None, "low": None, "high": None}
    assert "so the entropy of the modes is undefined" in " ".join(capsys.readouterr().err.split())


def test_modules_that_only_a_file_names_are_not_imported(
    car: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config,) = (car / "policy").glob("step-*/config.json")
    text = config.read_text()
    try:
        config.write_text(text.replace(f"{EXAMPLES}:mountain_car_mode", "antigravity:mode"))
        arguments = ("--checkpoint", car / "policy", "--output", tmp_path / "e", "--episodes", 2)
        said = fails(capsys, "evaluate", *arguments)
        assert "names its environment by the module antigravity, which would be imported; if you trust it" in said
        assert "--mode-function 'antigravity:mode'" in said
    finally:
        config.write_text(text)


def test_a_collection_goes_on_with_what_was_said_once_unless_it_would_import_a_stranger(
    car: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(car / "car.zarr", tmp_path / "car.zarr")
    run("collect", "--resume", tmp_path / "car.zarr", "--episodes", 14, "--workers", 1)
    assert EpisodeStore.open(tmp_path / "car.zarr").episode_modes() == ["left", "right"] * 7
    header = tmp_path / "car.zarr" / "zarr.json"
    header.write_text(header.read_text().replace(f"{EXAMPLES}:MountainCarExpert", "antigravity:Expert"))
    said = fails(capsys, "collect", "--resume", tmp_path / "car.zarr", "--episodes", 16)
    assert "by the module antigravity, which would be imported" in said
    assert "--expert antigravity:Expert" in said


@pytest.mark.skipif(find_spec("panda_gym") is None, reason="panda-gym is not installed")
def test_panda_gym_is_collected_trained_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env, store, policy = ("--env", "panda_gym:PandaReach-v3"), tmp_path / "reach.zarr", tmp_path / "policy"
    expert = ("--expert", f"{EXAMPLES}:PandaReachExpert")
    run("collect", *env, *expert, "--episodes", 40, "--output", store, "--workers", 1)
    horizons = ("--observation-horizon", 1, "--prediction-horizon", 8, "--action-horizon", 4)
    run("train", "--dataset", store, "--output", policy, "--steps", 250, *horizons, *SMALL)
    evaluate = ("evaluate", "--checkpoint", policy, "--episodes", 8, "--workers", 1)
    assert "the module panda_gym, which would be imported" in fails(capsys, *evaluate, "--output", tmp_path / "no")
    run(*evaluate, "--output", tmp_path / "evaluation", *env)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["success_rate"]["value"] >= 0.5
    assert results["mode_base"] is None
