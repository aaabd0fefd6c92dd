"""diffusion-policy study instructions: what a policy is told, and what it does then.

A row is an instruction, a column a weight of guidance, on the same seeds each time. Asked are the modes that the
demonstrations with that instruction had; done is the mode of an episode that succeeded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_policy.basics.files import plain
from diffusion_policy.commands.episodes import require_memory
from diffusion_policy.commands.options.acting import PARALLEL
from diffusion_policy.commands.options.study import Study
from diffusion_policy.commands.policy_in_env import PolicyInEnv, choose_modes
from diffusion_policy.commands.study_cells import Cells, Refused, keep, naming_a_stop, roll_out, show, tell_asked
from diffusion_policy.commands.terminal import console, print_cells
from diffusion_policy.config import ConfigError, SampleConfig
from diffusion_policy.evaluation import metrics
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.evaluation.intervals import Metric, by_cluster, clustered_share
from diffusion_policy.evaluation.metrics import NONE
from diffusion_policy.report.instructions_page import write_instructions_page

GUIDANCES = (0.0, 1.0, 3.0)
"""Of a policy that can be guided."""


def run(options: Study, loaded: PolicyInEnv) -> dict[str, Any]:
    """Study; returns what results.json holds, which is kept after each cell. Raises ConfigError for a policy that is
    told no instructions, and for modes that its environment does not have."""
    modes, _ = choose_modes(loaded)
    asked, weights = find_asked(options, loaded, modes), choose_guidances(options, loaded)
    for text in asked:
        for weight in weights:
            require_memory(loaded.policy, choose_sampling(options, loaded, text, weight), PARALLEL)
    cells: Cells = {text: {} for text in asked}
    told = {
        "embedding_size": loaded.policy.label_rows.size,
        "sampler": options.samplers[0],
        "chunking": plain(dataclasses.asdict(options.chunking)),
    }
    kept = {"modes": list(modes), "asked": asked, "instructions": cells, "all": {}}
    results = {**tell_asked(options, loaded, **told), **kept}
    for weight in weights:
        everything: list[tuple[Episode, Sequence[str]]] = []
        for text in asked:
            console.print(f"{text}, guidance {weight:g}", soft_wrap=True)
            with naming_a_stop(options, f"{text!r}, {weight:g}"):
                cell, episodes = measure(options, loaded, choose_sampling(options, loaded, text, weight), asked[text])
            cells[text][f"{weight:g}"] = cell
            everything += [(episode, asked[text]) for episode in episodes]
            results["all"][f"{weight:g}"] = summarize(everything)
            keep(options, results, cell)
    print_tables(results)
    show(options, "page", options.output / "instructions.html", lambda path: write_instructions_page(path, results))
    return results


def find_asked(options: Study, loaded: PolicyInEnv, modes: Sequence[str]) -> dict[str, list[str]]:
    """What is told, and the modes that each text asks for: those that its demonstrations had, or what the user says;
    empty where neither does. Raises ConfigError for a policy that is told nothing, and for modes that are not there."""
    policy, shown = loaded.policy, loaded.checkpoint.dataset.instructions
    if not policy.instructions:
        raise ConfigError(f"{options.checkpoint} was trained without --condition-on-instruction: it is told nothing")
    asked = {}
    for text, mode in (options.texts or dict.fromkeys(policy.instructions)).items():
        if mode is not None and mode not in modes:
            raise ConfigError(f"--instruction names the mode {mode!r}; the modes are {', '.join(modes) or 'none'}")
        asked[text] = [known for known in shown.get(text, {}) if known != NONE] if mode is None else [mode]
    return asked


def choose_guidances(options: Study, loaded: PolicyInEnv) -> tuple[float, ...]:
    """The weights that are compared."""
    return options.guidances or (GUIDANCES if loaded.policy.config.condition_dropout else GUIDANCES[:1])


def choose_sampling(options: Study, loaded: PolicyInEnv, text: str, guidance: float) -> SampleConfig:
    """How plans are sampled for one instruction; raises ValueError where the policy cannot."""
    steps = options.steps[0] if options.steps else None
    sampling = SampleConfig(options.samplers[0], steps, instruction=text, guidance=guidance)
    return loaded.policy.complete(sampling)


def measure(
    options: Study, loaded: PolicyInEnv, sampling: SampleConfig, asked: Sequence[str]
) -> tuple[dict[str, Any], list[Episode]]:
    """What the policy does when it is told so, and its episodes; why not, where it cannot."""
    try:
        rolled = roll_out(options, loaded, sampling, options.chunking)
    except Refused as error:
        return error.cell, []
    done: dict[str, int] = metrics.successes_by_mode(rolled.episodes)
    cell = {
        **summarize([(episode, asked) for episode in rolled.episodes]),
        "done": {mode: done[mode] for mode in sorted(done, key=str)},
        **rolled.faults,
    }
    return plain(cell), rolled.episodes


def summarize(told: Sequence[tuple[Episode, Sequence[str]]]) -> dict[str, Any]:
    """Of episodes and the modes that each was asked for: their number, the share of successes, and the share of these
    that were done as asked; undefined where no mode was asked for."""
    judged = [(episode.seed, episode.mode in asked) for episode, asked in told if episode.success and asked]
    share = Metric(None)
    if judged:
        share = clustered_share(*by_cluster([seed for seed, _ in judged], [right for _, right in judged]))
    return {
        "episodes": len(told),
        "success_rate": dataclasses.asdict(metrics.success_rate([one for one, _ in told]) if told else Metric(None)),
        "as_asked": dataclasses.asdict(share),
    }


def print_tables(results: Mapping[str, Any]) -> None:
    """A table a figure, a row an instruction; then which modes were done."""
    cells = {**results["instructions"], "all": results["all"]}
    print_cells("successes", "instruction", "guidance", cells, "success_rate", "{:.2f}")
    print_cells("successes in the mode that was asked for", "instruction", "guidance", cells, "as_asked", "{:.2f}")
    for text, of_text in results["instructions"].items():
        for weight, cell in of_text.items():
            done = ", ".join(f"{mode} {count}" for mode, count in cell.get("done", {}).items()) or "nothing"
            asked = " or ".join(results["asked"][text]) or "unknown"
            console.print(f"{text!r}, guidance {weight}: asked {asked}; done {done}", soft_wrap=True)
