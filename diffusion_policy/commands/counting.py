"""What results.json says of episodes: the scorecard, each delay, each outcome, and where they were run.

Knows episodes, and the policy in its environment that ran them. Runs nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.episodes import RolledOut, describe_machine, measure_episodes
from diffusion_policy.commands.policy_in_env import PolicyInEnv, choose_modes
from diffusion_policy.envs.adapters import capped_steps
from diffusion_policy.evaluation import metrics
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.evaluation.results import FORMAT_VERSION


def count_results(
    loaded: PolicyInEnv, rolled_out: Mapping[int, RolledOut], backend: str, remarks: Remarks
) -> dict[str, Any]:
    """Everything that the report shows as a number, but for what is measured of plans; `rolled_out`: the episodes by
    delay, the first of which has the scorecard."""
    policy, demonstrated = loaded.policy, loaded.checkpoint.dataset
    episodes, lost, mode_failures = next(iter(rolled_out.values()))
    modes, base = choose_modes(loaded)
    period = 1 / loaded.frames_per_second
    undefined = dataclasses.asdict(metrics.Metric(None))
    return {
        "format_version": FORMAT_VERSION,
        "episodes": len(episodes),
        **measure_episodes(loaded, episodes, modes, period, remarks).fields(),
        "diversity": undefined,
        "planning_latency_ms": dict.fromkeys(("p50", "p95", "p99"), undefined),
        "mode_base": base,
        "demonstrations": {
            "episodes": demonstrated.episodes,
            "modes": demonstrated.modes,
            "mode_entropy": metrics.mode_entropy(demonstrated.modes, modes),
        },
        "errors": [dataclasses.asdict(one) for one in lost],
        "mode_failures": [dataclasses.asdict(one) for one in mode_failures],
        "capped_steps": capped_steps(loaded.env),
        "delay": [count_under_delay(delay, one.episodes, modes) for delay, one in rolled_out.items()],
        "control_period": period,
        **describe_machine(policy, backend),
        "outcomes": [tell_outcome(episode) for episode in episodes],
    }


def tell_outcome(episode: Episode) -> dict[str, Any]:
    """How one episode ended."""
    return {
        "seed": episode.seed,
        "repeat": episode.repeat,
        "success": episode.success,
        "mode": episode.mode,
        "steps": len(episode.actions),
        "measures": dict(episode.measures),
    }


def count_under_delay(delay: int, episodes: Sequence[Episode], modes: Sequence[str]) -> dict[str, Any]:
    """One point of the curves against delay; `delay` in control steps."""
    solved = metrics.effective_successes(episodes)
    return {
        "steps": delay,
        "success_rate": dataclasses.asdict(metrics.success_rate(episodes)),
        "mode_entropy": dataclasses.asdict(metrics.behaviour_entropy(solved, modes)),
        "measures": {name: dataclasses.asdict(metric) for name, metric in metrics.mean_measures(episodes).items()},
    }
