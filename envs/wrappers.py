"""The wrappers around an environment: what a store or checkpoint keeps of them, and how they are put on again.

An environment is written as {"id", "arguments", "wrappers"?}. A wrapper is {"entry_point":
"gymnasium.wrappers...:Name", "kwargs": {...}}, the inner ones first, as Gymnasium's EnvSpec has them; what cannot be
kept is {"entry_point": None, "name": what it is}. A time limit directly around the environment is the argument
`max_episode_steps`.

Knows Gymnasium's wrappers. Whoever makes one has made sure that the user named its module: see `foreign`.
"""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import WrapperSpec
from gymnasium.wrappers import AddRenderObservation, AddWhiteNoise, ObstructView

from diffusion_policy.basics.text import error_line
from diffusion_policy.envs.contract import Contract, name_of_env
from diffusion_policy.envs.images import RenderedImage
from diffusion_policy.envs.modules import load
from diffusion_policy.envs.protocols import layers
from diffusion_policy.envs.spaces import EnvSpecError
from diffusion_policy.envs.task import TaskEnv

Wrapped = Mapping[str, Any]
"""One wrapper, as it is written."""

KEPT = {
    *("TimeLimit", "ClipAction", "RescaleAction", "StickyAction", "RepeatAction", "AtariPreprocessing"),
    *("FilterObservation", "FlattenObservation", "ReshapeObservation", "RescaleObservation", "DtypeObservation"),
    *("GrayscaleObservation", "ResizeObservation", "AddRenderObservation", "MaxAndSkipObservation"),
    *("DelayObservation", "TimeAwareObservation", "FrameStackObservation", "DiscretizeObservation"),
    *("AddWhiteNoise", "ObstructView"),
}
"""Gymnasium's wrappers whose arguments say all that they do. Only these are made from what a file says: RecordVideo,
for one, writes into folders, and NormalizeObservation has seen what is in no argument."""
OWN = {f"{kind.__module__}:{kind.__qualname__}": kind for kind in (RenderedImage,)}
"""Wrappers of ours, by entry point, whose arguments say all that they do."""
UNSEEN = {
    *("OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "RecordVideo", "HumanRendering"),
    *("RenderCollection", "NormalizeReward", "TransformReward", "ClipReward"),
}
"""Gymnasium's wrappers that change nothing of what is observed or done."""
PICTURES = (AddWhiteNoise, ObstructView)
"""Those that change pictures alone, which are observed under AddRenderObservation only."""
PASSING = {"Adapter", "Capped", "TimeLimit", "NoisyActions", "ClipAction", "RescaleAction"}
"""Other wrappers that pass each observation on by itself: none is made of several, or of the one before."""
OURS = {"Contract", "Fresh", "Recorder"}
MOST = 4096
"""Largest whole number in the arguments of a wrapper, but a limit of steps: what is allocated grows with it."""


def describe_env(env: gymnasium.Env) -> dict[str, Any] | None:
    """The environment with its wrappers, as it is written; None where Gymnasium does not know how it was made."""
    spec = env.unwrapped.spec
    found = layers(env)
    for i, layer in enumerate(found):
        described = getattr(layer, "described", None)
        if isinstance(layer, gymnasium.Wrapper) and described is not None:  # an EnvSpec has made it
            wrappers = [*described.get("wrappers", ()), *(_outside(one) for one in _wrappers(found[:i]))]
            return {**described, "wrappers": wrappers} if wrappers else dict(described)
    if spec is None:
        return None
    arguments, wrappers = {}, []
    registered = gymnasium.registry.get(spec.id)
    for name, value in spec.kwargs.items():
        try:
            arguments[name] = _plain(value)
        except ValueError:
            if not (registered and _same(registered.kwargs.get(name), value)):  # that one comes with the id
                wrappers.append({"entry_point": None, "name": f"the argument {name} of {spec.id}"})
    limits, within = _wrappers_around(found, registered.additional_wrappers if registered else ())
    limit = min(limits, default=None)
    if limit != (registered.max_episode_steps if registered else None):
        arguments["max_episode_steps"] = -1 if limit is None else limit
    if not any(isinstance(layer, AddRenderObservation | RenderedImage) for layer in found):
        arguments.pop("render_mode", None)
    wrappers += within
    return {"id": spec.id, "arguments": arguments} | ({"wrappers": wrappers} if wrappers else {})


def lost(wrappers: Sequence[Wrapped]) -> list[str]:
    """What of the wrappers cannot be put on again, by name."""
    return [_name(one) for one in wrappers if _is_lost(one)]


def foreign(wrappers: Sequence[Wrapped]) -> list[str]:
    """Entry points of wrappers that are neither Gymnasium's nor ours: their modules would be imported."""
    points = [str(one["entry_point"]) for one in wrappers if not _is_lost(one) and _gymnasiums(one) is None]
    return [point for point in points if point not in OWN]


def wrap(env: gymnasium.Env, wrapped: Wrapped) -> gymnasium.Env:
    """Put a wrapper on again; raises EnvSpecError where it cannot be. A module that its entry point names is
    imported."""
    point, name, kwargs = wrapped.get("entry_point"), _gymnasiums(wrapped), wrapped.get("kwargs", {})
    if _is_lost(wrapped):
        raise EnvSpecError(f"{name_of_env(env)} was wrapped in {_name(wrapped)}, which cannot be made again")
    if name in UNSEEN:
        return env
    try:
        if name is None:
            kind = OWN.get(str(point)) or load(str(point))
            if not (isinstance(kind, type) and issubclass(kind, gymnasium.Wrapper)):
                raise EnvSpecError(f"{point} is no wrapper of environments, as {name_of_env(env)} was recorded under")
            return kind(env, **_revive(kwargs))
        _check_sizes(name, kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of precision, which was said when the user put it on
            return getattr(gymnasium.wrappers, name)(env, **_revive(kwargs))
    except EnvSpecError:
        raise
    except Exception as error:
        raise EnvSpecError(
            f"the wrapper {point} cannot be put around {name_of_env(env)}: {error_line(error)}"
        ) from error


def look(env: gymnasium.Env, looking: bool) -> None:
    """Have an environment draw the images that it observes from now on, or give black ones, which takes no time. One in
    which a wrapper may make an observation out of several draws all of them."""
    for layer in layers(env):
        if isinstance(layer, TaskEnv | RenderedImage):
            layer.looking = looking
        if type(layer).__name__ not in OURS | UNSEEN | PASSING and not isinstance(layer, RenderedImage):
            return


def is_written(value: object) -> bool:
    """Whether JSON is a list of wrappers as they are written."""
    return isinstance(value, list | tuple) and all(
        isinstance(one, Mapping)
        and isinstance(one.get("entry_point"), str | None)
        and isinstance(one.get("kwargs", {}), Mapping | None)
        and isinstance(one.get("name", ""), str)
        for one in value
    )


def _wrappers_around(
    found: Sequence[gymnasium.Env], listed: Sequence[WrapperSpec]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The time limits directly around the environment, and what is written of the wrappers that were put around what
    `gymnasium.make` gave. What lies below the wrapper that `make` itself puts on belongs to the environment's
    registration, and so do those that the registration lists, which `make` puts around the time limit: they come with
    the id. Where there is no wrapper of `make`'s, nobody can tell whose the others are."""
    made = [
        i
        for name in ("OrderEnforcing", "PassiveEnvChecker")
        for i, layer in enumerate(found)
        if type(layer) is getattr(gymnasium.wrappers, name)
    ]
    around = [layer for layer in reversed(found[: made[0] if made else -1]) if not isinstance(layer, Contract)]
    limited = len(list(takewhile(_is_limit, around)))
    changed = []
    if made and listed:
        ends = [n for n in range(limited + 1) if _are_listed(around[n : n + len(listed)], listed)]
        if ends:
            limited = ends[-1]
            around[limited : limited + len(listed)] = []
        else:
            changed = [f"a change to the registered {one.entry_point.rpartition(':')[2]}" for one in listed]
    limits = [layer._saved_kwargs["max_episode_steps"] for layer in around[:limited]]  # pyright: ignore[reportAttributeAccessIssue]
    written = _wrappers(around[limited:][::-1])
    if not made:
        written = [one if _is(one, "TimeLimit") else {"entry_point": None, "name": _name(one)} for one in written]
    return limits, written + [{"entry_point": None, "name": name} for name in changed]


def _is_limit(layer: gymnasium.Env) -> bool:
    return type(layer) is gymnasium.wrappers.TimeLimit


def _are_listed(layers: Sequence[gymnasium.Env], listed: Sequence[WrapperSpec]) -> bool:
    """Whether these wrappers are those that a registration lists: of their kinds, with their arguments."""
    if len(layers) < len(listed):
        return False
    for layer, spec in zip(layers, listed, strict=True):
        parameters = inspect.signature(type(layer).__init__).parameters
        wanted = {name: one.default for name, one in parameters.items()} | dict(spec.kwargs or {})
        saved = vars(layer).get("_saved_kwargs", {})
        alike = all(_same(wanted[name], value) for name, value in saved.items() if name in wanted)
        if type(layer).__name__ != spec.entry_point.rpartition(":")[2] or not alike:
            return False
    return True


def _wrappers(found: Sequence[gymnasium.Env]) -> list[dict[str, Any]]:
    """What is written of these wrappers, from the outermost in; the inner first."""
    written, pictured = [], False
    for layer in found:
        if pictured or type(layer) not in PICTURES:
            written.append(_written(layer))
        pictured = pictured or isinstance(layer, AddRenderObservation)
    return [one for one in reversed(written) if one is not None]


def _outside(wrapped: dict[str, Any]) -> dict[str, Any]:
    """A wrapper around an Adapter, which an EnvSpec would put within it: there observations have other names."""
    _, _, name = str(wrapped["entry_point"]).partition(":")
    return {"entry_point": None, "name": name} if "Observation" in name else wrapped


def _written(layer: Any) -> dict[str, Any] | None:
    """What is written of a wrapper; None where it changes nothing."""
    kind = type(layer)
    gymnasiums = kind.__module__.startswith("gymnasium.wrappers.")
    if gymnasiums and kind.__name__ in UNSEEN:
        return None
    if kind.__module__.startswith("diffusion_policy.") and kind not in OWN.values():
        plain = kind.__name__ in OURS or getattr(layer, "plain", False)
        if issubclass(kind, gymnasium.wrappers.TimeLimit):
            return {"entry_point": "gymnasium.wrappers.common:TimeLimit", "kwargs": dict(layer._saved_kwargs)}
        return None if plain else {"entry_point": None, "name": f"{kind.__name__} with functions"}
    importable = "<" not in kind.__qualname__ and kind.__module__ != "__main__"
    saved = {name: value for name, value in vars(layer).get("_saved_kwargs", {}).items() if name != "env"}
    if importable and (kind.__name__ in KEPT if gymnasiums else _says_all(kind, saved)):
        try:
            kwargs = {name: _keep(value) for name, value in saved.items()}
            return {"entry_point": f"{kind.__module__}:{kind.__qualname__}", "kwargs": kwargs}
        except ValueError:
            pass
    return {"entry_point": None, "name": kind.__name__}


def _says_all(kind: type, saved: Mapping[str, Any]) -> bool:
    """Whether a wrapper of somebody's has saved all its arguments; those of a wrapper that it inherits from are others,
    and with `**kwargs` nobody knows."""
    names = set(inspect.signature(kind.__init__).parameters) - {"self", "env"}
    return issubclass(kind, gymnasium.utils.RecordConstructorArgs) and names == set(saved)


def _is(wrapped: Wrapped, name: str) -> bool:
    return not _is_lost(wrapped) and _gymnasiums(wrapped) == name


def _is_lost(wrapped: Wrapped) -> bool:
    """Whether a wrapper does not say all that it does: by Gymnasium's own convention its arguments are None then."""
    silent = wrapped.get("entry_point") is None or wrapped.get("kwargs", {}) is None
    name = _gymnasiums(wrapped)
    return name not in UNSEEN and (silent or (name is not None and name not in KEPT))


def _name(wrapped: Wrapped) -> str:
    return str(wrapped.get("name") or str(wrapped.get("entry_point")).rpartition(":")[2])


def _gymnasiums(wrapped: Wrapped) -> str | None:
    """The name of Gymnasium's wrapper that an entry point means, None where it is another's."""
    module, _, name = str(wrapped.get("entry_point")).partition(":")
    return name if module == "gymnasium.wrappers" or module.startswith("gymnasium.wrappers.") else None


def _plain(value: Any) -> Any:
    """An argument as JSON; raises ValueError where it is none."""
    if isinstance(value, np.generic) and not isinstance(value, np.void):
        value = value.item()
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(one) for key, one in value.items()}
    raise ValueError(f"{value!r} is no JSON")


def _keep(value: Any) -> Any:
    """An argument of a wrapper as JSON: arrays and types of numbers too; raises ValueError where it is none."""
    if isinstance(value, np.ndarray):
        return {"array": _plain(value.tolist()), "dtype": value.dtype.str}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    return _plain(value)


def _revive(value: Any) -> Any:
    """What `_keep` was given; a list is a tuple, which wrappers want for shapes."""
    if isinstance(value, Mapping):
        if value.keys() == {"array", "dtype"}:
            return np.array(value["array"], np.dtype(str(value["dtype"])))
        return {str(key): _revive(one) for key, one in value.items()}
    return tuple(_revive(one) for one in value) if isinstance(value, list | tuple) else value


def _check_sizes(name: str, value: Any) -> None:
    """Raise EnvSpecError for numbers with which a wrapper would fill the memory."""
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            _check_sizes(name, one)
    elif isinstance(value, int) and value > MOST and name != "TimeLimit":
        raise EnvSpecError(f"the numbers in the arguments of {name} must be at most {MOST}; got {value}")


def _same(a: Any, b: Any) -> bool:
    """Whether an argument is the one that stands in the registry, which Gymnasium copies."""
    try:
        return a is b or bool(np.array_equal(a, b))
    except Exception:  # of things that cannot be compared
        return False
