"""Learn multimodal robot behaviour from demonstrations with diffusion policies, and measure success per mode.

    import diffusion_policy as dp

    dp.collect("demos.zarr", env="diffusion_policy/Avoid-v0", env_kwargs={"rows": 1}, episodes=40)
    dp.train("demos.zarr", "runs/avoid", widths=(32, 64), steps=500, learning_rate=1e-3)
    results = dp.evaluate("runs/avoid", "runs/avoid/evaluation", episodes=20)
    controller = dp.load("runs/avoid").controller(seed=0)

Importing the package costs nothing: each name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffusion_policy.commands.front_door import (
        LoadedPolicy,
        collect,
        evaluate,
        forecast,
        render_dataset,
        rollout,
        train,
    )
    from diffusion_policy.commands.loading import load
    from diffusion_policy.config import (
        PolicyConfig,
        SampleConfig,
        SuccessAndModes,
        TrainConfig,
        TransformerConfig,
        UnetConfig,
    )
    from diffusion_policy.control.controller import Controller
    from diffusion_policy.control.policy_planner import PolicyPlanner
    from diffusion_policy.datasets.recorder import Recorder
    from diffusion_policy.datasets.store import EpisodeStore
    from diffusion_policy.datasets.windows import Windows
    from diffusion_policy.envs.adapters import EnvSpec
    from diffusion_policy.policy import DiffusionPolicy
    from diffusion_policy.serving.client import connect
    from diffusion_policy.training.trainer import Trainer

HOMES = {
    "commands.front_door": ("LoadedPolicy", "collect", "evaluate", "forecast", "render_dataset", "rollout", "train"),
    "commands.loading": ("load",),
    "config": ("PolicyConfig", "SampleConfig", "SuccessAndModes", "TrainConfig", "TransformerConfig", "UnetConfig"),
    "control.controller": ("Controller",),
    "control.policy_planner": ("PolicyPlanner",),
    "datasets.recorder": ("Recorder",),
    "datasets.store": ("EpisodeStore",),
    "datasets.windows": ("Windows",),
    "envs.adapters": ("EnvSpec",),
    "serving.client": ("connect",),
    "policy": ("DiffusionPolicy",),
    "training.trainer": ("Trainer",),
}
"""Where each name of the front door stands."""

__all__ = [  # noqa: RUF022  (functions first)
    "collect", "train", "evaluate", "rollout", "forecast", "render_dataset", "load", "connect", "LoadedPolicy",
    "DiffusionPolicy",
    "Controller", "PolicyPlanner", "Trainer", "Windows", "EpisodeStore", "Recorder", "EnvSpec", "PolicyConfig",
    "UnetConfig", "TransformerConfig", "TrainConfig", "SampleConfig", "SuccessAndModes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"diffusion_policy.{module}"), name)
    raise AttributeError(f"module 'diffusion_policy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
