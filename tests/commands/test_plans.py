"""study plans, and costs from the command line, with a small planner in the maze."""

import json
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

import diffusion_policy as dp
from diffusion_policy import envs
from diffusion_policy.cli import main
from diffusion_policy.commands import study_plans
from diffusion_policy.commands.study_plans import FIGURES, Sampled, summarize
from diffusion_policy.envs import maze_expert
from diffusion_policy.envs.protocols import Verdict, as_judging

MAZE = "diffusion_policy/Maze-v0"


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planner that was trained for four steps."""
    folder = tmp_path_factory.mktemp("maze")
    dp.collect(folder / "maze.zarr", env=MAZE, episodes=3, workers=1)
    dp.train(
        folder / "maze.zarr",
        folder / "run",
        observation=("position", "velocity", "goal"),
        target=("position", "action"),
        inpaint_start=True,
        inpaint_goal="goal",
        observation_horizon=1,
        prediction_horizon=32,
        action_horizon=8,
        widths=(8,),
        groups=4,
        level_dim=16,
        noise_levels=10,
        steps=4,
        batch_size=16,
        device="cpu",
    )
    return folder / "run"


def study(planner: Path, output: Path, *more: str) -> int:
    told = [
        "study",
        "plans",
        "--checkpoint",
        str(planner),
        "--output",
        str(output),
        "--episodes",
        "2",
        "--workers",
        "1",
    ]
    brief = ["--env-kwargs", '{"obstacles": 1, "max_episode_steps": 12}', "--samplers", "ddim", "--steps", "2"]
    return main([*told, *brief, "--plan-samples", "5", *more])


def test_plans_are_judged_led_and_chosen(planner: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    assert study(planner, output, "--cost", "clearance=1", "smoothness=0.1", "--cost-steps", "2", "--plans", "3") == 0
    results = json.loads((output / "results.json").read_text())
    assert list(results["plans"]) == ["plain", "best of several", "led", "best of several led"]
    for cell in results["plans"].values():
        assert FIGURES.keys() <= cell.keys()
        assert cell["success"]["value"] == 0  # of a planner that has learned nothing
        assert cell["milliseconds"] > 0
    assert results["costs"]["cost"] == ["clearance=1", "smoothness=0.1"]
    assert (output / "plans.png").stat().st_size > 10_000
    page = (output / "plans.html").read_text()
    assert page.count("data:video/mp4;base64,") == page.count("data:image/png;base64,") == 1
    for told in (*FIGURES.values(), *results["plans"]):
        assert told in page
    frames = imageio.mimread(output / "denoising.mp4", memtest=False)
    assert len(frames) == 3 + 8  # two denoising steps, and what comes out
    assert (frames[0] != frames[2]).mean() > 0.01
    assert {cell["lost"] for cell in results["plans"].values()} == {0}


def test_without_costs_there_are_plain_plans_alone(planner: Path, tmp_path: Path) -> None:
    assert study(planner, tmp_path / "study") == 0
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert list(results["plans"]) == ["plain"]


def test_a_cost_of_the_user_that_fails_is_named_and_the_others_go_on(
    planner: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "my_costs.py").write_text(
        "def nothing(sequences, observations):\n    return sequences['position'] * 0\n"
    )
    monkeypatch.chdir(tmp_path)
    assert study(planner, tmp_path / "study", "--cost", "my_costs:nothing") == 0
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert "the cost my_costs:nothing must give a tensor of shape" in results["plans"]["led"]["refused"]
    assert "valid" in results["plans"]["plain"]


def test_ctrl_c_names_the_row_and_keeps_the_others(planner: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    measure = study_plans.measure

    def stop(options, way, judging, drawn):
        if way.chosen:
            raise KeyboardInterrupt
        return measure(options, way, judging, drawn)

    monkeypatch.setattr(study_plans, "measure", stop)
    assert study(planner, tmp_path / "study", "--cost", "length") != 0
    assert "stopped at best of several; the others are in" in " ".join(capsys.readouterr().err.split())
    assert list(json.loads((tmp_path / "study" / "results.json").read_text())["plans"]) == ["plain"]


def test_an_environment_that_judges_no_plans_is_refused(demonstrations: Path, tmp_path: Path, capsys) -> None:
    small = {"widths": (8,), "groups": 4, "level_dim": 16, "noise_levels": 4, "steps": 1, "device": "cpu"}
    dp.train(demonstrations, tmp_path / "run", **small)
    told = ["study", "plans", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "s"), "--episodes", "1"]
    assert main(told) == 2
    assert "study plans needs an environment that judges plans, as Maze-v0 does" in capsys.readouterr().err


def test_the_maze_judges_the_ways_of_its_expert() -> None:
    env = envs.make(MAZE)
    judging = as_judging(env)
    assert judging is not None
    for seed in range(4):
        observation, _ = env.reset(seed=seed)
        modes = judging.modes_that_solve(observation)
        start, goal = (np.asarray(observation[key], np.float64) for key in ("position", "goal"))
        for mode in modes:
            path = maze_expert.plan_path(start, goal, mode)
            (verdict,) = judging.judge(observation, path[None, 1:])
            assert (verdict.valid, verdict.mode) == (True, mode)
            assert 0.99 <= verdict.ratio < 1.8
        straight, short = np.linspace([start, start], [goal, goal], 30), np.stack([start, start])
        through = judging.judge(observation, np.stack([straight[1:, 0], np.resize(short, (29, 2))]))
        assert not through[1].valid  # it stays
    assert as_judging(envs.make("diffusion_policy/Avoid-v0")) is None


def sampled(valid: list[bool], modes: list[str | None], exist: tuple[str, ...] = ("a", "b")) -> Sampled:
    verdicts = [Verdict(ok, mode, 1.5) for ok, mode in zip(valid, modes, strict=True)]
    return Sampled(0, np.zeros((len(valid), 4, 2)), verdicts, exist, 10.0, 2.0, {})


def test_figures_of_judged_plans_in_closed_form() -> None:
    found = summarize(
        [sampled([True, False], ["a", "b"]), sampled([False, True], ["a", "z"]), sampled([False] * 2, ["a"] * 2)]
    )
    assert found["valid"]["value"] == pytest.approx(1 / 3)
    assert found["any_valid"]["value"] == pytest.approx(2 / 3)
    assert found["coverage"]["value"] == pytest.approx((1 / 2 + 0 + 0) / 3)  # z is none of those that exist
    assert (found["path_ratio"]["value"], found["smoothness"]["value"]) == (1.5, 0)
    assert found["first_valid"] == pytest.approx(2.0 * 1.5)
    nothing = summarize([sampled([False], ["a"])])
    assert (nothing["path_ratio"]["value"], nothing["first_valid"]) == (None, None)


def test_costs_come_from_the_command_line_to_the_samples(planner: Path, tmp_path: Path) -> None:
    seen: dict[str, float] = {}
    for name, more in (("plain", []), ("led", ["--cost", "smoothness", "--cost-steps", "5", "--cost-size", "0.5"])):
        output = tmp_path / name
        told = ["evaluate", "--checkpoint", str(planner), "--output", str(output), "--episodes", "2", "--repeats", "1"]
        brief = ["--env-kwargs", '{"max_episode_steps": 8}', "--sampling-steps", "2", "--workers", "1", "--videos", "0"]
        assert main([*told, *brief, *more]) == 0
        seen[name] = json.loads((output / "results.json").read_text())["measures"]["smoothness"]["value"]
    assert seen["led"] < seen["plain"]


def test_goals_beyond_the_demonstrations_are_remarked_and_costs_are_kept(planner: Path, tmp_path: Path) -> None:
    told = [
        "evaluate",
        "--checkpoint",
        str(planner),
        "--output",
        str(tmp_path / "e"),
        "--episodes",
        "4",
        "--repeats",
        "1",
    ]
    brief = ["--env-kwargs", '{"max_episode_steps": 3}', "--sampling-steps", "2", "--workers", "1", "--videos", "0"]
    assert main([*told, *brief, "--cost", "length", "--cost-steps", "0"]) == 0
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert (results["costs"]["cost"], results["costs"]["cost_steps"]) == (["length"], 0)
    said = " ".join((tmp_path / "e" / "report.html").read_text().split())
    assert "goals lie beyond what was demonstrated: goal in" in said  # three demonstrations reach few places


def test_plans_of_an_arm_are_led_and_judged(tmp_path: Path) -> None:
    arm = "diffusion_policy/PandaReach-v0"
    small = {"widths": (8,), "groups": 4, "level_dim": 16, "noise_levels": 10, "steps": 4, "batch_size": 16}
    dp.collect(tmp_path / "panda.zarr", env=arm, episodes=2, workers=1)
    dp.train(
        tmp_path / "panda.zarr",
        tmp_path / "run",
        observation=("joints", "velocities", "goal"),
        target=("joints", "action"),
        inpaint_start=True,
        inpaint_goal="goal",
        observation_horizon=1,
        prediction_horizon=32,
        action_horizon=8,
        device="cpu",
        **small,
    )
    costs = ["--cost", "clearance=1", "smoothness=0.1", "goal=0.1", "--plans", "2"]
    assert study(tmp_path / "run", tmp_path / "study", *costs) == 0
    cells = json.loads((tmp_path / "study" / "results.json").read_text())["plans"]
    assert all(FIGURES.keys() <= cell.keys() for cell in cells.values()), cells
    assert (tmp_path / "study" / "plans.png").stat().st_size > 10_000
