"""diffusion-policy doctor: why a policy misbehaves.

Finds a dataset and a policy, and makes the checks of `training.doctor` as far as what they need is there.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.text import Text

from diffusion_policy import __version__
from diffusion_policy.basics.text import printable
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint, count_weights, without_memory
from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.labels import read_labels
from diffusion_policy.commands.options.doctor import Doctor
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.stores import Keys, choose_angles, choose_keys, open_recorded, open_store
from diffusion_policy.commands.terminal import console, progress_bar
from diffusion_policy.config import ConfigError, PolicyConfig
from diffusion_policy.datasets.statistics import Statistics, measure
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.streaming import episodes_within, read_episodes
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.diffusion.schedules import make_schedule
from diffusion_policy.policy import DiffusionPolicy, choose_device
from diffusion_policy.report.figures import draw_noised
from diffusion_policy.training import doctor
from diffusion_policy.training.doctor import Check
from diffusion_policy.training.losses import derive_generator

PROBED = 512
"""Windows that a trained policy is looked at with."""
PLANNED = 64
"""Windows that plans are sampled for."""
PROBED_NUMBERS = 2**26
"""Numbers that the network may hold at a time; fewer windows are looked at where it would hold more."""
MOST_FITTED = 2**26
"""Weights of a network that is trained here: some 1 GB with gradients and moments."""
MEMORY_BYTES = 3e8
"""Of a larger dataset only the first episodes are looked at."""
READABLE = "data is readable and finite"
COLORS = {"pass": "green", "warn": "yellow", "fail": "red"}


class Subject(NamedTuple):
    """What is looked at."""

    config: PolicyConfig
    loaded: Checkpoint | None
    store: EpisodeStore | None
    keys: Keys
    device: torch.device


class Rows(NamedTuple):
    """What was read of a dataset."""

    store: EpisodeStore
    data: dict[str, np.ndarray]
    episode_ends: np.ndarray
    statistics: dict[str, Statistics]
    """By the names of `data`."""

    @property
    def episodes(self) -> Iterator[dict[str, np.ndarray]]:
        """The rows of each episode, as `data`."""
        for first, end in zip([0, *self.episode_ends[:-1]], self.episode_ends, strict=True):
            yield {key: rows[first:end] for key, rows in self.data.items()}


def run(options: Doctor) -> list[Check]:
    """Check; returns all checks. Raises ValueError for a dataset or checkpoint that cannot be opened, and Failed when a
    check fails."""
    if options.output:
        require_fresh(options.output)
    device = choose_device(options.device)
    loaded = checkpoint.load(options.checkpoint, device) if options.checkpoint else None
    if loaded:
        loaded.policy.resolve_sampling(options.sampling)
    store, keys, missing = _find_data(options, loaded)
    subject = Subject(loaded.policy.config if loaded else options.policy, loaded, store, keys, device)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    checks: list[Check] = []
    try:
        for check in chain(missing, _check_all(options, subject)):
            checks.append(check)
            status, name = Text(check.status, COLORS[check.status]), Text(check.name, "bold")
            console.print(Text("  ").join([status, Text.assemble(name, ": ", printable(check.figure))]))
            if check.advice:
                console.print(f"      -> {check.advice}")
    finally:  # whatever ends it, the checks that were made are kept
        if options.output:
            _write(options.output, options.checkpoint, checks, store)
    console.print_lines(f"\n{doctor.draw_timeline(subject.config)}\n", soft_wrap=True)
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        raise Failed(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    return checks


def _write(output: Path, path: Path | None, checks: Sequence[Check], store: EpisodeStore | None) -> None:
    """doctor.json; `path`: of the checkpoint."""
    report = {
        "package_version": __version__,
        "dataset": store.location if store else None,
        "checkpoint": str(path) if path else None,
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    (output / "doctor.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"checks in {output}/doctor.json")


def _find_data(options: Doctor, loaded: Checkpoint | None) -> tuple[EpisodeStore | None, Keys, list[Check]]:
    """The dataset to look at and the keys to observe; a warning where a checkpoint's own has gone or changed."""
    if loaded is None:
        assert options.dataset is not None
        store = open_store(options.dataset)
        return store, choose_keys(store, options.observation, options.action, options.policy), []
    policy = loaded.policy
    observed = tuple(policy.shapes.observations)
    keys = Keys(observed, loaded.dataset.action_key, loaded.predicted, policy.config.target)
    if options.dataset is not None:
        store = open_store(options.dataset)
        known = {**policy.shapes.observations, keys.target: policy.shapes.row}
        for key, shape in known.items():
            found = store.shape(key) if {*store.parts(key)} <= {*store.keys} else "nothing"
            if found != shape:
                raise ConfigError(f"the policy needs {key} of shape {shape} a step; {options.dataset} has {found}")
        return store, keys, []
    try:
        store = open_recorded("the checkpoint", loaded.dataset.location)
        if store.fingerprint(keys.observations, keys.target) == loaded.dataset.fingerprint:
            return store, keys, []
        found = f"{loaded.dataset.location} is no longer what the policy was trained on"
    except (StoreError, OSError, ConfigError) as error:  # ConfigError: a URL is not opened
        found = str(error)
    return None, keys, [Check("dataset is there", "warn", found, "name one with --dataset for all checks")]


