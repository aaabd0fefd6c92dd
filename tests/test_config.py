import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from diffusion_policy.cli import parse
from diffusion_policy.commands import runs
from diffusion_policy.commands.options.flags import is_options
from diffusion_policy.commands.options.sweep import OF_A_TRAINING, Sweep
from diffusion_policy.commands.options.train import KEPT, read_run, to_options
from diffusion_policy.commands.points import read_grid
from diffusion_policy.commands.train import Train
from diffusion_policy.commands.trials import to_flags, vary
from diffusion_policy.config import (
    ClipName,
    CnnConfig,
    ConfigError,
    DistillationConfig,
    GuidanceScheduleName,
    ImageConfig,
    LatentConfig,
    PolicyConfig,
    PredictionName,
    ResnetConfig,
    SampleConfig,
    SamplerName,
    ScheduleName,
    SpacingName,
    SuccessAndModes,
    TrainConfig,
    TransformerConfig,
    UnetConfig,
    VitConfig,
    as_kind,
    decode,
    flat_options,
    from_dict,
    with_options,
)
from diffusion_policy.diffusion.guidance import CLIPS, GUIDANCE_SCHEDULES
from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.diffusion.schedules import SCHEDULES, SPACINGS


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (PolicyConfig, {"prediction_horizon": 10}, "prediction-horizon must be a multiple of 4.*got 10"),
        (PolicyConfig, {"action_horizon": 16}, r"action-horizon must be at most 15 .*got 16"),
        (PolicyConfig, {"observation_horizon": 0}, "observation-horizon must be at least 1; got 0"),
        (PolicyConfig, {"observation_horizon": 20}, "prediction-horizon must be at least the observation-horizon 20"),
        (UnetConfig, {"kernel_size": -1}, "kernel-size must be odd; got -1"),
        (TrainConfig, {"seed": -1}, r"seed must be from 0 to below 2\^32; got -1"),
        (TrainConfig, {"seed": 2**32}, r"seed must be from 0 to below 2\^32"),
        (UnetConfig, {"widths": ()}, "widths must be positive numbers"),
        (UnetConfig, {"widths": (12, 24)}, r"widths must be multiples of the 8 groups; got \[12\]"),
        (UnetConfig, {"kernel_size": 4}, "kernel-size must be odd; got 4"),
        (UnetConfig, {"level_dim": 7}, "level-dim must be even"),
        (TransformerConfig, {"level_dim": 2}, "level-dim must be even and at least 4; got 2"),
        (TransformerConfig, {"width": 100, "heads": 8}, "width must be a multiple of the 8 heads; got 100"),
        (TransformerConfig, {"heads": 512}, "width must be a multiple of the 512 heads; got 256"),
        (TransformerConfig, {"heads": 0}, "heads must be at least 1; got 0"),
        (TransformerConfig, {"dropout": 1.0}, "dropout must be from 0 to below 1; got 1.0"),
        (
            TransformerConfig,
            {"conditioning": "film"},
            "unknown conditioning 'film'; choose from adaln, cross-attention",
        ),
        (CnnConfig, {"cnn_widths": ()}, r"cnn-widths must be from 1 to 10 numbers from 1 to 8192; got \(\)"),
        (CnnConfig, {"keypoints": 0}, "keypoints must be from 1 to 1024; got 0"),
        (ResnetConfig, {"keypoints": 2000}, "keypoints must be from 1 to 1024; got 2000"),
        (VitConfig, {"vit_width": 30}, "vit-width must be a multiple of 4; got 30"),
        (VitConfig, {"vit_layers": 0}, "vit-layers must be at least 1; got 0"),
        (ImageConfig, {"image_crop": 0.0}, "image-crop must be above 0 and at most 1; got 0.0"),
        (ImageConfig, {"image_crop": 1.5}, "image-crop must be above 0 and at most 1; got 1.5"),
        (ImageConfig, {"color_jitter": 1.0}, "color-jitter must be from 0 to below 1; got 1.0"),
        (ImageConfig, {"image_features": 0}, "image-features must be at least 1; got 0"),
        (ImageConfig, {"image_normalization": "gray"}, "unknown image-normalization 'gray'; choose from scale"),
        (PolicyConfig, {"schedule": "cubic"}, "unknown schedule 'cubic'; choose from cosine, linear"),
        (TrainConfig, {"steps": 0}, "steps must be at least 1; got 0"),
        (TrainConfig, {"learning_rate": 0.0}, "learning-rate must be above 0"),
        (TrainConfig, {"validation_share": 1.0}, "validation-share must be from 0 to below 1"),
        (SampleConfig, {"sampler": "dmp"}, "unknown sampler 'dmp'; choose from ddim, ddpm"),
        (SampleConfig, {"sampling_steps": 0}, "sampling-steps must be at least 1; got 0"),
        (SampleConfig, {"eta": 1.5}, "eta must be from 0 to 1; got 1.5"),
        (SampleConfig, {"spacing": "odd"}, "unknown spacing 'odd'; choose from trailing, leading, even, log-snr"),
        (SampleConfig, {"clip": "hard"}, "unknown clip 'hard'; choose from auto, static, dynamic, none"),
        (SampleConfig, {"corrector_steps": 1, "sampling_steps": 1}, "sampling-steps must be at least 2; got 1"),
        (SampleConfig, {"guidance": float("inf")}, "guidance must be at least -1; got inf"),
        (
            SampleConfig,
            {"mode": "a", "instruction": "b"},
            "a mode or an instruction; got both --mode and --instruction",
        ),
        (SampleConfig, {"instruction": ""}, "instruction must be one line of at most 500 printable characters"),
        (SampleConfig, {"instruction": "a\nb"}, "instruction must be one line of at most 500 printable characters"),
        (
            PolicyConfig,
            {"condition_on_mode": True, "condition_on_instruction": True},
            "got condition-on-mode and -on-instruction",
        ),
        (
            PolicyConfig,
            {"schedule_options": (float("nan"),)},
            "schedule-options must be finite, and whole numbers below",
        ),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(kind, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize("widths, horizon", [((64,), 1), ((64,), 7), ((64, 128), 6), ((64, 128, 256), 12)])
def test_only_the_real_down_samplings_bind_the_horizon(widths, horizon) -> None:
    config = with_options(
        PolicyConfig(), widths=widths, prediction_horizon=horizon, observation_horizon=1, action_horizon=1
    )
    assert (config.network, config.prediction_horizon) == (UnetConfig(widths=widths), horizon)


OTHERS: dict[type, dict[str, Any]] = {
    PolicyConfig: {
        "observation_horizon": 3, "prediction_horizon": 32, "action_horizon": 4, "schedule": "linear",
        "noise_levels": 20, "schedule_options": (0.001, 0.3), "prediction": "velocity", "snr_gamma": 5.0,
        "learn_variance": True, "condition_dropout": 0.2, "normalization": "quantiles", "condition_on_mode": True,
        "objective": "regression", "student_steps": 2, "mixture_components": 3, "max_delay": 3, "goal": ("xy",),
        "condition_on_instruction": True, "rotations": ("pose:3,4,5",),
        "target": ("xy", "action"), "prediction_stride": 2, "inverse_dynamics": True, "inpaint_start": True,
        "inpaint_goal": "goal", "action_form": "delta", "action_reference": "xy:0",
    },
    LatentConfig: {"latent_channels": 4, "latent_stride": 8, "latent_width": 16, "latent_kl": 0.1},
    UnetConfig: {"widths": (16, 32), "kernel_size": 3, "groups": 4, "level_dim": 16},
    TransformerConfig: {
        "width": 96, "layers": 3, "heads": 8, "mlp_ratio": 2, "dropout": 0.1, "conditioning": "cross-attention",
        "level_dim": 16,
    },
    ImageConfig: {
        "image_features": 32, "image_crop": 0.5, "color_jitter": 0.2, "image_normalization": "imagenet",
        "share_encoder": True,
    },
    CnnConfig: {"cnn_widths": (8, 16), "keypoints": 4},
    ResnetConfig: {"keypoints": 4},
    VitConfig: {"vit_width": 64, "vit_layers": 2, "vit_heads": 8},
    TrainConfig: {
        "steps": 4, "batch_size": 8, "learning_rate": 1e-05, "weight_decay": 0.0, "warmup_steps": 1,
        "gradient_clip": 0.5, "ema_power": 0.6, "ema_max_decay": 0.0, "validation_share": 0.25, "max_episodes": 3,
        "memory_gb": 0.5, "validate_every": 500, "checkpoint_every": 2000, "keep_checkpoints": 2, "keep_best":
        "action_error_best", "rollout_every": 500, "rollout_episodes": 2, "precision": "bf16", "accumulation": 2,
        "compile": True, "seed": 2**32 - 1, "vision_weights": "resnet18.safetensors", "freeze_vision": True,
        "hindsight": ("xy=pose",), "hindsight_share": 1.0, "mask_padding": True,
        "whole_windows": True,
        "noise_draws": 2, "latent": "runs/latent",
    },
    DistillationConfig: {
        "teacher": "runs/teacher", "student": "pairs", "teacher_steps": 4, "teacher_weights": "0" * 64, "pairs": 100,
        "pair_noise": 0.1, "guard": "stop",
    },
    SampleConfig: {
        "sampler": "ddpm", "sampling_steps": 3, "spacing": "even", "jump_from": 0.5, "eta": 1.0, "clip": "dynamic",
        "guidance": -1.0, "guidance_schedule": "rising", "mode": "links, \u00fcber", "corrector_steps": 1,
        "corrector_size": 0.02, "instruction": "go round it, on the left",
    },
    SuccessAndModes: {
        "success": "return>=90", "mode_function": "a.b:c", "mode_labels": ("left", "right"), "fresh": True,
    },
}  # fmt: skip
"""Of each option a value other than its default."""
FIELDS = [(kind, name) for kind, values in OTHERS.items() for name in values]
RUN = {
    "observation": ("pose", "xy"), "action": ("a", "b"), "angles": ("pose:2",), "device": "cpu",
    "tracker": ("tensorboard",), "env": "a/B-v0", "env_kwargs": '{"rows": 1}', "image_size": 32,
}  # fmt: skip
"""The same of what a training is told beside them."""


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


NETWORKS = UnetConfig(**OTHERS[UnetConfig]), TransformerConfig(**OTHERS[TransformerConfig])
VISIONS = {"unet": VitConfig(**OTHERS[VitConfig]), "transformer": CnnConfig(**OTHERS[CnnConfig])}
of_each_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.kind)


