"""Policies from images by the commands: published weights, frozen encoders, resume, and what does not fit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.commands.collect import Collect
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.networks.vision import ResNet18

BARE = "--widths 8 --groups 4 --level-dim 16 --noise-levels 20 --batch-size 16 --device cpu --steps 4"
SMALL = f"{BARE} --vision resnet18 --keypoints 4 --image-features 8 --validate-every 4 --checkpoint-every 2"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of the smallest task, with images."""
    path = tmp_path_factory.mktemp("data") / "images.zarr"
    Collect(path, env_kwargs='{"rows": 1, "image_size": 48}', episodes=4, workers=1).run()
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 as it is published, with BatchNorm and classifier."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in ResNet18(3).state_dict().items()}
    save_file({**tensors, "bn1.running_mean": torch.zeros(64), "fc.weight": torch.zeros(10, 512)}, path)
    return path


def trunk_of(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint.find(run) / "model.safetensors")
    return {name.partition("trunk.")[2]: tensor for name, tensor in tensors.items() if "trunk." in name}


def test_a_frozen_encoder_keeps_published_weights_and_looks_at_each_image_once(
    images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = ResNet18.forward
    monkeypatch.setattr(ResNet18, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    told = ["--vision-weights", str(weights), "--freeze-vision", "--observation", "image"]
    run = ["train", "--dataset", str(images), "--output", str(tmp_path / "run"), *SMALL.split(), *told]
    assert main(run) == 0
    assert "no weights of our norms" in capsys.readouterr().err
    kept = load_file(weights)
    trunk = trunk_of(tmp_path / "run")
    assert torch.equal(trunk["layer4.1.conv2.weight"], kept["layer4.1.conv2.weight"])
    rows = int(EpisodeStore.open(images).episode_ends[-1])
    assert sum(seen) == rows + 2 * 2  # and one window each of those to train on and those held out, for its size


def test_a_frozen_training_goes_on_as_the_same(images: Path, weights: Path, tmp_path: Path) -> None:
    told = ["--vision-weights", str(weights), "--freeze-vision", "--observation", "image"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        assert (
            main(
                [
                    "train",
                    "--dataset",
                    str(images),
                    "--output",
                    str(run),
                    *SMALL.split(),
                    *told,
                    "--keep-checkpoints",
                    "9",
                ]
            )
            == 0
        )
    shutil.rmtree(cut / "step-000004")
    assert main(["train", "--resume", str(cut)]) == 0
    one, other = (load_file(run / "step-000004" / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_crops_are_the_same_after_a_resume(images: Path, tmp_path: Path) -> None:
    told = ["--observation", "image", "--color-jitter", "0.2", "--keep-checkpoints", "9"]
    for name in ("whole", "cut"):
        assert main(["train", "--dataset", str(images), "--output", str(tmp_path / name), *SMALL.split(), *told]) == 0
    last = tmp_path / "cut" / "step-000004"
    shutil.rmtree(last)
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    one, other = (load_file(tmp_path / name / "step-000004" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    arguments = ["--episodes", "1", "--sampling-steps", "1", "--workers", "1", "--videos", "0", "--device", "cpu"]
    kwargs = ["--env-kwargs", '{"rows": 1, "image_size": 32, "max_episode_steps": 4}']
    assert (
        main(["evaluate", "--checkpoint", str(last.parent), "--output", str(tmp_path / "e"), *arguments, *kwargs]) == 2
    )


@pytest.mark.parametrize(
    "told, message",
    [
        (
            "--observation image --freeze-vision",
            "--freeze-vision keeps the weights of --vision-weights, or a teacher's",
        ),
        ("--observation desired_xy --vision-weights {weights}", "--vision-weights is for policies that observe images"),
        ("--observation image --vision-weights nowhere.safetensors", "nowhere.safetensors is missing"),
        ("--observation image --vision cnn --vision-weights {weights}", "the weights do not fit the encoder"),
        ("--observation image --image-crop 0.5", "resnet18 needs images above 32 x 32 px; got 24 x 24, after the crop"),
        ("--observation image --vision vit --keypoints 4", "--keypoints is an option of the"),
        (
            "--observation image --vision-weights {weights} --freeze-vision --memory-gb 0.0001",
            "freeze-vision keeps what the encoders make of all images in memory",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    told: str, message: str, images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = told.format(weights=weights).split()
    small = BARE.split() if "--vision " in told else SMALL.split()
    assert main(["train", "--dataset", str(images), "--output", str(tmp_path / "run"), *small, *flags]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
