"""An image beside what any environment observes, drawn by its own `render`.

Knows Gymnasium's contract. Knows no task and no simulator.
"""

from typing import Any

import gymnasium
import numpy as np
from PIL import Image

from diffusion_policy.basics.text import error_line, one_line
from diffusion_policy.envs.cameras import IMAGE, require_image_size
from diffusion_policy.envs.contract import guard, name_of_env
from diffusion_policy.envs.spaces import EnvSpecError, Observation, observe, observed_parts


class RenderedImage(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Adds to what is observed, which gets the names of `envs.spaces`, a square image (size, size, 3) uint8: the
    picture of `render`, each pixel the mean of the area that it stands for. A picture that is no square is squeezed
    into one, so that all of it is seen.

    The environment must be made with render_mode="rgb_array".
    """

    def __init__(self, env: gymnasium.Env, size: int, key: str = IMAGE) -> None:
        """`size`: width and height [px]; `key`: what the image is called. Raises EnvSpecError where the environment
        draws no such pictures or observes that key itself, and ValueError for a size that cannot be."""
        gymnasium.utils.RecordConstructorArgs.__init__(self, size=size, key=key)
        env = guard(env)
        super().__init__(env)
        self._name, self._size, self._key = name_of_env(env), require_image_size(size), key
        if not self._size:
            raise ValueError(f"an image of {self._name} needs a size; got {size!r}")
        if env.render_mode != "rgb_array":
            known = ", ".join(map(str, (env.metadata or {}).get("render_modes", ()))) or "none"
            raise EnvSpecError(
                f"{self._name} must be made with render_mode 'rgb_array' to give an image; got {env.render_mode!r}; it "
                f"knows {one_line(known, 100)}"
            )
        self.looking = True
        """Whether the image is drawn; it is black else."""
        self._parts = observed_parts(env.observation_space, self._name)
        if key in self._parts:
            raise EnvSpecError(f"{self._name} observes {key!r} itself; call the image of its pictures otherwise")
        spaces = {name: part.box for name, part in self._parts.items()}
        image = gymnasium.spaces.Box(0, 255, (self._size, self._size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict({**spaces, key: image})
        self.action_space = env.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observe(observation), info

    def step(self, action: Any) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._observe(observation), reward, terminated, truncated, info

    def _observe(self, observation: Any) -> Observation:
        black = np.zeros((self._size, self._size, 3), np.uint8)
        image = self._photograph() if self.looking else black
        return {**observe(self._parts, observation, self._name), self._key: image}

    def _photograph(self) -> np.ndarray:
        try:
            picture = np.asarray(self.env.render())
        except Exception as error:
            raise EnvSpecError(f"{self._name} cannot draw itself: {error_line(error)}") from error
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            got = f"{picture.dtype} of shape {picture.shape}"
            raise EnvSpecError(f"render of {self._name} must give a picture (height, width, 3) of uint8; got {got}")
        return np.array(Image.fromarray(picture).resize((self._size, self._size), Image.Resampling.BOX))
