"""Actions beyond an episode's end: marked in windows, and left out of the loss."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from diffusion_policy.config import ObjectiveName, PolicyConfig, with_options
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.streaming import load_windows
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import denoising_loss, draw

RNG = np.random.default_rng(0)
DATA = {"state": RNG.normal(size=(30, 3)).astype(np.float32), "action": RNG.uniform(5, 9, (30, 2)).astype(np.float32)}
CONFIG = with_options(
    PolicyConfig(), widths=(8,), level_dim=16, noise_levels=20, prediction_horizon=8, action_horizon=4
)


def test_windows_mark_which_actions_were_demonstrated() -> None:
    windows = Windows(DATA, np.array([12, 30]), [0, 1], 2, 8, mark_padding=True)
    batch = windows.gather([0, 5, 11, 12])
    assert batch.demonstrated is not None
    assert batch.demonstrated.int().tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 1],
    ]
    part = batch.part(2, 4)
    assert part.demonstrated is not None
    assert torch.equal(part.demonstrated, batch.demonstrated[2:])
    assert Windows(DATA, np.array([12, 30]), [0], 2, 8).gather([0]).demonstrated is None


def test_streamed_windows_mark_the_same(store: EpisodeStore) -> None:
    keys = {**{key: key for key in store.observation_keys}, "action": "action"}
    options = {"device": "cpu", "labels": None, "mark_padding": True}
    marks = []
    for memory in (1e9, 0):
        windows = load_windows(store, keys, range(12), 2, 16, memory_bytes=memory, **options)
        found: dict[int, list[bool]] = {}
        for _, batch in zip(range(2 * len(windows) // 64), windows.batches(64, 0), strict=False):
            assert batch.demonstrated is not None and batch.rows is not None  # noqa: PT018
            found |= dict(zip(batch.rows.tolist(), batch.demonstrated.tolist(), strict=True))
        marks.append(found)
    shared = marks[0].keys() & marks[1].keys()
    assert len(shared) > 100
    assert all(marks[0][row] == marks[1][row] for row in shared)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("objective", sorted({*get_args(ObjectiveName)} - {"autoencoding", "classifying"}))
def test_the_loss_of_each_objective_leaves_them_out(objective: ObjectiveName) -> None:
    torch.manual_seed(0)
    policy = DiffusionPolicy.for_data(replace(CONFIG, objective=objective), DATA)
    windows = Windows(DATA, np.array([30]), [0], 2, 8, mark_padding=True)
    batch = windows.gather([3, 27, 29])
    assert batch.demonstrated is not None
    other = torch.where(batch.demonstrated[..., None], batch.actions, torch.tensor(6.5))
    draws = draw(policy, 3, torch.Generator().manual_seed(0))
    masked, whole = (
        denoising_loss(policy, batch._replace(demonstrated=one), draws) for one in (batch.demonstrated, None)
    )
    assert torch.equal(masked[:1], whole[:1])
    assert not torch.allclose(masked[1:], whole[1:])
    if objective in ("regression", "mixture"):  # what is learned of the others depends on no action beyond the end
        again = denoising_loss(policy, batch._replace(actions=other), draws)
        torch.testing.assert_close(again, masked)
