"""Checks the attributes of a store.

Knows plain JSON. Knows no arrays and no files.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_policy.basics.names import (
    MOST_CHARACTERS,
    MOST_EMBEDDING,
    are_instructions,
    is_label,
    say_instructions,
)
from diffusion_policy.datasets.storage import StoreError


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_label, value))


def _is_wrapper(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("entry_point"), str | None)
        and isinstance(value.get("name", ""), str)
        and isinstance(value.get("kwargs") or {}, dict)
    )


def _are_angles(value: Any) -> bool:
    columns = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(of_key, list) and all(type(column) is int for column in of_key) for of_key in columns)


def _is_environment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("id"), str)
        and isinstance(value.get("arguments"), dict)
        and isinstance(value.get("signals", {}), dict)
        and isinstance(value.get("wrappers", []), list)
        and all(map(_is_wrapper, value.get("wrappers", [])))
    )


def _is_collection(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(type(value.get(name)) is int for name in ("episodes", "seed"))
        and isinstance(value.get("expert", ""), str)
    )


def _is_embedding(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("encoder"), str | None):
        return False
    return type(value.get("size")) is int and 1 <= value["size"] <= MOST_EMBEDDING


ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "modes": (_are_names, f"a list of labels, each one line of at most {MOST_CHARACTERS} printable characters"),
    "instructions": (are_instructions, say_instructions()),
    "instruction_embedding": (_is_embedding, f"a size from 1 to {MOST_EMBEDDING} and the name of an encoder"),
    "observation_keys": (_are_names, "a list of keys"),
    "action_key": (is_label, "a key"),
    "angles": (_are_angles, "lists of columns by key"),
    "environment": (_is_environment, "an id and arguments"),
    "control_frequency": (lambda value: isinstance(value, int | float) and 0 < value < math.inf, "a rate above 0 [Hz]"),
    "collection": (_is_collection, "numbers of episodes and of the first seed"),
    "minari": (lambda value: isinstance(value, dict), "an object"),
    "robomimic": (lambda value: isinstance(value, dict), "an object"),
    "lerobot": (lambda value: isinstance(value, dict), "an object"),
    "noise": (lambda value: value is None or (isinstance(value, int | float) and value >= 0), "at least 0"),
}
"""What attributes that we use must be."""


def fits(name: str, value: Any) -> bool:
    """Whether an attribute is what we mean by its name, or none of ours."""
    return name not in ATTRIBUTES or ATTRIBUTES[name][0](value)


def check_attributes(attributes: Mapping[str, Any], location: str) -> None:
    """Raise StoreError for an attribute of ours that is something else, or that is no JSON."""
    for name, value in attributes.items():
        if not fits(name, value):
            raise StoreError(f"{location}: the attribute {name} must be {ATTRIBUTES[name][1]}; got {value!r}")
    try:
        json.dumps(attributes)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{location}: attributes must be JSON: {error}") from error
