"""diffusion-policy train: a policy from a dataset.

Joins a dataset, a policy and a trainer, and keeps what comes of them in the folder of the run: the options, the
numbers, and a checkpoint from time to time. What is learned from is in `training_plan`; what a folder says, in `runs`.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_policy.basics.images import is_image
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands import distilling, image_encoders, latents, runs
from diffusion_policy.commands.interrupts import Failed, Interrupted, stop_on_signal
from diffusion_policy.commands.options.train import Train, read_run, to_options
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.panel import MEASURED, Panel
from diffusion_policy.commands.stores import open_store
from diffusion_policy.commands.terminal import console
from diffusion_policy.commands.training_plan import (
    Plan,
    cut_windows,
    make_plan,
    make_rollouts,
    make_sketch,
    require_batch_memory,
)
from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.streaming import StreamedWindows
from diffusion_policy.datasets.summary import summarize
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.normalizer import NORMALIZATIONS, describe_columns
from diffusion_policy.policy import DiffusionPolicy, choose_device
from diffusion_policy.training.distributed import Distributed, join_processes
from diffusion_policy.training.trackers import make_trackers
from diffusion_policy.training.trainer import Diverged, Progress, Trainer


def run(options: Train) -> None:
    """Train; raises ValueError for bad data, a bad device, an output folder that holds something or is in use, and
    when another training would be resumed; FloatingPointError when the loss is no longer finite."""
    if options.resume and os.path.realpath(options.resume) != os.path.realpath(options.output):
        raise ConfigError(f"--resume {options.resume} goes on in its own folder; got --output {options.output}")
    with join_processes(options.device) as (processes, device):
        quiet, console.quiet = console.quiet, not processes.is_main
        try:
            _run(options, processes, device)
        finally:
            console.quiet = quiet


def _run(options: Train, processes: Distributed, device_name: str) -> None:
    """Train, as one of `processes`."""
    if not options.resume and processes.is_main:
        require_fresh(options.output)
    device = choose_device(device_name)
    options, teacher = distilling.complete(latents.complete(options), device)
    store = open_store(options.dataset)
    plan = make_plan(options, store)
    sketch = make_sketch(options, store, plan)
    rows = int(np.diff(store.episode_ends, prepend=0)[plan.chosen].sum())
    batch = min(options.training.batch_size, rows)
    require_batch_memory(options, batch, processes.world_size, device)
    point = _begin(options, store, plan, sketch, device)
    if teacher is not None:
        distilling.begin(point.policy, teacher)
    image_encoders.begin(point.policy, options.training)
    roll_out = make_rollouts(options, store, point) if options.training.rollout_every else None
    told = _tell(options, store, plan, point.dataset.fingerprint)
    with console.status("reading the data"):
        windows, validation = _read_windows(options, store, plan, point.policy, device)
    _say_what_is_trained(plan, windows, point.policy, processes)
    lessons = distilling.make_lessons(options, point.policy, teacher, windows, validation)
    trainer = Trainer.for_policy(
        point.policy,
        lessons.windows,
        validation,
        options.training,
        loss=lessons.loss,
        validate=lessons.validate,
        distributed=processes,
        roll_out=roll_out,
    )
    with runs.lock(options.output, told, options.resume is not None) if processes.is_main else contextlib.nullcontext():
        if options.resume:
            _restore(trainer, options.resume)
        if trainer.step >= options.training.steps:
            console.print(f"{options.output} has all its {options.training.steps} steps")
        elif processes.is_main:
            _train(options, trainer, point, store.episode_ends)
        else:
            with stop_on_signal() as stop:
                trainer.run(should_stop=stop.is_set)


def _read_windows(
    options: Train, store: EpisodeStore, plan: Plan, policy: DiffusionPolicy, device: torch.device
) -> tuple[Windows | StreamedWindows, Windows | None]:
    """The windows to train on and those held out; what of the policy is frozen gets what it needs of them."""
    windows, validation = cut_windows(options, store, plan, device)
    latents.begin(policy, options, windows)
    if options.training.freeze_vision:
        windows = image_encoders.cache(windows, policy, options.training)
        validation = validation and image_encoders.cache(validation, policy, options.training)
    return windows, validation


def _begin(options: Train, store: EpisodeStore, plan: Plan, sketch: Checkpoint, device: torch.device) -> Checkpoint:
    """The sketch with what the data say: untrained weights, normalizer and fingerprint; raises CheckpointError where it
    could not be saved."""
    with console.status("measuring the data"):
        summary = summarize(store, plan.keys.observations, plan.keys.target, plan.chosen)
    columns = {f"data/{key}": summary.statistics[name] for name, key in plan.keys.names.items()}
    for sentence in describe_columns(columns, NORMALIZATIONS[options.policy.normalization]):
        console.print(sentence)
    torch.manual_seed(options.training.seed)
    policy = DiffusionPolicy.for_statistics(
        options.policy,
        summary.statistics,
        store.modes,
        plan.angles,
        plan.labels.instructions,
        plan.labels.embeddings,
        _read_rows(store, plan),
        sketch.policy.shapes.target,
    ).to(device)
    point = replace(sketch, policy=policy, dataset=replace(sketch.dataset, fingerprint=summary.fingerprint))
    checkpoint.require_savable(point)
    return point


def _read_rows(store: EpisodeStore, plan: Plan) -> Iterator[dict[str, np.ndarray]]:
    """The rows of each episode to train on, by the names of the keys once they are read; without images."""
    names = {name: key for name, key in plan.keys.names.items() if not is_image(store.shape(key))}
    for episode in store.episodes(plan.chosen.tolist(), tuple(dict.fromkeys(names.values()))):
        yield {name: episode.data[key] for name, key in names.items()}


def _tell(options: Train, store: EpisodeStore, plan: Plan, fingerprint: str) -> dict[str, Any]:
    """What the run's folder says of this training, with the keys and angles that the store named; raises ConfigError
    where it goes on and the folder says otherwise."""
    angles = {plan.keys.names[name]: ",".join(map(str, columns)) for name, columns in plan.angles.items()}
    angles = tuple(f"{key}:{columns}" for key, columns in angles.items())
    completed = replace(options, observation=plan.keys.observations, action=(plan.keys.action,), angles=angles)
    told = to_options(completed, fingerprint, plan.labels.tell(store.modes))
    if options.resume:
        runs.require_same(options.resume, read_run(options.resume), told)
    return told


def _say_what_is_trained(
    plan: Plan, windows: Windows | StreamedWindows, policy: DiffusionPolicy, processes: Distributed
) -> None:
    """How many episodes, windows and parameters, and where."""
    parameters = sum(weight.numel() for weight in policy.parameters())
    console.print(
        f"{len(plan.chosen)} training and {len(plan.held_out)} validation episodes, {len(windows)} windows"
        f"{'' if isinstance(windows, Windows) else ' streamed from the store'}, "
        f"{parameters / 1e6:.1f} M parameters, on {policy.device}"
        f"{'' if processes.world_size == 1 else f', {processes.world_size} processes'}"
    )


def _restore(trainer: Trainer, run: Path) -> None:
    """Take up the newest checkpoint of a run that is whole, if it has one; raises CheckpointError where all are
    damaged."""
    folders = checkpoint.steps_of(run)
    for folder in reversed(folders):
        try:
            loaded = checkpoint.load(folder)
            weights = loaded.policy.state_dict()
            state = checkpoint.load_training(folder, sum(weight.numel() for weight in weights.values()))
        except checkpoint.CheckpointError as error:
            if folder == folders[0]:
                raise
            console.print(f"{error}; going on from an older checkpoint", soft_wrap=True)
            continue
        trainer.restore(loaded.step, weights, state)
        console.print(f"going on from {folder}", soft_wrap=True)
        return


class Saver:
    """Writes the checkpoints of a run, each with what was measured at its very step."""

    def __init__(self, run: Path, trainer: Trainer, point: Checkpoint) -> None:
        self._run, self._trainer, self._point = run, trainer, point
        self.latest: Progress | None = None
        """The last numbers that were reported."""

    def save(self) -> Path:
        """Write one; returns its folder. Raises CheckpointError."""
        trainer, settings = self._trainer, self._trainer.config
        now = self.latest._asdict() if self.latest and self.latest.step == trainer.step else {}
        metrics = {name: now[name] for name in MEASURED if now.get(name) is not None}
        point = replace(self._point, policy=trainer.ema, step=trainer.step, metrics=metrics)
        kept = settings.keep_checkpoints, settings.keep_best
        return checkpoint.save(self._run, point, trainer.state(), *kept, count_due=True)


def _train(options: Train, trainer: Trainer, point: Checkpoint, episode_ends: np.ndarray) -> None:
    """Train with a panel, trackers, and a checkpoint from time to time; raises Interrupted when it was stopped."""
    run, settings, saver = options.output, options.training, Saver(options.output, trainer, point)
    with (
        stop_on_signal() as stop,
        Panel(settings.steps, trainer.step, str(trainer.ema.device)) as panel,
        make_trackers(options.tracker, run, read_run(run), trainer.step, panel.note) as trackers,
    ):
        guard = distilling.Guard(settings.distillation.guard, settings.steps)

        def show(progress: Progress) -> None:
            saver.latest = progress
            panel.update(progress)
            guard.hear(progress, panel.note)
            trackers.log(progress.step, progress._asdict())
            if progress.step % settings.checkpoint_every == 0 and progress.step < settings.steps:
                try:
                    panel.note("", checkpoint=saver.save())
                except checkpoint.CheckpointError as error:
                    panel.note(f"no checkpoint at step {progress.step}: {error}; {runs.last_checkpoint(run)}")

        with _say_what_is_left(run, episode_ends):
            trainer.run(show, lambda: stop.is_set() or bool(guard.reason))
            folder = saver.save()
        panel.note(f"checkpoint in {folder}", checkpoint=folder)
    if guard.reason:
        raise Failed(f"stopped by --guard, {guard.reason}; checkpoint in {folder}")
    if trainer.step < settings.steps:
        raise Interrupted(
            f"stopped after step {trainer.step} of {settings.steps}; checkpoint in {folder}; {runs.resume_command(run)}"
        )


@contextlib.contextmanager
def _say_what_is_left(run: Path, episode_ends: np.ndarray) -> Iterator[None]:
    """Have what ends a training say which checkpoint there is, and how to go on."""
    try:
        yield
    except Diverged as error:
        raise FloatingPointError(runs.divergence_report(run, error, episode_ends)) from error
    except (OSError, checkpoint.CheckpointError) as error:  # such as a full disk
        raise OSError(f"{error}; {runs.what_is_left(run)}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"stopped at once; {runs.what_is_left(run)}") from None
