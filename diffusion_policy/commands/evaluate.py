"""diffusion-policy evaluate: success per mode, as results.json and a page."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from diffusion_policy.basics.files import format_json, plain, write_whole
from diffusion_policy.commands.afterwards import PAGE, RESULTS, Remarks, hold_output, require_same, waits_for_page
from diffusion_policy.commands.beside_teacher import measure_teacher
from diffusion_policy.commands.counting import count_results
from diffusion_policy.commands.episodes import (
    RolledOut,
    describe_far_goals,
    make_group_planner,
    require_memory,
    resolve_for_episodes,
    run_episodes,
    sample_starts,
)
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.joining import choose_backend, choose_chunking, find_roll
from diffusion_policy.commands.kept_episodes import choose_kept, has_kept, keep_episodes, read_kept, trace
from diffusion_policy.commands.options.evaluate import Evaluate
from diffusion_policy.commands.pictures import gather_pictures, without_episodes
from diffusion_policy.commands.policy_in_env import (
    PolicyInEnv,
    load_with_environment,
    refuse_seen_seeds,
)
from diffusion_policy.commands.remote import find_server_of
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import BackendName, ChunkingConfig, CostConfig, to_json
from diffusion_policy.control.chunking import Chunking
from diffusion_policy.control.controller import require_horizons
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.planner import Planner
from diffusion_policy.envs.protocols import as_drawable, repeats_by_seed
from diffusion_policy.envs.scene import Scene
from diffusion_policy.evaluation import metrics
from diffusion_policy.evaluation.episode import Episode, Trace
from diffusion_policy.evaluation.results import read_results
from diffusion_policy.evaluation.rollout import planning_batch
from diffusion_policy.report.page import NO_PICTURES, Pictures, write_report
from diffusion_policy.report.text import caveats, scorecard_lines, teacher_rows
from diffusion_policy.serving.backends import make_planner

LATENCY_PLANS = 100
"""Planning calls, for one environment each, that the latency is taken from."""


class Evaluation(NamedTuple):
    """What the parts of one evaluation share."""

    options: Evaluate
    loaded: PolicyInEnv
    asked: Mapping[str, Any]
    """What decides the results: see `tell_asked`."""
    remarks: Remarks
    chunking: Chunking
    backend: BackendName = "eager"
    """What samples."""
    remote: Planner | None = None
    """The server that plans, if one does."""


def run(options: Evaluate) -> dict[str, Any]:
    """Evaluate; returns what results.json holds. Raises ValueError for a checkpoint that does not fit the environment,
    seeds of the demonstrations, too many sampling steps, a delay that the plans cannot bridge, an environment that
    cannot be run, or an output folder that holds something."""
    waits_for_page(options.output)
    loaded = load_with_environment(options, options.sampling)
    policy = loaded.policy
    options = dataclasses.replace(options, sampling=policy.complete(options.sampling))
    steps = policy.config.prediction_horizon - policy.config.observation_horizon + 1
    for delay in options.delay_steps:
        require_horizons(steps, action_horizon_of(options, loaded), delay)
    require_memory(policy, options.sampling, options.parallel)
    refuse_seen_seeds(loaded, options.seeds)
    chunking = choose_chunking(options.chunking, policy, options.sampling, find_roll(loaded.env))
    evaluation = Evaluation(options, loaded, tell_asked(options, loaded), Remarks(), chunking)
    with saying_that_nothing_was_done(), hold_output(options.output) as waits:
        if waits:
            return go_on(evaluation)
        sampling, episodes = options.sampling, options.episodes * options.repeats
        remote = find_server_of(options.remote, loaded.checkpoint, sampling)
        if remote is not None:
            return evaluate(evaluation._replace(backend=remote.served.backend, remote=remote))
        asked = choose_backend(options.backend, chunking)
        backend = resolve_for_episodes(loaded, sampling, asked, options.parallel, episodes)
        return evaluate(evaluation._replace(backend=backend))


@contextlib.contextmanager
def saying_that_nothing_was_done() -> Iterator[None]:
    """Ctrl-C within, which is a plain one before the first episode alone, is Interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("stopped after 0 episodes; nothing was written") from None


def action_horizon_of(options: Evaluate, loaded: PolicyInEnv) -> int:
    """The Ta that this evaluation runs with."""
    trained = loaded.policy.config.action_horizon
    return trained if options.action_horizon is None else options.action_horizon