def told(network: UnetConfig | TransformerConfig = NETWORKS[0], **given: Any) -> Train:
    """A training in which every option is given."""
    return Train(
        "data.zarr",
        Path("run"),
        **{**RUN, "action": ("a+b",), **given},
        policy=PolicyConfig(
            **{**OTHERS[PolicyConfig], "objective": "denoising", "condition_on_instruction": False},
            network=network,
            images=ImageConfig(**OTHERS[ImageConfig], vision=VISIONS[network.kind]),
        ),
        training=TrainConfig(**OTHERS[TrainConfig], distillation=DistillationConfig(**OTHERS[DistillationConfig])),
    )


@pytest.mark.parametrize("kind", OTHERS)
def test_each_option_has_another_value_to_be_tried_with(kind: type) -> None:
    of_its_own = {field.name for field in dataclasses.fields(kind) if not is_options(getattr(kind(), field.name))}
    assert of_its_own == OTHERS[kind].keys()
    assert {name for name, value in OTHERS[kind].items() if value == getattr(kind(), name)} == set()


@pytest.mark.parametrize("kind, name", FIELDS)
def test_an_option_survives_json_and_can_be_varied(kind: type, name: str) -> None:
    value = OTHERS[kind][name]
    config = dataclasses.replace(kind(), **{name: value})
    assert from_dict(kind, as_json(dataclasses.asdict(config))) == config
    if kind in (PolicyConfig, UnetConfig, TransformerConfig, ImageConfig, CnnConfig, VitConfig, TrainConfig):
        if name == "rotations":  # a grid divides values at commas and colons
            return
        text = ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
        (point,) = read_grid([f"{name.replace('_', '-')}={text}"])
        assert vary(kind(), as_json(point)) == config
        empty = [] if isinstance(value, tuple) else getattr(kind(), name)
        if isinstance(empty, list | bool | type(None)) and "widths" not in name:
            (back,) = read_grid([f"{name}={'false' if empty is False else 'none'}"])
            assert vary(config, back) == kind()


