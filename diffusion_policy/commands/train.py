"""diffusion-policy train: a policy from a dataset."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from diffusion_policy.commands import runs
from diffusion_policy.commands.environment import is_same_id, join_environment, refuse_modules
from diffusion_policy.commands.episodes import FIRST_ROLLOUT_SEED
from diffusion_policy.commands.interrupts import Interrupted, stop_on_signal
from diffusion_policy.commands.outputs import require_fresh
from diffusion_policy.commands.stores import Keys, choose_angles, choose_keys, open_store, recorded_location
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError, PolicyConfig, SuccessAndModes, TrainConfig, decode
from diffusion_policy.training.trackers import TrackerName

if TYPE_CHECKING:
    import numpy as np
    import torch

    from diffusion_policy.checkpoints.checkpoint import Checkpoint, Dataset, Environment
    from diffusion_policy.datasets.store import EpisodeStore
    from diffusion_policy.datasets.windows import StreamedWindows, Windows
    from diffusion_policy.policy import DiffusionPolicy
    from diffusion_policy.training.distributed import Distributed
    from diffusion_policy.training.trainer import Progress, Trainer


VALIDATION_BYTES = 2**24
"""Memory of the held-out windows where the others are streamed."""
MEASURED = ("validation_loss", "action_error", "action_error_best", "success_rate")
"""What a checkpoint says of itself, where it was measured at its step."""


class Plan(NamedTuple):
    """What of a dataset is learned from."""

    keys: Keys
    angles: dict[str, tuple[int, ...]]
    chosen: np.ndarray
    """Indices of the episodes to train on."""
    held_out: np.ndarray


@dataclass(frozen=True)
class Train:
    """Train a diffusion policy on a dataset; write checkpoints and metrics.jsonl into a new folder.

    Ctrl-C and SIGTERM leave a checkpoint of the last step, after what is to be measured there; --resume goes on from
    there, or from the newest checkpoint after any other end. It is then the same training, on the CPU bit by bit.
    Started by torchrun or accelerate launch, several processes divide every batch.
    """

    dataset: str
    """Store of demonstrations: a path or URL."""
    output: Path
    """Folder of this run."""
    resume: Path | None = None
    """Go on with the training in this folder. It needs no other option; of those of policy and training only keep,
    checkpoint-every and rollouts can change."""
    config: Path | None = None
    """Take policy and training options from this JSON, such as a checkpoint's config.json; flags override it."""
    observation: tuple[str, ...] = ()
    """Keys of the store that the policy observes; by default those that the store names, else all but the action."""
    action: tuple[str, ...] = ()
    """Key of the store that holds the actions, or several, whose columns stand side by side; by default the one that
    the store names, else action."""
    angles: tuple[str, ...] = ()
    """Columns that are angles [rad], as state:4 or pose:3,4,5: the network sees their cosine and sine. By default those
    that the store names."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps."""
    tracker: tuple[TrackerName, ...] = ()
    """Where numbers go beside metrics.jsonl. Each needs the extra of its name."""
    env: str | None = None
    """Environment of the rollouts, if not that of the demonstrations."""
    env_kwargs: str | None = None
    """Its arguments, as JSON."""
    policy: Annotated[PolicyConfig, tyro.conf.arg(name="")] = field(default_factory=PolicyConfig)
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    @classmethod
    def to_resume(cls, run: Path, dataset: str | None = None, trust: bool = False) -> Train:
        """The training of this folder, to go on with, on its own dataset unless one is named; raises ConfigError where
        there is none, where it alone names a URL, and, unless there is `trust`, where it names a module to import for
        its environment."""
        options = runs.read_run(run)
        fields = runs.to_fields(options, f"{run}/{runs.OPTIONS}")
        if not trust:
            refuse_modules(run, [fields.get("env")], [f"--env {fields.get('env')}"])
        return cls(dataset or recorded_location(run, options["dataset"]["location"]), run, resume=run, **fields)

    def run(self) -> None:
        """Train; raises ValueError for bad data, a bad device, an output folder that holds something or is in use, and
        when another training would be resumed; FloatingPointError when the loss is no longer finite."""
        from diffusion_policy.training.distributed import join_processes

        if self.resume and os.path.realpath(self.resume) != os.path.realpath(self.output):
            raise ConfigError(f"--resume {self.resume} goes on in its own folder; got --output {self.output}")
        with join_processes(self.device) as (processes, device):
            quiet, console.quiet = console.quiet, not processes.is_main
            try:
                self._run(processes, device)
            finally:
                console.quiet = quiet

    def _run(self, processes: Distributed, device_name: str) -> None:
        import numpy as np
        import torch

        from diffusion_policy.checkpoints import checkpoint
        from diffusion_policy.datasets.summary import summarize
        from diffusion_policy.datasets.windows import Windows
        from diffusion_policy.normalizer import NORMALIZATIONS, describe_columns
        from diffusion_policy.policy import DiffusionPolicy, choose_device
        from diffusion_policy.training.trainer import Trainer

        if not self.resume and processes.is_main:
            require_fresh(self.output)
        device = choose_device(device_name)
        store = open_store(self.dataset)
        keys, angles, chosen, held_out = plan = self.plan(store)
        sketch = self.sketch(store, plan)
        settings = self.training

        rows = int(np.diff(store.episode_ends, prepend=0)[chosen].sum())
        self._require_memory(min(settings.batch_size, rows), processes.count, device)
        with console.status("measuring the data"):
            summary = summarize(store, keys.observations, keys.action, chosen)
        columns = {f"data/{key}": summary.statistics[name] for key, name in keys.names.items()}
        for sentence in describe_columns(columns, NORMALIZATIONS[self.policy.normalization]):
            console.print(sentence)
        torch.manual_seed(settings.seed)
        policy = DiffusionPolicy.for_statistics(self.policy, summary.statistics, store.modes, angles).to(device)
        point = replace(sketch, policy=policy, dataset=replace(sketch.dataset, fingerprint=summary.fingerprint))
        checkpoint.require_savable(point)
        roll_out = self.make_rollouts(store, point) if settings.rollout_every else None
        modes = [store.modes, store.mode_indices().tolist()] if self.policy.condition_on_mode else []
        told = runs.to_options(self._completed(keys, angles), summary.fingerprint, modes)
        if self.resume:
            runs.require_same(self.resume, runs.read_run(self.resume), told)
        with console.status("reading the data"):
            windows, validation = self._cut_windows(store, keys, chosen, held_out, device)
        trainer = Trainer(policy, windows, validation, settings, processes, roll_out)
        parameters = sum(weight.numel() for weight in policy.parameters())
        console.print(
            f"{len(chosen)} training and {len(held_out)} validation episodes, {len(windows)} windows"
            f"{'' if isinstance(windows, Windows) else ' streamed from the store'}, "
            f"{parameters / 1e6:.1f} M parameters, on {device}"
            f"{'' if processes.count == 1 else f', {processes.count} processes'}"
        )
        with runs.lock(self.output, told, begun=self.resume is not None) if processes.is_main else nullcontext():
            self._restore(trainer)
            self._train(trainer, point.environment, point.dataset, store.episode_ends)

    def plan(self, store: EpisodeStore) -> Plan:
        """What is learned from; raises ValueError for keys and angles that are not there, and for episodes that are too
        few or too short."""
        import numpy as np

        from diffusion_policy.datasets.windows import split_episodes

        keys, settings = choose_keys(store, self.observation, self.action), self.training
        lengths = np.diff(store.episode_ends, prepend=0)
        chosen, held_out = split_episodes(len(lengths), settings.validation_share, settings.seed, settings.max_episodes)
        self._look_at_lengths(lengths[chosen])
        return Plan(keys, choose_angles(store, self.angles, keys), chosen, held_out)

    def sketch(self, store: EpisodeStore, plan: Plan) -> Checkpoint:
        """The checkpoint that this training ends with, but for what the data say: weights, which take no memory here,
        normalizer and fingerprint. Raises ValueError where it could not be trained or saved."""
        from diffusion_policy.checkpoints import checkpoint
        from diffusion_policy.policy import DiffusionPolicy, Shapes, choose_device

        choose_device(self.device)
        shapes = Shapes(
            {key: store.shape(key) for key in plan.keys.observations}, store.shape(plan.keys.action), plan.angles
        )
        with checkpoint.without_memory():
            policy = DiffusionPolicy(self.policy, shapes, store.modes)
        if policy.modes and not self.policy.condition_dropout and (self.training.keep_best or "").startswith("action"):
            raise ConfigError(
                "a policy with condition-on-mode and without condition-dropout has no action error; choose another "
                "--keep-best"
            )
        sketch = checkpoint.Checkpoint(policy, self.training, *describe(store, plan.keys, ""), self.training.steps)
        checkpoint.require_savable(sketch)
        return sketch

    def _completed(self, keys: Keys, angles: dict[str, tuple[int, ...]]) -> Train:
        """With the keys and angles that the store named."""
        stored = {name: key for key, name in keys.names.items()}
        texts = tuple(f"{stored[key]}:{','.join(map(str, columns))}" for key, columns in angles.items())
        return replace(self, observation=keys.observations, action=(keys.action,), angles=texts)

    def _restore(self, trainer: Trainer) -> None:
        """Take up the newest checkpoint of the run that is whole, if it goes on and has one; raises CheckpointError
        where all are damaged."""
        from diffusion_policy.checkpoints import checkpoint

        folders = checkpoint.steps_of(self.resume) if self.resume else []
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

    def make_rollouts(self, store: EpisodeStore, point: Checkpoint) -> Callable[[DiffusionPolicy], float | None]:
        """Measures the success rate of a policy on a few seeds, None where the simulator fails; raises ValueError where
        there is no environment, or another than the policy's, where the demonstrations have these seeds, and for a
        policy that cannot act without being told a mode."""
        import numpy as np

        from diffusion_policy.control.controller import Controller
        from diffusion_policy.evaluation.rollout import RolloutError, rollout
        from diffusion_policy.training.trainer import quick_sampling

        sampling = quick_sampling(point.policy)
        joined = join_environment(self.dataset, point, self.env, self.env_kwargs, sampling, SuccessAndModes())
        seeds = range(FIRST_ROLLOUT_SEED, FIRST_ROLLOUT_SEED + self.training.rollout_episodes)
        shown = np.intersect1d(store.seeds(), seeds)
        if len(shown) and is_same_id(joined.env_id, point.environment.id):
            raise ConfigError(
                f"rollouts in training take the seeds {seeds[0]} to {seeds[-1]}, of which {len(shown)} are "
                f"demonstrations' of {self.dataset}, first {shown[0]}; fewer --rollout-episodes, or --rollout-every 0"
            )

        def success_rate(policy: DiffusionPolicy) -> float | None:
            make_controller = partial(Controller, policy, sampling=sampling, dtype=joined.env.action_space.dtype)
            try:
                episodes = rollout(joined.make_env, make_controller, seeds, lambda _: None)
            except RolloutError as error:
                console.print(f"no rollouts at this step: {error}", soft_wrap=True)
                return None
            return sum(episode.success for episode in episodes) / len(episodes)

        return success_rate

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

    def _require_memory(self, batch: int, processes: int, device: torch.device) -> None:
        """Raise ConfigError where a part of a batch cannot fit the memory, which would end the training without a
        word."""
        import torch

        from diffusion_policy.training.trainer import least_memory

        if device.type == "cuda":
            there = torch.cuda.get_device_properties(device).total_memory
        elif hasattr(os, "sysconf"):
            there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        else:
            return
        needed = least_memory(self.policy, batch // (processes * self.training.accumulation))
        if needed > there:
            raise ConfigError(
                f"a batch of {batch} windows takes at least {needed / 1e9:.0f} GB, and {device} has {there / 1e9:.0f} "
                "GB; lower --batch-size, or compute it in parts with --accumulation"
            )

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

    def _train(self, trainer: Trainer, environment: Environment, dataset: Dataset, episode_ends: np.ndarray) -> None:
        """Train with a panel, trackers, and a checkpoint from time to time."""
        from diffusion_policy.checkpoints import checkpoint
        from diffusion_policy.commands.panel import Panel
        from diffusion_policy.training.trackers import make_trackers
        from diffusion_policy.training.trainer import Diverged

        settings, first_step = self.training, trainer.step
        if first_step >= settings.steps:
            console.print(f"{self.output} has all its {settings.steps} steps")
            return

        def save(metrics: dict[str, float]) -> Path:
            point = checkpoint.Checkpoint(trainer.ema, settings, environment, dataset, trainer.step, metrics)
            kept = settings.keep_checkpoints, settings.keep_best
            return checkpoint.save(self.output, point, trainer.state(), *kept, count_due=True)

        latest: dict[str, Any] = {}

        def measured() -> dict[str, float]:
            """What was measured at this very step."""
            now = latest if latest.get("step") == trainer.step else {}
            return {name: now[name] for name in MEASURED if now.get(name) is not None}

        if not trainer.is_main:
            with stop_on_signal() as stop:
                trainer.run(should_stop=stop.is_set)
            return
        told = runs.read_run(self.output)
        with (
            stop_on_signal() as stop,
            Panel(settings.steps, first_step, str(trainer.ema.device)) as panel,
            make_trackers(self.tracker, self.output, told, first_step, panel.note) as trackers,
        ):

            def show(progress: Progress) -> None:
                latest.update(progress._asdict())
                panel.update(progress)
                trackers.log(progress.step, progress._asdict())
                if progress.step % settings.checkpoint_every == 0 and progress.step < settings.steps:
                    try:
                        panel.note("", checkpoint=save(measured()))
                    except checkpoint.CheckpointError as error:
                        panel.note(
                            f"no checkpoint at step {progress.step}: {error}; {runs.last_checkpoint(self.output)}"
                        )

            try:
                trainer.run(show, stop.is_set)
                folder = save(measured())
            except Diverged as error:
                raise FloatingPointError(runs.divergence_report(self.output, error, episode_ends)) from error
            except (OSError, checkpoint.CheckpointError) as error:  # such as a full disk
                raise OSError(
                    f"{error}; {runs.last_checkpoint(self.output)}; {runs.resume_command(self.output)}"
                ) from error
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped at once; {runs.last_checkpoint(self.output)}; {runs.resume_command(self.output)}"
                ) from None
            panel.note(f"checkpoint in {folder}", checkpoint=folder)
        if trainer.step < settings.steps:
            raise Interrupted(
                f"stopped after step {trainer.step} of {settings.steps}; checkpoint in {folder}; "
                f"{runs.resume_command(self.output)}"
            )


def describe(store: EpisodeStore, keys: Keys, fingerprint: str) -> tuple[Environment, Dataset]:
    """What a checkpoint says of its dataset."""
    from diffusion_policy.checkpoints.checkpoint import Dataset, Environment
    from diffusion_policy.evaluation.metrics import NONE

    recorded = store.attributes.get("environment", {})
    modes = [mode or NONE for mode in store.episode_modes()]
    seeds = store.seeds()
    local = Path(store.location)
    environment = Environment(
        recorded.get("id"),
        recorded.get("arguments", {}),
        store.modes,
        recorded.get("signals", {}),
        decode(recorded.get("wrappers", []), tuple[dict[str, Any], ...], f"{store.location}, wrappers"),
    )
    dataset = Dataset(
        location=str(local.resolve()) if local.exists() else store.location,
        fingerprint=fingerprint,
        episodes=len(modes),
        steps=int(store.episode_ends[-1]),
        modes=dict(sorted(Counter(modes).items())),
        seeds=(int(seeds.min()), int(seeds.max())) if len(seeds) else None,
        action_key=keys.action,
    )
    return environment, dataset
