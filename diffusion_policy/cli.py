"""The command line: collects the verbs. `--help` imports neither torch nor a simulator."""

import contextlib
import dataclasses
import io
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from diffusion_policy import __version__
from diffusion_policy.basics.text import one_line
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.options.benchmark import Benchmark
from diffusion_policy.commands.options.collect import Collect
from diffusion_policy.commands.options.command import Command
from diffusion_policy.commands.options.compare import Compare
from diffusion_policy.commands.options.dataset import OF_DATASETS
from diffusion_policy.commands.options.demo import Demo
from diffusion_policy.commands.options.doctor import Doctor
from diffusion_policy.commands.options.evaluate import Evaluate
from diffusion_policy.commands.options.export import Export
from diffusion_policy.commands.options.flags import fill_in, make_form
from diffusion_policy.commands.options.forecast import Forecast
from diffusion_policy.commands.options.live import Live
from diffusion_policy.commands.options.report import Report
from diffusion_policy.commands.options.rollout import Rollout
from diffusion_policy.commands.options.run_robot import RunRobot
from diffusion_policy.commands.options.serve import Serve
from diffusion_policy.commands.options.study import Study
from diffusion_policy.commands.options.sweep import OF_A_TRAINING, Sweep
from diffusion_policy.commands.options.toy import Toy
from diffusion_policy.commands.options.train import (
    Train,
    TrainClassifier,
    TrainLatent,
    fields_of_teacher,
    read_options,
    to_fields,
)
from diffusion_policy.commands.terminal import console, open_standard_streams, out
from diffusion_policy.config import ConfigError, with_options

DESCRIPTION = """Learn multimodal robot behaviour from demonstrations, and measure success per mode.

Start with `diffusion-policy demo`. Each command explains itself: `diffusion-policy train --help`.
A mistake is answered with one line and exit status 2; --debug, anywhere, shows where it came from."""
VERBS: dict[str, type[Command]] = {
    "collect": Collect,
    "train": Train,
    "train-latent": TrainLatent,
    "train-classifier": TrainClassifier,
    "sweep": Sweep,
    **{f"dataset {verb}": kind for verb, kind in OF_DATASETS.items()},
    "evaluate": Evaluate,
    "report": Report,
    "compare": Compare,
    "forecast": Forecast,
    "rollout": Rollout,
    "run-robot": RunRobot,
    "serve": Serve,
    "live": Live,
    "export": Export,
    "benchmark": Benchmark,
    "study": Study,
    "doctor": Doctor,
    "toy": Toy,
    "demo": Demo,
}
"""What a user can ask for, in one word or two."""
FAMILIES = {"dataset": "Look at demonstrations, check them, bring them in and out, join, cut and mend them."}
"""What the verbs of two words are about."""
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


def parse(arguments: Sequence[str]) -> Command:
    """The command that arguments mean; raises ConfigError when they mean none."""
    defaults = _defaults_from_files(arguments)
    forms = {verb: make_form(kind, defaults.get(verb)) for verb, kind in VERBS.items()}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            form = tyro.cli(_choice(forms), prog="diffusion-policy", description=DESCRIPTION, args=arguments)
    except SystemExit as leaving:
        if leaving.code:
            raise ConfigError(_one_line(said.getvalue())) from leaving
        raise
    form = getattr(form, "verb", form)
    verb = next(verb for verb, kind in forms.items() if type(form) is kind)
    given = {argument.partition("=")[0].strip("-").replace("-", "_") for argument in arguments if argument[:2] == "--"}
    return fill_in(VERBS[verb], form, defaults.get(verb), given)


def _choice(forms: Mapping[str, type]) -> Any:
    """A choice between verbs for tyro; those of two words are a choice within the choice."""
    families: dict[str, dict[str, type]] = {}
    for verb, form in forms.items():
        first, _, second = verb.partition(" ")
        families.setdefault(first, {})[second] = form
    options = []
    for first, members in families.items():
        form = members.get("")
        if form is None:
            inner = Annotated[tyro.conf.OmitSubcommandPrefixes[_choice(members)], tyro.conf.arg(name="")]
            form = dataclasses.make_dataclass(first, [("verb", inner)], namespace={"__doc__": FAMILIES[first]})
        options.append(Annotated[form, tyro.conf.subcommand(first)])
    return Union[tuple(options)]  # noqa: UP007  (they are known only now)


def _one_line(box: str) -> str:
    """The sentences of tyro's error box, without its frame, its title and its closing pointer to --help."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).strip("│| ") for row in box.splitlines()]
    parts = [part.strip() for part in re.split(r"[─-]{6,}", " ".join(rows[1:-1]))]
    return "; ".join(part for part in parts if part and not part.startswith("For full helptext"))


def _defaults_from_files(arguments: Sequence[str]) -> dict[str, Command]:
    """{verb: its options} as the file of `train --resume RUN`, `train --config FILE`, `train --teacher RUN` or the same
    of its siblings and `sweep` says them, so that the other flags override them; nothing without."""
    verb = arguments[0] if arguments else ""
    values = _values_of_flags(arguments)
    training = {"train": Train, "train-latent": TrainLatent, "train-classifier": TrainClassifier}.get(verb)
    if training and "--resume" in values:
        if "--config" in values:
            raise ConfigError("--resume takes the options of the run itself, so --config cannot be given too")
        run, trust = Path(values["--resume"]), "--env" in values
        return {verb: training.to_resume(run, values.get("--dataset"), trust=trust)}
    if not (training or verb == "sweep") or not values.keys() & {"--config", "--teacher"}:
        return {}
    path = Path(values["--config"]) if "--config" in values else None
    fields = fields_of_teacher(Path(values["--teacher"])) if "--teacher" in values else {}
    fields |= {} if path is None else to_fields(read_options(path), path)
    if "--teacher" in values and "training" in fields:  # whose weights another run's file cannot know
        fields["training"] = with_options(fields["training"], teacher_weights=None)
    if training:
        return {verb: training(tyro.MISSING, tyro.MISSING, config=path, **fields)}
    fields = {name: value for name, value in fields.items() if name in OF_A_TRAINING}
    return {verb: Sweep(tyro.MISSING, tyro.MISSING, config=path, **fields)}


def _values_of_flags(arguments: Sequence[str]) -> dict[str, str]:
    """{flag: what stands behind it}, of --flag=text and --flag text alike."""
    flags = [argument.partition("=") for argument in arguments]
    return {
        flag: value if equals else arguments[i + 1]
        for i, (flag, equals, value) in enumerate(flags)
        if equals or i + 1 < len(arguments)
    }


if __name__ == "__main__":
    sys.exit(main())
