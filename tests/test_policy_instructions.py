"""Policies that are told instructions, by index or by the embeddings of texts."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint, CheckpointError, Dataset, Environment
from diffusion_policy.checkpoints.safe_files import describe
from diffusion_policy.config import PolicyConfig, SampleConfig, TrainConfig, with_options
from diffusion_policy.control.planner import planning_rng
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import denoising_loss, derive_generator, draw

RNG = np.random.default_rng(0)
DATA = {key: RNG.normal(size=(40, 2)).astype(np.float32) for key in ("state", "action")}
TEXTS = ("go round the left", "pass it on the right side", "stop before it")
EMBEDDINGS = RNG.normal(size=(3, 8)).astype(np.float32)
CONFIG = with_options(
    PolicyConfig(condition_on_instruction=True, condition_dropout=0.2), widths=(16, 32), level_dim=32, noise_levels=20
)
PLAIN = SampleConfig(sampling_steps=2)


def new_policy(embeddings: np.ndarray | None = EMBEDDINGS, **options) -> DiffusionPolicy:
    torch.manual_seed(0)
    config = replace(CONFIG, **options)
    return DiffusionPolicy.for_data(config, DATA, instructions=TEXTS, embeddings=embeddings).eval()


def observe(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"state": torch.randn(rows, 2, 2, generator=torch.Generator().manual_seed(1))}


def plan(policy: DiffusionPolicy, **options) -> torch.Tensor:
    return policy.sample(observe(), [planning_rng(0, row, 0) for row in range(2)], 1, replace(PLAIN, **options))


def keep(policy: DiffusionPolicy, run: Path) -> Path:
    dataset = Dataset("somewhere", "0", 3, 40, {}, None, instructions={TEXTS[0]: {"left": 2}, TEXTS[1]: {"none": 1}})
    known = Checkpoint(policy, TrainConfig(), Environment(None, {}, ()), dataset, 1)
    return checkpoint.save(run, known, {})


of_both = pytest.mark.parametrize("embeddings", [None, EMBEDDINGS], ids=["learned", "of texts"])


@of_both
def test_the_instruction_is_what_is_dropped(embeddings: np.ndarray | None) -> None:
    policy = new_policy(embeddings)
    assert policy.labels == policy.instructions == TEXTS
    assert policy.takes_new_instructions is (embeddings is not None)
    cond = policy.encode(observe(), torch.tensor([0, 2]))
    assert cond.shape == (2, policy.cond_dim) == (2, 4 + (3 if embeddings is None else 2))
    dropped = policy.unconditional(cond)
    assert torch.equal(dropped[:, :4], cond[:, :4])
    assert not dropped[:, 4:].any()
    assert cond[:, 4:].any(dim=1).all()
    assert torch.equal(policy.encode(observe()), dropped)  # told nothing


@of_both
def test_what_it_is_told_decides_what_it_does(embeddings: np.ndarray | None) -> None:
    policy = new_policy(embeddings)
    plans = [plan(policy, instruction=text) for text in TEXTS] + [plan(policy)]
    assert len({tuple(one.flatten().tolist()) for one in plans}) == 4
    guided = plan(policy, instruction=TEXTS[0], guidance=2.0)
    assert (guided - plans[3]).norm() > (plans[0] - plans[3]).norm()


def test_a_new_text_is_told_by_its_embedding() -> None:
    policy = new_policy()
    same = policy.with_instruction("keep left of it", EMBEDDINGS[0])
    assert same.instructions == (*TEXTS, "keep left of it")
    assert policy.instructions == TEXTS
    torch.testing.assert_close(plan(same, instruction="keep left of it"), plan(policy, instruction=TEXTS[0]))
    other = policy.with_instruction("keep left of it", 2 * EMBEDDINGS[1])
    assert not torch.equal(plan(other, instruction="keep left of it"), plan(policy, instruction=TEXTS[0]))
    for rows in (same, same.for_few_rows()):
        assert rows.find_label(replace(PLAIN, instruction="keep left of it")) == 3


@pytest.mark.parametrize(
    "embeddings, options, asked, message",
    [
        (None, {}, {"instruction": "go round on the left"}, "the nearest known are: 'go round the left'; .*"),
        (
            EMBEDDINGS,
            {},
            {"instruction": "stop"},
            "'stop before it'.*; evaluate, rollout, study and live take any with its dataset",
        ),
        (None, {"condition_on_instruction": False}, {"instruction": "go"}, "trained without condition-on-instruction"),
        (None, {}, {"mode": "left"}, "cannot be steered to mode 'left'; it was trained without condition-on-mode"),
        (None, {"condition_dropout": 0.0}, {}, "must be told an instruction, such as 'go round the left'; 'pass it"),
        (None, {}, {"guidance": 1.0}, "guidance needs an instruction to guide to, such as 'go round the left'"),
    ],
)
def test_what_it_cannot_be_told_is_refused(embeddings, options: dict, asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(new_policy(embeddings, **options), **asked)


def test_policies_without_instructions_or_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="needs data with at least two instructions; it has 1; give them to its"):
        DiffusionPolicy.for_data(CONFIG, DATA, instructions=TEXTS[:1])
    with pytest.raises(ValueError, match="only a policy that was trained with embeddings of instructions"):
        new_policy(None).with_instruction("stop", EMBEDDINGS[0])
    with pytest.raises(ValueError, match=r"embeddings of 8 numbers; got shape \(3,\)"):
        new_policy().with_instruction("stop", EMBEDDINGS[0][:3])


@of_both
def test_it_learns_from_windows_that_know_their_instruction(embeddings: np.ndarray | None) -> None:
    policy = new_policy(embeddings).train()
    windows = Windows(DATA, np.array([15, 40]), [0, 1], 2, 16, labels=np.array([2, -1]))
    batch = windows.gather(np.arange(40))
    assert batch.labels is not None
    assert batch.labels.tolist() == [2] * 15 + [-1] * 25
    draws = draw(policy, 40, derive_generator("test"))
    denoising_loss(policy, batch, draws).mean().backward()
    with pytest.raises(ValueError, match="trained with the instructions of its windows; got none"):
        denoising_loss(policy, batch._replace(labels=None), draws)


@of_both
def test_a_checkpoint_keeps_instructions_and_embeddings(embeddings: np.ndarray | None, tmp_path: Path) -> None:
    policy = new_policy(embeddings)
    loaded = checkpoint.load(keep(policy, tmp_path))
    assert loaded.policy.instructions == TEXTS
    assert loaded.dataset.instructions == {TEXTS[0]: {"left": 2}, TEXTS[1]: {"none": 1}}
    assert torch.equal(plan(loaded.policy, instruction=TEXTS[1]), plan(policy, instruction=TEXTS[1]))
    if embeddings is not None:
        new = [one.with_instruction("stop", EMBEDDINGS[1] + 1) for one in (policy, loaded.policy)]
        assert torch.equal(*(plan(one, instruction="stop") for one in new))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("instructions", ["x" * 501, "b", "c"], "instructions must be a list of at most 1024 texts"),
        ("instructions", ["a", "a", "c"], "instructions must be a list of at most 1024 texts, each once"),
        ("instructions", ["a", "b"], "tensor|shape"),
        ("embedding_size", 8193, "the embedding_size must be from 0 to 8192; got 8193"),
        ("embedding_size", -1, "the embedding_size must be from 0 to 8192; got -1"),
        ("embedding_size", 9, "tensor|shape"),
    ],
)
def test_a_checkpoint_that_promises_other_instructions_is_refused(
    name: str, value: object, message: str, tmp_path: Path
) -> None:
    folder = keep(new_policy(), tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = keep(new_policy(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["label_rows.rows"][0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["files"]["model.safetensors"] = asdict(describe(folder / "model.safetensors"))
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="finite"):
        checkpoint.load(folder)
