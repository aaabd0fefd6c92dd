"""Other people's environments through the commands: collected, trained, evaluated, compared."""

import contextlib
import json
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from gymnasium.wrappers import RescaleAction, TimeLimit

from diffusion_policy.cli import main, parse
from diffusion_policy.commands.environment import signal_flags
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.config import SampleConfig, SuccessAndModes
from diffusion_policy.datasets.recorder import Recorder
from diffusion_policy.datasets.store import EpisodeStore

SMALL = ["--widths", "32", "64", "--level-dim", "32", "--batch-size", "64", "--learning-rate", "2e-3"]
"""What learns the slow test's task."""
TINY = ["--widths", "16", "32", "--level-dim", "32", "--batch-size", "64", "--learning-rate", "4e-3"]
QUICK = SampleConfig(sampling_steps=2)
EXAMPLES = "diffusion_policy.envs.examples"
MOUNTAIN_CAR = [
    *("--env", "MountainCarContinuous-v0", "--success", "return>=90"),
    *("--mode-function", f"{EXAMPLES}:mountain_car_mode", "--mode-labels", "left", "right"),
]

pytestmark = pytest.mark.usefixtures("blank_pictures")


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
    run("train", "--dataset", folder / "car.zarr", "--output", folder / "policy", "--steps", 80, *TINY)
    return folder


def test_what_was_said_of_an_environment_is_kept_with_its_data_and_its_policy(car: Path) -> None:
    store = EpisodeStore.open(car / "car.zarr")
    assert store.episode_modes() == ["left", "right"] * 6
    results = Evaluate(car / "policy", car / "evaluation", episodes=4, workers=1, videos=0, sampling=QUICK).run()
    assert results["signals"]["success"] == "return>=90"
    assert results["mode_base"] == "environment"
    assert {outcome["mode"] for outcome in results["outcomes"]} <= {"left", "right", None}
    for outcome in results["outcomes"]:
        assert outcome["success"] == (outcome["measures"]["return"] >= 90)


@pytest.mark.slow
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
    for steps in (1, 2):
        run("evaluate", "--checkpoint", car / "policy", "--output", car / f"steps{steps}", "--episodes", 4,
            "--sampling-steps", steps, "--workers", 1, "--videos", 0)  # fmt: skip
    capsys.readouterr()
    run("compare", car / "steps1", car / "steps2", "--output", car / "comparison")
    assert f"A is {car}/steps1" in capsys.readouterr().out
    comparison = json.loads((car / "comparison" / "comparison.json").read_text())
    assert sum(comparison[name] for name in ("both", "only_a", "only_b", "neither")) == 4
    assert comparison["sentence"] in (car / "comparison" / "comparison.html").read_text().replace("&#39;", "'")
    text = fails(capsys, "compare", car / "steps1", car / "nothing")
    assert "there is no results.json of an evaluation at" in text


@pytest.mark.slow
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
    text = fails(capsys, "evaluate", *arguments, "--env-kwargs", '{"goal_velocity": 0.0, "max_episode_steps": 20}',
                 "--mode-function", f"{EXAMPLES}:mountain_car_mode")  # fmt: skip
    assert "say what success is" in text


