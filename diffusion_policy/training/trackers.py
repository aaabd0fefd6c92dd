"""Where the numbers of a training go: a file of JSON lines always, TensorBoard and Weights & Biases when asked for.

Knows names and numbers; knows no policy and no trainer. TensorBoard and W&B are imported when they are used.
"""

import contextlib
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from diffusion_policy.basics.files import open_regular, parse_json, read_bytes, write_whole
from diffusion_policy.config import ConfigError

TrackerName = Literal["tensorboard", "wandb"]

GROUPED = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "validation_loss": "validation/loss",
    "action_error": "validation/action_error",
    "action_error_best": "validation/action_error_best",
    "teacher_agreement": "validation/teacher_agreement",
    "teacher_spread": "validation/teacher_spread",
    "success_rate": "rollout/success_rate",
    "steps_per_second": "speed/steps_per_second",
}
"""What TensorBoard and W&B call each number; what is not listed keeps its name."""

ANSWER_WITHIN = 30
"""W&B's server must answer within this time at the start [s]."""
UPLOAD_WITHIN = 120
"""What W&B has not uploaded so long after the end [s] stays in the run's folder, for `wandb sync`."""

MAX_LOG_BYTES = 2**31
MAX_LINE_BYTES = 2**16
"""A longer line was not written by us."""


class Tracker(Protocol):
    """Takes the numbers of a training, step by step."""

    def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Numbers known after a step, by name; None: not measured at this step. A `step` among them is not repeated."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class JsonLines:
    """One JSON object a line, `step` first; None and what is not finite are null. Each line is flushed."""

    def __init__(self, path: Path, first_step: int) -> None:
        """`first_step`: steps done when the training starts or resumes. 0 starts a new file; else what an interrupted
        training logged after it, and a torn last line, are dropped, so that the log is as if never interrupted."""
        if first_step > 0 and os.path.lexists(path):
            _drop_after(path, first_step)
        elif os.path.lexists(path):
            path.unlink()  # not written into: it may be a link or a pipe
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Write a line; raises OSError when the disk is full."""
        finite = {name: None if value is None or not math.isfinite(value) else value for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files of TensorBoard in a folder: `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step`: steps done when the training starts or resumes; TensorBoard forgets what came after. Raises
        ConfigError where it is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step > 0 else None)

    def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Hand scalars to the writer's thread; raises what stopped that thread."""
        for name, value in _grouped(numbers).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class WandB:
    """A run on Weights & Biases, or with WANDB_MODE=offline in the folder alone, to send later with `wandb sync`.

    The run's id is kept in the folder, so that a resumed training goes on in the same run. Steps that were sent before
    the interruption are not taken twice: W&B keeps the first. WANDB_PROJECT and WANDB_NAME are honoured.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        """`config`: the options of the run, shown beside its curves. `first_step`: steps done when the training starts
        or resumes; 0 starts a new run. Raises ConfigError where W&B is not installed, has no API key or does not
        answer; never asks on the terminal."""
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from error
        settings = wandb.Settings(
            silent=True,  # nor does it ask for a key
            console="off",  # the panel stays as it is
            init_timeout=ANSWER_WITHIN,
            finish_timeout=UPLOAD_WITHIN,
            finish_timeout_raises=True,
        )
        try:
            wandb.setup(settings=settings)
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "diffusion-policy"),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                dir=folder,
                id=_run_id(folder / "wandb" / "run-id", first_step),
                resume="allow",
                config=dict(config),
                settings=settings,
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0].rstrip(".")
            hint = "WANDB_MODE=offline needs neither key nor network"
            raise ConfigError(f"W&B did not start ({reason}); {hint}") from error
        self.url: str | None = self._run.url or None
        """Where the run is seen; None offline."""

    def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Hand the numbers to W&B's process, which sends them."""
        self._run.log(_grouped(numbers), step=step)

    def close(self) -> None:
        """Send what is left; raises TimeoutError when that takes longer than `UPLOAD_WITHIN`."""
        self._run.finish()


