"""diffusion-policy train: a policy from a data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffusion_policy.commands.common import (
    Interrupted,
    Keys,
    choose_angles,
    choose_keys,
    console,
    open_store,
    progress_bar,
    require_fresh,
    stop_on_signal,
)
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from diffusion_policy.checkpoint import Dataset, Environment
    from diffusion_policy.datasets.statistics import Summary
    from diffusion_policy.datasets.store import EpisodeStore
    from diffusion_policy.datasets.windows import StreamedWindows, Windows
    from diffusion_policy.trainer import Progress, Trainer


VALIDATION_BYTES = 2**24
"""Memory of the held-out windows where the others are streamed."""


@dataclass(frozen=True)
class Train:
    """Train a diffusion policy on a data set; write checkpoints and metrics.jsonl into a new folder.

    Ctrl-C leaves a checkpoint of the last step.
    """

    dataset: str
    """Store of demonstrations: a path or URL."""
    output: Path
    """Folder of this run."""
    config: Path | None = None
    """Take policy and training options from this JSON, such as a checkpoint's config.json; flags override it."""
    observation: tuple[str, ...] = ()
    """Keys of the store that the policy observes; by default those that the store names, else all but the action."""
    action: str | None = None
    """Key of the store that holds the actions; by default the one that the store names, else action."""
    angles: tuple[str, ...] = ()
    """Columns that are angles [rad], as state:4 or pose:3,4,5: the network sees their cosine and sine. By default those
    that the store names."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""
    policy: Annotated[PolicyConfig, tyro.conf.arg(name="")] = field(default_factory=PolicyConfig)
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> None:
        """Train; raises ValueError for bad data, a bad device, or an output folder that holds something."""
        import numpy as np
        import torch

        from diffusion_policy import checkpoint
        from diffusion_policy.datasets.statistics import summarize
        from diffusion_policy.datasets.windows import Windows, split_episodes
        from diffusion_policy.policy import DiffusionPolicy, choose_device
        from diffusion_policy.trainer import Trainer

        require_fresh(self.output)
        device = choose_device(self.device)
        store = open_store(self.dataset)
        keys = choose_keys(store, self.observation, self.action)
        angles = choose_angles(store, self.angles, keys)
        lengths = np.diff(store.episode_ends, prepend=0)
        settings = self.training
        chosen, held_out = split_episodes(len(lengths), settings.validation_share, settings.seed, settings.max_episodes)
        self._look_at_lengths(lengths[chosen])

        torch.manual_seed(settings.seed)
        with console.status("measuring the data"):
            summary = summarize(store, keys.observations, keys.action, chosen)
        policy = DiffusionPolicy.for_statistics(self.policy, summary.statistics, store.modes, angles).to(device)
        with console.status("reading the data"):
            windows, validation = self._cut_windows(store, keys, chosen, held_out, device)
        trainer = Trainer(policy, windows, validation, settings)
        environment, dataset = describe(store, keys, summary)
        parameters = sum(weight.numel() for weight in policy.parameters())
        console.print(
            f"{len(chosen)} training and {len(held_out)} validation episodes, {len(windows)} windows"
            f"{'' if isinstance(windows, Windows) else ' streamed from the store'}, "
            f"{parameters / 1e6:.1f} M parameters, on {device}"
        )

        def save() -> Path:
            point = checkpoint.Checkpoint(trainer.averaged, self.training, environment, dataset, trainer.step)
            return checkpoint.save(self.output, point, trainer.state())

        self.output.mkdir(parents=True, exist_ok=True)
        with stop_on_signal() as stop:
            self._train(trainer, stop.is_set, save)
            folder = save()
        if trainer.step < self.training.steps:
            raise Interrupted(f"stopped after step {trainer.step} of {self.training.steps}; checkpoint in {folder}")
        console.print(f"checkpoint in {folder}")

    def _cut_windows(
        self, store: EpisodeStore, keys: Keys, chosen: np.ndarray, held_out: np.ndarray, device: torch.device
    ) -> tuple[Windows | StreamedWindows, Windows | None]:
        """The windows to train on, and those of as many held-out episodes as fit the memory."""
        from diffusion_policy.datasets.windows import Windows, episodes_within, hold_windows, load_windows

        horizons = self.policy.observation_horizon, self.policy.prediction_horizon
        modes = store.mode_indices() if self.policy.condition_on_mode else None
        memory = self.training.memory_gb * 1e9
        windows = load_windows(store, keys.names, chosen, *horizons, device, modes, memory)
        if len(held_out) == 0:
            return windows, None
        few = episodes_within(store, keys.names, held_out, memory if isinstance(windows, Windows) else VALIDATION_BYTES)
        return windows, hold_windows(store, keys.names, few, *horizons, device, modes)

    def _look_at_lengths(self, lengths: np.ndarray) -> None:
        """Raise ConfigError when no episode is as long as a window; say so when some are not."""
        horizon = self.policy.prediction_horizon
        short = int((lengths < horizon).sum())
        if short == len(lengths):
            raise ConfigError(
                f"no episode of {self.dataset} is as long as a window: the longest has {lengths.max()} steps, the "
                f"prediction-horizon is {horizon}; lower it"
            )
        if short:
            console.print(
                f"{short} of {len(lengths)} episodes are shorter than a window of {horizon} steps (the shortest has "
                f"{lengths.min()}); their last action is repeated"
            )

    def _train(self, trainer: Trainer, should_stop: Callable[[], bool], save: Callable[[], object]) -> None:
        """Train with a bar, a line at each validation, metrics.jsonl, and a checkpoint from time to time."""
        with progress_bar("steps") as bar, (self.output / "metrics.jsonl").open("w") as metrics:
            task = bar.add_task("training", total=self.training.steps, note="")

            def show(progress: Progress) -> None:
                note = f"loss {progress.loss:.3f}, {progress.steps_per_second:.1f}/s"
                bar.update(task, completed=progress.step, note=note)
                metrics.write(json.dumps(progress._asdict()) + "\n")
                metrics.flush()
                if progress.validation_loss is not None:
                    losses = f"loss {progress.loss:.4f}, validation loss {progress.validation_loss:.4f}"
                    bar.console.print(f"step {progress.step}: {losses}")
                if progress.step % self.training.checkpoint_every == 0:
                    save()

            trainer.run(show, should_stop)


def describe(store: EpisodeStore, keys: Keys, summary: Summary) -> tuple[Environment, Dataset]:
    """What a checkpoint says of its data set."""
    from diffusion_policy.checkpoint import Dataset, Environment
    from diffusion_policy.datasets.statistics import to_json
    from diffusion_policy.metrics import NONE

    recorded = store.attributes.get("environment", {})
    modes = [mode or NONE for mode in store.episode_modes()]
    seeds = store.seeds()
    local = Path(store.location)
    environment = Environment(
        recorded.get("id"), recorded.get("arguments", {}), store.modes, recorded.get("signals", {})
    )
    dataset = Dataset(
        location=str(local.resolve()) if local.exists() else store.location,
        fingerprint=summary.fingerprint,
        episodes=len(modes),
        steps=int(store.episode_ends[-1]),
        modes=dict(sorted(Counter(modes).items())),
        seeds=(int(seeds.min()), int(seeds.max())) if len(seeds) else None,
        action_key=keys.action,
        statistics=to_json(summary.statistics),
    )
    return environment, dataset