def test_a_mode_function_that_raises_is_named_and_costs_no_episode(
    car: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("evaluate", "--checkpoint", car / "policy", "--output", tmp_path / "e", "--episodes", 1, "--workers", 1,
        "--videos", 0, "--sampling-steps", 1, "--env-kwargs", '{"max_episode_steps": 20}', "--success", "none",
        "--mode-function", "json:loads")  # fmt: skip
    assert "json:loads failed: TypeError" in " ".join(capsys.readouterr().err.split())
    assert len(json.loads((tmp_path / "e" / "results.json").read_text())["outcomes"]) == 1


def test_without_any_success_the_entropy_is_undefined_and_said_so(
    car: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Evaluate(
        car / "policy", tmp_path / "e", 2, env_kwargs='{"max_episode_steps": 20}', workers=1, videos=1, sampling=QUICK
    ).run()
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
        assert "--mode-function antigravity:mode --mode-labels left right" in said
    finally:
        config.write_text(text)


def test_flags_that_an_error_tells_can_be_given_as_they_are() -> None:
    signals = SuccessAndModes("return>=90", "my_task:mode", ("left", "it's right"), fresh=True)
    told = shlex.split(" ".join(signal_flags(signals)))
    assert parse(["collect", "--output", "s.zarr", *told]).signals == signals  # pyright: ignore[reportAttributeAccessIssue]


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
@pytest.mark.slow
def test_panda_gym_is_collected_trained_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env, store, policy = ("--env", "panda_gym:PandaReach-v3"), tmp_path / "reach.zarr", tmp_path / "policy"
    expert = ("--expert", f"{EXAMPLES}:PandaReachExpert")
    run("collect", *env, *expert, "--episodes", 40, "--output", store, "--workers", 1)
    horizons = ("--observation-horizon", 1, "--prediction-horizon", 8, "--action-horizon", 4)
    run("train", "--dataset", store, "--output", policy, "--steps", 250, *horizons, *SMALL)
    evaluate = ("evaluate", "--checkpoint", policy, "--episodes", 8, "--workers", 1, "--videos", 1)
    assert "the module panda_gym, which would be imported" in fails(capsys, *evaluate, "--output", tmp_path / "no")
    run(*evaluate, "--output", tmp_path / "evaluation", *env)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["success_rate"]["value"] >= 0.5
    assert results["mode_base"] is None


class Tangled(gymnasium.Env):
    """Observes a number, a double and a gear; takes a matrix; has no reset options, and fails to close."""

    observation_space = Dict(
        {"arm": Tuple((Box(-9, 9, ()), Box(-1e7, 1e7, (2,), np.float64))), "gear/now": Discrete(3)}
    )
    action_space = Box(-2, 2, (2, 1))

    def reset(self, seed: int | None = None) -> tuple[Any, dict]:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        self.lengths: list[float] = []
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert action.shape == (2, 1)
        self.lengths.append(float(np.abs(action).max()))
        self.x += 0.1 * float(action[0, 0])
        return self._observe(), -1.0, False, False, {"success": np.array([abs(self.x) < 1])}

    def close(self) -> None:
        raise RuntimeError("already closed")

    def _observe(self) -> dict[str, Any]:
        return {"arm": (np.float32(self.x), np.array([5.4e6 + self.x, 0])), "gear/now": np.int64(self.x > 0)}


def test_what_is_recorded_under_wrappers_is_trained_on_and_acted_with_under_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gymnasium.register("Tangled-v0", entry_point=Tangled, disable_env_checker=True)
    try:
        env = RescaleAction(
            gymnasium.make("Tangled-v0"), np.full((2, 1), -1, np.float32), np.full((2, 1), 1, np.float32)
        )
        with contextlib.suppress(RuntimeError), Recorder(TimeLimit(env, 12), tmp_path / "t.zarr") as recorder:
            for seed in range(4):
                recorder.reset(seed=seed)
                for step in range(12):
                    recorder.step(np.full((2, 1), np.sin(step + seed), np.float32))
        horizons = ("--observation-horizon", 1, "--prediction-horizon", 4, "--action-horizon", 2)
        run("train", "--dataset", tmp_path / "t.zarr", "--output", tmp_path / "p", "--steps", 2, "--widths", 16, 32,
            "--batch-size", 8, "--device", "cpu", *horizons)  # fmt: skip
        results = Evaluate(
            tmp_path / "p", tmp_path / "e", episodes=2, workers=1, videos=0, sampling=SampleConfig(sampling_steps=1)
        ).run()
        assert [one["entry_point"].rpartition(":")[2] for one in results["wrappers"]] == ["RescaleAction", "TimeLimit"]
        assert {outcome["steps"] for outcome in results["outcomes"]} == {12}
        capsys.readouterr()
        run("dataset", "replay", tmp_path / "t.zarr")
        assert "gear.now: off by 0 at most, in 4 episodes" in capsys.readouterr().out
    finally:
        gymnasium.registry.pop("Tangled-v0")


class Forgetful(Tangled):
    """Its start does not come from the seed."""

    def reset(self, seed: int | None = None) -> tuple[Any, dict]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().reset()


def test_replay_says_that_a_seed_repeats_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gymnasium.register("Forgetful-v0", entry_point=Forgetful, max_episode_steps=3)
    try:
        env = gymnasium.make("Forgetful-v0", disable_env_checker=True)
        with contextlib.suppress(RuntimeError), Recorder(env, tmp_path / "f.zarr") as recorder:
            recorder.reset(seed=1)
            for _ in range(3):
                recorder.step(np.zeros((2, 1), np.float32))
        assert main(["dataset", "replay", str(tmp_path / "f.zarr")]) == 1
        assert "Forgetful-v0 does not repeat an episode by its seed" in " ".join(capsys.readouterr().err.split())
    finally:
        gymnasium.registry.pop("Forgetful-v0")
