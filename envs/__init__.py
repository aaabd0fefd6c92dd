"""Simulated tasks with known modes. Importing this package registers their ids with Gymnasium.

Every task is a plain `gymnasium.Env` with `info["is_success"]` at each step, `modes` (all labels) and
`mode(observations) -> label | None`. Optional are `info["measures"]` (how the episode stands, as named numbers; those
of its last step count), and what `protocols` has of drawing and of decisions. `adapters` makes any other Gymnasium
environment such a task.

To add a task of PyBullet, `avoid` is the example:
1. Write a module with a class `MyTaskEnv(TaskEnv)`; `task.TaskEnv` says what it sets and defines.
2. In `__init__`: the spaces (`task.float_box`), a `Simulation` with its `Viewpoint`, the scene, an arm of `robots`, and
   a saved state to which each `reset` returns, so that the same seed gives the same episode.
3. In `_advance`: clip the action, move the arm, step the simulation, say what is observed and whether it is a success.
4. `mode(observations)`, a pure function of the observed trajectory; `modes`, all labels.
   Where actions are places: `still_action(observation)`, from which the noise of `collect` is measured.
   With goals: observe them, and offer `modes_that_solve(observation)`, which `collect` asks for.
5. To be drawn: `scene`, `path`, `planned_path`, `pixels`; for its decisions: `choice`.
6. Add its id to `_TASKS` here, and an expert for each mode to `experts.EXPERTS`.
7. The tests of `tests/envs/test_envs.py` that are parametrized over `ENV_IDS` then check the contract.
"""

from typing import Any

import gymnasium

from diffusion_policy.basics.text import error_line

_TASKS = {  # entry point, control steps after which Gymnasium's time limit ends an episode
    "diffusion_policy/Avoid-v0": ("diffusion_policy.envs.avoid:AvoidEnv", 250),
    "diffusion_policy/BlockPush-v0": ("diffusion_policy.envs.block_push:BlockPushEnv", 350),
    "diffusion_policy/Maze-v0": ("diffusion_policy.envs.maze:MazeEnv", 200),
    "diffusion_policy/PandaReach-v0": ("diffusion_policy.envs.panda_reach:PandaReachEnv", 120),
    "diffusion_policy/PushT-v0": ("diffusion_policy.envs.push_t:PushTEnv", 300),
    "diffusion_policy/Intersection-v0": ("diffusion_policy.envs.intersection:IntersectionEnv", 80),
}
for _id, (_entry_point, _steps) in _TASKS.items():
    gymnasium.register(_id, entry_point=_entry_point, max_episode_steps=_steps)

ENV_IDS = tuple(_TASKS)
"""Ids of all our tasks."""


def make(env_id: str, /, **arguments: Any) -> gymnasium.Env:
    """`gymnasium.make` with an error that lists our ids and one that names a wrong argument.

    A picklable factory for worker processes is `functools.partial(make, env_id, **arguments)`.
    """
    try:
        return gymnasium.make(env_id, **arguments)
    except gymnasium.error.UnregisteredEnv as error:
        raise ValueError(
            f"unknown environment {env_id!r}; choose from {', '.join(ENV_IDS)}, or any id that Gymnasium knows "
            f"(module:Id imports the module that registers it). Gymnasium says: {error}"
        ) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            given = {name: value for name, value in arguments.items() if name != "disable_env_checker"}
            raise ValueError(f"{env_id} does not take the arguments {given}: {error}") from error
        raise ValueError(f"{env_id} could not be made: {error_line(error)}") from error
