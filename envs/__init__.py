"""Simulated tasks with known modes. Importing this package registers their ids with Gymnasium.

Every task is a plain `gymnasium.Env` with `info["is_success"]` at each step, `modes` (all labels) and
`mode(observations) -> label | None`; what else it offers for drawing (`scene`, `path`, `planned_path`) is optional.
"""

from typing import Any

import gymnasium

from diffusion_policy.envs.avoid import EPISODE_STEPS

gymnasium.register(
    "diffusion_policy/Avoid-v0",
    entry_point="diffusion_policy.envs.avoid:AvoidEnv",
    max_episode_steps=EPISODE_STEPS,
)

ENV_IDS = ("diffusion_policy/Avoid-v0",)
"""Ids of all our tasks."""


def make(env_id: str, /, render_mode: str | None = None, **arguments: Any) -> gymnasium.Env:
    """`gymnasium.make` with an error that lists our ids and one that names a wrong argument.

    A picklable factory for worker processes is `functools.partial(make, env_id, **arguments)`.
    """
    try:
        return gymnasium.make(env_id, render_mode=render_mode, **arguments)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(
            f"unknown environment {env_id!r}; choose from {', '.join(ENV_IDS)}, or any id that Gymnasium knows "
            f"(module:Id imports the module that registers it). Gymnasium says: {error}"
        ) from error
    except TypeError as error:
        raise ValueError(f"{env_id} does not take the arguments {arguments}: {error}") from error
