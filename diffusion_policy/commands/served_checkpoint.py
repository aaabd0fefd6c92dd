"""What `diffusion-policy serve` makes of a checkpoint; an exported policy needs none of it, and no torch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands.episodes import planning_threads
from diffusion_policy.commands.joining import choose_backend, choose_chunking
from diffusion_policy.commands.options.serve import Serve
from diffusion_policy.config import ConfigError
from diffusion_policy.control.chunking import Chunking
from diffusion_policy.control.planner import Planner
from diffusion_policy.serving.backends import RUNTIMES, make_planner, resolve_backend
from diffusion_policy.serving.batching import CallsOfSizes


def choose_planner(
    options: Serve, loaded: Checkpoint, sizes: Sequence[int]
) -> tuple[Planner, Chunking, dict[str, Any], Serve]:
    """Planner, chunking, description, and the options with what `auto` means. `sizes`: rows of the graphs, where it is
    planned by some."""
    policy = loaded.policy
    sampling = policy.complete(options.sampling)
    if options.chunking.roll_forward:
        raise ConfigError("--roll-forward asks an environment; it is an option of the client")
    if options.chunking.score is not None:
        raise ConfigError("--score is an option of the client, which chooses among the samples that it asks for")
    chunking = choose_chunking(options.chunking, policy, sampling)
    asked = choose_backend(options.backend, chunking)
    backend = resolve_backend(policy, sampling, asked, max(sizes))
    if backend == "eager":  # as `evaluate` plans, on which last digits depend
        torch.set_num_threads(planning_threads(policy))
    if backend in RUNTIMES or backend == "graph":
        graphs = sizes if backend in RUNTIMES else [max(sizes)]
        planner: Planner = CallsOfSizes(
            {size: make_planner(policy, sampling, backend, rows=size, precision=options.precision) for size in graphs}
        )
    else:
        planner = make_planner(policy, sampling, backend, precision=options.precision)
    described = {
        "sampling": sampling,
        "backend": backend,
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "angles": {key: tuple(columns) for key, columns in policy.shapes.angles.items()},
        "environment": loaded.environment.id,
        "control_rate": loaded.dataset.control_rate,
        "weights_sha256": loaded.weights_sha256,
    }
    return planner, chunking, described, replace(options, backend=backend, device=policy.device.type)
