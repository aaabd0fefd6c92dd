"""What stands around the results of an evaluation: the folder that they go into, and the work after them, which can
fail without taking them along."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusion_policy.basics.files import WRITING, plain, remove
from diffusion_policy.basics.text import error_line, one_line
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.outputs import holding, require_fresh
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError

T = TypeVar("T")

RESULTS, EPISODES, PAGE = "results.json", "episodes.zarr", "report.html"
LEFTOVERS = {f"{WRITING}{name}" for name in (RESULTS, EPISODES, PAGE)}
"""What a killed evaluation can leave beside them."""


class Remarks:
    """What went wrong beside the results, a sentence each, said once."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def say(self, sentence: str) -> None:
        """Say it now, and keep it for the page."""
        sentence = one_line(sentence)
        if sentence not in self.sentences:
            self.sentences.append(sentence)
            console.print(sentence, soft_wrap=True)

    def attempt(self, what: str, make: Callable[[], T], otherwise: T) -> T:
        """What `make` gives; where it fails, for whatever reason but Ctrl-C, that is said and it is
        `otherwise`."""
        try:
            return make()
        except Interrupted:
            raise
        except (Exception, SystemExit) as error:  # somebody else's simulator may even leave
            self.say(f"{what}: {explain(error)}")
            return otherwise


def explain(error: BaseException) -> str:
    """What went wrong; with its type where the message may not speak for itself."""
    return str(error) if isinstance(error, ValueError | Failed) and str(error) else error_line(error)


@contextlib.contextmanager
def hold_output(output: Path) -> Iterator[bool]:
    """Have an evaluation's folder for oneself; whether results are there that still lack their page. Raises ConfigError
    where the folder holds anything else but leftovers of a killed evaluation, which are removed; and ValueError where
    another process holds it, or it cannot be written."""
    waits_for_page(output)
    with holding(output):
        waits = waits_for_page(output)  # another may have been quicker
        for name in LEFTOVERS:
            remove(output / name)
        probe = output / f"{WRITING}{RESULTS}"
        probe.touch()  # a folder that cannot be written to is no late surprise
        probe.unlink()
        yield waits


def waits_for_page(output: Path) -> bool:
    """Whether a folder holds results without their page; raises ConfigError where it holds anything else."""
    names = {each.name for each in output.iterdir()} - LEFTOVERS if output.is_dir() else set()
    if RESULTS in names and PAGE not in names:
        return True
    if names or not output.is_dir():
        require_fresh(output)
    return False


def require_same(output: Path, earlier: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ConfigError where results are not those of what is asked now."""
    for name, value in plain(asked).items():
        if earlier.get(name) != value:
            there, now = (f"{one!r:.100}" for one in (earlier.get(name), value))
            raise ConfigError(
                f"{output} holds the results of another evaluation: {name} {there} there, {now} asked; choose another "
                "--output"
            )