class Trackers:
    """All trackers of a run as one. No exception of TensorBoard or W&B stops a training: it is told once, and that
    tracker is dropped. JSON lines are no such luxury: a disk that takes none raises OSError."""

    def __init__(self, lines: JsonLines, others: Mapping[str, Tracker], tell: Callable[[str], None]) -> None:
        """`others`: trackers by the name that a message calls them; `tell` takes a message of one line."""
        self._lines = lines
        self._others = dict(others)
        self._tell = tell

    def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Give the numbers to each tracker."""
        self._lines.log(step, numbers)
        for name, tracker in list(self._others.items()):
            try:
                tracker.log(step, numbers)
            except Exception as error:
                del self._others[name]
                self._tell(f"{name} stopped at step {step} and is left out from here on: {_in_a_line(error)}")

    def close(self) -> None:
        """Close each tracker, whatever becomes of the others."""
        with contextlib.closing(self._lines):
            for name, tracker in self._others.items():
                try:
                    tracker.close()
                except Exception as error:
                    self._tell(f"{name} was not closed properly: {_in_a_line(error)}")
            self._others = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tell_user(message: str) -> None:
    """Print a message on standard error."""
    print(message, file=sys.stderr)


def make_trackers(
    names: Sequence[TrackerName],
    run: Path,
    config: Mapping[str, Any],
    first_step: int,
    tell: Callable[[str], None] = tell_user,
) -> Trackers:
    """The trackers of a run: metrics.jsonl in its folder always, the others by name.

    `config`: the options of the run, for those that show them. `first_step`: steps done when the training starts or
    resumes. `tell` takes a line for the user. Raises ConfigError for one that is unknown, absent or not set up.
    """
    run.mkdir(parents=True, exist_ok=True)
    others: dict[str, Tracker] = {}
    with contextlib.ExitStack() as made:
        for name in dict.fromkeys(names):
            if name == "tensorboard":
                others["TensorBoard"] = TensorBoard(run / "tensorboard", first_step)
            elif name == "wandb":
                wandb = others["W&B"] = WandB(run, config, first_step)
                if wandb.url:
                    tell(f"W&B shows this run at {wandb.url}")
            else:
                raise ConfigError(f"unknown tracker {name!r}; choose from tensorboard, wandb")
            made.callback(list(others.values())[-1].close)
        lines = JsonLines(run / "metrics.jsonl", first_step)
        made.pop_all()
    return Trackers(lines, others, tell)


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics.jsonl, as they stand there and as JSON, each with an integer `step`; what is torn or no
    such line is passed over. Raises FileError where there is no regular file, or one that is too large."""
    with open_regular(path, MAX_LOG_BYTES) as file:
        while line := file.readline(MAX_LINE_BYTES):
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                if type(row) is dict and type(row.get("step")) is int:
                    yield line.rstrip(b"\n"), row


def _drop_after(path: Path, last_step: int) -> None:
    """Drop the lines of later steps and what is no whole line; the file is replaced as one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as new:
        for line, row in read_lines(path):
            if row["step"] <= last_step:
                new.write(line + b"\n")
        new.flush()
        os.fsync(new.fileno())
    partial.replace(path)


def _grouped(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """The numbers that were measured, by their grouped names."""
    return {GROUPED.get(name, name): value for name, value in numbers.items() if value is not None and name != "step"}


def _run_id(file: Path, first_step: int) -> str:
    """The id in the file when a training resumes, else a new one, which is written there."""
    if first_step > 0 and os.path.lexists(file):
        run_id = read_bytes(file, 100).decode(errors="replace").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]+", run_id):
            return run_id
        raise ConfigError(f"{file} must hold the id of a run on W&B; delete it to begin another; got {run_id!r}")
    run_id = secrets.token_hex(4)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, run_id + "\n")
    return run_id


def _missing(extra: str, error: ImportError) -> ConfigError:
    return ConfigError(f"{extra} is not installed: pip install 'diffusion-policy-toolkit[{extra}]' ({error})")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
