"""The environment that a program acts in: what the user asks for, completed by what a store or a checkpoint says of its
own.

Knows options, and how environments are made. Knows neither a policy nor a store.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium

from diffusion_policy.commands.options.acting import parse_env_kwargs
from diffusion_policy.commands.terminal import console
from diffusion_policy.commands.trust import refuse_modules
from diffusion_policy.config import ConfigError, SuccessAndModes, from_dict
from diffusion_policy.envs import ENV_IDS
from diffusion_policy.envs.adapters import EnvSpec, capped_steps
from diffusion_policy.envs.cameras import IMAGE, WRIST_IMAGE, require_image_size
from diffusion_policy.envs.contract import control_rate
from diffusion_policy.envs.images import RenderedImage
from diffusion_policy.envs.wrappers import foreign, is_written, lost


def describe_episodes(env: gymnasium.Env) -> dict[str, Any]:
    """Attributes of a store of the episodes of an environment that an EnvSpec has made."""
    rate = control_rate(env)
    return {
        "environment": dict(env.described),  # pyright: ignore[reportAttributeAccessIssue]
        **({"control_frequency": rate} if rate else {}),
        "observation_keys": sorted(env.observation_space.keys()),  # pyright: ignore[reportAttributeAccessIssue]
        "action_key": "action",
    }


def choose_env_spec(
    source: object,
    recorded: Mapping[str, Any],
    env: str | None,
    env_kwargs: str | None,
    signals: SuccessAndModes,
    image_size: int | None = None,
) -> tuple[EnvSpec, SuccessAndModes]:
    """The environment that was asked for, completed by what a file says of its own: `recorded` has id, arguments,
    signals and wrappers; `image_size`: see `with_images`. Raises ConfigError where there is none, where the file alone
    names a module, which would be imported, and where it was recorded under wrappers that no file can keep."""
    env_id = env or recorded.get("id")
    if env_id is None:
        raise ConfigError(f"{source} names no environment; give one with --env")
    same = is_same_id(env_id, recorded.get("id"))
    arguments = recorded.get("arguments", {}) if same else {}
    from_file = [] if env else [env_id]
    if same and not signals.given:
        signals = from_dict(SuccessAndModes, recorded.get("signals", {}))
        from_file += [signals.success, signals.mode_function]
    refuse_modules(source, from_file, [f"--env {shlex.quote(env_id)}", *signal_flags(signals)])
    wrappers = choose_wrappers(source, recorded.get("wrappers") or (), env, env_id) if same else ()
    arguments = arguments if env_kwargs is None else parse_env_kwargs(env_kwargs)
    spec = make_env_spec(env_id, arguments, signals, wrappers)
    return spec if image_size is None else with_images(spec, image_size), signals


def signal_flags(signals: SuccessAndModes) -> list[str]:
    """Flags that mean these signals, as a shell takes them."""
    flags = []
    for name, value in signals.given.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        flags.append(" ".join([f"--{name.replace('_', '-')}", *map(shlex.quote, values)]))
    return flags


def is_same_id(one: str | None, other: str | None) -> bool:
    """Whether two ids mean the same environment: `module:Id` is `Id`, which Gymnasium itself calls it."""
    return one is not None and other is not None and one.rpartition(":")[2] == other.rpartition(":")[2]


def choose_wrappers(
    source: object, wrappers: Sequence[Mapping[str, Any]], env: str | None, env_id: str
) -> Sequence[Mapping[str, Any]]:
    """The wrappers that a file says were around its environment. Where one of them cannot be put on again, or would be
    imported from a module that the user does not name with --env (`env`), raises ConfigError; but with --env the
    environment is made as it is registered, without any, which is said."""
    if not is_written(wrappers):
        raise ConfigError(f"{source} does not say its wrappers as a list of entry points and arguments")
    named = env.partition(":")[0] if env and ":" in env else None
    strangers = [point for point in foreign(wrappers) if point.partition(":")[0] != named]
    if not strangers and not lost(wrappers):
        return wrappers
    if env is None:
        if lost(wrappers):
            raise ConfigError(
                f"{source} was recorded under what no file can keep: {', '.join(lost(wrappers))}; register an "
                "environment that is made with all of it, and give that with --env module:Id"
            )
        again = f"{strangers[0].partition(':')[0]}:{env_id.rpartition(':')[2]}"
        refuse_modules(source, strangers, [f"--env {shlex.quote(again)}"])
    names = [str(one.get("entry_point") or one.get("name")).rpartition(":")[2] for one in wrappers]
    console.print(f"{env_id} is made as it is registered, without what {source} was recorded under: {', '.join(names)}")
    return ()


def make_env_spec(
    env_id: str, arguments: Mapping[str, Any], signals: SuccessAndModes, wrappers: Sequence[Mapping[str, Any]] = ()
) -> EnvSpec:
    """An environment factory; raises ValueError for signals that contradict each other."""
    return EnvSpec(
        env_id,
        dict(arguments),
        signals.success,
        signals.mode_function,
        signals.mode_labels,
        signals.fresh,
        tuple(wrappers),
    )


def with_images(spec: EnvSpec, size: int, keys: Sequence[str] = (IMAGE,)) -> EnvSpec:
    """The environment with images of a size [px] beside what it observes: a task of ours by its own arguments, any
    other one by the pictures of its `render`. Raises ConfigError for several pictures of one that draws one."""
    if spec.env.rpartition(":")[2] in ENV_IDS:
        wrist = {"wrist_image": True} if WRIST_IMAGE in keys else {}
        return replace(spec, arguments=spec.arguments | {"image_size": size} | wrist)
    if len(keys) != 1:
        raise ConfigError(f"{spec.env} draws one picture; got the keys {', '.join(keys)}")
    require_image_size(size)
    point = f"{RenderedImage.__module__}:{RenderedImage.__qualname__}"
    drawn = {"entry_point": point, "kwargs": {"size": size, "key": keys[0]}}
    return replace(spec, arguments=spec.arguments | {"render_mode": "rgb_array"}, wrappers=(*spec.wrappers, drawn))


def say_cap(env_id: str, env: gymnasium.Env) -> None:
    """Say after how many steps the episodes of an environment without a time limit end."""
    steps = capped_steps(env)
    if steps is not None:
        console.print(
            f"{env_id} has no time limit, so its episodes end after {steps} steps; choose another number with "
            "--env-kwargs '{\"max_episode_steps\": 5000}'"
        )
