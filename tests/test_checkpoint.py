import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_policy import checkpoint
from diffusion_policy.checkpoint import CheckpointError
from diffusion_policy.controller import planning_generator


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that may be damaged."""
    return Path(shutil.copytree(checkpoint.find(run), tmp_path / "step-000030"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewrite_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """New weights with a true checksum."""
    save_file(weights, folder / "model.safetensors")
    files = json.loads((folder / "config.json").read_text())["files"]
    files["model.safetensors"] = checkpoint._describe(folder / "model.safetensors")
    edit_config(folder, files=files)


def test_what_is_loaded_acts_as_what_was_saved(run: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(run)
    again = checkpoint.load(checkpoint.save(tmp_path / "again", loaded, {}))
    shapes = loaded.policy.shapes.observations
    observations = {key: torch.full((1, 2, *shape), 0.4) for key, shape in shapes.items()}
    plans = [each.policy.sample(observations, [planning_generator(0)]) for each in (loaded, again)]
    assert torch.equal(*plans)
    assert again.training == loaded.training
    assert again.environment == loaded.environment
    assert again.dataset == loaded.dataset


def test_it_says_what_it_was_trained_for_and_on(run: Path, demonstrations: Path) -> None:
    loaded = checkpoint.load(run)
    assert loaded.step == 30
    assert loaded.environment.id == "diffusion_policy/Avoid-v0"
    assert loaded.environment.arguments == {"rows": 1}
    assert loaded.environment.modes == ("left", "right")
    assert loaded.dataset.location == str(demonstrations)
    assert loaded.dataset.modes == {"left": 6, "right": 6}
    assert loaded.dataset.seeds == (0, 11)
    assert np.isfinite([weight.abs().max().item() for weight in loaded.policy.state_dict().values()]).all()


def test_only_whole_checkpoints_are_found_and_the_newest_wins(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    loaded = checkpoint.load(run)
    first = checkpoint.save(folder, loaded, {})
    (folder / ".writing-step-000099").mkdir()
    assert checkpoint.find(folder) == first
    later = checkpoint.Checkpoint(loaded.policy, loaded.training, loaded.environment, loaded.dataset, 1_000_000)
    assert checkpoint.find(folder) == first
    second = checkpoint.save(folder, later, {})
    assert checkpoint.find(folder) == second
    assert not first.exists()


def test_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            checkpoint.load(path)


def test_damaged_weights_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged: its size or SHA-256"):
        checkpoint.load(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(copy)


def test_a_checkpoint_without_its_normalizer_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    rewrite_weights(copy, {name: value for name, value in weights.items() if not name.startswith("normalizer.")})
    with pytest.raises(CheckpointError, match="has no normalizer"):
        checkpoint.load(copy)


def test_shapes_that_disagree_with_the_configuration_are_named(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    rewrite_weights(copy, {**weights, "network.out.1.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"network.out.1.bias has shape \(3,\); its configuration needs \(2,\)"):
        checkpoint.load(copy)
    rewrite_weights(copy, {**weights, "extra": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"unknown \['extra'\]"):
        checkpoint.load(copy)


def test_newer_formats_and_other_files_are_refused(copy: Path) -> None:
    edit_config(copy, format_version=2)
    with pytest.raises(CheckpointError, match="has format version 2; this package reads up to 1"):
        checkpoint.load(copy)
    edit_config(copy, format="something else")
    with pytest.raises(CheckpointError, match="is not the configuration of a checkpoint"):
        checkpoint.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(copy)


@pytest.mark.parametrize("part", ["policy", "training", "shapes", "environment", "dataset", "files", "step"])
def test_an_incomplete_configuration_is_refused(copy: Path, part: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config[part]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"config.json is incomplete: '{part}'"):
        checkpoint.load(copy)


def test_a_pickle_in_place_of_the_weights_is_never_opened(copy: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save(Hostile(), copy / "model.safetensors")
    files = {"model.safetensors": checkpoint._describe(copy / "model.safetensors")}
    edit_config(copy, files=files)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        checkpoint.load(copy)
    assert not (tmp_path / "owned").exists()
