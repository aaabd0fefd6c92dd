"""What the README shows is what runs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_policy.cli import main, parse
from diffusion_policy.commands import demo
from diffusion_policy.diffusion.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("steps", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_the_python_runs_as_it_stands_there(tmp_path: Path, steps: int) -> None:
    code, _ = python_blocks()
    assert "TrainConfig(steps=500," in code
    code = code.replace("steps=500", f"steps={steps}")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"^(left|right|none): (\d+) of (\d+)$", done.stdout, re.MULTILINE)
    assert sum(int(episodes) for _, _, episodes in counts) == 20
    successes = sum(int(succeeded) for _, succeeded, _ in counts)
    assert successes > 0 or steps < 500
    assert f"success: Metric(value={successes / 20}" in done.stdout


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


SMALL = "--widths 16 32 --groups 4 --level-dim 16 --noise-levels 20 --steps 2 --batch-size 16 --device cpu"
MINIATURE = {
    "collect": "--episodes 4 --workers 1",
    "train": SMALL,
    "evaluate": "--episodes 2 --sampling-steps 2 --workers 1 --videos 0 --device cpu",
    "rollout": "--episodes 1 --sampling-steps 2 --workers 1 --device cpu",
    "study": "--samplers ddim --steps 2 --episodes 1 --workers 1 --device cpu",
    "doctor": "--overfit-steps 2 --device cpu",
    "sweep": f"{SMALL} --episodes 1 --sampling-steps 2",
    "compare": "",
    "dataset": "",
    "toy": "",
    "demo": "",
}
"""What is added to a command, so that it takes seconds; a flag given twice counts as given last."""
LONG = {"sweep", "toy", "demo"}
"""Commands that take long all the same."""


def commands() -> list[str]:
    """The commands of the README, in its order, a line each."""
    return re.findall(r"^diffusion-policy (.*)$", README.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_commands_run_one_after_another_as_they_stand_there(
    all_of_them: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "EPISODES", 2)
    assert len(commands()) >= 20
    for command in commands():
        command = command.replace("--dataset D ", "--dataset runs/demo/demonstrations.zarr ")
        command = command.replace("int:1000:2000", "int:2:3")
        verb, *_ = words = shlex.split(command)
        if "--resume" not in command:
            words += shlex.split(MINIATURE[verb])
        if command.startswith("dataset validate runs/mine.zarr"):  # recorded in Python, a moment before
            assert len(python_blocks()[1].strip().splitlines()) <= 14
            exec(python_blocks()[1], {})
        if verb not in LONG or all_of_them:
            status = main(words)
            assert status in ((0, 1) if verb == "doctor" else (0,)), f"{command}\n{capsys.readouterr().err}"
        elif verb == "demo":
            shutil.copytree("runs/demo/evaluation", "runs/other/evaluation")


def test_what_a_launcher_starts_is_understood() -> None:
    started = re.findall(
        r"^\S.* -m diffusion_policy\.cli (.*)$|^RAY_ADDRESS=\S+ diffusion-policy (.*)$", README, re.MULTILINE
    )
    assert len(started) == 5
    for command in started:
        parse("".join(command).split())


def test_the_tree_names_every_module() -> None:
    tree = README[README.index("## The tree") :]
    for folder in ("diffusion_policy", "envs", "datasets"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem == "__init__" or path.name in tree, path


def test_the_table_of_samplers_is_the_committed_study() -> None:
    study = json.loads((ROOT / ".github" / "studies" / "demo_samplers.json").read_text())
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (\d.*) \|$", README, re.MULTILINE))
    assert rows.keys() == study["samplers"].keys() == SAMPLERS.keys()
    for name, cells in study["samplers"].items():
        shown = [
            f"{cell['success_rate']['value']:.2f} · {cell['mode_entropy']['value']:.2f} · {cell['milliseconds']:.0f}"
            for cell in cells.values()
        ]
        assert rows[name].split(" | ") == shown


def test_the_pictures_exist() -> None:
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()