@of_each_network
def test_a_run_remembers_all_that_it_was_told(network, tmp_path: Path) -> None:
    train = told(network)
    names = {field.name for field in dataclasses.fields(Train)} - {"dataset", "output", "resume", "config"}
    assert names == KEPT.keys() == RUN.keys() | {"policy", "training"}
    options = to_options(train, "abc")
    runs.write_options(tmp_path, options)
    assert read_run(tmp_path) == as_json(options)
    resumed = parse(["train", "--resume", str(tmp_path)])
    assert resumed == dataclasses.replace(train, output=tmp_path, resume=tmp_path)
    runs.require_same(tmp_path, as_json(options), options)


@of_each_network
def test_a_file_of_options_says_all_that_flags_can(network, tmp_path: Path) -> None:
    train, file = told(network), tmp_path / "options.json"
    file.write_text(json.dumps(to_options(train, "abc")))
    assert parse(["train", "--dataset", "data.zarr", "--output", "run", "--config", str(file)]) == dataclasses.replace(
        train, config=file
    )


def test_options_by_the_names_of_older_versions_are_read(tmp_path: Path) -> None:
    train, file = told(), tmp_path / "options.json"
    today = as_json(to_options(train, "abc"))
    network = {name: value for name, value in today["policy"].pop("network").items() if name != "kind"}
    del today["policy"]["encoder"]
    today["policy"] = {
        ("levels" if name == "noise_levels" else name): v for name, v in today["policy"].items()
    } | network
    renamed = {"ema_power": "average_power", "ema_max_decay": "average_limit", "keep_checkpoints": "keep"}
    today["training"] = {renamed.get(name, name): value for name, value in today["training"].items()}
    file.write_text(json.dumps(today))
    assert parse(["train", "--dataset", "data.zarr", "--output", "run", "--config", str(file)]) == dataclasses.replace(
        train, config=file
    )


