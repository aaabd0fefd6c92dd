"""The verbs as functions, for Python: `import diffusion_policy as dp`. Options are keywords with the names of the
command line's flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands import export
from diffusion_policy.commands.joining import choose_backend, choose_chunking
from diffusion_policy.commands.options.collect import Collect
from diffusion_policy.commands.options.dataset import Render
from diffusion_policy.commands.options.evaluate import Evaluate
from diffusion_policy.commands.options.export import Export
from diffusion_policy.commands.options.forecast import Forecast
from diffusion_policy.commands.options.rollout import Rollout
from diffusion_policy.commands.options.train import Train, fields_of_teacher
from diffusion_policy.config import (
    BackendName,
    ChunkingName,
    PlanningPrecision,
    SampleConfig,
    list_types,
    with_options,
)
from diffusion_policy.control.chunking import Chunking, Roll, split_options
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.single import SingleController
from diffusion_policy.policy import DiffusionPolicy, choose_device
from diffusion_policy.serving.backends import make_planner
from diffusion_policy.serving.plan_folder import PlanConfig

T = TypeVar("T")


def collect(output: str | Path, **options: Any) -> None:
    """Collect demonstrations from an expert into a new dataset; options as `diffusion-policy collect --help` shows.
    Raises ConfigError for an unknown option, with the nearest, or one that cannot work."""
    _told(Collect(Path(output)), options).run()


def train(dataset: str | Path, output: str | Path, **options: Any) -> None:
    """Train a policy on a dataset, a path or URL, in a new folder; options as `diffusion-policy train --help` shows.
    Raises as `collect`, and FloatingPointError when the loss is no longer finite."""
    taught = fields_of_teacher(Path(options["teacher"])) if options.get("teacher") else {}
    _told(Train(str(dataset), Path(output), **taught), options).run()


def evaluate(checkpoint: str | Path, output: str | Path, **options: Any) -> dict[str, Any]:
    """Roll a policy out on unseen seeds; returns what results.json holds. Options as `diffusion-policy evaluate --help`
    shows. Raises as `collect`."""
    return _told(Evaluate(Path(checkpoint), Path(output)), options).run()


def rollout(checkpoint: str | Path, **options: Any) -> Any:
    """Roll a policy out for a few episodes, to look at or to record; options as `diffusion-policy rollout --help`
    shows. Raises as `collect`."""
    return _told(Rollout(Path(checkpoint)), options).run()


def forecast(checkpoint: str | Path, dataset: str | Path, output: str | Path, **options: Any) -> dict[str, Any]:
    """Forecast what comes in recorded episodes; returns what results.json holds. Options as `diffusion-policy forecast
    --help` shows. Raises as `collect`, and FloatingPointError for a forecast that is not finite."""
    return _told(Forecast(Path(checkpoint), str(dataset), Path(output)), options).run()


def render_dataset(store: str | Path, output: str | Path, **options: Any) -> int:
    """Add camera images to demonstrations that hold states, in a new dataset; returns the number of episodes. Options
    as `diffusion-policy dataset render --help` shows. Raises as `collect`."""
    return _told(Render(str(store), Path(output)), options).run()


def load_checkpoint(path: str | Path, device: str = "auto") -> LoadedPolicy:
    """See `loading.load`."""
    return LoadedPolicy(checkpoint.load(Path(path), choose_device(device)))


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy with what its checkpoint says of it."""

    checkpoint: Checkpoint

    @property
    def policy(self) -> DiffusionPolicy:
        """The policy with EMA weights, in eval mode."""
        return self.checkpoint.policy

    def controller(
        self,
        seed: int = 0,
        *,
        action_horizon: int | None = None,
        delay_steps: int = 0,
        chunking: ChunkingName | Chunking = "receding",
        roll: Roll | None = None,
        backend: BackendName = "eager",
        precision: PlanningPrecision = "fp32",
        **options: Any,
    ) -> SingleController:
        """Steers one robot: `action = controller.act(observation)`, once a control step. `seed`: of the planning noise;
        `action_horizon`: steps executed before planning again, by default that of training; `delay_steps`: control
        steps that planning takes; `chunking`: how plans are joined, by name or made; `roll`: what is expected to be
        observed after some actions, for roll_forward (see `control.chunking.Roll`); `backend` and `precision`: what
        samples, as `diffusion-policy rollout --help` says; the others are options of chunking and sampling, such as
        rtc_strength=8 and sampling_steps=8. Raises ConfigError for options that the policy cannot follow."""
        joined, sampling = split_options(chunking, options)
        config = self.policy.complete(with_options(SampleConfig(), **sampling))
        if not isinstance(joined, Chunking):
            joined = choose_chunking(joined, self.policy, config, roll)
        backend = choose_backend(backend, joined)
        planner = make_planner(self.policy, config, backend, rows=1, samples=joined.samples, precision=precision)
        controller = SingleController(
            planner,
            seed,
            action_horizon=action_horizon,
            delay_steps=delay_steps,
            chunking=joined,
            sampling_steps=config.sampling_steps,
        )
        if backend == "graph" or (backend == "auto" and self.policy.device.type == "cuda"):
            time_plans(planner, 1, 1, joined)  # the graph is captured before the first control step
        return controller

    def export(self, output: str | Path, **options: Any) -> PlanConfig:
        """Write this policy as ONNX, to act where there is no torch; options as `diffusion-policy export --help` shows.
        Returns what the folder's plan.json says. Raises as `collect`, and ExportError for what has no graph."""
        return export.write(_told(Export(Path(), Path(output)), options), self.checkpoint)


def _told(command: T, options: Mapping[str, Any]) -> T:
    """A command with these options: what JSON flags say may be a mapping, paths may be texts."""
    types, values = list_types(type(command)), dict(options)
    for name, value in options.items():
        if isinstance(value, Mapping):
            values[name] = json.dumps(value)
        elif isinstance(value, list):
            values[name] = tuple(value)
        elif isinstance(value, str) and types.get(name) in (Path, Path | None):
            values[name] = Path(value)
    return with_options(command, **values)
