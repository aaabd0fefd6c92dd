"""A student beside its teacher, on the same seeds and under the same planning noise: success, entropy, and how often an
episode comes to the same mode.

Knows checkpoints and episodes. Writes nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.episodes import make_group_planner, measure_episodes, run_episodes
from diffusion_policy.commands.joining import choose_chunking, find_roll
from diffusion_policy.commands.labels import learn_instructions
from diffusion_policy.commands.options.evaluate import Evaluate
from diffusion_policy.commands.policy_in_env import PolicyInEnv, choose_modes
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError, SampleConfig
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.evaluation import metrics
from diffusion_policy.evaluation.episode import Episode

TIMED = 30
"""Plans that the time of a plan is taken from."""
FIGURES = ("success_rate", "mode_entropy", "commitment")
"""Of the scorecard."""


def measure_teacher(
    options: Evaluate, loaded: PolicyInEnv, episodes: Sequence[Episode], remarks: Remarks
) -> dict[str, Any]:
    """What results.json says of the teacher of a student, which ran these episodes; nothing for another policy. What
    goes wrong is a remark."""

    def compare() -> dict[str, Any]:
        teacher = find_teacher(loaded.checkpoint)
        return {} if teacher is None else {"teacher": compare_with_teacher(options, loaded, teacher, episodes, remarks)}

    return remarks.attempt("the teacher could not be run beside it", compare, {}) if options.teacher else {}


def find_teacher(student: Checkpoint) -> Checkpoint | None:
    """The teacher that a student names; None for a policy that has none. Raises ValueError where it is gone, or is no
    longer the one."""
    asked = student.training.distillation
    if asked.teacher is None:
        return None
    loaded = checkpoint.load(Path(asked.teacher), student.policy.device)
    if loaded.weights_sha256 != asked.teacher_weights:
        raise ConfigError(f"{asked.teacher} has other weights than the teacher had")
    return loaded


def compare_with_teacher(
    options: Evaluate, loaded: PolicyInEnv, teacher: Checkpoint, episodes: Sequence[Episode], remarks: Remarks
) -> dict[str, Any]:
    """What results.json says of the teacher; `episodes`: the student's, under the first delay. Raises ValueError where
    none of the teacher's could be run."""
    told = options.sampling.instruction
    teacher = learn_instructions(teacher, [] if told is None else [told], options.instruction_encoder)
    taught = loaded._replace(checkpoint=teacher)
    sampling = teacher.policy.complete(SampleConfig(mode=options.sampling.mode, instruction=told))
    chunking = choose_chunking(options.chunking, teacher.policy, sampling, find_roll(loaded.env))
    console.print(f"the teacher, in {sampling.sampling_steps} steps")
    rolled_out = run_episodes(
        taught,
        options.seeds,
        make_group_planner(teacher.policy, sampling, "eager", options.parallel, samples=chunking.samples),
        parallel=options.parallel,
        workers=options.workers,
        repeats=options.repeats,
        delay_steps=options.delay_steps[0],
        action_horizon=options.action_horizon,
        chunking=chunking,
        hang_after=options.hang_after,
        engine=options.engine,
    )
    if not rolled_out.episodes:
        raise ConfigError(f"every episode failed: {rolled_out.lost[0].reason}")
    modes, _ = choose_modes(taught)
    card = measure_episodes(taught, rolled_out.episodes, modes, 1 / taught.frames_per_second, remarks).fields()
    times = {
        name: metrics.percentiles(time_plans(PolicyPlanner(one.policy, asked), 1, TIMED), (50,))["p50"]
        for name, one, asked in (("teacher", teacher, sampling), ("student", loaded.checkpoint, options.sampling))
    }
    return {
        "checkpoint": str(loaded.checkpoint.training.distillation.teacher),
        "sampling": asdict(sampling),
        **{name: card[name] for name in FIGURES},
        "mode_agreement": asdict(agree(episodes, rolled_out.episodes)),
        "milliseconds": times,
    }


def agree(episodes: Sequence[Episode], others: Sequence[Episode]) -> metrics.Metric:
    """Share of the episodes that end in the same mode as those of others from the same seed and noise; of those that
    both have, and where the other's has one."""
    theirs = {(one.seed, one.repeat): one.mode for one in others if one.mode is not None}
    both = [(one.mode, theirs[one.seed, one.repeat]) for one in episodes if (one.seed, one.repeat) in theirs]
    return metrics.wilson(sum(own == other for own, other in both), len(both)) if both else metrics.Metric(None)
