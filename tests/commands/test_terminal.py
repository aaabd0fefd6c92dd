"""What is printed, as a terminal and a pipe get it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from diffusion_policy.commands.terminal import Terminal, printable

CLI = (sys.executable, "-W", "ignore", "-m", "diffusion_policy.cli")


def test_nothing_that_a_terminal_obeys_is_printed() -> None:
    assert printable("\x1b]0;owned\x07\x1b[2J") == r"\x1b]0;owned\x07\x1b[2J"
    assert printable("a\u202eb\ud800\x9b1m\u2028") == r"a\u202eb\ud800\x9b1m\u2028"
    assert printable("Größe 数据\N{NO-BREAK SPACE}µ ✓\tx\ny") == "Größe 数据\N{NO-BREAK SPACE}µ ✓\tx\\ny"


def test_texts_and_tables_are_printed_as_they_are() -> None:
    written = io.StringIO()
    terminal = Terminal(file=written, width=100, force_terminal=True, color_system=None)
    table = Table("key")
    table.add_row("\x1b[31m[/x]")
    terminal.print("in work/22 [/final] :smile: \x1b[2J")
    terminal.print(table)
    terminal.print("data/x\nerror: your disk is full")
    terminal.print_lines("first\nsecond")
    assert r"in work/22 [/final] :smile: \x1b[2J" in written.getvalue()
    assert r"\x1b[31m[/x]" in written.getvalue()
    assert "\x1b" not in written.getvalue()
    assert r"data/x\nerror: your disk is full" in written.getvalue().splitlines()
    assert written.getvalue().splitlines()[-2:] == ["first", "second"]


def test_a_terminal_that_cannot_be_written_falls_silent() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for file in (Full(), closed):
        terminal = Terminal(file=file)
        terminal.print("lost")
        terminal.print("lost too")
        assert terminal.quiet


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-", "| head -1", "> /dev/full"])
def test_results_do_not_depend_on_who_reads_them(demonstrations: Path, tmp_path: Path, redirection: str) -> None:
    script = f'set -o pipefail; "$@" {redirection}'
    command = [*CLI, "dataset", "inspect", str(demonstrations)]
    done = subprocess.run(["bash", "-c", script, "bash", *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_an_output_of_ascii_gets_what_it_cannot_show_spelled_out(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [*CLI, "dataset", "inspect", str(tmp_path / "Größe [/b] \x1b[2J")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert r"Gr\xf6\xdfe [/b] \x1b[2J" in done.stderr
    assert "Traceback" not in done.stderr
