import pytest
import torch

from diffusion_policy.networks.vision import (
    BACKBONES,
    ImageEncoder,
    ResNet18,
    SpatialSoftmax,
    center_crop,
    jitter,
    load_trunk,
    random_crop,
)

OPTIONS = {
    "cnn": {"cnn_widths": (4, 16, 8), "keypoints": 5},
    "resnet18": {"keypoints": 5},
    "vit": {"vit_width": 16, "vit_layers": 2, "vit_heads": 2},
}


def make(kind: str, size: int = 40, features: int = 6) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(BACKBONES[kind]((size, size, 3), features, **OPTIONS[kind]), features)


@pytest.mark.parametrize("kind", BACKBONES)
def test_an_encoder_makes_features_of_each_observed_image_and_looks_at_no_other_row(kind: str) -> None:
    encoder, images = make(kind), torch.rand(3, 2, 40, 40, 3)
    features = encoder(images)
    assert features.shape == (3, 2 * encoder.numbers) == (3, 12)
    torch.testing.assert_close(encoder(images[1:2]), features[1:2])
    swapped = encoder(images.flip(1)).unflatten(1, (2, 6)).flip(1).flatten(1)
    torch.testing.assert_close(swapped, features)
    features.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in encoder.parameters())


def test_the_spatial_softmax_finds_where_a_map_is_active() -> None:
    maps = torch.zeros(1, 2, 5, 9)
    maps[0, 0, 0, 8] = maps[0, 1, 2, 4] = 100.0
    torch.testing.assert_close(SpatialSoftmax()(maps), torch.tensor([[[1.0, -1.0], [0.0, 0.0]]]))
    warm = SpatialSoftmax()
    warm.log_temperature.data.fill_(20.0)
    torch.testing.assert_close(warm(maps), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)


def test_keypoints_follow_what_moves_in_the_image() -> None:
    encoder = make("cnn", 32)
    near, far = torch.zeros(2, 1, 2, 32, 32, 3)
    near[:, :, 4:8, 4:8], far[:, :, 24:28, 24:28] = 5.0, 5.0
    first, second = encoder.keypoints(near), encoder.keypoints(far)
    assert first is not None
    assert second is not None
    assert first.shape == (1, 2, 5, 2)
    assert ((second - first).abs() > 1e-4).all()
    assert make("vit", 32).keypoints(near) is None


def test_resnet18_has_the_published_size_and_names() -> None:
    network = ResNet18(3)
    weights = network.state_dict()
    assert sum(tensor.numel() for tensor in weights.values()) == 11_176_512  # torchvision's, without its classifier
    assert weights["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert weights["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert network(torch.zeros(2, 3, 64, 96)).shape == (2, 512, 2, 3)


def test_a_resnet_refuses_images_of_which_it_leaves_one_pixel() -> None:
    with pytest.raises(ValueError, match="resnet18 needs images above 32 x 32 px; got 32 x 64, after the crop"):
        BACKBONES["resnet18"]((32, 64, 3), 8, keypoints=4)


def test_a_vit_refuses_images_without_a_patch() -> None:
    with pytest.raises(ValueError, match="a vit needs images of at least 16 x 16 px; got 12 x 30, after the crop"):
        BACKBONES["vit"]((12, 30, 3), 8, **OPTIONS["vit"])


def test_crops_are_windows_of_the_image_the_same_for_all_steps_of_a_row() -> None:
    images = torch.arange(2 * 2 * 10 * 8 * 3).view(2, 2, 10, 8, 3)
    cut = random_crop(images, 0.5, torch.tensor([[0.0, 0.0], [0.999, 0.999]]))
    assert torch.equal(cut[0], images[0, :, :5, :4])
    assert torch.equal(cut[1], images[1, :, 5:, 4:])
    assert torch.equal(center_crop(images, 0.5), images[:, :, 2:7, 2:6])
    assert center_crop(images, 1.0) is images
    assert random_crop(images, 1.0, torch.zeros(2, 2)) is images


def test_every_place_of_a_crop_is_as_likely() -> None:
    images = torch.arange(4).view(1, 1, 4, 1, 1).expand(3000, 1, 4, 8, 1)
    generator = torch.Generator().manual_seed(0)
    tops = random_crop(images, 0.5, torch.rand(3000, 2, generator=generator))[:, 0, 0, 0, 0]
    assert torch.bincount(tops).tolist() == pytest.approx([1000] * 3, rel=0.1)


def test_jitter_changes_brightness_contrast_and_saturation_of_a_row_alike() -> None:
    images = torch.rand(2, 2, 4, 4, 3) * 2 - 1
    same = jitter(images, 0.3, torch.full((2, 3), 0.5))
    torch.testing.assert_close(same, images)
    brighter = jitter(images, 0.3, torch.tensor([[1.0, 0.5, 0.5]] * 2))
    torch.testing.assert_close(brighter - images, torch.full_like(images, 0.3))
    grey = jitter(images, 1.0, torch.tensor([[0.5, 0.5, 0.0]] * 2))
    torch.testing.assert_close(grey, images.mean(-1, keepdim=True).expand_as(images))
    flat = jitter(images, 1.0, torch.tensor([[0.5, 0.0, 0.5]] * 2))
    torch.testing.assert_close(flat, images.mean((1, 2, 3, 4), keepdim=True).expand_as(images))


def test_published_weights_of_a_resnet_are_taken_but_for_classifier_and_batchnorm() -> None:
    trunk = ResNet18(3)
    published = {name: torch.full_like(tensor, 0.5) for name, tensor in ResNet18(3).state_dict().items()}
    published |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    published |= {"bn1.running_mean": torch.zeros(64), "bn1.num_batches_tracked": torch.tensor(1)}
    lacking = load_trunk(trunk, published, "resnet.safetensors")
    assert (trunk.layer3[1].conv1.weight == 0.5).all()
    assert (trunk.bn1.weight == 1).all()
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in lacking} <= {"bn1", "bn2", "1"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv1.weight": None}, "the weights do not fit the encoder: it has no conv1.weight"),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, r"conv1.weight has the shape \(64, 1, 7, 7\); .* needs \(64, 3,"),
        ({"layer5.0.conv1.weight": torch.zeros(1)}, "it has layer5.0.conv1.weight, which the encoder does not"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: dict[str, torch.Tensor | None], message: str) -> None:
    weights = {name: tensor for name, tensor in {**ResNet18(3).state_dict(), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load_trunk(ResNet18(3), weights, "resnet.safetensors")