def test_a_sweep_takes_of_a_file_what_its_trials_share(tmp_path: Path) -> None:
    train, file = told(), tmp_path / "options.json"
    file.write_text(json.dumps(to_options(train, "abc")))
    sweep = parse(["sweep", "--dataset", "d", "--output", "o", "--grid", "seed=1", "--config", str(file)])
    assert isinstance(sweep, Sweep)
    assert set(OF_A_TRAINING) == {"observation", "action", "angles", "device", "policy", "training"}
    assert {name: getattr(sweep, name) for name in OF_A_TRAINING} == {
        name: getattr(train, name) for name in OF_A_TRAINING
    }


@of_each_network
def test_the_command_of_a_trial_says_all_that_it_was_told(
    network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = told(network)
    monkeypatch.chdir(tmp_path)
    teacher = tmp_path / OTHERS[DistillationConfig]["teacher"] / "step-000004"
    teacher.mkdir(parents=True)
    (teacher / "config.json").write_text(json.dumps({"policy": {}}))
    again = parse(["train", *to_flags(train)])
    assert again == dataclasses.replace(train, output=Path("run-again"))
    plain = Train("data.zarr", Path("run"))
    assert parse(["train", *to_flags(plain)]) == dataclasses.replace(plain, output=Path("run-again"))


# Which network


def parse_train(*flags: str) -> PolicyConfig:
    train = parse(["train", "--dataset", "d", "--output", "o", *flags])
    assert isinstance(train, Train)
    return train.policy


def test_a_network_is_chosen_by_name_with_options_of_its_own() -> None:
    chosen = with_options(PolicyConfig(), network="transformer", width=96, heads=8, level_dim=16)
    assert chosen.network == TransformerConfig(width=96, heads=8, level_dim=16)
    assert chosen == parse_train("--network", "transformer", "--width", "96", "--heads", "8", "--level-dim", "16")
    assert with_options(chosen, layers=2).network == TransformerConfig(width=96, heads=8, level_dim=16, layers=2)
    assert with_options(chosen, network="unet").network == UnetConfig(level_dim=16)  # what both have stays
    assert flat_options(chosen)["network"] == "transformer"
    assert parse_train("--level-dim", "16").network == UnetConfig(level_dim=16)
    assert as_kind(chosen.network, TransformerConfig) is chosen.network


@pytest.mark.parametrize("horizon", [1, 7, 1024])
def test_a_transformer_takes_any_horizon(horizon: int) -> None:
    config = PolicyConfig(1, horizon, 1, TransformerConfig())
    assert config.network.numbers_held(horizon) > 0
    with pytest.raises(ConfigError, match="prediction-horizon must be a multiple of 4"):
        PolicyConfig(1, 7, 1, UnetConfig())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--network", "transformer", "--widths", "64"], "^--widths is an option of the unet; this is a transformer$"),
        (["--network=transformer", "--kernel_size=5"], "^--kernel-size is an option of the unet; this is a tr"),
        (["--width", "256"], "^--width is an option of the transformer; this is a unet$"),  # though it is the default
        (["--network", "mlp"], "mlp.*unet.*transformer"),
    ],
)
def test_an_option_of_the_other_network_is_refused_and_not_ignored(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_train(*flags)


def test_from_python_an_option_of_the_other_network_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="--widths is an option of the unet; this is a transformer"):
        with_options(PolicyConfig(), network="transformer", widths=(8,))
    with pytest.raises(ConfigError, match="--layers is an option of the transformer; this is a unet"):
        with_options(PolicyConfig(), layers=2)
    with pytest.raises(ConfigError, match="unknown network 'mlp'; choose from unet, transformer"):
        with_options(PolicyConfig(), network="mlp")
    with pytest.raises(ConfigError, match=r"unknown option 'layer'; did you mean layers\?"):
        with_options(PolicyConfig(), layer=2)


