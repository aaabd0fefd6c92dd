"""Policies that see: images from the window to the action, in training, planning, export and checkpoints."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_policy.basics.images import as_uint8, is_channels_first, is_image
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint, Dataset, Environment
from diffusion_policy.checkpoints.schema import check_bounds
from diffusion_policy.config import (
    CnnConfig,
    ImageConfig,
    PolicyConfig,
    ResnetConfig,
    SampleConfig,
    TrainConfig,
    TransformerConfig,
    VitConfig,
    with_options,
)
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.planner import planning_rng
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.datasets.statistics import measure
from diffusion_policy.datasets.windows import Batch, Windows
from diffusion_policy.policy import DiffusionPolicy, Shapes
from diffusion_policy.serving.export import Exporting, draw_observations, make_export
from diffusion_policy.serving.exported import OnnxPlanner
from diffusion_policy.training.losses import denoising_loss, draw
from diffusion_policy.training.trainer import Trainer

RNG = np.random.default_rng(0)
SIZE = (48, 40, 3)
DATA = {
    "image": RNG.integers(0, 256, (60, *SIZE), np.uint8),
    "wrist": RNG.integers(0, 256, (60, *SIZE), np.uint8),
    "state": RNG.normal(2, 3, (60, 4)).astype(np.float32),
    "action": RNG.uniform(5, 9, (60, 2)).astype(np.float32),
}
CNN = CnnConfig((4, 8), 4)
CONFIG = with_options(
    PolicyConfig(images=ImageConfig(CNN, image_features=6)), widths=(16, 32), level_dim=32, noise_levels=20
)
VISIONS = [CNN, ResnetConfig(4), VitConfig(16, 1, 2)]
of_each_vision = pytest.mark.parametrize("vision", VISIONS, ids=lambda vision: vision.kind)


def new_policy(config: PolicyConfig = CONFIG) -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy.for_data(config, DATA).eval()


def seeing(**options) -> PolicyConfig:
    return replace(CONFIG, images=replace(CONFIG.images, **options))


def observe(rows: int) -> dict[str, torch.Tensor]:
    drawn = draw_observations(new_policy(), rows, np.random.default_rng(1))
    return {key: torch.from_numpy(values) for key, values in drawn.items()}


@of_each_vision
def test_a_row_depends_on_its_own_images_and_noise_alone(vision) -> None:
    policy, observations = new_policy(seeing(vision=vision)), observe(3)
    assert observations["image"].dtype == torch.uint8
    actions = policy.sample(observations, [planning_rng(seed) for seed in range(3)], 2)
    assert actions.shape == (3, 2, 16, 2)
    alone = policy.sample({key: rows[1:2] for key, rows in observations.items()}, [planning_rng(1)], 2)
    torch.testing.assert_close(alone, actions[1:2], rtol=1e-4, atol=1e-4)
    for key in ("image", "wrist", "state"):
        other = {**observations, key: observations[key].flip(0)}
        assert not torch.equal(policy.encode(other)[0], policy.encode(observations)[0])


def test_images_are_encoded_once_for_all_samples_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = new_policy(), []
    encoder = policy.encoder_of("image")
    own = encoder.backbone.trunk.forward
    monkeypatch.setattr(encoder.backbone.trunk, "forward", lambda images: calls.append(images) or own(images))
    policy.sample(observe(2), [planning_rng(0)] * 2, 5, SampleConfig("ddim", 8))
    assert [tuple(images.shape) for images in calls] == [(4, 3, 42, 35)]


def test_pixels_are_normalized_by_channel_and_the_middle_is_seen() -> None:
    images = torch.from_numpy(DATA["image"][:2, None])
    seen = new_policy(seeing(image_crop=0.5)).prepare("image", images)
    torch.testing.assert_close(seen, (images[:, :, 12:36, 10:30].float() - 127.5) / 127.5)
    policy = new_policy(seeing(image_normalization="channels", image_crop=1.0))
    every = policy.prepare("image", torch.from_numpy(DATA["image"][:, None]))
    torch.testing.assert_close(every.mean((0, 1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(every.std((0, 1, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    policy = new_policy(seeing(image_normalization="imagenet", image_crop=1.0))
    white = policy.prepare("image", torch.full((1, 1, *SIZE), 255, dtype=torch.uint8))
    torch.testing.assert_close(white[0, 0, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / 0.225, rtol=0.02, atol=0)


def test_training_sees_crops_that_are_drawn_for_the_whole_batch() -> None:
    policy = new_policy(seeing(color_jitter=0.3))
    batch = Batch(observe(8), torch.full((8, 16, 2), 7.0))
    draws = draw(policy, 8, torch.Generator().manual_seed(3))
    whole = denoising_loss(policy, batch, draws)
    halves = [denoising_loss(policy, batch.part(a, b), draws.rows(a, b)) for a, b in ((0, 4), (4, 8))]
    torch.testing.assert_close(torch.cat(halves), whole)
    other = draws._replace(augmentation=1 - draws.augmentation)  # pyright: ignore[reportOperatorIssue]
    assert not torch.allclose(denoising_loss(policy, batch, other), whole)
    assert draw(policy, 8, torch.Generator(), learning=False).augmentation is None


def test_cameras_share_an_encoder_by_option() -> None:
    own, shared = new_policy(), new_policy(seeing(share_encoder=True))
    assert shared.encoder_of("image") is shared.encoder_of("wrist")
    assert own.encoder_of("image") is not own.encoder_of("wrist")
    assert own.encode(observe(1)).shape == shared.encode(observe(1)).shape == (1, 2 * (6 + 6 + 4))
    count = sum(weight.numel() for weight in own.encoder_of("image").parameters())
    sizes = [sum(weight.numel() for weight in policy.encoders.parameters()) for policy in (own, shared)]
    assert sizes == [2 * count, count]
    observations = observe(1)
    same = shared.encode({**observations, "wrist": observations["image"]})
    torch.testing.assert_close(same[:, :12], same[:, 20:])
    data = {**DATA, "wrist": DATA["wrist"][:, :32]}
    with pytest.raises(ValueError, match=r"share-encoder must have images of one size; got \[\(48, 40, 3\), \(32, 40"):
        DiffusionPolicy.for_data(seeing(share_encoder=True), data)


def test_encoder_and_sampling_compile_as_one_graph() -> None:
    policy, config = new_policy(), SampleConfig("ddim", 2)
    noise, observations = torch.randn(2, 1, *policy.noise_shape(config)), observe(2)
    torch.compiler.reset()
    compiled = torch.compile(policy.sample_on_device, fullgraph=True, backend="eager")
    with torch.no_grad():
        eager = policy.sample_on_device(observations, noise, config)
        torch.testing.assert_close(compiled(observations, noise, config), eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "vision",
    [VISIONS[0], *(pytest.param(vision, marks=pytest.mark.slow) for vision in VISIONS[1:])],
    ids=lambda vision: vision.kind,
)
def test_an_exported_policy_sees(vision, graphs_made_once) -> None:
    policy, sampling = new_policy(seeing(vision=vision)), SampleConfig("ddim", 2)
    config, files = make_export(policy, sampling, Exporting(), tolerance=3e-4)  # untrained, it amplifies rounding
    planner = OnnxPlanner(config, files, 1, "here")
    observations = draw_observations(policy, 3, RNG)
    noise = policy.draw_noise([RNG] * 3, 1, sampling)
    tensors = {key: torch.from_numpy(values) for key, values in observations.items()}
    expected = policy.sample_from(tensors, noise, sampling)[:, :, 1:]
    np.testing.assert_allclose(planner.sample(observations, noise), expected, rtol=3e-4, atol=3e-4)
    assert config.type_of("image") == "uint8"
    assert config.type_of("state") == "float64"


def test_a_policy_with_a_transformer_sees_each_image_as_a_token() -> None:
    network = TransformerConfig(16, 1, 2, conditioning="cross-attention", level_dim=16)
    policy = new_policy(replace(CONFIG, network=network))
    assert [tuple(part) for part in policy.network.observe.parts] == [(2, 6), (2, 4), (2, 6)]
    assert policy.sample(observe(2), [planning_rng(0)] * 2).shape == (2, 1, 16, 2)


def test_a_checkpoint_keeps_what_it_sees_by(tmp_path: Path) -> None:
    policy = new_policy(seeing(share_encoder=True, image_normalization="channels"))
    dataset = Dataset("d.zarr", "0" * 64, 1, 60, {}, None, "action")
    point = Checkpoint(policy, TrainConfig(steps=1), Environment(None, {}, ()), dataset, 1)
    loaded = checkpoint.load(checkpoint.save(tmp_path, point, {}, 1, None)).policy.eval()
    assert loaded.config == policy.config
    assert loaded.images == ("image", "wrist")
    observations = observe(1)
    assert torch.equal(*(one.sample(observations, [planning_rng(0)]) for one in (policy, loaded)))


def test_images_of_usual_cameras_fit_a_checkpoint_and_absurd_ones_do_not() -> None:
    action = (2,)
    check_bounds(Shapes({f"camera {i}": (480, 640, 3) for i in range(4)}, action), ())
    check_bounds(Shapes({"image": (256, 256, 3), "state": (65_536,)}, action), ())
    with pytest.raises(ValueError, match="the size of the images must be from 0 to 16777216; got"):
        check_bounds(Shapes({"image": (8192, 8192, 4)}, action), ())


def test_a_controller_holds_uint8_and_refuses_what_does_not_fit() -> None:
    controller = Controller(PolicyPlanner(new_policy()), 2)
    controller.reset(np.ones(2, bool), [(0, 0), (1, 0)])
    rows = {key: DATA[key][:2] for key in ("image", "wrist", "state")}
    first = controller.act(rows)
    assert controller._history["image"].dtype == np.uint8
    again = Controller(PolicyPlanner(new_policy()), 2)
    again.reset(np.ones(2, bool), [(0, 0), (1, 0)])
    shares = {**rows, "image": rows["image"] / 255}
    np.testing.assert_array_equal(again.act(shares), first)

    def refused(images: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            controller.act({**rows, "image": images})

    shape = r"the observation image must be images \(height, width, channels\) of shape \(48, 40, 3\), 2 of them; "
    refused(np.moveaxis(rows["image"], -1, 1), shape + r"got \(2, 3, 48, 40\); move the channels to the last axis")
    refused(rows["image"][..., :1], shape + r"got \(2, 48, 40, 1\); give 3 channels \(RGB\)")
    refused(rows["image"][:, :20], shape + r"got \(2, 20, 40, 3\); resize them to 48 x 40 px")
    refused(rows["image"] - 1.0, "image must hold images of uint8, or floats .*; got float64 from -1 to")
    refused(rows["image"] * 2.0, "image must hold images of uint8, or floats from 0 to 1 or from 0 to 255; got")
    refused(rows["image"] * np.nan, "image must hold images of uint8, .* got float64 from nan to nan")


def test_windows_hold_uint8_and_give_what_was_stored() -> None:
    data = {**DATA, "image": DATA["image"].astype(np.float32)}  # as the published Push-T store has them
    windows = Windows(data, np.array([20, 60]), [0, 1], 2, 16)
    batch = windows.gather(np.array([0, 30]))
    assert batch.observations["image"].dtype == torch.uint8
    np.testing.assert_array_equal(batch.observations["image"][1], DATA["image"][29:31])
    with pytest.raises(ValueError, match="image must hold images of uint8, or floats"):
        Windows({**DATA, "image": DATA["image"] - 300.0}, np.array([60]), [0], 2, 16)


def test_statistics_of_images_are_those_of_their_channels() -> None:
    found = measure(DATA["image"])
    pixels = DATA["image"].reshape(-1, 3).astype(np.float64)
    assert found.shape == SIZE
    assert found.rows == 60
    np.testing.assert_allclose(found.mean, pixels.mean(0))
    np.testing.assert_allclose(found.std, pixels.std(0))
    np.testing.assert_array_equal([found.minimum, found.maximum], [pixels.min(0), pixels.max(0)])
    np.testing.assert_allclose([found.low, found.high], np.quantile(pixels, [0.01, 0.99], axis=0), atol=1)


def test_what_is_an_image() -> None:
    assert is_image((96, 96, 3))
    assert is_image((8, 8, 1))
    assert not is_image((9, 2))
    assert not is_image((3, 96, 96))
    assert is_channels_first((3, 96, 96))
    assert not is_channels_first((96, 96, 3))
    assert not is_channels_first((4, 4, 4))
    shares = np.array([[[[0.0], [1.0], [0.5]]]])
    assert as_uint8(shares, "x").ravel().tolist() == [0, 255, 128]
    assert as_uint8(np.array([[[[0.0], [200.0], [0.5]]]]), "x").ravel().tolist() == [0, 200, 0]


def test_it_learns_from_images_what_states_do_not_say() -> None:
    """A bright spot says where to go."""
    rng = np.random.default_rng(0)
    places = rng.integers(2, 14, (400, 2))
    images = np.zeros((400, 16, 16, 1), np.uint8)
    for image, (y, x) in zip(images, places, strict=True):
        image[y - 1 : y + 2, x - 1 : x + 2] = 255
    data = {"image": images, "action": places.astype(np.float32)}
    config = with_options(
        CONFIG, widths=(32,), prediction_horizon=1, observation_horizon=1, action_horizon=1, prediction="sample",
        image_crop=1.0, cnn_widths=(8, 16),
    )  # fmt: skip
    torch.manual_seed(0)
    policy = DiffusionPolicy.for_data(config, data)
    windows = Windows(data, np.arange(1, 401), range(400), 1, 1)
    settings = TrainConfig(steps=200, batch_size=64, learning_rate=3e-3, warmup_steps=10, validate_every=10**6)
    trainer = Trainer.for_policy(policy, windows, None, settings)
    trainer.run()
    batch = windows.gather(np.arange(64))
    acted = trainer.ema.sample(batch.observations, [planning_rng(i) for i in range(64)])[:, 0]
    assert float((acted - batch.actions).abs().mean()) < 0.5
