"""diffusion-policy doctor: why a policy misbehaves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.text import Text

from diffusion_policy import __version__
from diffusion_policy.basics.lines import printable
from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.stores import Keys, choose_angles, choose_keys, open_recorded, open_store
from diffusion_policy.commands.terminal import console, progress_bar
from diffusion_policy.config import ConfigError, PolicyConfig, SampleConfig, require_at_least, require_seed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from diffusion_policy.checkpoints.checkpoint import Checkpoint
    from diffusion_policy.datasets.store import EpisodeStore
    from diffusion_policy.datasets.windows import Windows
    from diffusion_policy.policy import DiffusionPolicy
    from diffusion_policy.training.doctor import Check

PROBED = 512
"""Windows that a trained policy is looked at with."""
PLANNED = 64
"""Windows that plans are sampled for."""
PROBED_NUMBERS = 2**26
"""... but fewer where the network would hold more numbers than these at a time."""
MOST_FITTED = 2**26
"""Weights of a network that is trained here: some 1 GB with gradients and moments."""
MEMORY_BYTES = 3e8
"""Of a larger dataset only the first episodes are looked at."""
READABLE = "data is readable and finite"
COLORS = {"pass": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Doctor:
    """Check a dataset, a trained policy, or both, and say what to do. Exit status 1 when a check fails.

    With a dataset alone the options of the policy are those given here; with a checkpoint they are its own. Without
    --dataset a checkpoint's own dataset is looked for where it was.
    """

    dataset: str | None = None
    """Store of demonstrations: a path or URL."""
    checkpoint: Path | None = None
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    output: Path | None = None
    """Folder for doctor.json and noised.png, a picture of an action sequence at a low, a middle and a high noise level;
    without it neither is written."""
    observation: tuple[str, ...] = ()
    """Keys of the store to observe where no checkpoint says; by default those that it names, else all others."""
    action: tuple[str, ...] = ()
    """Key of the actions where no checkpoint says, or several, whose columns stand side by side; by default the one
    that the store names, else action."""
    angles: tuple[str, ...] = ()
    """Columns that are angles [rad] where no checkpoint says, as state:4; by default those that the store names."""
    overfit_steps: int = 2000
    """Training steps of the test that a new network can learn 32 windows by heart; 0 leaves it out."""
    seed: int = 0
    """Seed of windows, noise and weights."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    policy: Annotated[PolicyConfig, tyro.conf.arg(name="")] = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        require_at_least(self, 0, ("overfit_steps",))
        require_seed(self)
        if self.dataset is None and self.checkpoint is None:
            raise ConfigError("the doctor needs a --dataset, a --checkpoint, or both")

    def run(self) -> list[Check]:
        """Check; returns all checks. Raises ValueError for a dataset or checkpoint that cannot be opened, and Failed
        when a check fails."""
        from diffusion_policy.checkpoints import checkpoint
        from diffusion_policy.policy import choose_device
        from diffusion_policy.training.doctor import draw_timeline

        if self.output:
            require_fresh(self.output)
        device = choose_device(self.device)
        loaded = checkpoint.load(self.checkpoint, device) if self.checkpoint else None
        if loaded:
            loaded.policy.resolve_sampling(self.sampling)
        store, keys, missing = self._find_data(loaded)
        config = loaded.policy.config if loaded else self.policy
        if self.output:
            self.output.mkdir(parents=True, exist_ok=True)
        checks: list[Check] = []
        try:
            for check in chain(missing, self._checks(config, loaded, store, keys, device)):
                checks.append(check)
                status, name = Text(check.status, COLORS[check.status]), Text(check.name, "bold")
                console.print(Text("  ").join([status, Text.assemble(name, ": ", printable(check.figure))]))
                if check.advice:
                    console.print(f"      -> {check.advice}")
        finally:  # whatever ends it, the checks that were made are kept
            if self.output:
                self._write(checks, store)
        console.print_lines(f"\n{draw_timeline(config)}\n", soft_wrap=True)
        failed = [check.name for check in checks if check.status == "fail"]
        if failed:
            raise Failed(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
        return checks

    def _write(self, checks: Sequence[Check], store: EpisodeStore | None) -> None:
        assert self.output is not None
        report = {
            "package_version": __version__,
            "dataset": store.location if store else None,
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        (self.output / "doctor.json").write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"checks in {self.output}/doctor.json")

    def _checks(
        self,
        config: PolicyConfig,
        loaded: Checkpoint | None,
        store: EpisodeStore | None,
        keys: Keys,
        device: torch.device,
    ) -> Iterator[Check]:
        """All checks, one after the other, as far as what they need is there."""
        import numpy as np
        import torch

        from diffusion_policy.checkpoints.checkpoint import count_weights, without_memory
        from diffusion_policy.datasets.statistics import measure
        from diffusion_policy.diffusion.schedules import make_schedule
        from diffusion_policy.policy import DiffusionPolicy
        from diffusion_policy.report.figures import draw_noised
        from diffusion_policy.training import doctor

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
        yield doctor.Check(READABLE, "pass", f"{len(data['action'])} steps of {', '.join(data)}, no NaN, no infinity")
        statistics = {key: measure(data[name])._replace(dtype=store.dtype(key)) for key, name in keys.names.items()}
        modes = loaded.policy.modes if loaded else store.modes
        angles = loaded.policy.shapes.angles if loaded else choose_angles(store, self.angles, keys)

        def make_untrained() -> DiffusionPolicy:
            torch.manual_seed(self.seed)
            named = {keys.names[key]: found for key, found in statistics.items()}
            plain = dataclasses.replace(config, snr_gamma=0.0, condition_dropout=0.0)
            return DiffusionPolicy.for_statistics(plain, named, modes, angles)

        with without_memory():
            weights = count_weights(loaded.policy if loaded else make_untrained())
        policy = loaded.policy if loaded else make_untrained().to(device)
        yield doctor.check_constant({f"data/{key}": s for key, s in statistics.items()}, config.normalization)
        yield from self._check_data(policy, data, ends)
        windows = _windows(policy, store, data, ends)
        if self.output:
            middle = windows.gather(torch.tensor([len(windows) // 2])).actions[0]
            clean = policy.normalizer.normalize("action", middle).cpu().numpy()
            figure = draw_noised(clean, doctor.noised(policy, middle, self.seed))
            figure.savefig(self.output / "noised.png", dpi=150)
            console.print(f"a noised action sequence in {self.output}/noised.png")
        if loaded:
            jumps = doctor.largest_jumps(data["action"], ends)
            yield from self._check_policy(policy, windows, jumps)
        if self.overfit_steps and weights > MOST_FITTED:
            figure = f"{weights} weights; the test is made with at most {MOST_FITTED}"
            yield doctor.Check("overfits 32 windows", "warn", figure, "fewer observed numbers, or smaller widths")
        elif self.overfit_steps:
            with progress_bar("steps") as bar:
                task = bar.add_task("overfitting", total=self.overfit_steps, note="")
                check = doctor.check_overfit(
                    make_untrained().to(device) if loaded else policy,
                    windows,
                    self.overfit_steps,
                    self.seed,
                    lambda step: bar.update(task, completed=step),
                )
            yield check

    def _check_data(
        self, policy: DiffusionPolicy, data: Mapping[str, np.ndarray], episode_ends: np.ndarray
    ) -> Iterator[Check]:
        """What needs no training: the data, and how schedule, normalizer and horizons fit it."""
        import numpy as np
        import torch

        from diffusion_policy.training import doctor

        normalized = policy.normalizer.normalize("action", torch.from_numpy(data["action"]))
        lengths = np.diff(episode_ends, prepend=0)
        yield doctor.check_last_level(policy.diffusion.schedule, float(normalized.square().mean().sqrt()))
        yield doctor.check_horizons(lengths, policy.config)
        yield doctor.check_padding(lengths, policy.config)
        yield doctor.check_clipping(normalized, policy.choose_clip(self.sampling))

    def _find_data(self, loaded: Checkpoint | None) -> tuple[EpisodeStore | None, Keys, list[Check]]:
        """The dataset to look at and the keys to observe; a warning where a checkpoint's own has gone or changed."""
        from diffusion_policy.datasets.store import StoreError
        from diffusion_policy.training.doctor import Check

        if self.dataset is not None:
            store = open_store(self.dataset)
            if loaded is None:
                return store, choose_keys(store, self.observation, self.action), []
            keys = Keys(tuple(loaded.policy.shapes.observations), loaded.dataset.action_key)
            known = {**loaded.policy.shapes.observations, keys.action: loaded.policy.shapes.action}
            for key, shape in known.items():
                found = store.shape(key) if {*store.parts(key)} <= {*store.keys} else "nothing"
                if found != shape:
                    raise ConfigError(f"the policy needs {key} of shape {shape} a step; {self.dataset} has {found}")
            return store, keys, []
        assert loaded is not None
        keys = Keys(tuple(loaded.policy.shapes.observations), loaded.dataset.action_key)
        try:
            store = open_recorded("the checkpoint", loaded.dataset.location)
            if store.fingerprint(*keys) == loaded.dataset.fingerprint:
                return store, keys, []
            found = f"{loaded.dataset.location} is no longer what the policy was trained on"
        except (StoreError, OSError, ConfigError) as error:  # ConfigError: a URL is not opened
            found = str(error)
        return None, keys, [Check("dataset is there", "warn", found, "name one with --dataset for all checks")]

    def _check_policy(self, policy: DiffusionPolicy, windows: Windows, jumps: np.ndarray) -> Iterator[Check]:
        """What needs a trained policy."""
        import torch

        from diffusion_policy.policy import derive_generator
        from diffusion_policy.training import doctor

        order = torch.randperm(len(windows), generator=derive_generator("doctor windows", self.seed))
        probed = min(PROBED, max(2, PROBED_NUMBERS // _numbers_held(policy)))
        batch, few = windows.gather(order[:probed]), windows.gather(order[: min(PLANNED, probed)])
        probes = doctor.probe(policy, batch, self.seed)
        yield doctor.check_noise_scale(probes)
        yield doctor.check_one_step(probes)
        yield doctor.check_conditioning(policy, batch, self.seed)
        yield doctor.check_copying(policy, batch, self.seed)
        yield doctor.check_bound(policy, batch, self.seed)
        yield doctor.check_jumps(policy, few, jumps, self.sampling, self.seed)


def _numbers_held(policy: DiffusionPolicy) -> int:
    """About as many numbers as a window takes while the network looks at it."""
    config, shapes = policy.config, policy.shapes
    observed = sum(math.prod(shape) for shape in shapes.observations.values())
    return config.observation_horizon * observed + config.prediction_horizon * (
        shapes.action[0] + 4 * max(config.widths)
    )


def _windows(
    policy: DiffusionPolicy, store: EpisodeStore, data: Mapping[str, np.ndarray], episode_ends: np.ndarray
) -> Windows:
    """All windows of what was read of a store, with the modes as the policy numbers them."""
    import numpy as np

    from diffusion_policy.datasets.windows import Windows

    modes = None
    if policy.modes:
        labels = store.episode_modes()[: len(episode_ends)]
        modes = np.array([policy.modes.index(label) if label in policy.modes else -1 for label in labels])
    horizons = policy.config.observation_horizon, policy.config.prediction_horizon
    return Windows(data, episode_ends, range(len(episode_ends)), *horizons, policy.device, modes)


def _read(store: EpisodeStore, keys: Keys) -> tuple[dict[str, np.ndarray], np.ndarray, list[Check]]:
    """All rows of these keys, or of the first episodes that fit the memory, and where the episodes end among them; a
    failed check for each key that cannot be read."""
    import numpy as np

    from diffusion_policy.datasets.store import StoreError
    from diffusion_policy.datasets.windows import episodes_within, read_episodes
    from diffusion_policy.training.doctor import Check

    data, ends, problems = {}, np.empty(0), []
    try:
        episodes = episodes_within(store, keys.names, np.arange(len(store.episode_ends)), MEMORY_BYTES)
    except StoreError as error:
        return {}, ends, [Check(READABLE, "fail", str(error), "see what else is wrong: dataset validate")]
    for key, name in keys.names.items():
        try:
            rows, ends = read_episodes(store, {key: name}, episodes)
            data |= rows
        except StoreError as error:
            problems.append(Check(READABLE, "fail", str(error), "see what else is wrong: dataset validate"))
    return data, ends, problems