def test_a_file_says_one_network_and_flags_another(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps(to_options(told(NETWORKS[1]), "abc")))
    from_file = "--config", str(file)
    assert parse_train(*from_file, "--layers", "1").network == dataclasses.replace(NETWORKS[1], layers=1)
    assert parse_train(*from_file, "--network", "unet", "--groups", "4").network == UnetConfig(groups=4, level_dim=16)
    with pytest.raises(ConfigError, match="--groups is an option of the unet; this is a transformer"):
        parse_train(*from_file, "--groups", "4")


def test_a_sweep_varies_networks_and_the_options_of_one() -> None:
    (one, other) = read_grid(["network=unet,transformer"])
    assert (vary(PolicyConfig(), one), vary(PolicyConfig(), other).network) == (PolicyConfig(), TransformerConfig())
    (point,) = read_grid(["network=transformer", "layers=2"])
    assert vary(PolicyConfig(), point).network == TransformerConfig(layers=2)
    assert vary(TrainConfig(), point) == TrainConfig()
    with pytest.raises(ConfigError, match="--layers is an option of the transformer; this is a unet"):
        vary(PolicyConfig(), {"layers": 2})


@pytest.mark.parametrize(
    "network, message",
    [
        ({"kind": "mlp"}, "^network: unknown kind 'mlp'; known are unet, transformer$"),
        ({"kind": ["unet"]}, r"^network: unknown kind \['unet'\]; known are unet, transformer$"),
        ({"kind": "unet", "layers": 2}, "^network: unknown option 'layers'; known are widths, kernel_size"),
        ({"widths": [7]}, r"^network: widths must be multiples of the 8 groups; got \[7\]$"),
        ({"kind": "transformer", "widths": [8]}, "^network: unknown option 'widths'; did you mean width?"),
        ({"kind": "transformer", "heads": 3}, "^network: width must be a multiple of the 3 heads; got 256$"),
        ({"kind": "transformer", "heads": "3"}, "^network, heads must be a whole number; got '3'$"),
        (3, "^network must be a JSON object; got 3$"),
    ],
)
def test_what_is_wrong_with_a_network_in_a_file_is_said_of_the_one_that_is_named(network, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(PolicyConfig, {"network": network})


def test_a_file_that_names_no_kind_of_network_means_the_unet() -> None:
    assert from_dict(PolicyConfig, {"network": {"widths": [8, 16]}}).network == UnetConfig(widths=(8, 16))


def test_a_training_with_another_network_is_another_training(tmp_path: Path) -> None:
    before, now = (to_options(told(network), "abc") for network in NETWORKS)
    with pytest.raises(ConfigError, match=r"another training: network unet, now transformer; vision vit, now cnn$"):
        runs.require_same(tmp_path, as_json(before), as_json(now))


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner | None = None
    either: int | str = 0
    pair: tuple[int, float] = (0, 0.0)
    rows: dict[str, float | None] = dataclasses.field(default_factory=dict)


def test_options_may_be_nested() -> None:
    outer = Outer(Inner(3, ("a",)), "x", (1, 2.5), {"a": None, "b": 1.0})
    assert decode(as_json(dataclasses.asdict(outer)), Outer, "") == outer
    assert decode({"inner": None, "pair": [1, 2]}, Outer, "") == Outer(pair=(1, 2.0))
    for tree, said in (
        ({"inner": {"sise": 3}}, "file: inner: unknown option 'sise'; did you mean size?"),
        ({"inner": {}}, "file, inner: 'size' is missing"),
        ({"inner": {"size": "3"}}, "file, inner, size must be a whole number; got '3'"),
        ({"inner": [3]}, r"file, inner must be a JSON object; got \[3\]"),
        ({"pair": [1, 2, 3]}, r"file, pair must be a list of 2 items, each a whole number; got \[1, 2, 3\]"),
        ({"rows": {"a": "b"}}, "file, rows, 'a' must be a finite number; got 'b'"),
    ):
        with pytest.raises(ConfigError, match=said.replace("file: inner", "file, inner")):
            decode(tree, Outer, "file")


ODD_NUMBERS = [float("nan"), float("inf"), -float("inf"), 2**63, -(2**63) - 1, 10**400, 1e400]


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, name in FIELDS if kind is not SuccessAndModes])
def test_numbers_that_are_none_are_refused_in_one_line(kind: type, name: str) -> None:
    value = OTHERS[kind][name]
    for odd in ODD_NUMBERS:
        for given in (odd, [odd]):
            with pytest.raises(ConfigError) as caught:
                from_dict(kind, {name: given})
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 500
        if not isinstance(value, str | bool):
            with pytest.raises(ConfigError):
                kind(**{name: (odd,) if isinstance(value, tuple) else odd})


