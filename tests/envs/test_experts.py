import numpy as np
import pytest

from diffusion_policy import envs
from diffusion_policy.envs.experts import EXPERTS, AvoidExpert

AVOID = "diffusion_policy/Avoid-v0"


def run_expert(env, mode: str, seed: int, noise: float) -> tuple[bool, str | None]:
    rng = np.random.default_rng(seed)
    expert = EXPERTS[env.spec.id](mode)
    observation, _ = env.reset(seed=seed)
    path, done, info = [observation], False, {}
    while not done:
        action = expert.act(observation)
        action = action + noise * np.linalg.norm(action) * rng.standard_normal(2)
        observation, _, terminated, truncated, info = env.step(action.astype(np.float32))
        path.append(observation)
        done = terminated or truncated
    return info["is_success"], env.unwrapped.mode({key: np.stack([o[key] for o in path]) for key in observation})


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_every_mode_is_shown_and_disturbance_is_survived(rows: int, noise: float) -> None:
    env = envs.make(AVOID, rows=rows)
    modes = env.unwrapped.modes
    outcomes = [run_expert(env, mode, seed, noise) == (True, mode) for seed, mode in enumerate(modes)]
    assert np.mean(outcomes) == 1.0 if noise == 0 else np.mean(outcomes) >= 0.9


def test_it_comes_back_to_its_path_from_anywhere_between_two_rows() -> None:
    expert = AvoidExpert("left-right")
    for x in (0.35, 0.5, 0.65):
        xy = np.array([x, -0.03])
        for _ in range(40):
            xy = xy + expert.act({"desired_xy": xy})
            if xy[1] > 0.08:
                break
        assert xy[0] > 0.6  # through the right gate of the second row


def test_it_moves_at_constant_speed() -> None:
    expert = AvoidExpert("left", speed=0.007)
    for xy in np.random.default_rng(0).uniform([0.3, -0.3], [0.7, 0.3], (50, 2)):
        assert np.linalg.norm(expert.act({"desired_xy": xy})) == pytest.approx(0.007, rel=1e-4)


@pytest.mark.parametrize("mode", ["", "up", "middle", "left-left-left-left", "left-leftmost"])
def test_unknown_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"unknown mode '{mode}'; Avoid has modes such as"):
        AvoidExpert(mode)
