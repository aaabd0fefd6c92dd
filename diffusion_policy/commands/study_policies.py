"""diffusion-policy study networks, study students: several policies on the same seeds, by success and by cost.

A row is a policy under one number of sampling steps; trainings that differ in their seed alone are one row. Students
stand beside their teacher, which is asked in as few steps too.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.files import FileError, plain
from diffusion_policy.basics.metric_table import METRICS
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.beside_teacher import agree
from diffusion_policy.commands.episodes import (
    measure_episodes,
    require_memory,
)
from diffusion_policy.commands.labels import learn_instructions
from diffusion_policy.commands.losses import METRICS as METRICS_FILE
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import Study
from diffusion_policy.commands.policy_in_env import PolicyInEnv, choose_modes, join_environment, refuse_seen_seeds
from diffusion_policy.commands.study_cells import Refused, keep, naming_a_stop, roll_out, show, tell_asked
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ChunkingConfig, ConfigError, SampleConfig, to_json
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.report.policies_page import FIGURES, write_policies_page
from diffusion_policy.serving.backends import make_planner, resolve_backend
from diffusion_policy.training.trackers import read_lines

FEW_STEPS = (1, 2, 4)
"""Of the teacher, beside its usual ones."""
TIMED = 30
"""Plans that the time of a plan is taken from."""


class Asked(NamedTuple):
    """One policy under one number of sampling steps."""

    row: str
    path: str
    loaded: PolicyInEnv
    sampling: SampleConfig


def run(options: Study, loaded: PolicyInEnv) -> dict[str, Any]:
    """Study; returns what results.json holds, which is kept after each policy."""
    asked = tell_apart(list(choose_policies(options, loaded)))
    for one in asked:
        require_memory(one.loaded.policy, one.sampling, PARALLEL)
    rows: dict[str, list[dict[str, Any]]] = {}
    results = {**tell_asked(options, loaded), "rows": rows}
    taught: list[Episode] = []
    for i, one in enumerate(asked):
        console.print(f"{one.row}: {one.path}", soft_wrap=True)
        with naming_a_stop(options, one.path):
            cell, episodes = measure(options, one, taught if options.what == "students" else [])
        taught = episodes if i == 0 else taught
        rows.setdefault(one.row, []).append(cell)
        keep(options, results, cell)
    print_rows(rows)
    show(options, "page", options.output / f"{options.what}.html", lambda path: write_policies_page(path, results))
    return results


def choose_policies(options: Study, loaded: PolicyInEnv) -> Iterator[Asked]:
    """All that are compared: the checkpoint, the teacher of students in few steps too, and the others. Raises
    ValueError for others that do not act in its environment, or have seen the seeds."""
    told = next(iter(options.texts), None)
    usual = loaded.policy.complete(SampleConfig(mode=options.mode, guidance=options.guidance, instruction=told))
    mine = str(options.checkpoint)
    yield Asked(describe(loaded.checkpoint, usual), mine, loaded, usual)
    if options.what == "students":
        trained = loaded.policy.diffusion.trained_steps or options.steps or FEW_STEPS
        for steps in dict.fromkeys(trained):
            if steps == usual.sampling_steps:
                continue
            fewer = dataclasses.replace(usual, sampling_steps=steps)
            yield Asked(describe(loaded.checkpoint, fewer), mine, loaded, fewer)
    for path in options.beside:
        other = checkpoint.load(path, loaded.policy.device)
        other = learn_instructions(other, [*options.texts], options.instruction_encoder)
        beside = join_environment(
            path,
            other,
            env=options.env,
            env_kwargs=options.env_kwargs,
            image_size=options.image_size,
            signals=options.signals,
            costs=options.costs,
        )
        if (beside.env_id, beside.env_kwargs) != (loaded.env_id, loaded.env_kwargs):
            raise ConfigError(f"{path} acts in {beside.env_id} {beside.env_kwargs}, not as {options.checkpoint} does")
        refuse_seen_seeds(beside, options.seeds)
        sampling = other.policy.complete(SampleConfig(mode=options.mode, instruction=told))
        yield Asked(describe(other, sampling), str(path), loaded._replace(checkpoint=other), sampling)


def tell_apart(asked: Sequence[Asked]) -> list[Asked]:
    """With the path behind the name of a row where another row of this name was trained otherwise."""
    groups: dict[str, list[tuple[Any, str]]] = {}
    apart = []
    for one in asked:
        training = to_json(one.loaded.checkpoint.training)
        own = to_json(one.loaded.policy.config), training | {"seed": 0}
        alike = groups.setdefault(one.row, [])
        row = next((name for known, name in alike if known == own), None)
        if row is None:
            row = f"{one.row} ({one.path})" if alike else one.row
            alike.append((own, row))
        apart.append(one._replace(row=row))
    return apart


def describe(loaded: Checkpoint, sampling: SampleConfig) -> str:
    """What a policy is and how it is sampled, in words; not the seed of its training."""
    config, taught = loaded.policy.config, loaded.training.distillation
    options = to_json(config.network)
    sizes = (options[name] for name in ("widths", "width", "layers") if name in options)
    size = " x ".join("-".join(map(str, one)) if isinstance(one, list) else str(one) for one in sizes)
    learned = f"student ({taught.student})" if taught.student else config.objective
    steps = sampling.sampling_steps
    return f"{options['kind']} {size}, {learned}, {steps} {'step' if steps == 1 else 'steps'}"


def tell_policy(asked: Asked) -> dict[str, Any]:
    """What one policy is, and what its training took."""
    trained, policy = asked.loaded.checkpoint, asked.loaded.policy
    return {
        "checkpoint": asked.path,
        "network": to_json(policy.config.network),
        "objective": policy.config.objective,
        "student": trained.training.distillation.student,
        "sampling_steps": asked.sampling.sampling_steps,
        "training_seed": trained.training.seed,
        "training_steps": trained.step,
        "training_minutes": training_minutes(Path(asked.path), trained.step),
        "parameters": sum(weight.numel() for weight in policy.parameters()),
    }


def measure(options: Study, asked: Asked, taught: Sequence[Episode]) -> tuple[dict[str, Any], list[Episode]]:
    """What one policy does and costs, and its episodes; `taught`: those of the teacher, none for no student."""
    loaded, policy, sampling = asked.loaded, asked.loaded.policy, asked.sampling
    cell = tell_policy(asked)
    try:
        done = roll_out(options, loaded, sampling, ChunkingConfig())
    except Refused as error:
        return cell | error.cell, []
    modes, _ = choose_modes(loaded)
    card = measure_episodes(loaded, done.episodes, modes, 1 / loaded.frames_per_second, Remarks()).fields()
    fastest = resolve_backend(policy, sampling, "auto", 1)
    times = {"eager": _median_time(PolicyPlanner(policy, sampling))}
    if fastest != "eager":
        times[fastest] = _median_time(make_planner(policy, sampling, fastest))
    found = {
        **{name: card[name] for name in FIGURES},
        "measures": card["measures"],
        "modes": card["modes"],
        "mode_agreement": dataclasses.asdict(agree(done.episodes, taught)) if taught else None,
        "milliseconds": times,
        **done.faults,
    }
    return plain(cell | found), done.episodes


def _median_time(planner: Any) -> float:
    return float(np.median(time_plans(planner, 1, TIMED)))


def training_minutes(path: Path, step: int) -> float | None:
    """What the training steps took up to this one, as its metrics say; None where they do not. The pairs of a student
    are made before."""
    folder = path.parent if (path / "config.json").exists() else path
    minutes, done = 0.0, 0
    try:
        for _, line in read_lines(folder / METRICS_FILE):
            speed, now = line.get("steps_per_second"), line.get("step")
            if isinstance(speed, float) and speed > 0 and isinstance(now, int) and done < now <= step:
                minutes += (now - done) / speed / 60
                done = now
    except (FileError, OSError):
        return None
    return minutes if done and math.isfinite(minutes) else None


def print_rows(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A line a row: means over its training seeds."""
    for name, cells in rows.items():
        measured = [cell for cell in cells if "refused" not in cell]
        if not measured:
            continue
        said = []
        for figure in FIGURES:
            values = [cell[figure]["value"] for cell in measured if cell[figure]["value"] is not None]
            if values:
                spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
                said.append(f"{METRICS[figure].label} {np.mean(values):.3f}{spread}")
        milliseconds = np.mean([min(cell["milliseconds"].values()) for cell in measured])
        console.print(f"{name}: {', '.join(said)}, {milliseconds:.1f} ms a plan", soft_wrap=True)
