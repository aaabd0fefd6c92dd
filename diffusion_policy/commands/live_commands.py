"""What a person can ask of a live session: each command checks what it is given, and changes the session.

Knows commands as maps of plain values. Knows no browser.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.basics.text import error_line
from diffusion_policy.commands.live_recording import PERSON, POLICY
from diffusion_policy.commands.live_session import LiveSession
from diffusion_policy.config import ConfigError

Command = Mapping[str, Any]


def obey(session: LiveSession, command: Command) -> None:
    """Do what a person asks. Raises ConfigError for what cannot be; then all is as it was."""
    name = command.get("do")
    act = COMMANDS.get(name) if isinstance(name, str) else None
    if act is None:
        raise ConfigError(f"unknown command {name!r:.60}; choose from {', '.join(COMMANDS)}")
    try:
        act(session, command)
    except ConfigError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(error_line(error)) from error


def _run(session: LiveSession, command: Command) -> None:
    session.running = bool(command.get("on", True))


def _step(session: LiveSession, _: Command) -> None:
    session.running = False
    session.advance()


def _reset(session: LiveSession, command: Command) -> None:
    seed = command.get("seed", session.episode.seed)
    if type(seed) is not int or not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"a seed is a whole number from 0 to {MOST_SEED}; got {seed!r:.60}")
    session.begin(seed)


def _set(session: LiveSession, command: Command) -> None:
    settings = command.get("settings")
    if not isinstance(settings, dict):
        raise ConfigError("settings must be a map")
    session.policy.change(settings)


def _drive(session: LiveSession, command: Command) -> None:
    driver = {"policy": POLICY, "person": PERSON}.get(str(command.get("who")))
    if driver is None:
        raise ConfigError("who drives is policy or person")
    session.drive(driver)


def _mouse(session: LiveSession, command: Command) -> None:
    if command.get("down"):
        session.mouse.steer(_place(command))
    else:
        session.mouse.release()


def _push(session: LiveSession, command: Command) -> None:
    if command.get("down"):
        session.push(_place(command))
    else:
        session.mouse.release()


def _place(command: Command) -> np.ndarray:
    """A place in the picture, in shares of its width and height, (2,)."""
    place = command.get("x"), command.get("y")
    if not all(isinstance(one, int | float) and -1 <= one <= 2 for one in place):
        raise ConfigError("a place in the picture is x and y, 0 to 1")
    return np.array(place, np.float64)


def _record(session: LiveSession, command: Command) -> None:
    session.record(bool(command.get("on", True)))


def _undo(session: LiveSession, _: Command) -> None:
    session.recording.undo()


COMMANDS = {
    "run": _run,
    "step": _step,
    "reset": _reset,
    "set": _set,
    "drive": _drive,
    "mouse": _mouse,
    "push": _push,
    "record": _record,
    "undo": _undo,
}
"""What a person can ask for."""