def tell_asked(options: Evaluate, loaded: PolicyInEnv) -> dict[str, Any]:
    """What decides the results but for the delays: the first fields of results.json."""
    return {
        "environment": loaded.env_id,
        "env_kwargs": loaded.env_kwargs,
        "wrappers": [dict(one) for one in loaded.wrappers],
        "signals": dataclasses.asdict(loaded.signals),
        "checkpoint": str(options.checkpoint),
        "training_steps": loaded.checkpoint.step,
        "weights_sha256": loaded.checkpoint.weights_sha256,
        "repeats": options.repeats,
        "seeds": list(options.seeds),
        "sampling": dataclasses.asdict(options.sampling) | {"clip": loaded.policy.choose_clip(options.sampling)},
        "planning_batch": planning_batch(options.parallel),
        "action_horizon": action_horizon_of(options, loaded),
        "chunking": None if options.chunking == ChunkingConfig() else plain(to_json(options.chunking)),
        "costs": None if options.costs == CostConfig() else plain(to_json(options.costs)),
    }


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Roll out under each delay, keep results and episodes, then do what may fail."""
    rolled_out, results = roll_out_each_delay(evaluation)
    return finish(evaluation, results, rolled_out[evaluation.options.delay_steps[0]].episodes)


def finish(evaluation: Evaluation, results: dict[str, Any], episodes: Sequence[Episode]) -> dict[str, Any]:
    """Measure what is not measured yet, and write the page; returns all results."""
    options, remarks = evaluation.options, evaluation.remarks
    with telling_what_is_kept(options):
        if "seeds_repeat" not in results:
            results = {**results, "seeds_repeat": tell_seeds_repeat(evaluation)}
            with console.status("measuring diversity and latency"):
                results |= plain(measure_plans(evaluation, episodes))
            results |= plain(measure_teacher(options, evaluation.loaded, episodes, remarks))
            remarks.attempt("what was measured after the rollouts is not kept", lambda: keep(options, results), None)
        print_scorecard(results)
        with console.status("filming and drawing"):
            pictures = take_pictures(evaluation, results, episodes)
        write_page(evaluation, results, pictures)
    return results


@contextlib.contextmanager
def telling_what_is_kept(options: Evaluate) -> Iterator[None]:
    """Ctrl-C within is Interrupted, with what can be done with the results."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"stopped; the results are in {options.output}/{RESULTS}, and the same command writes their page"
        ) from None


def roll_out_each_delay(evaluation: Evaluation) -> tuple[dict[int, RolledOut], dict[str, Any]]:
    """The episodes by delay, and the results, which are kept after each delay. A delay that fails after another
    succeeded is a remark; raises Failed, ValueError, FloatingPointError where it is the first, and Interrupted."""
    options, remarks, policy = evaluation.options, evaluation.remarks, evaluation.loaded.policy
    chunking, sampling = evaluation.chunking, options.sampling
    planner = evaluation.remote or make_group_planner(
        policy, sampling, evaluation.backend, options.parallel, samples=chunking.samples
    )
    rolled_out: dict[int, RolledOut] = {}
    results: dict[str, Any] = {}
    for delay in options.delay_steps:
        try:
            rolled_out[delay] = roll_out(evaluation, planner, delay)
        except (Failed, Interrupted, ValueError, FloatingPointError, ConnectionError) as error:
            if not results:
                raise
            if isinstance(error, Interrupted):
                before = f"those of the delays before are in {options.output}/{RESULTS}"
                raise Interrupted(f"stopped before the results of delay {delay}; {before}") from None
            remarks.say(f"no results for planning that takes {delay} control steps: {error}")
            continue
        far = describe_far_goals(policy, rolled_out[delay].episodes)
        if far:
            remarks.say(far)
        with console.status("counting"):
            results = plain(
                {**evaluation.asked, **count_results(evaluation.loaded, rolled_out, evaluation.backend, remarks)}
            )
        keep(options, results)
        if len(rolled_out) == 1:
            with telling_what_is_kept(options), console.status("keeping the episodes"):
                keep_first(evaluation, results, rolled_out[delay].episodes)
    return rolled_out, results


