"""The one display of a training: a live panel in a terminal, plain lines elsewhere.

Knows numbers and a console; asks torch only for the memory of a GPU.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Self, get_args

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from diffusion_policy.basics.metric_table import METRICS, lower_is_better
from diffusion_policy.basics.text import printable, three_digits
from diffusion_policy.commands.terminal import console as shared_console
from diffusion_policy.config import MetricName
from diffusion_policy.training.trainer import Progress

TREND = 60
"""So many of the last reports are drawn as the trend of the loss."""
WIDEST = 100
"""The panel is no wider, so that a line is still read as one [columns]."""
REFRESHES = 4
"""How often the panel is drawn anew [1/s]."""
SMOOTHING = 0.2
"""Weight of the newest report in a smoothed number."""
MEASURED = {name: METRICS[name].label for name in (*get_args(MetricName), "teacher_spread")}
"""Numbers that are measured from time to time, and what they are called."""
BARS = "▁▂▃▄▅▆▇█"
UNKNOWN = "–"  # noqa: RUF001


class Measured(NamedTuple):
    """A number that is measured from time to time: the last one, and the best with its step."""

    last: float
    best: float
    best_step: int


class Sparkline:
    """Numbers as a row of small bars, from the lowest to the highest of them; the last ones where room is short."""

    def __init__(self, values: Iterable[float]) -> None:
        self._values = [value for value in values if math.isfinite(value)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        shown = self._values[-options.max_width :]
        low, high = min(shown, default=0.0), max(shown, default=0.0)
        scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
        yield Text("".join(BARS[round(scale * (value - low))] for value in shown), style="cyan")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(1, min(len(self._values), options.max_width)))


class Pace:
    """How fast a training goes. Its first report, which holds imports and compilation, counts for nothing."""

    def __init__(self) -> None:
        self._began: float | None = None  # [s]
        self._step = 0
        self._training_time = 0.0  # without validation, rollouts and checkpoints [s]
        self._overhead = 1.0  # all time, as a multiple of that
        self.seconds_per_step: float | None = None
        """Of training alone, smoothed; None before two reports."""

    def update(self, step: int, steps_per_second: float, now: float) -> None:
        """Take a report; `now` [s]."""
        if self._began is None:
            self._began = now
        elif steps_per_second > 0:
            self.seconds_per_step = _smooth(self.seconds_per_step, 1 / steps_per_second)
            self._training_time += (step - self._step) / steps_per_second
            if self._training_time > 0:
                self._overhead = max(1.0, (now - self._began) / self._training_time)
        self._step = step

    def time_for(self, steps: int) -> float | None:
        """What so many more steps will take, with as much beside training as so far [s]; None before it is known."""
        return None if self.seconds_per_step is None else steps * self.seconds_per_step * self._overhead


class Panel:
    """Shows a training while its context is open, and leaves a summary behind.

    In a terminal it is one panel, drawn anew in place. Elsewhere (a log file) it is a plain line at each validation and
    each checkpoint. What was never measured is left out.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        device: str,
        console: Console = shared_console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first_step`: steps done before, in a training that goes on. `clock`: the time [s]."""
        self._total = total_steps
        self._step = first_step
        self._device = device
        self._console = console
        self._clock = clock
        self._started = clock()
        self._ended: float | None = None
        self._latest: Progress | None = None
        self._trend: deque[float] = deque(maxlen=TREND)  # smoothed losses
        self._pace = Pace()
        self._measured: dict[str, Measured] = {}
        self._checkpoint: Path | None = None
        self._lock = threading.Lock()  # the panel is drawn by a thread of its own
        in_terminal = console.file.isatty() and not console.is_dumb_terminal
        self._live = Live(self, console=console, refresh_per_second=REFRESHES) if in_terminal else None

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = self._clock()
        if self._live:
            self._live.transient = self._latest is None  # there is nothing to sum up
            self._live.stop()
        elif self._latest:
            numbers = self._sentence(self._latest, self._measured)
            self._print(f"{self._state()} after {_duration(self._elapsed())}: {numbers}")

    def update(self, progress: Progress) -> None:
        """Show the numbers of a step."""
        validated = {name: value for name in MEASURED if (value := getattr(progress, name)) is not None}
        with self._lock:
            self._step = progress.step
            self._latest = progress
            self._trend.append(_smooth(self._trend[-1] if self._trend else None, progress.loss))
            self._pace.update(progress.step, progress.steps_per_second, self._clock())
            for name, value in validated.items():
                self._measured[name] = self._with(name, value)
        if validated and not self._live:
            self._print(f"{self._sentence(progress, validated)}, {_duration(self._time_left())} left")

    def note(self, text: str = "", checkpoint: Path | str | None = None) -> None:
        """Print a line above the panel. `checkpoint`: the one that was just written, which the panel then names; where
        there is no panel and no text, it gets a line too."""
        if checkpoint is not None:
            with self._lock:
                self._checkpoint = Path(checkpoint)
            if not self._live:
                text = text or f"checkpoint in {checkpoint}"
        if text:
            self._print(text)

    def __rich__(self) -> RenderableType:
        with self._lock:
            return Frame(
                Group(self._bar(), Text(), *self._quality(), self._machinery()),
                title=Text(f"{self._state()} on {self._device}", style="bold not dim"),
                title_align="left",
                border_style="dim",
                padding=(0, 1),
                width=min(self._console.width, WIDEST),
            )

    def _bar(self) -> Table:
        bar = Table.grid(padding=(0, 2, 0, 0), expand=True)
        bar.add_column(ratio=1)
        done = self._step / self._total if self._total else 1.0
        cells: list[RenderableType] = [
            ProgressBar(max(1, self._total), self._step, complete_style="cyan", finished_style="green"),
            f"{self._step}/{self._total}",
            f"{math.floor(100 * done)} %",
        ]
        if self._ended is None:
            cells.append(f"{_duration(self._time_left())} left")
        for _ in cells[1:]:
            bar.add_column(no_wrap=True, justify="right")
        bar.add_row(*cells)
        return bar

    def _quality(self) -> Iterable[RenderableType]:
        """How well the policy does: a line a number."""
        if not self._trend:
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True, min_width=len(MEASURED["validation_loss"]))
        table.add_column(no_wrap=True, min_width=len("1.20e-05"), justify="right")
        table.add_column()  # what gives way where room is short
        table.add_row("loss", _number(self._trend[-1]), Sparkline(self._trend))
        for name in ("validation_loss", "action_error", "teacher_agreement", "teacher_spread", "success_rate"):
            if measured := self._measured.get(name):
                beside = f"best {_show(name, measured.best)} at step {measured.best_step}"
                if name == "teacher_spread":
                    beside = "of the teacher's"
                if name == "action_error" and (sample := self._measured.get("action_error_best")):
                    beside = f"best sample {_number(sample.last)}"
                table.add_row(MEASURED[name], _show(name, measured.last), Text(beside, style="dim"))
        yield from (table, Text())

    def _machinery(self) -> Table:
        """How the training runs: three numbers a row."""
        cells: list[RenderableType] = []
        for name, value in self._facts().items():
            cells += [Text(name, style="dim"), Text(value)]
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(6):
            table.add_column(no_wrap=True)
        for row in range(0, len(cells), 6):
            table.add_row(*cells[row : row + 6])
        return table

    def _facts(self) -> dict[str, str]:
        facts = {}
        if self._latest:
            facts["learning rate"] = _number(self._latest.learning_rate)
            facts["gradient norm"] = _number(self._latest.gradient_norm)
            facts["speed"] = f"{_number(self._steps_per_second(self._latest))} steps/s"
        facts["elapsed"] = _duration(self._elapsed())
        if memory := resident_memory():
            facts["memory"] = f"{memory / 1e9:.2f} GB"
        if self._checkpoint:
            facts["checkpoint"] = self._checkpoint.name
        if self._device.startswith("cuda"):
            facts["GPU memory"] = f"{torch.cuda.memory_allocated(self._device) / 1e9:.2f} GB"
        return facts

    def _sentence(self, latest: Progress, measured: Collection[str]) -> str:
        """Step, loss, those of the measured numbers, and speed, in one plain line."""
        parts = [f"step {latest.step}/{self._total}", f"loss {_number(self._trend[-1])}"]
        for name, words in MEASURED.items():
            if name in measured:
                parts.append(f"{words} {_show(name, self._measured[name].last)}")
        return ", ".join([*parts, f"{_number(self._steps_per_second(latest))} steps/s"])

    def _time_left(self) -> float | None:
        return self._pace.time_for(self._total - self._step)

    def _state(self) -> str:
        if self._ended is None:
            return "training"
        return "done" if self._step >= self._total else "stopped"

    def _elapsed(self) -> float:
        return (self._clock() if self._ended is None else self._ended) - self._started

    def _steps_per_second(self, latest: Progress) -> float:
        return 1 / self._pace.seconds_per_step if self._pace.seconds_per_step else latest.steps_per_second

    def _with(self, name: str, value: float) -> Measured:
        """What is known of a number after it was measured again."""
        before = self._measured.get(name)
        if before is None or (value < before.best if lower_is_better(name) else value > before.best):
            return Measured(value, value, self._step)
        return before._replace(last=value)

    def _print(self, line: str) -> None:
        self._console.print(printable(line), markup=False, soft_wrap=True)


def resident_memory() -> int | None:
    """Memory that this process holds [bytes]: now on Linux, at most so far on other systems; None on Windows."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _smooth(before: float | None, value: float) -> float:
    return value if before is None else before + SMOOTHING * (value - before)


def _number(value: float) -> str:
    """Three digits that count, none of them dropped: 0.100, 12.3, 1.20e-5."""
    return three_digits(value, keep_zeros=True)


def _show(name: str, value: float) -> str:
    """A number that is measured from time to time; a rate has two decimals."""
    return f"{value:.2f}" if METRICS[name].unit == "%" else _number(value)


def _duration(seconds: float | None) -> str:
    """As in 1:02:03."""
    return UNKNOWN if seconds is None else str(timedelta(seconds=max(0, int(seconds))))