def _check_all(options: Doctor, subject: Subject) -> Iterator[Check]:
    """All checks, one after the other, as far as what they need is there."""
    config, store, keys = subject.config, subject.store, subject.keys
    check, schedule = doctor.check_decreasing(
        lambda: make_schedule(config.schedule, config.noise_levels, config.schedule_options)
    )
    yield check
    if schedule is None:
        return
    yield doctor.check_first_level(schedule)
    data, ends, problems = _read(store, keys) if store else ({}, np.empty(0), [])
    yield from problems
    if store is None or problems:
        yield doctor.check_last_level(schedule)
        return
    yield Check(READABLE, "pass", f"{len(data['action'])} steps of {', '.join(data)}, no NaN, no infinity")
    statistics = {name: measure(data[name])._replace(dtype=store.dtype(key)) for name, key in keys.names.items()}
    yield from _check_with_data(options, subject, Rows(store, data, ends, statistics))


def _check_with_data(options: Doctor, subject: Subject, rows: Rows) -> Iterator[Check]:
    """What needs data: of them alone, of a trained policy, and of one that is trained here."""
    loaded, make = subject.loaded, partial(_make_untrained, options, subject, rows)
    with without_memory():
        weights = count_weights(loaded.policy if loaded else make())
    policy = loaded.policy if loaded else make().to(subject.device)
    columns = {f"data/{subject.keys.names[name]}": found for name, found in rows.statistics.items()}
    yield doctor.check_constant(columns, subject.config.normalization)
    yield from _check_data(options, policy, rows)
    windows = _windows(policy, rows.store, rows.data, rows.episode_ends)
    if options.output:
        _draw_noised(options.output / "noised.png", policy, windows, options.seed)
    if loaded:
        jumps = doctor.largest_jumps(rows.data["action"][:, policy.shapes.executed], rows.episode_ends)
        yield from _check_policy(options, policy, windows, jumps)
    if options.overfit_steps and weights > MOST_FITTED:
        figure = f"{weights} weights; the test is made with at most {MOST_FITTED}"
        yield Check("overfits 32 windows", "warn", figure, "fewer observed numbers, or a smaller network")
    elif options.overfit_steps:
        yield _check_overfit(options, make().to(subject.device) if loaded else policy, windows)


def _make_untrained(options: Doctor, subject: Subject, rows: Rows) -> DiffusionPolicy:
    """A new policy for these data that denoises, whose loss weighs all levels alike and drops no condition."""
    loaded = subject.loaded
    modes = loaded.policy.modes if loaded else rows.store.modes
    angles = loaded.policy.shapes.angles if loaded else choose_angles(rows.store, options.angles, subject.keys)
    target = loaded.policy.shapes.target if loaded else subject.keys.sizes(rows.store)
    torch.manual_seed(options.seed)
    plain = dataclasses.replace(
        subject.config, objective="denoising", student_steps=0, snr_gamma=0.0, condition_dropout=0.0
    )
    if loaded is None:
        labels = read_labels(rows.store, plain)
        texts, embeddings = labels.instructions, labels.embeddings
    else:  # its rows are embeddings too: they tell apart what it was trained on
        texts, known = loaded.policy.instructions, loaded.policy.label_rows
        embeddings = known.get_buffer("rows").cpu().numpy() if known.size else None
    return DiffusionPolicy.for_statistics(
        plain, rows.statistics, modes, angles, texts, embeddings, rows.episodes, target
    )


