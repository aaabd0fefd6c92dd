"""Real processes that train together, started as users start them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.commands.train import Train
from diffusion_policy.config import PolicyConfig, TrainConfig, with_options
from diffusion_policy.datasets.windows import Shard
from diffusion_policy.training.distributed import Distributed, join_processes

TINY = with_options(PolicyConfig(), widths=(16, 32), level_dim=32, noise_levels=20)
TRAINING = TrainConfig(
    steps=50, batch_size=64, learning_rate=1e-3, warmup_steps=5, validate_every=25, checkpoint_every=20
)
FLAGS = [
    *["--widths", "16", "32", "--level-dim", "32", "--noise-levels", "20", "--steps", "50", "--batch-size", "64"],
    *["--learning-rate", "1e-3", "--warmup-steps", "5", "--validate-every", "25", "--checkpoint-every", "20"],
    *["--device", "cpu"],
]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train_command(processes: int, launcher: str, *arguments: str) -> list[str]:
    """`train` in so many processes on this machine."""
    start = {
        "torchrun": [*["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]],
        "accelerate": [
            *["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)],
            *["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
            *["--main_process_port", str(free_port()), "--num_cpu_threads_per_process", "1"],
        ],
    }[launcher]
    return [sys.executable, "-m", *start, "-m", "diffusion_policy.cli", "train", *arguments]


@pytest.fixture(scope="module")
def alone(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    Train(str(demonstrations), run, policy=TINY, training=TRAINING, device="cpu").run()
    return run


def largest_difference(a: Path, b: Path) -> float:
    """Of all weights: averaged, raw."""
    states = [
        {**checkpoint.load(run).policy.state_dict(), **checkpoint.load_training(checkpoint.find(run))} for run in (a, b)
    ]
    names = [name for name in states[0] if not name.startswith("optimizer.")]
    assert len(names) > 40
    return max((states[0][name] - states[1][name]).abs().max().item() for name in names)


def test_two_processes_train_as_one_does(demonstrations: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train_command(2, "accelerate", "--dataset", str(demonstrations), "--output", str(run), *FLAGS)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert "on cpu, 2 processes" in " ".join(done.stderr.split())
    assert largest_difference(alone, run) < 1e-5
    lines = [[json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (alone, run)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert lines[1][-1]["loss"] == pytest.approx(lines[0][-1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_signal_stops_all_and_another_number_of_processes_goes_on(
    demonstrations: Path, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = train_command(2, "torchrun", "--dataset", str(demonstrations), "--output", str(run), *FLAGS)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ONE_THREAD) as launched:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        launched.terminate()
        _, said = launched.communicate(timeout=60)
    assert f"go on with: diffusion-policy train --resume {run}" in " ".join(said.split())
    assert 10 <= checkpoint.load(run).step < 50
    Train.to_resume(run).run()
    assert largest_difference(alone, run) < 1e-5


def test_alone_a_sum_is_what_it_is() -> None:
    numbers = [torch.ones(2), torch.tensor(3.0)]
    Distributed().all_reduce_sum(numbers)
    assert [number.tolist() for number in numbers] == [[1, 1], 3]
    assert Distributed().is_main
    assert not Distributed(Shard(1, 2)).is_main


def test_several_processes_take_only_devices_that_each_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = "take the device auto, cpu or cuda, a GPU for each; got 'cuda:1'"
    with pytest.raises(ValueError, match=said), join_processes("cuda:1"):
        pass
