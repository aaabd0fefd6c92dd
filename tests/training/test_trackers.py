"""Trackers, read back with the libraries whose files they write."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from diffusion_policy.config import ConfigError
from diffusion_policy.training.trackers import GROUPED, JsonLines, TensorBoard, Trackers, make_trackers
from diffusion_policy.training.trainer import Progress


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_line_holds_step_first_and_null_for_what_is_unknown_or_not_finite(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    numbers = {"loss": 0.5, "validation_loss": None, "gradient_norm": float("inf"), "step": 7, "rate": float("nan")}
    lines.log(7, numbers)
    (line,) = read_lines(tmp_path / "metrics.jsonl")  # before it is closed: each line is flushed
    lines.close()
    assert line == {"step": 7, "loss": 0.5, "validation_loss": None, "gradient_norm": None, "rate": None}
    assert next(iter(line)) == "step"


def test_a_new_training_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n')
    JsonLines(path, 0).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ["", '{"step": 30, "lo', '{"step": 20, "loss": 0.', "{"])
def test_a_resumed_log_is_as_if_never_interrupted(tmp_path: Path, torn: str) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    uninterrupted = JsonLines(whole, 0)
    for step in (10, 20, 30, 40):
        uninterrupted.log(step, {"loss": 1 / step})
    uninterrupted.close()

    first = JsonLines(resumed, 0)
    for step in (10, 20, 30):
        first.log(step, {"loss": 1 / step})
    first.close()
    with resumed.open("a") as file:
        file.write(torn)
    second = JsonLines(resumed, 20)
    for step in (30, 40):
        second.log(step, {"loss": 1 / step})
    second.close()
    assert resumed.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "resumed.jsonl"}


def test_a_log_that_is_cut_anywhere_resumes_with_the_lines_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    first.log(10, {"loss": 0.1})
    first.log(20, {"loss": 0.2})
    first.close()
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        JsonLines(path, 20).close()
        whole = content[:cut].count(b"}")  # a line that lacks only its end is whole
        assert [line["step"] for line in read_lines(path)] == [10, 20][:whole]
        assert path.read_bytes().count(b"\n") == whole


def test_a_log_that_is_gone_does_not_stop_a_resumed_training(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", 100)
    lines.log(110, {"loss": 0.5})
    lines.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 110, "loss": 0.5}]


def test_each_number_of_a_training_has_a_group() -> None:
    assert set(GROUPED) == set(Progress._fields) - {"step"}


def read_scalars(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_reads_the_numbers_that_were_measured_by_group(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path, 0)
    tracker.log(10, {"step": 10, "loss": 0.5, "validation_loss": None, "learning_rate": 1e-4, "steps_per_second": 12.0})
    tracker.log(20, {"loss": 0.25, "validation_loss": 0.3, "action_error": 2.0, "success_rate": 0.75})
    tracker.close()
    assert read_scalars(tmp_path) == {
        "train/loss": [(10, 0.5), (20, 0.25)],
        "train/learning_rate": [(10, 1e-4)],
        "speed/steps_per_second": [(10, 12.0)],
        "validation/loss": [(20, 0.3)],
        "validation/action_error": [(20, 2.0)],
        "rollout/success_rate": [(20, 0.75)],
    }


def test_tensorboard_forgets_what_came_after_the_step_from_which_a_training_resumes(tmp_path: Path) -> None:
    for first_step, loss in ((0, 0.5), (20, 0.25)):
        tracker = TensorBoard(tmp_path, first_step)
        for step in (first_step + 10, first_step + 20, first_step + 30):
            tracker.log(step, {"loss": loss})
        tracker.close()
    assert read_scalars(tmp_path) == {"train/loss": [(10, 0.5), (20, 0.5), (30, 0.25), (40, 0.25), (50, 0.25)]}


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    hint = rf"^{name} is not installed: pip install 'diffusion-policy-toolkit\[{name}\]' \(.+\)$"
    with pytest.raises(ConfigError, match=hint):
        make_trackers([name], tmp_path, {}, 0)


def test_an_unknown_tracker_is_refused_and_the_log_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    with pytest.raises(ConfigError, match="unknown tracker 'mlflow'; choose from tensorboard, wandb"):
        make_trackers(["tensorboard", "mlflow"], tmp_path, {}, 0)  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10}\n'


class Frail:
    """Breaks at a step, and when it is closed if told so."""

    def __init__(self, breaks_at: int = 0, breaks_closing: bool = False) -> None:
        self.steps: list[int] = []
        self.closed = False
        self._breaks_at = breaks_at
        self._breaks_closing = breaks_closing

    def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
        if step == self._breaks_at:
            raise OSError("no space left\non device")
        self.steps.append(step)

    def close(self) -> None:
        if self._breaks_closing:
            raise TimeoutError
        self.closed = True


def test_a_tracker_that_breaks_is_told_once_and_dropped_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[str] = []
    broken, sound = Frail(breaks_at=20), Frail()
    with Trackers(JsonLines(tmp_path / "log", 0), {"W&B": broken, "TensorBoard": sound}, told.append) as trackers:
        for step in (10, 20, 30):
            trackers.log(step, {"loss": 1.0})
    assert told == ["W&B stopped at step 20 and is left out from here on: no space left on device"]
    assert broken.steps == [10]
    assert sound.steps == [10, 20, 30]
    assert [line["step"] for line in read_lines(tmp_path / "log")] == [10, 20, 30]


def test_closing_closes_all_whatever_becomes_of_one(tmp_path: Path) -> None:
    told: list[str] = []
    sound = Frail()
    lines = JsonLines(tmp_path / "log", 0)
    trackers = Trackers(lines, {"W&B": Frail(breaks_closing=True), "TensorBoard": sound}, told.append)
    trackers.close()
    assert told == ["W&B was not closed properly: TimeoutError"]
    assert sound.closed
    with pytest.raises(ValueError, match="closed file"):
        lines.log(10, {})


@pytest.fixture
def away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B sees no login and no settings of the user."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("away_from_home")
def test_without_a_key_wandb_is_explained_in_one_line_and_asks_nothing_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = (
        "from pathlib import Path; from diffusion_policy.training.trackers import make_trackers\n"
        "try: make_trackers(['wandb'], Path('run'), {}, 0)\n"
        "except ValueError as error: print(error)"
    )
    monkeypatch.setenv("TERM", "xterm")
    terminal, side = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", code], stdin=side, stdout=side, stderr=side, timeout=60, check=True)
        shown = os.read(terminal, 4096).decode().splitlines()
    finally:
        os.close(side)
        os.close(terminal)
    (line,) = shown
    assert re.fullmatch(r"W&B did not start \(No API key.*\); WANDB_MODE=offline needs neither key nor network", line)


def records_of(path: Path) -> Iterator[Any]:
    """Records of W&B's transaction log: LevelDB's log format, in which crc, length and type lead each piece."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    content, at, record = path.read_bytes(), 7, b""
    while at < len(content):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is padding
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


@pytest.mark.usefixtures("away_from_home")
def test_wandb_offline_keeps_numbers_and_options_and_a_resumed_training_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    try:
        for first_step in (0, 10):
            with make_trackers(["wandb"], run, {"training": {"steps": 20}, "output": run}, first_step) as trackers:
                trackers.log(first_step + 10, {"step": first_step + 10, "loss": 0.5, "validation_loss": None})
    finally:
        wandb.teardown()
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    ids, steps = [], []
    for file in files:
        for record in records_of(file):
            if record.HasField("run"):
                ids.append(record.run.run_id)
                assert record.run.project == "diffusion-policy"
                assert record.run.display_name == "run"
                options = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert options["training"] == {"steps": 20}
            if record.HasField("history"):
                numbers = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                steps.append(record.history.step.num)
                assert {name for name in numbers if "/" in name} == {"train/loss"}
                assert json.loads(numbers["train/loss"]) == 0.5
    assert ids == [(run / "wandb" / "run-id").read_text().strip()] * 2
    assert steps == [10, 20]
    assert capfd.readouterr() == ("", "")
