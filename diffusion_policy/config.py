"""Options as frozen dataclasses, validated when they are built; and the one decoder that makes them, or anything else
that has type hints, of JSON. The CLI's flags and the checkpoint's JSON are made from these fields and their docstrings;
nothing here imports torch."""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import reprlib
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.basics.names import MOST_CHARACTERS, MOST_INSTRUCTION, is_instruction

# Names of what the registries of the diffusion core hold; written here since those need torch.
ScheduleName = Literal["cosine", "linear", "sigmoid", "constant", "flow"]
PredictionName = Literal["noise", "sample", "velocity", "flow"]
ObjectiveName = Literal[
    "denoising", "autoencoding", "classifying", "regression", "mip", "mixture", "shortcut", "meanflow"
]
StudentName = Literal["pairs", "progressive", "consistency", "shortcut", "meanflow"]
GuardName = Literal["warn", "stop", "off"]
SamplerName = Literal[
    "ddim", "ddpm", "ddpm-large", "dpm-solver-1", "dpm-solver-2m", "dpm-solver-sde", "unipc", "euler", "heun"
]
SpacingName = Literal["trailing", "leading", "even", "log-snr"]
NormalizationName = Literal["limits", "moments", "quantiles"]
ActionFormName = Literal["absolute", "relative", "delta"]
ImageNormalizationName = Literal["scale", "channels", "imagenet"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
PlanningPrecision = Literal["fp32", "bf16"]
BackendName = Literal["eager", "compile", "graph", "onnx", "openvino", "auto"]
MetricName = Literal["validation_loss", "action_error", "action_error_best", "success_rate", "teacher_agreement"]
ClipName = Literal["auto", "static", "dynamic", "none"]
GuidanceScheduleName = Literal["constant", "falling", "rising", "middle"]
ChunkingName = Literal["receding", "rtc", "trained-rtc", "bid", "ensemble"]
RtcMask = Literal["exp", "linear", "ones", "zeros"]
ConditioningName = Literal["adaln", "cross-attention"]

# What options may ask for, far beyond what anyone trains: a checkpoint that asks for more is a stranger's.
MAX_HORIZON = 1024
MAX_RESOLUTIONS = 10
MAX_WIDTH = 8192
"""Channels, also of the noise level's embedding."""
MAX_KERNEL_SIZE = 255
MAX_COMPONENTS = 128
MAX_KEYPOINTS = 1024
MAX_LAYERS = 128
"""Of a transformer; also how many times wider than a token its MLPs may be."""
MAX_LEVELS = 100_000
MAX_STEP = 10**12
MAX_STUDENT_STEPS = 64
MAX_PAIRS = 10**8
MAX_PLANS = 1024
"""Made for one observation, to choose from."""
BID_PLANS = 15
"""As published for Push-T (arXiv 2408.17355)."""
MAX_ITEMS = 1024
"""Items of a list in JSON."""
MAX_EPISODES = 100_000
"""Of an evaluation: all stay in memory until they are counted."""


class ConfigError(ValueError):
    """An option has a value that cannot work."""


class Group(NamedTuple):
    """In the annotation of a field: the title under which --help lists this flag and those after it, empty for none."""

    title: str


def _require(condition: bool, name: str, allowed: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name.replace('_', '-')} must be {allowed}; got {got}")


def require_at_least(config: object, lowest: float, names: Iterable[str]) -> None:
    """Raise ConfigError when one of these fields is below `lowest`, or NaN."""
    for name in names:
        _require(getattr(config, name) >= lowest, name, f"at least {lowest}", getattr(config, name))


def require_at_most(config: object, highest: float, names: Iterable[str]) -> None:
    """Raise ConfigError when one of these fields is above `highest`, or NaN."""
    for name in names:
        _require(getattr(config, name) <= highest, name, f"at most {highest}", getattr(config, name))


def require_numbers(config: Any) -> None:
    """Raise ConfigError when a number among the fields is infinite, NaN, or an integer beyond 64 bits."""
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                _require(_is_plain(number), one.name, "finite, and whole numbers below 2^63", number)


def _is_plain(number: float) -> bool:
    """Whether it is finite, and fits 64 bits if it is a whole number."""
    return abs(number) < 2**63 if isinstance(number, int) else math.isfinite(number)


def require_labels(labels: Iterable[str]) -> None:
    """Raise ConfigError for names of keys and modes that do not fit one line."""
    for label in labels:
        if not 1 <= len(label) <= MOST_CHARACTERS or not label.isprintable():
            raise ConfigError(f"keys and modes have at most {MOST_CHARACTERS} printable characters; got {label[:50]!r}")


@dataclass(frozen=True)
class UnetConfig:
    """The conditional 1-D temporal U-Net."""

    kind: ClassVar[str] = "unet"
    widths: tuple[int, ...] = (64, 128, 256)
    """Channels of the U-Net at each resolution; each resolution is half as long in time as the one before."""
    kernel_size: int = 5
    """Steps that one convolution of the U-Net sees; odd."""
    groups: int = 8
    """Groups of each GroupNorm of the U-Net; divides every width."""
    level_dim: int = 128
    """Size of the noise level's embedding; even."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("groups",))
        require_at_most(self, MAX_KERNEL_SIZE, ("kernel_size",))
        _require(len(self.widths) >= 1 and min(self.widths) >= 1, "widths", "positive numbers", self.widths)
        fit = len(self.widths) <= MAX_RESOLUTIONS and max(self.widths) <= MAX_WIDTH
        _require(fit, "widths", f"at most {MAX_RESOLUTIONS} numbers up to {MAX_WIDTH}", reprlib.repr(self.widths))
        _require(self.kernel_size % 2 == 1 and self.kernel_size > 0, "kernel_size", "odd", self.kernel_size)
        _require_level_dim(self.level_dim)
        wrong = [width for width in self.widths if width % self.groups]
        _require(not wrong, "widths", f"multiples of the {self.groups} groups", wrong)
        require_numbers(self)

    def require_horizon(self, prediction_horizon: int, prediction_stride: int) -> None:
        """Raise ConfigError where the network cannot take sequences of this length."""
        stride = prediction_stride * 2 ** (len(self.widths) - 1)
        if prediction_horizon % stride:
            skips = f" of every {prediction_stride}th step" if prediction_stride > 1 else ""
            raise ConfigError(
                f"prediction-horizon must be a multiple of {stride}, since {len(self.widths)} widths halve the time "
                f"axis{skips} {len(self.widths) - 1} times; got {prediction_horizon}"
            )

    def least_memory(self, steps: int) -> int:
        """Bytes that one sequence takes at least while the network learns from it: each resolution keeps its channels
        some 16 times, for four residual blocks."""
        return 4 * 16 * sum(width * (steps >> i) for i, width in enumerate(self.widths))

    def numbers_held(self, steps: int) -> int:
        """About as many numbers as one sequence takes at a time while the network looks at it."""
        return steps * 4 * max(self.widths)


@dataclass(frozen=True)
class TransformerConfig:
    """The diffusion transformer over the steps of a sequence: DiT blocks with adaLN-Zero."""

    kind: ClassVar[str] = "transformer"
    width: int = 256
    """Numbers of each token of the transformer, which is a step of the sequence; a multiple of the heads."""
    layers: int = 4
    """Blocks of the transformer, each with self-attention and an MLP."""
    heads: int = 4
    """Heads of each attention of the transformer."""
    mlp_ratio: int = 4
    """How many times wider than a token the MLPs of the transformer are inside."""
    dropout: float = 0.0
    """Share of attention weights, and of what each part of a transformer's block adds, that is left out in training;
    0.1 is usual."""
    conditioning: ConditioningName = "adaln"
    """How the transformer is told the observations: beside the noise level, in the scale, shift and gate of each block
    (adaln); or as tokens that every block attends to, one for each key and observed step (cross-attention)."""
    level_dim: int = 128
    """Size of the noise level's embedding; even."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("width", "layers", "heads", "mlp_ratio"))
        require_at_most(self, MAX_WIDTH, ("width",))
        require_at_most(self, MAX_LAYERS, ("layers", "mlp_ratio"))
        _require(self.width % self.heads == 0, "width", f"a multiple of the {self.heads} heads", self.width)
        _require(0 <= self.dropout < 1, "dropout", "from 0 to below 1", self.dropout)
        check_choice("conditioning", self.conditioning, get_args(ConditioningName))
        _require_level_dim(self.level_dim)
        require_numbers(self)

    def require_horizon(self, prediction_horizon: int, prediction_stride: int) -> None:
        """Nothing: the network takes sequences of any length."""

    def least_memory(self, steps: int) -> int:
        """Bytes that one sequence takes at least while the network learns from it: each block keeps about ten tokens a
        step, and the inside of its MLP before and behind the activation."""
        return 4 * steps * self.layers * self.width * (10 + 2 * self.mlp_ratio)

    def numbers_held(self, steps: int) -> int:
        """About as many numbers as one sequence takes at a time while the network looks at it: the inside of an MLP and
        three tokens a step, or the weights of an attention."""
        return steps * max((self.mlp_ratio + 3) * self.width, self.heads * steps)


def _require_level_dim(level_dim: int) -> None:
    """Raise ConfigError for a size that an embedding of the noise level cannot have."""
    _require(level_dim <= MAX_WIDTH, "level_dim", f"at most {MAX_WIDTH}", level_dim)
    _require(level_dim % 2 == 0 and level_dim >= 4, "level_dim", "even and at least 4", level_dim)


@dataclass(frozen=True)
class StateEncoderConfig:
    """Encoder of an observation that is a row of numbers: its observed steps side by side."""

    kind: ClassVar[str] = "state"


@dataclass(frozen=True)
class CnnConfig:
    """A small convolutional network, and the places where its maps are active (spatial softmax)."""

    kind: ClassVar[str] = "cnn"
    cnn_widths: tuple[int, ...] = (16, 32, 64, 64)
    """Channels of the cnn's convolutions, of which the first two halve the image."""
    keypoints: int = 32
    """Places in the image that the spatial softmax of cnn and resnet18 finds."""

    def __post_init__(self) -> None:
        fit = 1 <= len(self.cnn_widths) <= MAX_RESOLUTIONS and 1 <= min(self.cnn_widths) <= max(self.cnn_widths)
        fit = fit and max(self.cnn_widths) <= MAX_WIDTH
        got = reprlib.repr(self.cnn_widths)
        _require(fit, "cnn_widths", f"from 1 to {MAX_RESOLUTIONS} numbers from 1 to {MAX_WIDTH}", got)
        _require_keypoints(self.keypoints)


@dataclass(frozen=True)
class ResnetConfig:
    """ResNet-18 with GroupNorm, and the places where its maps are active (spatial softmax)."""

    kind: ClassVar[str] = "resnet18"
    keypoints: int = 32
    """Places in the image that the spatial softmax of cnn and resnet18 finds."""

    def __post_init__(self) -> None:
        _require_keypoints(self.keypoints)


@dataclass(frozen=True)
class VitConfig:
    """A small vision transformer over patches of the image."""

    kind: ClassVar[str] = "vit"
    vit_width: int = 128
    """Numbers of each patch of the vit; a multiple of its heads."""
    vit_layers: int = 1
    """Blocks of the vit."""
    vit_heads: int = 4
    """Heads of each attention of the vit."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("vit_width", "vit_layers", "vit_heads"))
        require_at_most(self, MAX_WIDTH, ("vit_width",))
        require_at_most(self, MAX_LAYERS, ("vit_layers",))
        _require(self.vit_width % self.vit_heads == 0, "vit_width", f"a multiple of {self.vit_heads}", self.vit_width)


def _require_keypoints(keypoints: int) -> None:
    """Raise ConfigError for a number of keypoints that an encoder cannot have."""
    _require(1 <= keypoints <= MAX_KEYPOINTS, "keypoints", f"from 1 to {MAX_KEYPOINTS}", keypoints)


@dataclass(frozen=True)
class ImageConfig:
    """How the images among the observations are encoded: keys whose steps are (height, width, channels)."""

    vision: CnnConfig | ResnetConfig | VitConfig = field(default_factory=CnnConfig)
    """Encoder of each camera: a small convolutional network (cnn), ResNet-18 with GroupNorm, both with a spatial
    softmax, or a vision transformer of one layer (vit)."""
    image_features: int = 64
    """Numbers that an image becomes for the network."""
    image_crop: float = 0.875
    """Share of height and width that is cut from each image: at a random place in training, which is what makes
    policies from images work on little data, and from the middle otherwise; 1 cuts nothing."""
    color_jitter: float = 0.0
    """By how much brightness, contrast and saturation of images vary in training; 0.2 is usual where light changes."""
    image_normalization: ImageNormalizationName = "scale"
    """How pixels become numbers of about one: 0 and 255 become -1 and 1 (scale); each channel gets the mean 0 and the
    deviation 1 of the data (channels), or of ImageNet, as published weights want it (imagenet)."""
    share_encoder: bool = False
    """Give all cameras one encoder, with the same weights; they must have images of one size."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("image_features",))
        require_at_most(self, MAX_WIDTH, ("image_features",))
        _require(0 < self.image_crop <= 1, "image_crop", "above 0 and at most 1", self.image_crop)
        _require(0 <= self.color_jitter < 1, "color_jitter", "from 0 to below 1", self.color_jitter)
        check_choice("image-normalization", self.image_normalization, get_args(ImageNormalizationName))
        require_numbers(self)


@dataclass(frozen=True)
class LatentConfig:
    """A learned space in which diffusion runs: a shorter sequence of fewer numbers, of an autoencoder that train-latent
    has trained."""

    latent_channels: int = 0
    """Numbers of a step of the latent sequence; 0 for diffusion of the actions themselves."""
    latent_stride: int = 4
    """Steps of a sequence that one latent step stands for; a power of two that divides the prediction horizon."""
    latent_width: int = 64
    """Channels of the autoencoder's convolutions."""
    latent_kl: float = 1e-4
    """Weight of the autoencoder's divergence from a normal distribution, beside its squared error."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, ("latent_channels", "latent_kl"))
        require_at_least(self, 1, ("latent_stride", "latent_width"))
        require_at_most(self, MAX_WIDTH, ("latent_channels", "latent_stride", "latent_width"))
        power = self.latent_stride & (self.latent_stride - 1) == 0
        _require(power, "latent_stride", "a power of two", self.latent_stride)
        require_numbers(self)


OF_SEQUENCES = (
    "observation_horizon", "prediction_horizon", "prediction_stride", "inverse_dynamics", "normalization", "target",
    "rotations", "action_form", "action_reference",
)  # fmt: skip
"""Options of a policy that decide what its sequences mean: teacher and student, policy and autoencoder or classifier
share them."""
OF_NOISE = ("schedule", "noise_levels", "schedule_options")
"""Options of a policy that decide what a noised sequence is."""


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is: horizons, network, encoders and diffusion."""

    observation_horizon: int = 2
    """Observed steps given to the policy, the last one is now (To)."""
    prediction_horizon: int = 16
    """Steps in a predicted action sequence (T); with the unet a multiple of 2^(number of widths - 1)."""
    action_horizon: int = 8
    """Steps executed before planning again (Ta); at most T - To + 1."""
    network: Annotated[UnetConfig | TransformerConfig, Group("network")] = field(default_factory=UnetConfig)
    """The network: a temporal U-Net, or a diffusion transformer, which takes any prediction horizon."""
    encoder: StateEncoderConfig = field(default_factory=StateEncoderConfig)
    images: Annotated[ImageConfig, Group("images")] = field(default_factory=ImageConfig)
    schedule: Annotated[ScheduleName, Group("diffusion")] = "cosine"
    """Noise schedule: how much noise each level holds."""
    noise_levels: int = 100
    """Noise levels of the schedule (K)."""
    schedule_options: tuple[float, ...] = ()
    """Numbers of the noise schedule instead of its own: first and last beta (linear, sigmoid), beta (constant), offset
    s (cosine)."""
    prediction: PredictionName = "noise"
    """What the network predicts: the noise, the clean sample, the velocity alpha eps - sigma x0, or that of a flow,
    eps - x0."""
    snr_gamma: float = 0.0
    """Weigh the loss of each level by min(SNR, this) (min-SNR-gamma; 5 is usual); 0 weighs all levels alike."""
    learn_variance: bool = False
    """Learn the variance of the sampler ddpm's steps too (Nichol & Dhariwal), which then calls the network twice."""
    condition_dropout: float = 0.0
    """Share of training windows that lose their condition, so that the policy can be guided; 0.1 is usual. What is
    lost are the goals, and the mode or instruction that the network is given; without any the observations."""
    normalization: Annotated[NormalizationName, Group("policy")] = "limits"
    """How each column becomes a number of about one: its limits become -1 and 1; or its mean 0 and its deviation 1; or
    its quantiles 0.01 and 0.99 become -1 and 1."""
    target: tuple[str, ...] = ()
    """What the network predicts of each step, in this order: observation keys, and `action`, of which it is executed;
    by default the action alone. Without the action it is a forecast, which nothing executes."""
    prediction_stride: int = 1
    """Steps from one that the network predicts to the next; those between are interpolated, so that a long plan is a
    short sequence. It divides T."""
    inverse_dynamics: bool = False
    """Denoise the observations among the target alone, and have a small network of its own say the action that leads
    from one state to the next."""
    inpaint_start: bool = False
    """Hold what is observed until now in place in the sequence, at every denoising step and in training: the
    observations among what is predicted."""
    inpaint_goal: str | None = None
    """Observation that the last step of the sequence is to come to: it is held in the columns of the first observation
    that is predicted, at every denoising step; in training what the sequence itself comes to is."""
    rotations: tuple[str, ...] = ()
    """Columns that are rotations, of observations or of the action, as action:3,4,5 (a rotation vector [rad]) or
    pose:3,4,5,6 (a quaternion x, y, z, w): the network sees six numbers of each, which have no jumps."""
    action_form: ActionFormName = "absolute"
    """How the network says actions: as the dataset holds them (absolute), as differences from what is observed now
    (relative), or from the action before (delta). What is executed is as the dataset holds it."""
    action_reference: str | None = None
    """Observation that relative and delta actions are differences from, as agent_pos or state:0,1: as many of the
    action's columns, from the first one on; further ones, such as a gripper's, stay absolute."""
    goal: tuple[str, ...] = ()
    """Observation keys that are goals: the same all through an episode, encoded once, and what condition-dropout loses,
    so that guidance leads towards them."""
    condition_on_mode: bool = False
    """Give the demonstration's mode label to the network too, so that the policy can be steered with --mode."""
    condition_on_instruction: bool = False
    """Give the demonstration's instruction to the network too, so that the policy can be told with --instruction what
    to do: its embedding, where the dataset has embeddings of all instructions, else one that is learned for each."""
    objective: Annotated[ObjectiveName, Group("objective")] = "denoising"
    """What is learned. denoising: diffusion, in many steps. autoencoding: a latent space alone, see train-latent.
    classifying: the modes of noised sequences, see train-classifier. Without a teacher, in few: shortcut (the average
    velocity over jumps of 1/2, 1/4, ... of the way) and meanflow (over any jump). To compare with, and without
    diffusion: regression (least squares, one answer to one observation), mip (two calls, the second corrects the
    first), mixture (behaviour cloning by a mixture of Gaussians)."""
    student_steps: int = 0
    """Sampling steps that a student is trained for, and by which shortcut and meanflow are sampled where nothing else
    is asked for; 0 is 1 for all of these."""
    mixture_components: int = 16
    """Gaussians of the objective mixture."""
    latent: Annotated[LatentConfig, Group("latent")] = field(default_factory=LatentConfig)
    max_delay: Annotated[int, Group("policy")] = 0
    """Learn to go on from up to so many actions that are executed while a plan is made, for --chunking trained-rtc; 0
    learns no such thing. At most T - To."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("observation_horizon", "prediction_horizon", "prediction_stride", "action_horizon"))
        require_at_least(self, 0, ("max_delay",))
        require_at_least(self, 2, ("noise_levels",))
        require_at_most(self, MAX_HORIZON, ("prediction_horizon",))
        require_at_most(self, MAX_LEVELS, ("noise_levels",))
        if self.prediction_horizon % self.prediction_stride:
            raise ConfigError(
                f"prediction-stride must divide the prediction-horizon {self.prediction_horizon}; got "
                f"{self.prediction_stride}"
            )
        self.network.require_horizon(self.prediction_horizon, self.prediction_stride)
        _require(
            self.prediction_horizon >= self.observation_horizon,
            "prediction_horizon",
            f"at least the observation-horizon {self.observation_horizon}",
            self.prediction_horizon,
        )
        longest = self.prediction_horizon - self.observation_horizon + 1
        if self.action_horizon > longest:
            raise ConfigError(
                f"action-horizon must be at most {longest} (prediction-horizon {self.prediction_horizon} - "
                f"observation-horizon {self.observation_horizon} + 1); got {self.action_horizon}"
            )
        _require(self.max_delay < longest, "max_delay", f"below {longest}, the steps of a plan", self.max_delay)
        check_choice("schedule", self.schedule, get_args(ScheduleName))
        check_choice("prediction", self.prediction, get_args(PredictionName))
        check_choice("normalization", self.normalization, get_args(NormalizationName))
        check_choice("action-form", self.action_form, get_args(ActionFormName))
        if len(set(self.target)) < len(self.target):
            raise ConfigError(f"target must name each key once; got {', '.join(self.target)}")
        for text in self.rotations:
            _require(len(parse_columns(text)[1]) in (3, 4), "rotations", "a key with 3 or 4 columns", text)
        self._check_objective()
        if self.condition_on_mode and self.condition_on_instruction:
            raise ConfigError("a policy is told a mode or an instruction; got condition-on-mode and -on-instruction")
        _require(0 <= self.snr_gamma < math.inf, "snr_gamma", "at least 0", self.snr_gamma)
        _require(0 <= self.condition_dropout < 1, "condition_dropout", "from 0 to below 1", self.condition_dropout)
        require_numbers(self)

    @property
    def predicted_steps(self) -> int:
        """Steps of a sequence as the network predicts it."""
        return self.prediction_horizon // self.prediction_stride

    def target_key(self, action: str) -> str:
        """What the columns that the network predicts are called in a store, of several arrays `a+b`; `action`: the
        store's key of the actions."""
        return "+".join(action if key == "action" else key for key in self.target) or action

    def _check_objective(self) -> None:
        check_choice("objective", self.objective, get_args(ObjectiveName))
        require_at_least(self, 0, ("student_steps",))
        require_at_most(self, MAX_STUDENT_STEPS, ("student_steps",))
        require_at_least(self, 1, ("mixture_components",))
        require_at_most(self, MAX_COMPONENTS, ("mixture_components",))
        if self.objective == "classifying" and not self.condition_on_mode:
            raise ConfigError("the objective classifying is of modes: it needs condition-on-mode, see train-classifier")
        if self.objective in ("regression", "mip", "mixture"):
            name = "student_steps"
            _require(not self.student_steps, name, f"0 with the objective {self.objective}", self.student_steps)
        if self.objective != "denoising":
            for name in ("max_delay", "learn_variance", "snr_gamma"):
                _require(not getattr(self, name), name, f"0 with the objective {self.objective}", getattr(self, name))

    @property
    def is_few_step(self) -> bool:
        """Whether it can be sampled only in the way that it was trained for."""
        return self.objective != "denoising" or self.student_steps > 0

    def describe_objective(self) -> str:
        """In words."""
        return f"the objective {self.objective}" if self.objective != "denoising" else "a student"


@dataclass(frozen=True)
class DistillationConfig:
    """How a student learns from a trained policy to be sampled in few steps."""

    teacher: str | None = None
    """Checkpoint of a policy to learn from: its run's folder, or one of its checkpoints. Options of the policy are
    the teacher's where nothing else is said."""
    student: StudentName | None = None
    """How to learn from the teacher, in student-steps. pairs: the sequence that the teacher makes of the same noise,
    which keeps its modes; progressive: two of its steps in one; consistency: the same end from all levels of one path;
    shortcut, meanflow: its average velocity over jumps."""
    teacher_steps: int | None = None
    """Steps of DDIM by which the teacher is followed (pairs, consistency): a multiple of student-steps. By default 8,
    or what it was trained for."""
    teacher_weights: str | None = None
    """SHA-256 that the file of the teacher's weights must have; a run keeps that of its teacher here."""
    pairs: int = 150_000
    """Pairs of noise and the teacher's sequence that are made before the training (pairs)."""
    pair_noise: float = 0.02
    """Standard deviation of the noise on the normalized observations of pairs, so that they cover what lies beside the
    demonstrations."""
    guard: GuardName = "warn"
    """What to do where plans of the student spread less than before, in comparison with the teacher's: warn, stop, or
    nothing (off)."""

    def __post_init__(self) -> None:
        if self.student is not None:
            check_choice("student", self.student, get_args(StudentName))
        check_choice("guard", self.guard, get_args(GuardName))
        if self.teacher_steps is not None:
            require_at_least(self, 1, ("teacher_steps",))
            require_at_most(self, MAX_LEVELS, ("teacher_steps",))
        require_at_least(self, 1, ("pairs",))
        require_at_most(self, MAX_PAIRS, ("pairs",))
        require_at_least(self, 0, ("pair_noise",))
        require_numbers(self)


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained."""

    steps: int = 3000
    """Training steps."""
    batch_size: int = 256
    """Windows in a training step."""
    noise_draws: int = 1
    """Number of times that each window of a step is noised. What it observes is encoded once for all of them: 4 cost
    little more than 1 where encoding images takes most of the time, and the gradient is steadier."""
    learning_rate: float = 3e-4
    """Highest learning rate of AdamW; it rises during the warm-up and falls to 0 along a cosine."""
    weight_decay: float = 1e-6
    """Weight decay of AdamW."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises; at most a tenth of all."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    ema_power: float = 0.75
    """Power p of the moving average (EMA) of the weights: at each step it keeps 1 - (1 + step)^-p of itself, at most
    ema-max-decay."""
    ema_max_decay: float = 0.999
    """Largest share of itself that the moving average (EMA) of the weights keeps at a step."""
    validation_share: Annotated[float, Group("data")] = 0.05
    """Share of the episodes held out; 0 trains on all."""
    max_episodes: int | None = None
    """Use only so many episodes, drawn by the seed; those held out come on top."""
    memory_gb: float = 4.0
    """Windows that need more memory than this are streamed from the store in shuffled blocks, in some 0.2 GB."""
    hindsight: tuple[str, ...] = ()
    """Take goals from what the episode itself comes to: goal=state, or goal=state:2,3,4 for some of its columns,
    replaces the goal of a window by a later observation of its episode."""
    hindsight_share: float = 0.5
    """Share of the training windows whose goal hindsight replaces."""
    mask_padding: bool = False
    """Leave out of the loss the actions beyond an episode's ends, where the first or last one is repeated; without this
    the policy learns to stay where the demonstration ended."""
    whole_windows: bool = False
    """Train on, and validate with, the windows alone that lie within their episodes, so that nothing is repeated before
    an episode's beginning or beyond its end; for forecasts, as long windows are mostly repetition else."""
    vision_weights: Annotated[str | None, Group("images")] = None
    """File of weights (.safetensors) that the trunks of all image encoders begin with, such as those of a published
    ResNet-18, whose BatchNorms are left out."""
    latent: Annotated[str | None, Group("training")] = None
    """Train in the latent space of this run of train-latent, or of one of its checkpoints; its autoencoder stays as it
    is, and becomes part of the policy."""
    freeze_vision: Annotated[bool, Group("images")] = False
    """Leave the trunks of the image encoders as they begin; what they make of the images' middle is computed once,
    before the training."""
    validate_every: Annotated[int, Group("validation")] = 250
    """Training steps between two validations."""
    checkpoint_every: Annotated[int, Group("checkpoint")] = 1000
    """Training steps between two checkpoints."""
    keep_checkpoints: int = 1
    """Number of newest checkpoints that stay; older ones are deleted, but for the one that keep-best keeps."""
    keep_best: MetricName | None = None
    """Metric by which the best checkpoint stays too; a link `best` in the run's folder leads to it."""
    rollout_every: Annotated[int, Group("rollout")] = 0
    """Training steps between two rollouts of the EMA weights in the environment; 0 for none."""
    rollout_episodes: int = 20
    """Episodes of each rollout, always the same seeds, apart from those of demonstrations and evaluations."""
    precision: Annotated[PrecisionName, Group("training")] = "fp32"
    """What the network computes in; its weights stay fp32."""
    accumulation: int = 1
    """Parts of a batch that are computed one after the other, which takes less memory and gives the same result but for
    rounding, and for what dropout leaves out."""
    compile: bool = False
    """Have the network compiled by torch.compile: a minute at the start, then faster on a GPU."""
    seed: int = 0
    """Seed of the weights, the split, the order and the noise."""
    distillation: Annotated[DistillationConfig, Group("student")] = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        counts = "steps", "batch_size", "noise_draws", "accumulation", "rollout_episodes"
        require_at_least(self, 1, (*counts, "validate_every", "checkpoint_every", "keep_checkpoints"))
        require_at_least(self, 0, ("weight_decay", "warmup_steps", "rollout_every", "memory_gb"))
        require_at_most(self, MAX_STEP, ("steps",))
        require_at_most(self, MAX_EPISODES, ("rollout_episodes",))
        _require(self.accumulation <= self.batch_size, "accumulation", "at most the batch-size", self.accumulation)
        check_choice("precision", self.precision, get_args(PrecisionName))
        self._check_best()
        require_seed(self)
        for name in ("learning_rate", "gradient_clip", "ema_power"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        _require(0 <= self.ema_max_decay < 1, "ema_max_decay", "from 0 to below 1", self.ema_max_decay)
        _require(self.max_episodes is None or self.max_episodes >= 1, "max_episodes", "at least 1", self.max_episodes)
        require_at_most(self, 1e6, ("memory_gb",))
        _require(0 <= self.validation_share < 1, "validation_share", "from 0 to below 1", self.validation_share)
        _require(0 < self.hindsight_share <= 1, "hindsight_share", "above 0 and at most 1", self.hindsight_share)
        require_numbers(self)

    def _check_best(self) -> None:
        """Raise ConfigError for a best checkpoint by what is not measured where checkpoints are kept."""
        if self.keep_best is None:
            return
        check_choice("keep-best", self.keep_best, get_args(MetricName))
        measured, every = ("rollout-every", self.rollout_every), self.checkpoint_every
        if self.keep_best != "success_rate":
            measured = "validate-every", self.validate_every
        if measured[1] == 0 or every % measured[1]:
            raise ConfigError(
                f"keep-best {self.keep_best} is measured by {measured[0]}, which must divide checkpoint-every "
                f"{every}; got {measured[1]}"
            )
        if self.keep_best.startswith("teacher") and self.distillation.teacher is None:
            raise ConfigError(f"keep-best {self.keep_best} is measured of a student; got no --teacher")
        if self.keep_best != "success_rate" and self.validation_share == 0:
            raise ConfigError(f"keep-best {self.keep_best} needs held-out episodes; got validation-share 0")


@dataclass(frozen=True)
class SampleConfig:
    """How action sequences are drawn."""

    sampler: SamplerName = "ddim"
    """Sampler. Deterministic after their first noise: ddim, dpm-solver-1, dpm-solver-2m, unipc, euler, heun (denoises
    twice a step); with noise at every step: ddpm (the learned variance, else the posterior's), ddpm-large (the forward
    step's variance), dpm-solver-sde."""
    sampling_steps: int | None = None
    """Denoising steps, at most the policy's noise levels; by default 16, or what the policy was trained for."""
    spacing: SpacingName = "trailing"
    """Which noise levels the steps start from: evenly down from the last one (trailing), evenly up from 0 (leading),
    evenly with both ends (even), evenly in log-SNR (log-snr)."""
    jump_from: float = 0.0
    """Share of the noise levels, from the least noised one, that the last step jumps over: with ddpm, a few steps with
    noise and one jump."""
    eta: float = 0.0
    """Noise of ddim, from 0 (none) to 1 (as much as ddpm)."""
    clip: ClipName = "auto"
    """Keep every predicted clean sequence within -1 and 1: static clips, dynamic scales down by a high quantile of each
    sequence, none does neither. auto is static for a policy that normalizes by limits, where that is the range of the
    demonstrations, else none."""
    guidance: float = 0.0
    """Weight w of classifier-free guidance, eps = (1 + w) eps_cond - w eps_uncond. 0 is the plain conditional policy
    (where others write 1 for that, their weight is 1 + w)."""
    guidance_schedule: GuidanceScheduleName = "constant"
    """Noise levels at which guidance acts: all, falling from the noisiest level, rising towards the last step, or the
    middle three fifths."""
    mode: str | None = None
    """Steer a policy that was trained with --condition-on-mode to this mode."""
    instruction: str | None = None
    """Tell a policy that was trained with --condition-on-instruction what to do, in the words of its dataset."""
    corrector_steps: int = 0
    """Langevin steps after each sampling step (predictor-corrector)."""
    corrector_size: float = 0.05
    """Size of a Langevin step, as a share of the level's noise variance."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("sampler", SamplerName),
            ("spacing", SpacingName),
            ("clip", ClipName),
            ("guidance_schedule", GuidanceScheduleName),
        ):
            check_choice(name.replace("_", "-"), getattr(self, name), get_args(choices))
        if self.sampling_steps is not None:
            require_at_least(self, 1, ("sampling_steps",))
            require_at_most(self, MAX_LEVELS, ("sampling_steps",))
        if self.mode is not None and self.instruction is not None:
            raise ConfigError("a policy is told a mode or an instruction; got both --mode and --instruction")
        if self.instruction is not None and not is_instruction(self.instruction):
            allowed = f"one line of at most {MOST_INSTRUCTION} printable characters without blanks around it"
            raise ConfigError(f"instruction must be {allowed}; got {str(self.instruction)[:50]!r}")
        require_at_least(self, 0, ("corrector_steps",))
        require_at_most(self, 1000, ("corrector_steps",))
        if self.corrector_steps and self.sampling_steps == 1:
            raise ConfigError("corrector-steps act between sampling steps, so sampling-steps must be at least 2; got 1")
        _require(0 <= self.jump_from < 1, "jump_from", "from 0 to below 1", self.jump_from)
        _require(0 <= self.eta <= 1, "eta", "from 0 to 1", self.eta)
        _require(self.eta == 0 or self.sampler == "ddim", "eta", f"0 with the sampler {self.sampler}", self.eta)
        _require(-1 <= self.guidance < math.inf, "guidance", "at least -1", self.guidance)
        _require(0 < self.corrector_size <= 1, "corrector_size", "above 0 and at most 1", self.corrector_size)
        require_numbers(self)

    @property
    def is_plain(self) -> bool:
        """Whether each step is DDIM's, from levels that are evenly spaced down from the last one."""
        plain = self.sampler == "ddim" and self.spacing == "trailing" and not self.jump_from
        return plain and not self.eta and not self.corrector_steps


@dataclass(frozen=True)
class ChunkingConfig:
    """How a new plan is joined to the one that is being executed."""

    chunking: ChunkingName = "receding"
    """How a new plan follows the one before: as soon as it is ready (receding); sampled so that it begins as the one
    before goes on, by guidance (rtc) or as training with --max-delay has taught (trained-rtc); the closest to it of
    several plans (bid); or averaged with all before (ensemble), which smooths, and averages modes too."""
    rtc_strength: float = 5.0
    """Largest weight of the guidance of rtc."""
    rtc_mask: RtcMask = "exp"
    """How the guidance of rtc falls behind the delay: exp, linear, not at all (ones), or at once (zeros)."""
    rtc_deviation: float = 1.0
    """How far plans spread for one observation, in normalized numbers, as rtc assumes; below 1 it corrects more at high
    noise."""
    plans: int | None = None
    """Plans that are made each time, of which one is followed: the best by --score, or the closest with bid. By default
    15 with bid, else 1."""
    score: str | None = None
    """Function, as module:function, of observations {key: (B, To, ...)} and plans (B, N, steps, A) that gives a score
    (B, N); the plan with the highest is followed. The module may lie in the working directory. Or costs, the lowest
    sum of what --cost names."""
    bid_decay: float = 0.5
    """Weight of a step in the distance of bid, relative to the step before."""
    weak_checkpoint: Path | None = None
    """A weaker policy for bid, such as an early checkpoint: plans like its own are avoided."""
    ensemble_decay: float = 0.01
    """How much less each later plan weighs than the one before in ensemble: exp(-this); below 0 more."""
    roll_forward: bool = False
    """Plan from what will be observed when the plan is ready, where the environment can tell it from the actions until
    then; instead of what is observed now."""

    def __post_init__(self) -> None:
        check_choice("chunking", self.chunking, get_args(ChunkingName))
        check_choice("rtc-mask", self.rtc_mask, get_args(RtcMask))
        _require(self.rtc_strength >= 0, "rtc_strength", "at least 0", self.rtc_strength)
        _require(self.rtc_deviation > 0, "rtc_deviation", "above 0", self.rtc_deviation)
        _require(0 < self.bid_decay <= 1, "bid_decay", "above 0 and at most 1", self.bid_decay)
        _require(abs(self.ensemble_decay) <= 10, "ensemble_decay", "from -10 to 10", self.ensemble_decay)
        _require(self.plans is None or 1 <= self.plans <= MAX_PLANS, "plans", f"from 1 to {MAX_PLANS}", self.plans)
        require_numbers(self)

    def require_consistent(self) -> None:
        """Raise ConfigError for options that the strategy does not have."""
        if self.score is not None and self.chunking == "bid":
            raise ConfigError("bid chooses by its own score; name --score with another --chunking")
        if self.plans is not None and self.plans > 1 and self.score is None and self.chunking != "bid":
            raise ConfigError(f"one of {self.plans} plans is chosen by a --score, or with --chunking bid; got neither")
        if self.weak_checkpoint is not None and self.chunking != "bid":
            raise ConfigError("--weak-checkpoint is for --chunking bid")

    @property
    def samples(self) -> int:
        """Plans that are made for each observation."""
        return self.plans or (BID_PLANS if self.chunking == "bid" else 1)


@dataclass(frozen=True)
class CostConfig:
    """Costs that plans are led away from, beside what was demonstrated."""

    cost: tuple[str, ...] = ()
    """Costs of a plan, each with its weight, as clearance=1 smoothness=0.1: coming near to walls and obstacles
    (clearance), agents near to each other (apart), bends (smoothness), length, the distance of the end to the observed
    goal (goal), or a function, as module:function=1, in torch. Samples are led down their gradient, and --score costs
    chooses by them."""
    cost_key: tuple[str, ...] = ()
    """Of what is predicted, the keys whose first two columns are places: costs are of the path of each, and lead it. By
    default all that is predicted; name position alone where actions are no places."""
    cost_from: float = 1.0
    """Share of the noise levels, from the least noised one, at which costs lead the samples."""
    cost_steps: int = 1
    """Gradient steps at each noise level; 0 leads no sample, where costs shall only choose."""
    cost_size: float = 0.05
    """Of a gradient step: how far a step of a plan moves at most, in normalized numbers, of which the demonstrations
    span 2."""
    classifier: str | None = None
    """Run of train-classifier, or one of its checkpoints, whose gradient leads samples to a mode: classifier guidance,
    also of a policy that was trained without modes."""
    classifier_mode: str | None = None
    """Mode that the classifier leads to."""
    classifier_weight: float = 1.0
    """Weight of the classifier's gradient; 1 samples what the policy would if it knew the mode, more exaggerates."""
    cost_margin: float = 0.05
    """How far the cost clearance keeps away, and apart agents from each other, in the units of places."""

    def __post_init__(self) -> None:
        _require(0 < self.cost_from <= 1, "cost_from", "above 0 and at most 1", self.cost_from)
        require_at_least(self, 0, ("cost_steps", "cost_margin"))
        require_at_most(self, 1000, ("cost_steps",))
        if (self.classifier is None) != (self.classifier_mode is None):
            raise ConfigError(
                f"classifier and classifier-mode go together; got {self.classifier} and {self.classifier_mode}"
            )
        _require(0 < self.cost_size <= 2, "cost_size", "above 0 and at most 2", self.cost_size)
        require_numbers(self)

    @property
    def leads(self) -> bool:
        """Whether anything leads samples, or judges them."""
        return bool(self.cost) or self.classifier is not None


@dataclass(frozen=True)
class SuccessAndModes:
    """How success and modes are read of an environment that does not say them itself. Datasets and checkpoints keep
    it, so that it is said once."""

    success: str | None = None
    """What success is, if not info["is_success"] or info["success"]: 'return>=90', a threshold on the sum of an
    episode's rewards, module:function of (observation, info), or none, where nothing is a success."""
    mode_function: str | None = None
    """Function, as module:function, that gives the mode of an episode from its observations {key: (steps + 1, ...)},
    None for no mode. The module may lie in the working directory."""
    mode_labels: tuple[str, ...] = ()
    """All labels that the mode function can give."""
    fresh: bool = False
    """Make the environment anew for each episode, where a seed alone does not repeat one, as in panda-gym's Push."""

    def __post_init__(self) -> None:
        require_labels(self.mode_labels)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that say something, as JSON."""
        fields = {name: value for name, value in asdict(self).items() if value}
        return fields | ({"mode_labels": list(self.mode_labels)} if self.mode_labels else {})


def require_seed(config: object) -> None:
    """Raise ConfigError when the field `seed` is negative or too large for every generator that it feeds."""
    seed = getattr(config, "seed")  # noqa: B009
    _require(0 <= seed <= MOST_SEED, "seed", "from 0 to below 2^32", seed)


def parse_columns(text: str) -> tuple[str, tuple[int, ...]]:
    """Some columns of a key, as state:0,1; a key alone has all, (). Raises ConfigError where none are told."""
    found = re.fullmatch(r"(.+?)(?::(\d+(?:,\d+)*))?", text) if isinstance(text, str) else None
    if found is None or (":" in text and found[2] is None):
        raise ConfigError(f"columns are told as key:0,1; got {text!r}")
    return found[1], tuple(map(int, (found[2] or "").split(","))) if found[2] else ()


def parse_source(text: str) -> tuple[str, tuple[str, tuple[int, ...]]]:
    """A key and the columns that it is made of, as goal=state:2,3,4. Raises ConfigError where none are told."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise ConfigError(f"a goal and where it comes from is told as goal=state or goal=state:2,3,4; got {text!r}")
    return name, parse_columns(source)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ConfigError, listing what there is, when `value` is none of the choices."""
    if value not in choices:
        raise ConfigError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


OLD_NAMES = {
    "policy": {"levels": "noise_levels"},
    "training": {"average_power": "ema_power", "average_limit": "ema_max_decay", "keep": "keep_checkpoints"},
}
"""What options were called before; files say them still."""


def with_todays_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of `policy` and `training` options, as any version has written it, by the names of today: what was
    renamed, and the network's options, which stood beside the policy's."""
    today = dict(options)
    for part, names in OLD_NAMES.items():
        if isinstance(today.get(part), dict):
            today[part] = {names.get(name, name): value for name, value in today[part].items()}
    policy = today.get("policy")
    own = [one.name for one in dataclasses.fields(UnetConfig)]
    if isinstance(policy, dict) and "network" not in policy and policy.keys() & set(own):
        moved = {name: policy[name] for name in own if name in policy}
        rest = {name: value for name, value in policy.items() if name not in moved}
        today["policy"] = {**rest, "network": {"kind": UnetConfig.kind, **moved}}
    return today


def to_json(config: Any) -> Any:
    """A dataclass as JSON's types, with the `kind` of those that are one of several; `decode` is its inverse."""
    if dataclasses.is_dataclass(config):
        tag = {"kind": getattr(config, "kind")} if hasattr(config, "kind") else {}  # noqa: B009
        return tag | {one.name: to_json(getattr(config, one.name)) for one in dataclasses.fields(config)}
    if isinstance(config, tuple) and hasattr(config, "_fields"):
        return {name: to_json(value) for name, value in zip(config._fields, config, strict=True)}  # pyright: ignore
    if isinstance(config, Mapping):
        return {name: to_json(value) for name, value in config.items()}
    return [to_json(item) for item in config] if isinstance(config, list | tuple) else config


def flat_options(config: Any) -> dict[str, Any]:
    """{name: value} of a dataclass and of those within it, as the command line names them, with the kind of those that
    are one of several; raises TypeError for a name that stands in two of them."""
    flat: dict[str, Any] = {}
    for name, hint in _hints_of(type(config)).items():
        value = getattr(config, name)
        found = {name: value.kind} if kinds_of(hint) else {}
        found |= flat_options(value) if dataclasses.is_dataclass(value) else {name: value}
        if flat.keys() & found.keys():
            raise TypeError(f"two options are called {min(flat.keys() & found.keys())}")
        flat |= found
    return flat


def kinds_of(hint: Any) -> dict[str, Any]:
    """{kind: dataclass} of a type that is one of several dataclasses, told apart by their `kind`; empty for others."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    return {option.kind: option for option in options} if all(hasattr(option, "kind") for option in options) else {}


def list_types(kind: Any) -> dict[str, Any]:
    """{name: type} of all options of a dataclass and of those within it, also of those that are not chosen."""
    found: dict[str, Any] = {}
    for name, hint in _hints_of(kind).items():
        kinds = kinds_of(hint)
        if dataclasses.is_dataclass(hint):
            found |= list_types(hint)
        else:
            found[name] = Literal[tuple(kinds)] if kinds else hint
        for one in kinds.values():
            found |= list_types(one)
    return found


def as_kind(config: Any, kind: type) -> Any:
    """Options of this kind: themselves, or the defaults with the options that both kinds have."""
    if isinstance(config, kind):
        return config
    return kind(
        **{one.name: getattr(config, one.name) for one in dataclasses.fields(kind) if hasattr(config, one.name)}
    )


def refuse_others(kind: Any, kinds: Mapping[str, Any], given: Collection[str]) -> None:
    """Raise ConfigError for options that other kinds have and this one has not."""
    for other in kinds.values():
        for name in list_types(other):
            if name in given and name not in list_types(kind):
                raise ConfigError(f"--{name.replace('_', '-')} is an option of the {other.kind}; this is a {kind.kind}")


T = TypeVar("T")


def with_options(config: T, **options: Any) -> T:
    """The dataclass with other values for some options, which may stand in a dataclass within it: `with_options(
    PolicyConfig(), network="transformer", width=128)`. Raises ConfigError for unknown names, with the nearest, and for
    options of another kind than the chosen one."""
    known = list_types(type(config))
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; {did_you_mean(name, known)}")
    changes: dict[str, Any] = {}
    for name, hint in _hints_of(type(config)).items():
        value = getattr(config, name)
        if not dataclasses.is_dataclass(value):
            changes |= {name: options[name]} if name in options else {}
            continue
        if kinds := kinds_of(hint):
            value = _choose(name, value, kinds, options)
        changes[name] = with_options(
            value, **{name: options[name] for name in list_types(type(value)) & options.keys()}
        )
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]


def _choose(name: str, config: Any, kinds: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The one of several kinds of options that is asked for."""
    chosen = options.get(name, config.kind)
    check_choice(name, chosen, kinds)
    refuse_others(kinds[chosen], kinds, options)
    return as_kind(config, kinds[chosen])


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a config from JSON's types; raises ConfigError for unknown names (with the nearest) and wrong types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"the options of {kind.__name__} must be a JSON object; got {reprlib.repr(values)}")
    return decode(dict(values), kind, "")


def decode(value: Any, hint: Any, where: str) -> Any:
    """What a type hint asks for, made of JSON: a dataclass or NamedTuple of an object, in which fields that have a
    default may be missing; a tuple of a list (or a tuple); None of null. `where` names the value in messages.

    Raises ConfigError for unknown fields, with the nearest, and for wrong types: numbers are finite, whole ones are no
    booleans and fit 64 bits. What the dataclasses themselves refuse is their own ConfigError.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _decode_one_of(value, hint, where)
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return _decode_object(value, hint, where)
    if origin is dict and type(value) is dict:
        return {key: decode(item, arguments[1], _join(where, reprlib.repr(key))) for key, item in value.items()}
    if origin is tuple and type(value) in (list, tuple) and len(value) <= MAX_ITEMS:
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) == len(value):
            return tuple(decode(item, hints[i], f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is Literal and value in arguments:
        return value
    elif type(value) is hint:
        if type(value) not in (int, float) or _is_plain(value):
            return value
    elif hint is float and type(value) is int and _is_plain(value):
        return float(value)
    raise ConfigError(f"{where or 'this'} must be {_say(hint)}; got {reprlib.repr(value)}")


def _decode_one_of(value: Any, hint: Any, where: str) -> Any:
    """The first of several types that fits."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if value is None and len(options) < len(get_args(hint)):
        return None
    if kinds := kinds_of(hint):
        return _decode_object(value, _named_kind(value, kinds, where), where)
    for option in options[:-1]:
        with contextlib.suppress(ConfigError):
            return decode(value, option, where)
    return decode(value, options[-1], where)


def _named_kind(value: Any, kinds: Mapping[str, Any], where: str) -> Any:
    """The dataclass that JSON names by its `kind`; the first one where it names none."""
    named = value.get("kind", next(iter(kinds))) if type(value) is dict else next(iter(kinds))
    if named not in [*kinds]:
        raise ConfigError(f"{where or 'this'}: unknown kind {reprlib.repr(named)}; known are {', '.join(kinds)}")
    return kinds[named]


def _decode_object(value: Any, kind: Any, where: str) -> Any:
    """A dataclass or NamedTuple."""
    if type(value) is not dict:
        raise ConfigError(f"{where or kind.__name__} must be a JSON object; got {reprlib.repr(value)}")
    hints, prefix = _hints_of(kind), f"{where}: " if where else ""
    if hasattr(kind, "kind"):
        if value.get("kind", kind.kind) != kind.kind:
            raise ConfigError(f"{prefix}unknown kind {reprlib.repr(value['kind'])}; known is {kind.kind}")
        value = {name: item for name, item in value.items() if name != "kind"}
    for name in value:
        if name not in hints:
            raise ConfigError(f"{prefix}unknown option {reprlib.repr(name)}; {did_you_mean(name, hints)}")
    missing = _required(kind) - value.keys()
    if missing:
        raise ConfigError(f"{prefix}{min(missing)!r} is missing")
    fields = {name: decode(item, hints[name], _join(where, name)) for name, item in value.items()}
    try:
        return kind(**fields)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message on an unknown name: the nearest that is known, or all."""
    nearest = difflib.get_close_matches(name[:MOST_CHARACTERS], known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"


@functools.cache
def _hints_of(kind: Any) -> dict[str, Any]:
    """Type hints of the fields."""
    return {name: hint for name, hint in get_type_hints(kind).items() if get_origin(hint) is not ClassVar}


@functools.cache
def _required(kind: Any) -> set[str]:
    """Fields without a default."""
    if not dataclasses.is_dataclass(kind):
        return set(kind._fields) - kind._field_defaults.keys()
    none = dataclasses.MISSING
    return {one.name for one in dataclasses.fields(kind) if one.default is none and one.default_factory is none}


def _join(where: str, name: str) -> str:
    return f"{where}, {name}" if where else name


NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", type(None): "null"}
"""What JSON calls a type."""


def _say(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of at most {MAX_ITEMS} items, each {_say(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} items, each {_say(arguments[0])}"
    return NAMES.get(hint, "a JSON object")
