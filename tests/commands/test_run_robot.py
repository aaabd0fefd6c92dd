"""A robot that is steered in real time, from the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffusion_policy.cli import main
from diffusion_policy.datasets.store import EpisodeStore

ROBOTS = """
import time
from pathlib import Path
import numpy as np

class Robot:
    success = True

    def __init__(self, last=10**9, hangs_at=10**9, raises_at=10**9):
        self.taken, self.last, self.hangs_at, self.raises_at = 0, last, hangs_at, raises_at

    def observe(self):
        xy = np.array([0.5, -0.2 + 0.001 * self.taken])
        return None if self.taken >= self.last else {"desired_xy": xy, "actual_xy": xy}

    def act(self, action):
        self.taken += 1
        if self.taken == self.hangs_at:
            time.sleep(60)
        if self.taken == self.raises_at:
            raise OSError("the cable is loose")

    def stop(self):
        with open(Path(__file__).with_name("stopped"), "a") as file:  # also when it is called after its test
            file.write("stopped ")

class Half:
    def observe(self):
        return None

class Broken(Robot):
    def __init__(self):
        raise OSError("no such device")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / f"{tmp_path.name}_robots.py").write_text(ROBOTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def command(folder: Path, run: Path, *options: str, robot: str = "Robot") -> list[str]:
    fixed = ["--checkpoint", str(run), "--output", "out", "--backend", "eager", "--device", "cpu"]
    sampling = ["--sampling-steps", "1", "--hz", "50", "--watchdog", "20"]
    return ["run-robot", f"{folder.name}_robots:{robot}", *fixed, *sampling, *options]


def test_a_run_leaves_its_log_as_a_dataset_and_a_page(folder: Path, run: Path, capsys) -> None:
    assert main(command(folder, run, "--robot-kwargs", '{"last": 30}', "--delay-steps", "1", "--chunking", "rtc")) == 0
    assert "the robot's episode has ended; 30 actions" in capsys.readouterr().out
    assert (folder / "stopped").read_text() == "stopped "
    results = json.loads((folder / "out/results.json").read_text())
    assert (results["actions"], results["failed"], results["success"]) == (30, False, True)
    assert results["planning_ms"]["p50"] > 0
    page = (folder / "out/run.html").read_text()
    assert "jitter" in page
    assert page.count("data:image/png") == 2
    (episode,) = EpisodeStore.open(folder / "out/log.zarr").episodes()
    assert episode.success
    data = episode.data
    assert data["action"].shape == (30, 2)
    steps = data["plan_step"][:, 0].astype(int)
    np.testing.assert_allclose(data["plan"][np.arange(1, 8), steps[1:8]], data["action"][1:8])
    assert np.diff(data["time"][:, 0]).min() > 0
    assert main(["dataset", "validate", "out/log.zarr"]) == 0
    train = ["train", "--dataset", "out/log.zarr", "--output", "learned", "--steps", "1", "--device", "cpu"]
    assert main([*train, "--widths", "8", "16", "--observation", "desired_xy", "--validation-share", "0"]) == 0
    assert main(command(folder, run)) == 2
    assert "already holds something" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault, why",
    [("raises_at", r"act() raised OSError: the cable is loose"), ("hangs_at", "act() has not returned for 0.5 s")],
)
def test_a_fault_stops_the_robot_and_keeps_the_log(folder: Path, run: Path, capsys, fault: str, why: str) -> None:
    options = ["--robot-kwargs", json.dumps({fault: 12}), "--watchdog", "0.5", "--delay-steps", "1"]
    assert main(command(folder, run, *options)) == 1
    assert why in capsys.readouterr().err
    assert (folder / "stopped").exists()
    assert json.loads((folder / "out/results.json").read_text())["failed"]
    assert EpisodeStore.open(folder / "out/log.zarr").shape("action") == (2,)
    assert EpisodeStore.open(folder / "out/log.zarr").episode_ends.tolist() == [11]


def test_ctrl_c_stops_the_robot_and_keeps_the_log(folder: Path, run: Path) -> None:
    arguments = [sys.executable, "-m", "diffusion_policy.cli", *command(folder, run)]
    if not (Path(__file__).parents[2] / "diffusion_policy/__main__.py").exists():
        arguments = [sys.executable, "-c", "import sys; from diffusion_policy.cli import main; sys.exit(main())"]
        arguments += command(folder, run)
    process = subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    for line in process.stderr:
        if "running at" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (folder / "stopped").read_text() == "stopped "
    assert json.loads((folder / "out/results.json").read_text())["ended"] == "stopped"


@pytest.mark.parametrize(
    "robot, options, message",
    [
        ("Half", (), "must have observe(), act(action) and stop(); it lacks act, stop"),
        ("Broken", (), "cannot be made: OSError: no such device"),
        ("Robott", (), "has no function 'Robott'; did you mean 'Robot'?"),
        ("Robot", ("--robot-kwargs", '{"speed": 1}'), "cannot be made: TypeError"),
        ("Robot", ("--robot-kwargs", "[1]"), "must be a JSON object"),
        ("Robot", ("--hz", "0"), "hz must be above 0; got 0"),
        ("Robot", ("--watchdog", "nan"), "watchdog must be above 0; got nan"),
        ("Robot", ("--steps", "0"), "steps must be at least 1; got 0"),
        ("Robot", ("--low", "2", "--high", "1"), "no action meets these limits"),
        ("Robot", ("--delay-steps", "99"), "delay-steps must be from 0 to"),
        ("Robot", ("--chunking", "trained-rtc"), "needs a policy that was trained with --max-delay"),
        ("Robot", ("--roll-forward",), "--roll-forward needs an environment"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(folder: Path, run: Path, capsys, robot, options, message: str) -> None:
    assert main(command(folder, run, *options, robot=robot)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (folder / "out").exists()
