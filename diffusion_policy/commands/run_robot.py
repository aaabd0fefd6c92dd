"""diffusion-policy run-robot: a policy that steers a robot in real time."""

import contextlib
import json
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import numpy as np

from diffusion_policy.basics.files import format_json, plain, write_whole
from diffusion_policy.basics.text import error_line
from diffusion_policy.commands.afterwards import Remarks
from diffusion_policy.commands.interrupts import Failed, stop_on_signal
from diffusion_policy.commands.joining import choose_backend, choose_chunking, find_score
from diffusion_policy.commands.loading import load
from diffusion_policy.commands.options.acting import parse_env_kwargs
from diffusion_policy.commands.options.run_robot import RunRobot
from diffusion_policy.commands.outputs import holding, require_fresh
from diffusion_policy.commands.remote import find_server
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError, SampleConfig
from diffusion_policy.control.chunking import Chunking, Roll, make_chunking
from diffusion_policy.control.limits import Limits
from diffusion_policy.control.planner import Planner
from diffusion_policy.control.realtime import RealTimeRunner, Robot
from diffusion_policy.control.run_log import RunLog
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs import modules
from diffusion_policy.report.run_page import summarize, write_run_page
from diffusion_policy.serving.backends import RUNTIMES, make_planner
from diffusion_policy.serving.exported import ExportedPolicy

PAGE, STORE, RESULTS = "run.html", "log.zarr", "results.json"


def run(options: RunRobot) -> dict[str, Any]:
    """Steer the robot; returns what results.json holds. Raises ConfigError for options that cannot work, also a rate
    that planning cannot keep, and Failed where the run ended by a fault."""
    require_fresh(options.output)
    with holding(options.output):
        try:
            return _run(options)
        finally:
            with contextlib.suppress(OSError):  # it holds something
                options.output.rmdir()


def _run(options: RunRobot) -> dict[str, Any]:
    """See `run`; the output folder is there."""
    robot = make_robot(options)
    try:
        roll = getattr(robot, "roll_forward", None)
        planner, chunking = choose_planner(options, None if roll is None else partial(modules.call, roll))
        runner = RealTimeRunner(
            planner,
            options.hz,
            chunking=chunking,
            action_horizon=options.action_horizon,
            delay_steps=options.delay_steps,
            limits=Limits(*(getattr(options, one.name) for one in fields(Limits))),
            watchdog=options.watchdog,
            dry_run=options.dry_run,
            seed=options.seed,
        )
    except BaseException:
        robot.stop()
        raise
    console.print(f"running at {options.hz:g} steps a second; Ctrl-C stops")
    with stop_on_signal() as stop:
        log = runner.run(robot, options.steps, stop)
        success = getattr(robot, "success", None)
        results = keep(options, log, bool(success) if isinstance(success, bool | np.bool_) else None)
    for line in log.warnings:
        console.print(line, soft_wrap=True)
    out.print(
        f"{log.ended}; {len(log.actions)} actions, {log.late} of them over 10 ms late, {log.missed} steps left out, "
        f"{log.starved} without an action; log in {options.output}",
        soft_wrap=True,
    )
    if log.failed:
        raise Failed(log.ended)
    return results


def make_robot(options: RunRobot) -> Robot:
    """The user's robot; raises ConfigError for a class that is none, or cannot be made."""
    kind = modules.load(options.robot)
    missing = [name for name in ("observe", "act", "stop") if not callable(getattr(kind, name, None))]
    if missing:
        raise ConfigError(f"{options.robot} must have observe(), act(action) and stop(); it lacks {', '.join(missing)}")
    arguments = parse_env_kwargs(options.robot_kwargs, "--robot-kwargs") if options.robot_kwargs else {}
    try:
        return kind(**arguments)
    except Exception as error:
        raise ConfigError(f"{options.robot} cannot be made: {error_line(error)}") from error


def choose_planner(options: RunRobot, roll: Roll | None) -> tuple[Planner, Chunking]:
    """What plans, and how plans are joined."""
    remote = find_server(options.remote)
    if remote is not None:
        if options.chunking.weak_checkpoint is not None:
            raise ConfigError("--weak-checkpoint is for a policy that is not served")
        if options.sampling not in (SampleConfig(), remote.served.sampling):
            raise ConfigError("the server samples as it was told; leave the sampling options out")
        return remote, make_chunking(options.chunking, roll=roll, score=find_score(options.chunking))
    assert options.checkpoint is not None
    runtime = RUNTIMES.get(options.backend, "onnxruntime")
    loaded = load(options.checkpoint, options.device, runtime=runtime, precision=options.precision)
    if isinstance(loaded, ExportedPolicy):
        if options.sampling not in (SampleConfig(), loaded.config.sampling):
            raise ConfigError("an exported policy samples as it was exported; leave the sampling options out")
        if options.chunking.weak_checkpoint is not None:
            raise ConfigError("--weak-checkpoint is for a policy that is not exported")
        chunking = make_chunking(options.chunking, roll=roll, score=find_score(options.chunking))
        loaded.require_samples(chunking)
        return loaded.planner, chunking
    chunking = choose_chunking(options.chunking, loaded.policy, options.sampling, roll)
    backend = choose_backend(options.backend, chunking)
    samples, precision = chunking.samples, options.precision
    return make_planner(loaded.policy, options.sampling, backend, samples=samples, precision=precision), chunking


def keep(options: RunRobot, log: RunLog, success: bool | None) -> dict[str, Any]:
    """Write log, results and page; what fails is a remark. Returns the results."""
    remarks = Remarks()
    remarks.attempt("the log could not be kept", lambda: write_log(options, log, success), None)
    asked = {
        "robot": options.robot,
        "robot_kwargs": json.loads(options.robot_kwargs or "{}"),
        "checkpoint": options.checkpoint and str(options.checkpoint),
        "server": options.remote.server,
        "hz": options.hz,
        "sampling": asdict(options.sampling),
        "chunking": asdict(options.chunking),
        "dry_run": options.dry_run,
        "success": success,
    }
    results = plain(asked | summarize(log))
    text = format_json(results)
    remarks.attempt(f"{RESULTS} could not be written", lambda: write_whole(options.output / RESULTS, text), None)
    remarks.attempt("no page", lambda: write_run_page(options.output / PAGE, results, log), None)
    return results


def write_log(options: RunRobot, log: RunLog, success: bool | None) -> None:
    """The run as an episode of a store: what was observed and executed, when, and the plan that was followed with the
    number of its step that was."""
    if not log.actions:
        return
    followed = np.array(log.plan_of)
    asked = np.array([plan.asked for plan in log.plans])
    data = {
        "time": np.array(log.times)[:, None],
        "plan": np.stack([plan.plan for plan in log.plans])[followed],
        "plan_step": (np.arange(len(followed)) - asked[followed])[:, None],
        **{key: np.stack(rows) for key, rows in log.observations.items()},
        "action": np.stack(log.actions),
    }
    attributes = {
        "control_frequency": options.hz,
        "observation_keys": sorted(log.observations),
        "action_key": "action",
        "robot": options.robot,
        **({"dry_run": True} if options.dry_run else {}),
    }
    with EpisodeStore.create(options.output / STORE, attributes, ()) as store:
        store.append([Demonstration(data, success=success)])
