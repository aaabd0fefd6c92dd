"""results.json as input: anybody may have made it."""

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_policy.basics.files import format_json
from diffusion_policy.cli import main
from diffusion_policy.commands.options.compare import Compare
from diffusion_policy.commands.options.report import Report
from diffusion_policy.evaluation.results import FORMAT_VERSION, read_results
from diffusion_policy.report import page

MISSING = object()
METRIC = {"value": 0.5, "low": 0.4, "high": None}
UNDEFINED = {"value": None, "low": None, "high": None}


def whole(seeds: int = 3) -> dict[str, Any]:
    """As evaluate writes it."""
    names = "mode_coverage mode_entropy mode_entropy_corrected mode_divergence conditional_entropy commitment jerk"
    return {
        "format_version": FORMAT_VERSION,
        "environment": "diffusion_policy/Avoid-v0",
        "env_kwargs": {"rows": 1},
        "signals": {"success": None, "fresh": False},
        "wrappers": [{"entry_point": "gymnasium.wrappers:RescaleAction", "kwargs": {}}],
        "checkpoint": "runs/demo",
        "training_steps": 30,
        "repeats": 1,
        "seeds": list(range(seeds)),
        "sampling": {"sampler": "ddim", "sampling_steps": 8, "eta": 0.0, "mode": None},
        "planning_batch": 25,
        "episodes": seeds,
        "success_rate": METRIC,
        "measures": {"score": METRIC, "return": UNDEFINED},
        "modes": {name: {"episodes": 1, "successes": 1, "success_rate": METRIC} for name in ("a-b", "a-c", "none")},
        **dict.fromkeys(names.split(), METRIC),
        **dict.fromkeys(("time_to_success", "diversity"), UNDEFINED),
        "planning_latency_ms": {"p50": METRIC},
        "mode_base": "environment",
        "demonstrations": {"episodes": 4, "modes": {"a-b": 4}, "mode_entropy": None},
        "errors": [{"seed": 7, "repeat": 0, "reason": "it fell"}],
        "mode_failures": [{"seed": 8, "repeat": 0, "reason": "no mode"}],
        "capped_steps": 1000,
        "delay": [{"steps": 0, "success_rate": METRIC, "mode_entropy": UNDEFINED, "measures": {}}],
        "control_period": 0.1,
        "backend": {"mode": "eager", "device": "cpu", "threads": 1, "machine": "x86_64"},
        "versions": {"package": "0", "torch": "2", "python": "3"},
        "outcomes": [
            {"seed": seed, "repeat": 0, "success": seed > 0, "mode": "a-b", "steps": 3, "measures": {"score": 0.5}}
            for seed in range(seeds)
        ],
        "seeds_repeat": True,
        "of_a_younger_version": [1],
    }


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a tree; of a list, to its first item."""
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for name, item in items:
        yield from places(item, (*at, name))


def changed(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return None if value is MISSING else value
    tree = copy.deepcopy(tree)
    here = tree
    for name in at[:-1]:
        here = here[name]
    if value is MISSING:
        del here[at[-1]]
    else:
        here[at[-1]] = value
    return tree


DEEP: list[Any] = []
for _ in range(40):
    DEEP = [DEEP]
VALUES = (
    *(MISSING, None, True, -1, 2**62, 2**63, 10**5000, 1.5, -1e308, math.nan, math.inf, "", "text", "\ud800"),
    *("<script>alert(1)</script>", "\u202eabc\x1b[31m\n", "x" * 5000, [], {}, [1, 2], {"a": 1}, {"value": 1}, DEEP),
)


def write(path: Path, tree: Any) -> Path:
    try:
        path.write_text(json.dumps(tree))
    except ValueError:  # 10^5000 is too long for Python's own JSON
        path.write_text(json.dumps(tree, default=str).replace('"long"', "1" * 5000))
    return path


def try_all(folder: Path, cases: list[tuple[tuple[Any, ...], Any]]) -> tuple[int, int]:
    """Compare changed results with whole ones, with a page; how many were compared and how many refused."""
    compared = refused = 0
    write(folder / "b.json", whole())
    for i, (at, value) in enumerate(cases):
        value = "1" * 5000 if value == 10**5000 else value
        write(folder / "a.json", changed(whole(), at, value))
        try:
            Compare(folder / "a.json", folder / "b.json", output=folder / str(i)).run()
            compared += 1
            page = (folder / str(i) / "comparison.html").read_text()
            assert "<script>" not in page, (at, value)
        except ValueError:  # one line of the command line
            refused += 1
    return compared, refused


CASES = [(at, value) for at in places(whole()) for value in VALUES]


def test_a_field_that_is_anything_else_is_a_page_or_one_line(tmp_path: Path, capsys) -> None:
    compared, refused = try_all(tmp_path, CASES[:: len(CASES) // 60])
    assert compared > 5
    assert refused > 20


def test_results_of_anybody_have_a_page_of_their_own_or_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(page, "to_png", lambda _: b"")
    written = 0
    for i, (at, value) in enumerate([((), whole()), (("seeds",), []), *CASES[5 :: len(CASES) // 60]]):
        value = "1" * 5000 if value == 10**5000 else value
        write(tmp_path / "results.json", changed(whole(), at, value))
        with contextlib.suppress(ValueError):
            html = Report(tmp_path, tmp_path / f"{i}.html").run().read_text()
            assert "<script>alert" not in html
            written += 1
    assert written > 5


@pytest.mark.slow
def test_every_field_may_be_anything_else(tmp_path: Path, capsys) -> None:
    try_all(tmp_path, CASES)


def test_a_wrong_field_is_named(tmp_path: Path, capsys) -> None:
    for at, value, message in (
        (("outcomes", 0, "success"), "yes", "outcomes[0], success must be true or false; got 'yes'"),
        (("modes", "a-b", "successes"), MISSING, "'successes' is missing"),
        (("delay",), 3, "delay must be a list"),
    ):
        path = write(tmp_path / "a.json", changed(whole(), at, value))
        assert main(["compare", str(path), str(path)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "a.json holds no outcomes and numbers as evaluate writes them" in said
        assert message in said


def test_results_of_many_episodes_are_read_and_more_than_anyone_runs_are_not(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(format_json(whole(10_000)))
    assert path.stat().st_size > 2**20
    assert len(read_results(tmp_path)["outcomes"]) == 10_000
    path.write_bytes(b"[" * 2**20)
    with pytest.raises(ValueError, match=r"it has 1048576 lists and objects; at most 262144 are read"):
        read_results(path)


def test_first_evaluations_are_still_read(tmp_path: Path) -> None:
    younger = ("format_version", "wrappers", "mode_failures", "capped_steps", "seeds_repeat", "of_a_younger_version")
    path = write(tmp_path / "old.json", {name: value for name, value in whole().items() if name not in younger})
    assert main(["compare", str(path), str(path), "--output", str(tmp_path / "page")]) == 0


def test_a_metric_that_is_younger_than_a_file_is_undefined(tmp_path: Path) -> None:
    path = write(
        tmp_path / "old.json", changed(changed(whole(), ("jerk",), MISSING), ("planning_latency_ms",), MISSING)
    )
    results = read_results(path)
    assert (results["jerk"], results["planning_latency_ms"]) == (UNDEFINED, {})


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, -1, True, "1", None, 1.0])
def test_a_newer_format_is_refused_in_one_line(tmp_path: Path, capsys, version: Any) -> None:
    path = write(tmp_path / "new.json", whole() | {"format_version": version, "jerk": "of another kind"})
    assert main(["compare", str(path), str(path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"new.json has format version {version!r}; this package reads up to {FORMAT_VERSION}" in said


def test_what_is_printed_as_json_is_json(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "a [1].json", whole())
    assert main(["compare", str(path), str(path), "--json", "--output", str(tmp_path / "page")]) == 0
    told = capsys.readouterr().out
    assert json.loads(told) == json.loads((tmp_path / "page" / "comparison.json").read_text())
    assert json.loads(told)["a"] == str(path)


def test_evaluations_are_not_paired_where_a_seed_repeats_no_episode(tmp_path: Path, capsys) -> None:
    pair = [write(tmp_path / f"{i}.json", whole() | {"seeds_repeat": bool(i)}) for i in (0, 1)]
    for paths in (pair, pair[::-1]):
        assert main(["compare", *map(str, paths), "--output", str(tmp_path / "page")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "does not repeat an episode by its seed, so episodes cannot be compared pair by pair" in said
        assert "A succeeds in 50 % (95 % interval at least 40 %) and B in 50 %" in said
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    "change, refused",
    [
        ({"environment": "avoid:diffusion_policy/Avoid-v0"}, False),
        ({"environment": "Other-v0"}, True),
        ({"wrappers": []}, True),
        ({"env_kwargs": {}}, True),
    ],
)
def test_tasks_are_the_same_under_the_same_wrappers(tmp_path: Path, capsys, change: Any, refused: bool) -> None:
    a, b = write(tmp_path / "a.json", whole()), write(tmp_path / "b.json", whole() | change)
    assert main(["compare", str(a), str(b)]) == (2 if refused else 0)
    assert ("are of different tasks" in capsys.readouterr().err) == refused
