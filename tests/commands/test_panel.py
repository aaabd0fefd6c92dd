"""The panel of a training, rendered to consoles of given widths."""

import io
import mmap
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from diffusion_policy.commands.panel import WIDEST, Pace, Panel, Sparkline, resident_memory
from diffusion_policy.training.trainer import Progress


class Terminal(io.StringIO):
    """A file that passes for a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A time that is set [s]."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def progress(step: int, **measured: float) -> Progress:
    numbers: dict[str, Any] = {
        "loss": 1 / step,
        "validation_loss": None,
        "action_error": None,
        "action_error_best": None,
        "teacher_agreement": None,
        "teacher_spread": None,
        "success_rate": None,
        "learning_rate": 1e-4,
        "gradient_norm": 0.5,
        "steps_per_second": 10.0,
    }
    return Progress(step=step, **numbers | measured)


def console_of(file: io.StringIO, width: int = 80) -> Console:
    return Console(file=file, width=width, force_terminal=file.isatty(), highlight=False)


def drawn(panel: Panel, width: int = 80) -> list[str]:
    """Lines of the panel as it stands."""
    console = Console(file=io.StringIO(), width=width, record=True, legacy_windows=False)
    console.print(panel)
    return console.export_text().splitlines()


def still(total_steps: int = 1000, first_step: int = 0, width: int = 80, clock: Clock | None = None) -> Panel:
    """A panel that is drawn only when asked for."""
    return Panel(total_steps, first_step, "cpu", console_of(io.StringIO(), width), clock or Clock())


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests are run in does not matter."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("width", [80, 120])
def test_each_number_is_shown_and_no_line_is_longer_than_the_terminal(width: int) -> None:
    clock = Clock()
    panel = still(100_000, 0, width, clock)
    for step in range(10, 1010, 10):
        clock.now += 1.0
        panel.update(progress(step, gradient_norm=12345.6, learning_rate=1.25e-05))
    panel.update(progress(2000, validation_loss=0.0312, action_error=4.5, action_error_best=2.25, success_rate=0.5))
    panel.update(progress(3000, validation_loss=0.0456, action_error=5.5, action_error_best=3.25, success_rate=0.25))
    panel.note(checkpoint=Path("runs/demo/policy/step-003000"))
    lines = drawn(panel, width)
    assert max(cell_len(line) for line in lines) == min(width, WIDEST)
    text = " ".join(" ".join(lines).split())
    for shown in (
        "training on cpu",
        "3000/100000 3 %",
        "validation loss 0.0456 best 0.0312 at step 2000",
        "action error 5.50 best sample 3.25",
        "success 0.25 best 0.50 at step 2000",
        "learning rate 0.000100",
        "gradient norm 0.500",
        "speed 10.0 steps/s",
        "elapsed 0:01:40",
        "GB",
        "checkpoint step-003000",
    ):
        assert shown in text
    assert "…" not in text
    trend = next(line for line in lines if line.startswith("│ loss"))
    assert sum(character in "▁▂▃▄▅▆▇█" for character in trend) == (60 if width == 120 else 49)


def test_a_narrow_terminal_cuts_what_does_not_fit() -> None:
    panel = still(width=40)
    panel.update(progress(100, validation_loss=0.5, action_error=0.5, success_rate=0.5))
    panel.note(checkpoint="step-000100")
    assert {cell_len(line) for line in drawn(panel, 40)} == {40}


def test_what_was_never_measured_is_left_out() -> None:
    panel = still()
    before = "\n".join(drawn(panel))
    assert "0/1000" in before
    assert not any(word in before for word in ("loss", "learning", "gradient", "speed", "checkpoint", "None"))
    panel.update(progress(10))
    after = "\n".join(drawn(panel))
    assert "loss" in after
    assert not any(word in after for word in ("validation", "action", "success", "checkpoint", "GPU", "None"))


def test_what_was_measured_once_stays_between_two_validations() -> None:
    panel = still()
    panel.update(progress(10, validation_loss=0.25))
    panel.update(progress(20))
    assert "0.250  best 0.250 at step 10" in "\n".join(drawn(panel))


def test_time_left_is_known_from_the_second_report_and_counts_what_is_done_beside_training() -> None:
    clock = Clock()
    panel = still(1000, 500, clock=clock)
    assert "500/1000  50 %  – left" in "\n".join(drawn(panel))  # noqa: RUF001
    clock.now = 100.0  # imports and compilation
    panel.update(progress(510, steps_per_second=0.1))
    assert "– left" in "\n".join(drawn(panel))  # noqa: RUF001
    clock.now = 101.0
    panel.update(progress(520, steps_per_second=10.0))
    assert "0:00:48 left" in "\n".join(drawn(panel))
    clock.now = 103.0  # as long beside training as in it
    panel.update(progress(530, steps_per_second=10.0))
    assert "0:01:10 left" in "\n".join(drawn(panel))


def test_pace_follows_a_training_that_slows_down() -> None:
    pace = Pace()
    now = 0.0
    for i in range(100):
        now += 1.0 if i < 50 else 4.0
        pace.update(10 * (i + 1), 10.0 if i < 50 else 2.5, now)
    assert pace.time_for(100) == pytest.approx(40, rel=0.01)


def test_the_loss_that_is_shown_is_smoothed() -> None:
    panel = still()
    for step in range(10, 500, 10):
        panel.update(progress(step, loss=1.0))
    panel.update(progress(500, loss=2.0))
    assert "1.20" in next(line for line in drawn(panel) if "loss" in line)


@pytest.mark.parametrize(
    "values, bars",
    [([], ""), ([3.0], "▁"), ([1.0, 1.0], "▁▁"), ([0.0, 7.0, 3.0], "▁█▄"), ([0.0, float("nan"), 1.0], "▁█")],
)
def test_a_sparkline_spans_from_the_lowest_to_the_highest(values: list[float], bars: str) -> None:
    console = Console(file=io.StringIO(), width=10, record=True)
    console.print(Sparkline(values))
    assert console.export_text().strip() == bars


def test_a_sparkline_shows_the_last_values_where_room_is_short() -> None:
    console = Console(file=io.StringIO(), width=3, record=True)
    console.print(Sparkline([9.0, 9.0, 0.0, 1.0, 7.0]))
    assert console.export_text() == "▁▂█\n"


def train(panel: Panel, last_step: int) -> None:
    with panel:
        for step in range(10, last_step + 1, 10):
            measured = {"validation_loss": 0.5} if step % 50 == 0 else {}
            panel.update(progress(step, loss=0.25, **measured))
        panel.note(checkpoint="runs/demo/policy/step-000100")
        panel.note("[W&B] stopped")


def test_where_there_is_no_terminal_each_validation_and_each_checkpoint_is_a_plain_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    console = Console(file=file, width=40, highlight=False)
    assert console.is_terminal  # it passes for one, and must not be treated as one
    train(Panel(100, 0, "cpu", console, Clock()), 100)
    assert file.getvalue().splitlines() == [
        "step 50/100, loss 0.250, validation loss 0.500, 10.0 steps/s, 0:00:05 left",
        "step 100/100, loss 0.250, validation loss 0.500, 10.0 steps/s, 0:00:00 left",
        "checkpoint in runs/demo/policy/step-000100",
        "[W&B] stopped",
        "done after 0:00:00: step 100/100, loss 0.250, validation loss 0.500, 10.0 steps/s",
    ]


@pytest.mark.parametrize("last_step, title", [(100, "done on cpu"), (60, "stopped on cpu")])
def test_in_a_terminal_notes_stand_above_one_panel_that_stays_as_a_summary(last_step: int, title: str) -> None:
    file = Terminal()
    train(Panel(100, 0, "cpu", console_of(file), Clock()), last_step)
    last = file.getvalue()[file.getvalue().rindex("╭") :]
    assert title in last
    assert f"{last_step}/100" in last
    assert "left" not in last
    assert "step-000100" in last
    assert "[W&B] stopped" not in last
    assert file.getvalue().count("[W&B] stopped") == 1
    assert "checkpoint in" not in file.getvalue()  # the panel names it


def test_a_training_that_fails_before_its_first_step_leaves_nothing_behind() -> None:
    log, terminal = io.StringIO(), Terminal()
    for file in (log, terminal):
        with pytest.raises(ValueError, match="no key"), Panel(100, 0, "cpu", console_of(file), Clock()):
            raise ValueError("no key")
    assert log.getvalue() == ""
    erased = "\x1b[2K"
    lines = terminal.getvalue().count("\n")
    assert terminal.getvalue().rsplit("╯", 1)[1].count(erased) == lines


def test_a_terminal_is_written_to_a_few_times_a_second_however_fast_the_steps_are() -> None:
    file = Terminal()
    with Panel(100_000, 0, "cpu", console_of(file)) as panel:
        for step in range(1, 301):
            panel.update(progress(step))
            time.sleep(0.001)
    assert file.getvalue().count("╭") < 20  # two in 0.3 s; room for a machine that is busy


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is the most that was ever held")
def test_the_memory_that_the_process_holds_grows_with_what_it_holds() -> None:
    before = resident_memory()
    with mmap.mmap(-1, 2**26) as held:  # fresh pages: the heap may have room that was freed before
        held.write(bytes(2**26))
        after = resident_memory()
    assert before is not None
    assert after is not None
    assert after - before > 0.9 * 2**26