@pytest.mark.parametrize("kind, name", FIELDS)
def test_values_of_another_type_are_refused_in_one_line(kind: type, name: str) -> None:
    value, usual = OTHERS[kind][name], getattr(kind(), name)
    for given in (None, True, 1, 0.5, "text", "\ud800", [], {}, [[]], [None], {"a": {}}, [{}], ["x"] * 2000):
        alike = type(given) is type(value) or (type(value) is float and type(given) is int)
        if alike or (given is None and usual is None) or (isinstance(value, tuple) and isinstance(given, list)):
            continue
        with pytest.raises(ConfigError, match=rf"^{name} must be ") as caught:
            from_dict(kind, {name: given})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_negative_zero_is_zero() -> None:
    assert from_dict(TrainConfig, {"weight_decay": -0.0, "seed": -0}) == TrainConfig(weight_decay=0.0)
    assert from_dict(SampleConfig, {"eta": -0.0, "sampler": "heun"}) == SampleConfig("heun")


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown option 'batch_sise'; did you mean batch_size"):
        from_dict(TrainConfig, {"batch_sise": 3})
    with pytest.raises(ConfigError, match="unknown option 'zzz'; known are"):
        from_dict(TrainConfig, {"zzz": 3})


@pytest.mark.parametrize("options", [{"steps": "3"}, {"steps": 1.5}, {"learning_rate": True}, {"steps": None}])
def test_wrong_types_are_refused(options) -> None:
    with pytest.raises(ConfigError, match="must be"):
        from_dict(TrainConfig, options)


def test_options_that_are_no_object_or_hold_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="the options of TrainConfig must be a JSON object; got 3"):
        from_dict(TrainConfig, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"widths\[0\] must be a whole number; got 'a'"):
        from_dict(UnetConfig, {"widths": ["a"]})


def test_the_names_that_options_allow_are_those_that_exist() -> None:
    assert set(get_args(ScheduleName)) == set(SCHEDULES)
    assert set(get_args(PredictionName)) == set(PREDICTIONS)
    assert set(get_args(SamplerName)) == set(SAMPLERS)
    assert set(get_args(SpacingName)) == set(SPACINGS)
    assert set(get_args(ClipName)) == {"auto", *CLIPS}
    assert set(get_args(GuidanceScheduleName)) == set(GUIDANCE_SCHEDULES)
