"""What the README shows is what runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_policy.cli import parse
from diffusion_policy.commands.train import Train
from diffusion_policy.config import PolicyConfig, TrainConfig
from diffusion_policy.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]
TINY = PolicyConfig(widths=(16, 32), level_dim=16, levels=10)
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


def test_recording_the_users_own_loop_runs_as_it_stands_there(tmp_path: Path) -> None:
    _, code = python_blocks()
    assert len(code.strip().splitlines()) <= 14
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    training = TrainConfig(steps=2, batch_size=16)
    Train(str(tmp_path / "runs" / "mine.zarr"), tmp_path / "run", policy=TINY, training=training, device="cpu").run()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_commands_are_understood() -> None:
    commands = re.findall(r"^diffusion-policy (.*)$", README.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        if not command.startswith("train --resume"):  # it reads the run
            parse(command.split())


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
