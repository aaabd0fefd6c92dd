"""diffusion-policy compare: whether one evaluation is better than another."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_policy.basics.files import format_json, write_whole
from diffusion_policy.commands.kept_episodes import has_kept, read_paths
from diffusion_policy.commands.options.compare import Compare
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError
from diffusion_policy.evaluation.comparison import Comparison, compare
from diffusion_policy.evaluation.results import read_results
from diffusion_policy.report.comparison_page import PathPairs, write_comparison
from diffusion_policy.report.text import share, share_interval


def run(options: Compare) -> Comparison:
    """Compare; raises ConfigError for evaluations of different tasks or without a common seed, and where seeds do not
    repeat episodes."""
    if options.output is not None:
        require_fresh(options.output)
    first, second = read_results(options.a), read_results(options.b)
    for name, value in tell_task(first).items():
        if value != tell_task(second)[name]:
            there, here = (f"{tell_task(results)[name]!r:.200}" for results in (first, second))
            raise ConfigError(f"{options.a} and {options.b} are of different tasks: {name} {there} and {here}")
    require_pairs(first, second)
    comparison = compare(first["outcomes"], second["outcomes"])
    result = dataclasses.asdict(comparison)
    text = format_json({"a": str(options.a), "b": str(options.b), **result})
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        write_whole(options.output / "comparison.json", text)
    if options.json:
        out.print_lines(text.rstrip())
    else:
        out.print(f"A is {options.a}, B is {options.b}")
        out.print(comparison.sentence)
    if options.output is not None:
        pairs = read_pairs(options, first, second)
        write_comparison(options.output / "comparison.html", first, second, result, pairs)
        console.print(f"page in {options.output}/comparison.html", soft_wrap=True)
    return comparison


def read_pairs(options: Compare, a: Mapping[str, Any], b: Mapping[str, Any]) -> PathPairs | None:
    """The paths of the episodes that both evaluations have kept; None, with a word on it, where one has none that can
    be drawn."""
    if not (has_kept(options.a) and has_kept(options.b)):
        return None
    try:
        (scene, of_a), (scene_b, of_b) = read_paths(options.a, a), read_paths(options.b, b)
    except ValueError as error:
        console.print(f"the page is without paths: {error}", soft_wrap=True)
        return None
    if scene is None or scene_b is None:
        return None
    return PathPairs(scene, {name: (of_a[name], of_b[name]) for name in of_a.keys() & of_b.keys()})


def tell_task(results: Mapping[str, Any]) -> dict[str, Any]:
    """What two evaluations must have in common; `module:Id` is what Gymnasium calls `Id`."""
    return {
        "environment": results["environment"].rpartition(":")[2],
        **{name: results[name] for name in ("env_kwargs", "signals")},
        "wrappers": results.get("wrappers", []),
    }


def require_pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise ConfigError where the episodes of one seed are not the same in two evaluations."""
    if a.get("seeds_repeat") is not False and b.get("seeds_repeat") is not False:
        return
    rates = (results["success_rate"] for results in (a, b))
    of_a, of_b = (f"{share(rate['value'])} (95 % interval {share_interval(rate)})" for rate in rates)
    raise ConfigError(
        "this environment does not repeat an episode by its seed, so episodes cannot be compared pair by pair; each "
        f"for itself, A succeeds in {of_a} and B in {of_b}: where the intervals do not overlap, the difference is real"
    )
