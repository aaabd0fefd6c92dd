"""The command line: collects the verbs. `--help` imports neither torch nor a simulator."""

import contextlib
import dataclasses
import io
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffusion_policy import __version__
from diffusion_policy.basics.lines import one_line
from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.compare import Compare
from diffusion_policy.commands.dataset import Dataset
from diffusion_policy.commands.demo import Demo
from diffusion_policy.commands.doctor import Doctor
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.rollout import Rollout
from diffusion_policy.commands.runs import read_options, to_fields
from diffusion_policy.commands.study import Study
from diffusion_policy.commands.sweep import Sweep
from diffusion_policy.commands.terminal import console, open_standard_streams, out
from diffusion_policy.commands.toy import Toy
from diffusion_policy.commands.train import Train
from diffusion_policy.config import ConfigError

DESCRIPTION = """Learn multimodal robot behaviour from demonstrations, and measure success per mode.

Start with `diffusion-policy demo`. Each command explains itself: `diffusion-policy train --help`.
A mistake is answered with one line and exit status 2; --debug, anywhere, shows where it came from."""


LONGEST = 2000
"""Characters of an error: a stranger's names may be of any length."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a check failed), 2 (a user's mistake), 130 (interrupted). A
    fault of ours is raised."""
    open_standard_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments == ["--version"]:
        out.print(__version__)
        return 0
    try:
        parse(arguments or ["--help"]).run()
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {one_line(str(error), LONGEST)}")
        return 2
    except Failed as finding:
        _say(finding)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        _say(str(stop) or "stopped")
        exec("")  # CPython remembers an interrupt within exec (imports use it), and would end by the signal, not by 130
        return 130
    return 0


def _say(text: object) -> None:
    """The last word, on one line."""
    console.print(str(text), soft_wrap=True)


Command = Collect | Train | Sweep | Dataset | Evaluate | Compare | Rollout | Study | Doctor | Toy | Demo


def parse(arguments: Sequence[str]) -> Command:
    """The command that arguments mean; raises ConfigError when they mean none."""
    commands: Any = (
        Annotated[Collect, tyro.conf.subcommand("collect")]
        | Annotated[Train, tyro.conf.subcommand("train", default=_train_defaults(arguments))]
        | Annotated[Sweep, tyro.conf.subcommand("sweep", default=_sweep_defaults(arguments))]
        | Annotated[Dataset, tyro.conf.subcommand("dataset")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Rollout, tyro.conf.subcommand("rollout")]
        | Annotated[Study, tyro.conf.subcommand("study")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
        | Annotated[Toy, tyro.conf.subcommand("toy")]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(commands, prog="diffusion-policy", description=DESCRIPTION, args=arguments)
    except SystemExit as leaving:
        if leaving.code:
            raise ConfigError(_one_line(said.getvalue())) from leaving
        raise


def _one_line(box: str) -> str:
    """The sentences of tyro's error box, without its frame, its title and its closing pointer to --help."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).strip("│| ") for row in box.splitlines()]
    parts = [part.strip() for part in re.split(r"[─-]{6,}", " ".join(rows[1:-1]))]
    return "; ".join(part for part in parts if part and not part.startswith("For full helptext"))


def _train_defaults(arguments: Sequence[str]) -> Train:
    """Options of `train --resume RUN` or `train --config FILE`, so that the other flags override them; plain defaults
    without."""
    defaults = Train(dataset=tyro.MISSING, output=tyro.MISSING)
    if not arguments or arguments[0] != "train":
        return defaults
    flags = [argument.partition("=") for argument in arguments]
    values = {
        flag: value if equals else arguments[i + 1]
        for i, (flag, equals, value) in enumerate(flags)
        if equals or i + 1 < len(arguments)
    }
    if "--resume" in values:
        if "--config" in values:
            raise ConfigError("--resume takes the options of the run itself, so --config cannot be given too")
        return Train.to_resume(Path(values["--resume"]), values.get("--dataset"), trust="--env" in values)
    if "--config" in values:
        path = Path(values["--config"])
        return dataclasses.replace(defaults, config=path, **to_fields(read_options(path), path))
    return defaults


def _sweep_defaults(arguments: Sequence[str]) -> Sweep:
    """Options of `sweep --config FILE`, as for train."""
    others = [argument for argument in arguments[1:] if argument != "--resume"]  # which is train's too
    base = _train_defaults(["train" if "sweep" in arguments[:1] else "", *others])
    names = ("config", "observation", "action", "angles", "policy", "training")
    return Sweep(dataset=tyro.MISSING, output=tyro.MISSING, **{name: getattr(base, name) for name in names})


if __name__ == "__main__":
    sys.exit(main())