def _draw_noised(path: Path, policy: DiffusionPolicy, windows: Windows, seed: int) -> None:
    """A picture of an action sequence at a low, a middle and a high noise level."""
    middle = windows.gather(torch.tensor([len(windows) // 2]))
    clean = policy.sequences.normalize(middle.actions, middle.observations)[0]
    draw_noised(clean.cpu().numpy(), doctor.noised(policy, clean, seed)).savefig(path, dpi=150)
    console.print(f"a noised action sequence in {path}")


def _check_data(options: Doctor, policy: DiffusionPolicy, rows: Rows) -> Iterator[Check]:
    """What needs no training: the data, and how schedule, normalizer and horizons fit it."""
    told = torch.cat([some for episode in rows.episodes for some in policy.express_rows(episode)])
    normalized, lengths = policy.normalizer.normalize("action", told), np.diff(rows.episode_ends, prepend=0)
    yield doctor.check_last_level(policy.diffusion.schedule, float(normalized.square().mean().sqrt()))
    yield doctor.check_horizons(lengths, policy.config)
    yield doctor.check_padding(lengths, policy.config)
    yield doctor.check_clipping(normalized, policy.choose_clip(options.sampling))


def _check_policy(options: Doctor, policy: DiffusionPolicy, windows: Windows, jumps: np.ndarray) -> Iterator[Check]:
    """What needs a trained policy."""
    order = torch.randperm(len(windows), generator=derive_generator("doctor windows", options.seed))
    probed = min(PROBED, max(2, PROBED_NUMBERS // _numbers_held(policy)))
    batch, few = windows.gather(order[:probed]), windows.gather(order[: min(PLANNED, probed)])
    if policy.config.is_few_step:
        said = f"{policy.config.describe_objective()} knows no other levels, so nothing is measured there"
        yield Check("is asked at its own steps", "pass", said)
        yield doctor.check_jumps(policy, few, jumps, options.sampling, options.seed)
        return
    probes = doctor.probe(policy, batch, options.seed)
    yield doctor.check_noise_scale(probes)
    yield doctor.check_one_step(probes)
    yield doctor.check_conditioning(policy, batch, options.seed)
    yield doctor.check_copying(policy, batch, options.seed)
    yield doctor.check_bound(policy, batch, options.seed)
    yield doctor.check_jumps(policy, few, jumps, options.sampling, options.seed)
    if policy.sequences.held is not None:
        yield doctor.check_held(policy, few, options.sampling, options.seed)


def _check_overfit(options: Doctor, policy: DiffusionPolicy, windows: Windows) -> Check:
    """The test that a new policy can learn some windows by heart, behind a progress bar."""
    with progress_bar("steps") as bar:
        task = bar.add_task("overfitting", total=options.overfit_steps, note="")

        def show(step: int) -> None:
            bar.update(task, completed=step)

        return doctor.check_overfit(policy, windows, options.overfit_steps, options.seed, show)


def _numbers_held(policy: DiffusionPolicy) -> int:
    """About as many numbers as a window takes while the network looks at it."""
    config, shapes = policy.config, policy.shapes
    observed = sum(math.prod(shape) for shape in shapes.observations.values())
    within = config.network.numbers_held(config.predicted_steps)
    return config.observation_horizon * observed + config.prediction_horizon * shapes.row[0] + within


def _windows(
    policy: DiffusionPolicy, store: EpisodeStore, data: Mapping[str, np.ndarray], episode_ends: np.ndarray
) -> Windows:
    """All windows of what was read of a store, with the modes or instructions as the policy numbers them."""
    labels = None
    if policy.labels:
        told = (store.episode_modes() if policy.modes else store.episode_instructions())[: len(episode_ends)]
        labels = np.array([policy.labels.index(label) if label in policy.labels else -1 for label in told])
    horizons = policy.config.observation_horizon, policy.config.prediction_horizon
    return Windows(data, episode_ends, range(len(episode_ends)), *horizons, device=policy.device, labels=labels)


def _read(store: EpisodeStore, keys: Keys) -> tuple[dict[str, np.ndarray], np.ndarray, list[Check]]:
    """All rows of these keys, or of the first episodes that fit the memory, and where the episodes end among them; a
    failed check for each key that cannot be read."""
    data, ends, problems = {}, np.empty(0), []
    try:
        episodes = episodes_within(store, keys.names.values(), np.arange(len(store.episode_ends)), MEMORY_BYTES)
    except StoreError as error:
        return {}, ends, [Check(READABLE, "fail", str(error), "see what else is wrong: dataset validate")]
    for name, key in keys.names.items():
        try:
            rows, ends = read_episodes(store, {name: key}, episodes)
            data |= rows
        except StoreError as error:
            problems.append(Check(READABLE, "fail", str(error), "see what else is wrong: dataset validate"))
    return data, ends, problems
