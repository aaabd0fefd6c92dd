"""What the studies share: a cell is what one policy does under one set of options, on the same seeds as the others."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_policy.basics.files import format_json, plain, write_whole
from diffusion_policy.basics.text import one_line
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.episodes import describe_machine, make_group_planner, run_episodes
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.joining import choose_chunking, find_roll
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import Study
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ChunkingConfig, SampleConfig
from diffusion_policy.control.chunking import Chunking
from diffusion_policy.control.controller import require_horizons
from diffusion_policy.evaluation.episode import Episode

Cells = dict[str, dict[str, Any]]
"""What was measured, by row and column."""


class Refused(ValueError):
    """A cell that cannot be measured; `cell` says why."""

    def __init__(self, why: str, **beside: Any) -> None:
        super().__init__(why)
        self.cell = {"refused": one_line(why), **beside}


class RolledOut(NamedTuple):
    """The episodes of a cell."""

    episodes: list[Episode]
    chunking: Chunking
    """How plans were joined."""
    faults: dict[str, Any]
    """What of results.json says which episodes were lost, and why."""


def tell_asked(options: Study, loaded: PolicyInEnv, **more: Any) -> dict[str, Any]:
    """What is studied, and where: the first fields of results.json."""
    horizon = options.action_horizon or loaded.policy.config.action_horizon
    return {
        "what": options.what,
        "environment": loaded.env_id,
        "env_kwargs": loaded.env_kwargs,
        "checkpoint": str(options.checkpoint),
        "training_steps": loaded.checkpoint.step,
        "episodes": options.episodes,
        "first_seed": options.seed,
        **more,
        "action_horizon": horizon,
        **describe_machine(loaded.policy),
    }


def roll_out(
    options: Study, loaded: PolicyInEnv, sampling: SampleConfig, joined: ChunkingConfig, delay_steps: int = 0
) -> RolledOut:
    """The episodes of a policy that is sampled so, and whose plans are joined so. Raises Refused where that cannot be,
    and where no episode came to its end."""
    policy = loaded.policy
    try:
        chunking = choose_chunking(joined, policy, sampling, find_roll(loaded.env))
        planner = make_group_planner(policy, sampling, "eager", PARALLEL, samples=chunking.samples)
        require_horizons(planner.steps, options.action_horizon or planner.action_horizon, delay_steps)
        episodes, lost, mode_failures = run_episodes(
            loaded,
            options.seeds,
            planner,
            parallel=PARALLEL,
            workers=options.workers,
            delay_steps=delay_steps,
            action_horizon=options.action_horizon,
            chunking=chunking,
        )
    except (ValueError, FloatingPointError) as error:
        raise Refused(str(error)) from error
    if not episodes:
        raise Refused(f"every episode failed: {lost[0].reason}", lost=len(lost))
    faults = {
        "lost": len(lost),
        "errors": [dataclasses.asdict(one) for one in lost],
        "mode_failures": [dataclasses.asdict(one) for one in mode_failures],
    }
    return RolledOut(list(episodes), chunking, plain(faults))


@contextlib.contextmanager
def naming_a_stop(options: Study, where: str) -> Iterator[None]:
    """Says of a stop in which cell it was."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"stopped at {where}; the others are in {options.output}") from None


def keep(options: Study, results: Mapping[str, Any], cell: Mapping[str, Any]) -> None:
    """Write all results so far; says why the last cell is empty, if it is."""
    if "refused" in cell:
        console.print(f"  not possible: {cell['refused']}", soft_wrap=True)
    write_whole(options.output / "results.json", format_json(results))


def show(options: Study, what: str, path: Path, write: Callable[[Path], None]) -> None:
    """Write what is looked at, a picture or a page, and say where all lies; one that cannot be made is a remark."""
    Remarks().attempt(f"no {what}", lambda: write(path), None)
    beside = f", {what} in {path}" if path.exists() else ""
    console.print(f"results in {options.output}/results.json{beside}", soft_wrap=True)
