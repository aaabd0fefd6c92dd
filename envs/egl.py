"""PyBullet's OpenGL renderer without a window: where its plugin lies, and how simulations of one process share it.

Knows processes. Knows no scene.
"""

import atexit
import contextlib
import importlib.util
import subprocess
import sys
from functools import cache
from typing import Any

from diffusion_policy.envs.quiet import silence

UNUSABLE = (
    "image_renderer 'egl' needs PyBullet's eglRenderer and a driver with EGL, which cannot be used here; choose "
    "'tiny', which draws on the CPU"
)
TRIAL = """
import pybullet, sys
pybullet.connect(pybullet.DIRECT)
sys.exit(pybullet.loadPlugin(sys.argv[1], "_eglRendererPlugin") < 0)
"""

_in_use: dict[Any, bool] = {}
"""Clients of PyBullet that draw with EGL, and whether they are in use."""


@cache
def find_plugin() -> str:
    """Where PyBullet's plugin lies; raises ValueError where it cannot be used. It ends a process in which it finds no
    driver, so another one tries it first."""
    found = importlib.util.find_spec("eglRenderer")
    if found is None or found.origin is None:
        raise ValueError(UNUSABLE)
    tried = subprocess.run([sys.executable, "-c", TRIAL, found.origin], capture_output=True)
    if tried.returncode != 0:
        raise ValueError(UNUSABLE)
    return found.origin


def hold(client: Any) -> None:
    """Note that a client draws with EGL."""
    _in_use[client] = True


def release(client: Any) -> bool:
    """Whether a client draws with EGL: then it is disconnected here once all of them are done, since each that
    disconnects takes EGL from the others of its process."""
    if client not in _in_use:
        return False
    _in_use[client] = False
    if not any(_in_use.values()):
        disconnect_all()
    return True


@atexit.register
def disconnect_all() -> None:
    """Disconnect all clients, those in use too."""
    with silence():
        for client in _in_use:
            with contextlib.suppress(Exception):
                client.disconnect()
    _in_use.clear()
