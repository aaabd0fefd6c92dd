"""diffusion-policy collect: demonstrations from scripted experts."""

import dataclasses
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusion_policy.commands.common import (
    DEFAULT_ENV,
    Interrupted,
    available_cores,
    console,
    parse_env_kwargs,
    progress_bar,
    stop_on_signal,
)
from diffusion_policy.config import ConfigError, require_at_least, require_seed


@dataclass(frozen=True)
class Collect:
    """Collect demonstrations with the environment's scripted experts, every mode in turn, into a zarr store.

    Only successful episodes are stored. Ctrl-C keeps the episodes that have finished.
    """

    output: Path
    """Store to create, such as demonstrations.zarr."""
    env: str = DEFAULT_ENV
    """Gymnasium id of the environment."""
    env_kwargs: str = "{}"
    """Arguments of the environment, as JSON: '{"rows": 3}'."""
    episodes: int = 240
    """Successful episodes to store."""
    seed: int = 0
    """Seed of the first episode; the next episode has the next seed."""
    noise: float = 0.4
    """Standard deviation of the noise on each executed action, as a share of its length. The clean action is recorded,
    so the policy learns to come back from where the noise leads."""
    workers: int = dataclasses.field(default_factory=available_cores)
    """Worker processes; the result is the same for any number."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("episodes", "workers"))
        require_at_least(self, 0, ("noise",))
        require_seed(self)
        parse_env_kwargs(self.env_kwargs)

    def run(self) -> None:
        """Collect; raises ValueError for an environment that is unknown or has no expert, or an output that exists."""
        from diffusion_policy import envs
        from diffusion_policy.datasets.collect import Demonstrator, collect
        from diffusion_policy.datasets.store import Demonstration, EpisodeStore
        from diffusion_policy.engines import ordered_map
        from diffusion_policy.envs.experts import EXPERTS

        arguments = parse_env_kwargs(self.env_kwargs)
        make_env = partial(envs.make, self.env, **arguments)
        env = make_env()
        if self.env not in EXPERTS:
            raise ConfigError(f"no expert for {self.env!r}; experts exist for {', '.join(EXPERTS)}")
        attributes = {
            "environment": {"id": self.env, "arguments": arguments},
            "control_frequency": env.metadata["render_fps"],
            "observation_keys": sorted(env.observation_space.keys()),  # pyright: ignore[reportAttributeAccessIssue]
            "action_key": "action",
            "noise": self.noise,
        }
        make_demonstrator = partial(Demonstrator, make_env, EXPERTS[self.env], self.noise)

        with stop_on_signal() as stop:
            store = EpisodeStore.create(self.output, attributes, env.get_wrapper_attr("modes"))
            with progress_bar("episodes") as bar:
                task = bar.add_task("collecting", total=self.episodes, note="")

                def show(demonstration: Demonstration) -> None:
                    bar.advance(task, demonstration.success)

                spread = partial(ordered_map, workers=self.workers)
                collect(store, make_demonstrator, self.episodes, self.seed, spread, show, stop.is_set)
        env.close()
        ends = store.episode_ends
        if len(ends) == 0:
            shutil.rmtree(self.output)  # nothing is lost, and the same command can be given again
            raise Interrupted("stopped before the first episode had finished")
        if len(ends) < self.episodes:
            raise Interrupted(f"stopped: {len(ends)} of {self.episodes} episodes are in {self.output}")
        console.print(f"{len(ends)} episodes, {ends[-1]} steps in {self.output}")
