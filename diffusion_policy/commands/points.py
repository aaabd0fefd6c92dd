"""What a sweep varies: the points of a grid, or random ones, from texts such as learning-rate=1e-4,3e-4."""

import itertools
import math
from collections.abc import Iterable
from typing import Any, get_args, get_origin

import numpy as np

from diffusion_policy.basics.files import parse_json
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.commands.options.sweep import MAX_TRIALS
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, did_you_mean, list_types

TYPES = list_types(PolicyConfig) | list_types(TrainConfig)
"""The options that can be varied, and what they are."""
DISTRIBUTIONS = ("log:1e-5:1e-3", "uniform:0:0.2", "int:100:200", "choice:64,128")
"""What --random can draw from."""


def read_grid(texts: Iterable[str]) -> list[dict[str, Any]]:
    """The points of a grid such as learning-rate=1e-4,3e-4 widths=32:64,64:128, {field: value as JSON}. Raises
    ConfigError for unknown options, and for more than MAX_TRIALS points."""
    axes = {name: [read_value(name, value) for value in values.split(",")] for name, values in split(texts, "grid")}
    count = math.prod(map(len, axes.values()))
    if count > MAX_TRIALS:
        raise ConfigError(f"a sweep has at most {MAX_TRIALS} trials; this --grid has {count}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def draw_points(texts: Iterable[str], count: int, seed: int) -> list[dict[str, Any]]:
    """So many random points of options such as learning-rate=log:1e-5:1e-3, {field: value as JSON}."""
    asked = split(texts, "random")
    generators = [derive_rng("sweep point", seed, i) for i in range(count)]
    return [{name: draw(name, text, rng) for name, text in asked} for rng in generators]


def draw(name: str, text: str, rng: np.random.Generator) -> Any:
    """One value of an option, as JSON, from `kind:...`; real numbers are rounded to four digits."""
    kind, _, rest = text.partition(":")
    if kind == "choice" and rest:
        values = rest.split(",")
        return read_value(name, values[rng.integers(len(values))])
    try:
        low, high = map(float, rest.split(":"))
    except ValueError:
        low = high = math.nan
    bounded = -(2.0**62) <= low <= high <= 2.0**62
    if kind not in ("log", "uniform", "int") or not bounded or (kind == "log" and low <= 0):
        raise ConfigError(
            f"--random {name.replace('_', '-')} must be drawn like {', '.join(DISTRIBUTIONS)}; got {text!r}"
        )
    if kind == "int":
        return int(rng.integers(int(low), int(high), endpoint=True))
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if kind == "log" else rng.uniform(low, high)
    return round(value) if int in (hint := type_of(name), *get_args(hint)) else float(f"{value:.4g}")


def split(texts: Iterable[str], flag: str) -> list[tuple[str, str]]:
    """Texts `option=values` as (field, values); raises ConfigError for unknown options, with the nearest."""
    found: dict[str, str] = {}
    for text in texts:
        option, equals, values = text.partition("=")
        name = option.replace("-", "_")
        if not equals or not values:
            raise ConfigError(f"--{flag} takes options with values, as in learning-rate=...; got {text!r}")
        type_of(name)
        if name in found:
            raise ConfigError(f"--{flag} names {option} twice")
        found[name] = values
    return list(found.items())


def type_of(name: str) -> Any:
    """The type of an option; raises ConfigError for an unknown one, with the nearest."""
    if name not in TYPES:
        raise ConfigError(f"unknown option {name!r}; {did_you_mean(name, TYPES)}".replace("_", "-"))
    return TYPES[name]


def read_value(name: str, text: str) -> Any:
    """A value as JSON; a:b:c for several numbers, none for no number."""
    if get_origin(type_of(name)) is tuple:
        return [] if text.lower() == "none" else [read_scalar(part) for part in text.split(":") if part]
    return read_scalar(text)


def read_scalar(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return {"True": True, "False": False, "None": None, "none": None}.get(text, text)