def keep_first(evaluation: Evaluation, results: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
    """Write episodes.zarr, those under the first delay; where that fails it is a remark."""
    output, remarks, plane = evaluation.options.output, evaluation.remarks, as_drawable(evaluation.loaded.env)
    kept = choose_kept(episodes)
    if kept and len(kept) < len(episodes):
        remarks.say(f"only the first {len(kept)} of {len(episodes)} episodes are kept, which are large")

    def trace_all() -> tuple[Scene, list[Trace]] | None:
        return (plane.scene, [trace(episode, plane) for episode in kept]) if plane is not None else None

    traced = remarks.attempt("the episodes are kept without their paths", trace_all, None) or (None, [])
    remarks.attempt("the episodes are not kept", lambda: keep_episodes(output, results, kept, *traced), None)


def roll_out(evaluation: Evaluation, planner: Planner, delay: int) -> RolledOut:
    """All episodes under one delay; raises Failed when every one was lost."""
    options = evaluation.options
    if len(options.delay_steps) > 1:
        console.print(f"planning takes {delay} control steps")
    rolled_out = run_episodes(
        evaluation.loaded,
        options.seeds,
        planner,
        backend=evaluation.backend,
        parallel=options.parallel,
        workers=options.workers,
        repeats=options.repeats,
        delay_steps=delay,
        action_horizon=options.action_horizon,
        chunking=evaluation.chunking,
        hang_after=options.hang_after,
        engine=options.engine,
    )
    if not rolled_out.episodes:
        raise Failed(f"every episode failed: {rolled_out.lost[0].reason}")
    return rolled_out


def go_on(evaluation: Evaluation) -> dict[str, Any]:
    """Write the page of an evaluation that was stopped after its results were kept."""
    options, remarks = evaluation.options, evaluation.remarks
    results = read_results(options.output)
    require_same(options.output, results, evaluation.asked)
    delays = tuple(row.get("steps") for row in results["delay"])
    if delays != options.delay_steps:
        console.print(f"the results are of --delay-steps {' '.join(map(str, delays))} only")
    there = f"{options.output}/{RESULTS} was there already: no episode was run again"
    without = f"{there}, and its page is without paths, plans and films"
    if not has_kept(options.output):
        remarks.say(without)
    elif kept := remarks.attempt(without, lambda: read_kept(options.output, results), None):
        remarks.say(there)
        if len(kept.episodes) < len(results["outcomes"]):
            remarks.say(f"paths, plans and films are of the first {len(kept.episodes)} episodes, which were kept")
        return finish(evaluation, results, kept.episodes)
    print_scorecard(results)
    write_page(evaluation, results, without_episodes(options.checkpoint, remarks))
    return results


def keep(options: Evaluate, results: Mapping[str, Any]) -> None:
    """Write results.json."""
    write_whole(options.output / RESULTS, format_json(results))


def write_page(evaluation: Evaluation, results: Mapping[str, Any], pictures: Pictures) -> None:
    """The page; without pictures where it cannot be made with them."""
    output, remarks = evaluation.options.output, evaluation.remarks

    def write(pictures: Pictures) -> bool:
        write_report(output / PAGE, results, pictures._replace(remarks=tuple(remarks.sentences)))
        return True

    written = remarks.attempt("the page could not be written with its pictures", lambda: write(pictures), False)
    written = written or remarks.attempt("the page could not be written", lambda: write(NO_PICTURES), False)
    page = f"page in {output}/{PAGE}" if written else "the same command tries the page again"
    console.print(f"results in {output}/{RESULTS}, {page}", soft_wrap=True)


def measure_plans(evaluation: Evaluation, episodes: Sequence[Episode]) -> dict[str, Any]:
    """Diversity and latency; where one cannot be measured it stays as it was."""
    loaded, sampling = evaluation.loaded, evaluation.options.sampling

    def diversity() -> dict[str, Any]:
        return {"diversity": dataclasses.asdict(metrics.diversity(sample_starts(loaded, episodes, sampling)))}

    def latency() -> dict[str, Any]:
        chunking, delay, horizon = (
            evaluation.chunking,
            evaluation.options.delay_steps[0],
            evaluation.options.action_horizon,
        )
        planner = evaluation.remote or make_planner(
            loaded.policy, sampling, evaluation.backend, samples=chunking.samples
        )
        times = time_plans(planner, 1, LATENCY_PLANS, chunking, delay_steps=delay, action_horizon=horizon)
        found = metrics.latency(times)
        return {"planning_latency_ms": {name: dataclasses.asdict(metric) for name, metric in found.items()}}

    return {
        **evaluation.remarks.attempt("the diversity could not be measured", diversity, {}),
        **evaluation.remarks.attempt("the time of planning could not be measured", latency, {}),
    }


def tell_seeds_repeat(evaluation: Evaluation) -> bool | None:
    """Whether a seed repeats an episode; None where that cannot be found out."""
    what = "whether a seed repeats an episode could not be found out"
    make_env, seed = evaluation.loaded.make_env, evaluation.options.seed
    return evaluation.remarks.attempt(what, lambda: repeats_by_seed(make_env, seed), None)


def take_pictures(evaluation: Evaluation, results: Mapping[str, Any], episodes: Sequence[Episode]) -> Pictures:
    """What the page shows beside numbers."""
    options, remarks = evaluation.options, evaluation.remarks
    films = options.videos
    if films and results.get("seeds_repeat") is False:
        films = 0
        remarks.say("no films: they replay episodes from their seeds, which do not repeat them here")
    return gather_pictures(
        evaluation.loaded,
        episodes,
        options.sampling,
        remarks,
        run=options.checkpoint,
        films=films,
        workers=options.workers,
    )


def print_scorecard(results: Mapping[str, Any]) -> None:
    """The figures of results.json with their intervals, a line each."""
    table = Table("", "", "95 % interval", box=None)
    for line in scorecard_lines(results):
        table.add_row(line.name, line.value, line.interval)
    console.print(table)
    beside = Table("", "student", "teacher", box=None)
    for row in teacher_rows(results):
        beside.add_row(*row)
    if beside.row_count:
        console.print(beside)
    if results["mode_base"] and results["mode_entropy"]["value"] is None:
        console.print("no episode succeeded in a mode, so the entropy of the modes is undefined")
    if results["mode_base"] == "demonstrations":
        console.print("the environment lists no modes: those of the demonstrations are counted")
    if results["errors"]:
        first = results["errors"][0]
        console.print(
            f"{len(results['errors'])} episodes could not be run and count nowhere, such as seed {first['seed']}: "
            f"{first['reason']}",
            soft_wrap=True,
        )
    for sentence in caveats(results):
        console.print(sentence, soft_wrap=True)
