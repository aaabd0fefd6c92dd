"""How actions and rotations are said to a network: closed forms, and a library's rotations."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from diffusion_policy.networks.representation import ActionFrame, compose, from_six, invert, to_quaternion, to_six

RNG = np.random.default_rng(0)
MANY = Rotation.random(500, rng=1)


def same(found: torch.Tensor, expected: Rotation) -> None:
    """Whether rotations, in either form, turn the same way."""
    numbers = found.numpy()
    other = Rotation.from_rotvec(numbers) if numbers.shape[-1] == 3 else Rotation.from_quat(numbers)
    assert (other * expected.inv()).magnitude().max() < 1e-5


@pytest.mark.parametrize("columns", [3, 4])
def test_six_numbers_are_two_columns_of_the_matrix_and_come_back(columns: int) -> None:
    raw = torch.from_numpy(MANY.as_rotvec() if columns == 3 else MANY.as_quat())
    six = to_six(raw)
    matrices = MANY.as_matrix()
    np.testing.assert_allclose(six.numpy(), np.concatenate([matrices[:, :, 0], matrices[:, :, 1]], axis=1), atol=1e-9)
    for back in (3, 4):
        same(from_six(six, back), MANY)
    same(from_six(3 * six, columns), MANY)  # any length


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 3.0, np.pi - 1e-4, np.pi])
def test_turns_by_nothing_and_by_a_half_come_back(angle: float) -> None:
    axes = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0, 0.8]], dtype=torch.float64)
    back = from_six(to_six(axes * angle), 3)
    assert torch.isfinite(back).all()
    same(back, Rotation.from_rotvec((axes * angle).numpy()))


def test_numbers_that_are_no_rotation_become_the_nearest_one_or_at_least_stay_finite() -> None:
    noisy = to_six(torch.from_numpy(MANY.as_rotvec())) + 0.01 * torch.randn(500, 6, generator=torch.manual_seed(0))
    found = Rotation.from_rotvec(from_six(noisy, 3).numpy())
    assert (found * MANY.inv()).magnitude().max() < 0.06
    assert torch.isfinite(from_six(torch.zeros(2, 6), 3)).all()
    assert torch.isfinite(to_six(torch.zeros(2, 4))).all()


def test_the_product_of_quaternions_is_one_turn_after_the_other() -> None:
    a, b = Rotation.random(100, rng=2), Rotation.random(100, rng=3)
    first, second = (to_quaternion(torch.from_numpy(one.as_rotvec())) for one in (a, b))
    same(compose(first, second), a * b)
    same(compose(invert(first), first), Rotation.identity(100))


def windows(seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Actions (4, 8, 8): two numbers, an angle, a rotation vector, two grippers; what is observed (4, 3, 6) beside."""
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(4, 8, 8))
    actions[..., 2] = rng.uniform(-np.pi, np.pi, (4, 8))
    actions[..., 3:6] = Rotation.random(32, rng=seed).as_rotvec().reshape(4, 8, 3)
    seen = rng.normal(size=(4, 3, 7))
    seen[..., 4:] = Rotation.random(12, rng=seed + 1).as_rotvec().reshape(4, 3, 3)
    return torch.from_numpy(actions), {"pose": torch.from_numpy(seen)}


REFERENCE = ("pose", (0, 1, 3, 4, 5, 6))
"""Of the first six columns of the actions."""


def test_relative_actions_are_differences_from_now_and_delta_ones_from_the_step_before() -> None:
    actions, observed = windows()
    seen = observed["pose"]
    relative = ActionFrame("relative", REFERENCE, [2], [(3, 4, 5)]).express(actions, observed)
    delta = ActionFrame("delta", REFERENCE, [2], [(3, 4, 5)]).express(actions, observed)
    torch.testing.assert_close(relative[..., :2], actions[..., :2] - seen[:, 2:, :2])
    torch.testing.assert_close(delta[:, :3, :2], actions[:, :3, :2] - seen[:, :, :2])
    torch.testing.assert_close(delta[:, 3:, :2], actions[:, 3:, :2] - actions[:, 2:-1, :2])
    for told in (relative, delta):
        assert torch.equal(told[..., 6:], actions[..., 6:])  # the grippers
        assert told[..., 2].abs().max() <= np.pi
    turned = Rotation.from_rotvec(seen[:, 2, 4:].numpy()).inv() * Rotation.from_rotvec(actions[:, 5, 3:6].numpy())
    same(relative[:, 5, 3:6], turned)
    before = Rotation.from_rotvec(actions[:, 4, 3:6].numpy())
    same(delta[:, 5, 3:6], before.inv() * Rotation.from_rotvec(actions[:, 5, 3:6].numpy()))


@pytest.mark.parametrize("form", ["absolute", "relative", "delta"])
def test_they_come_back_for_every_sample(form) -> None:
    actions, observed = windows()
    frame = ActionFrame(form, REFERENCE, [2], [(3, 4, 5)])
    told = frame.express(actions, observed)
    back = frame.restore(told.repeat_interleave(3, dim=0), observed)
    torch.testing.assert_close(back, actions.repeat_interleave(3, dim=0), atol=1e-5, rtol=0)
    from_now = frame.express(actions[:, 2:], observed, first=2)
    torch.testing.assert_close(from_now, told[:, 2:])


def test_quaternions_are_differences_too() -> None:
    actions, seen = MANY[:30].as_quat().reshape(3, 10, 4), MANY[30:33].as_quat().reshape(3, 1, 4)
    frame = ActionFrame("delta", ("pose", (0, 1, 2, 3)), (), [(0, 1, 2, 3)])
    observed = {"pose": torch.from_numpy(seen)}
    back = frame.restore(frame.express(torch.from_numpy(actions), observed), observed)
    same(back.reshape(-1, 4), MANY[:30])


def test_a_reference_holds_all_of_a_rotation_or_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"has 5 columns, in the middle of the rotation in the action's columns 3, 4, 5"
    ):
        ActionFrame("relative", ("pose", (0, 1, 2, 3, 4)), (), [(3, 4, 5)])
    ActionFrame("relative", ("pose", (0, 1, 2)), (), [(3, 4, 5)])  # positions alone
