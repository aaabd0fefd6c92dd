"""diffusion-policy compare: whether one evaluation is better than another."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from diffusion_policy.commands.common import console, require_fresh
from diffusion_policy.commands.terminal import out
from diffusion_policy.config import ConfigError

if TYPE_CHECKING:
    from diffusion_policy.comparison import Comparison


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
        """Compare; raises ConfigError for evaluations of different tasks or without a common seed."""
        from diffusion_policy.comparison import compare
        from diffusion_policy.report import write_comparison

        if self.output is not None:
            require_fresh(self.output)
        first, second = read_results(self.a), read_results(self.b)
        for name in ("environment", "env_kwargs", "signals"):
            if first.get(name) != second.get(name):
                raise ConfigError(
                    f"{self.a} and {self.b} are of different tasks: {name} {first.get(name)} and {second.get(name)}"
                )
        comparison = compare(first["outcomes"], second["outcomes"])
        result = dataclasses.asdict(comparison)
        text = json.dumps({"a": str(self.a), "b": str(self.b), **result}, indent=2)
        out.print(text if self.json else f"A is {self.a}, B is {self.b}\n{comparison.sentence}")
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "comparison.json").write_text(text + "\n")
            write_comparison(self.output / "comparison.html", first, second, result)
            console.print(f"page in {self.output}/comparison.html")
        return comparison


def read_results(path: Path) -> dict[str, Any]:
    """What an evaluation's results.json holds; raises ConfigError for anything else."""
    file = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no results.json of an evaluation at {path}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    kinds = {"seed": int, "repeat": int, "success": bool}
    outcomes = results.get("outcomes") if isinstance(results, dict) else None
    if not isinstance(outcomes, list) or not all(
        isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in kinds.items())
        for one in outcomes
    ):
        raise ConfigError(f"{file} holds no outcomes with seed, repeat and success; was it written by evaluate?")
    return results
