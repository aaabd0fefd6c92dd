"""Imports functions and classes of the user, named `module:function`, also from the working directory.

The caller must make sure that the user named the module.
"""

import contextlib
import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_policy.basics.text import error_line
from diffusion_policy.envs.spaces import EnvSpecError


def load(name: str) -> Callable[..., Any]:
    """The function or class that `module:function` names, also from a file in the working directory; raises
    EnvSpecError."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise EnvSpecError(f"a function is named module:function, such as my_task:mode; got {name!r}")
    module = import_module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise EnvSpecError(f"{module_name} has no function {attribute!r}{nearest(attribute, offered)}")
    return function


def import_module(name: str) -> Any:
    """Import a module, also from the working directory: last, so that nothing installed is hidden by a file there."""
    with contextlib.suppress(FileNotFoundError):  # a working directory that was deleted
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise EnvSpecError(f"importing {name} failed: {error_line(error)}") from error
        parent, _, last = missing.rpartition(".")
        beside = pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", []) if parent else None)
        raise EnvSpecError(f"there is no module {missing!r}{nearest(last, [each.name for each in beside])}") from error


def nearest(name: str, offered: Sequence[str]) -> str:
    """The end of a message that names what was probably meant."""
    near = difflib.get_close_matches(name, offered, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function; what it raises is named in one line."""
    try:
        return function(*arguments)
    except Exception as error:
        raise EnvSpecError(f"{name_of(function)} failed: {error_line(error)}") from error


def name_of(function: Callable[..., Any]) -> str:
    """What a function is named by."""
    return f"{function.__module__}:{getattr(function, '__qualname__', function)}"
