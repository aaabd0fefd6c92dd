"""The replicas of `serve --engine ray`: what each of them loads, and where they run."""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from diffusion_policy.commands.options.serve import Serve
from diffusion_policy.commands.serve import Chosen, choose
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError
from diffusion_policy.control.latency import time_plans
from diffusion_policy.evaluation import ray_engine
from diffusion_policy.serving import replicas
from diffusion_policy.serving.batching import plan_jobs


@contextlib.contextmanager
def start_replicas(options: Serve, chosen: Chosen) -> Iterator[replicas.Replicas]:
    """Replicas of what was chosen, for as long as the context lasts. Raises ValueError for more than the cluster has
    cores, OSError where none can begin."""
    threads, gpus = chosen.described["threads"], int(chosen.resolved.device.startswith("cuda"))
    with ray_engine.connect(options.replicas, "replicas"), contextlib.ExitStack() as stack:
        deploying = replicas.deploy(
            partial(make_plan, chosen.resolved, chosen.described),
            least=options.min_replicas,
            most=options.replicas,
            cores=replicas.cores_of_each(options.replicas, threads),
            threads=threads,
            gpus=gpus,
        )
        with console.status("starting replicas"):
            engine = stack.enter_context(deploying)
        yield engine


def make_plan(options: Serve, described: Mapping[str, Any]) -> replicas.Plan:
    """What a replica plans by. Raises ConfigError where that is not what the server says of it."""
    chosen = choose(options)
    for name, value in described.items():
        if chosen.described[name] != value:
            raise ConfigError(f"{name} is {chosen.described[name]} on {socket.gethostname()}, not {value}")
    time_plans(chosen.planner, 1, 3, chosen.chunking)  # before its first call
    return partial(plan_jobs, chosen.planner, chosen.chunking)
