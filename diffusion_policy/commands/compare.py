"""diffusion-policy compare: whether one evaluation is better than another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from diffusion_policy.basics.files import format_json, write_whole
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError

if TYPE_CHECKING:
    from diffusion_policy.evaluation.comparison import Comparison


@dataclass(frozen=True)
class Compare:
    """Compare two evaluations of the same task, seed by seed: McNemar's test for success, a paired bootstrap for the
    score, and a sentence that says whether the difference is real."""

    a: tyro.conf.Positional[Path]
    """Folder of an evaluation, or its results.json."""
    b: tyro.conf.Positional[Path]
    """The other one."""
    output: Path | None = None
    """Folder to write comparison.json and comparison.html into."""
    json: bool = False
    """Print comparison.json instead of sentences."""

    def run(self) -> Comparison:
        """Compare; raises ConfigError for evaluations of different tasks or without a common seed, and where seeds do
        not repeat episodes."""
        from diffusion_policy.evaluation.comparison import compare
        from diffusion_policy.evaluation.results import read_results
        from diffusion_policy.report.page import write_comparison

        if self.output is not None:
            require_fresh(self.output)
        first, second = read_results(self.a), read_results(self.b)
        for name, value in tell_task(first).items():
            if value != tell_task(second)[name]:
                there, here = (f"{tell_task(results)[name]!r:.200}" for results in (first, second))
                raise ConfigError(f"{self.a} and {self.b} are of different tasks: {name} {there} and {here}")
        require_pairs(first, second)
        comparison = compare(first["outcomes"], second["outcomes"])
        result = dataclasses.asdict(comparison)
        text = format_json({"a": str(self.a), "b": str(self.b), **result})
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            write_whole(self.output / "comparison.json", text)
        if self.json:
            out.print_lines(text.rstrip())
        else:
            out.print(f"A is {self.a}, B is {self.b}")
            out.print(comparison.sentence)
        if self.output is not None:
            write_comparison(self.output / "comparison.html", first, second, result)
            console.print(f"page in {self.output}/comparison.html", soft_wrap=True)
        return comparison


def tell_task(results: Mapping[str, Any]) -> dict[str, Any]:
    """What two evaluations must have in common; `module:Id` is what Gymnasium calls `Id`."""
    return {
        "environment": results["environment"].rpartition(":")[2],
        **{name: results[name] for name in ("env_kwargs", "signals")},
        "wrappers": results.get("wrappers", []),
    }


def require_pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise ConfigError where the episodes of one seed are not the same in two evaluations."""
    from diffusion_policy.report.text import share, share_interval

    if a.get("seeds_repeat") is not False and b.get("seeds_repeat") is not False:
        return
    rates = (results["success_rate"] for results in (a, b))
    of_a, of_b = (f"{share(rate['value'])} (95 % interval {share_interval(rate)})" for rate in rates)
    raise ConfigError(
        "this environment does not repeat an episode by its seed, so episodes cannot be compared pair by pair; each "
        f"for itself, A succeeds in {of_a} and B in {of_b}: where the intervals do not overlap, the difference is real"
    )
