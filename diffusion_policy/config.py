"""Options as frozen dataclasses, validated when they are built. The CLI's flags and the checkpoint's JSON are made from
these fields and their docstrings; nothing here imports torch."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

# Names of what SCHEDULES, PREDICTIONS and SAMPLERS hold; written here since those need torch.
ScheduleName = Literal["cosine", "linear"]
PredictionName = Literal["noise"]
SamplerName = Literal["ddim", "ddpm"]


class ConfigError(ValueError):
    """An option has a value that cannot work."""


def _require(condition: bool, name: str, allowed: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name.replace('_', '-')} must be {allowed}; got {got}")


def require_at_least(config: object, lowest: float, names: Iterable[str]) -> None:
    """Raise ConfigError when one of these fields is below `lowest`, or NaN."""
    for name in names:
        _require(getattr(config, name) >= lowest, name, f"at least {lowest}", getattr(config, name))


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is: horizons, network and diffusion."""

    observation_horizon: int = 2
    """Observed steps given to the policy, the last one is now (To)."""
    prediction_horizon: int = 16
    """Steps in a predicted action sequence (T); a multiple of 2^(number of widths - 1)."""
    action_horizon: int = 8
    """Steps executed before planning again (Ta); at most T - To + 1."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Channels of the U-Net at each resolution; each resolution is half as long in time as the one before."""
    kernel_size: int = 5
    """Steps that one convolution sees; odd."""
    groups: int = 8
    """Groups of each GroupNorm; divides every width."""
    level_dim: int = 128
    """Size of the noise level's embedding; even."""
    schedule: ScheduleName = "cosine"
    """Noise schedule."""
    levels: int = 100
    """Noise levels of the schedule (K)."""
    prediction: PredictionName = "noise"
    """What the network predicts."""
    clip: bool = True
    """Clip every predicted clean sequence to the range of the demonstrations."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("observation_horizon", "prediction_horizon", "action_horizon", "groups"))
        require_at_least(self, 2, ("levels",))
        _require(len(self.widths) >= 1 and min(self.widths) >= 1, "widths", "positive numbers", self.widths)
        stride = 2 ** (len(self.widths) - 1)
        if self.prediction_horizon % stride:
            raise ConfigError(
                f"prediction-horizon must be a multiple of {stride}, since {len(self.widths)} widths halve the time "
                f"axis {len(self.widths) - 1} times; got {self.prediction_horizon}"
            )
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
        _require(self.kernel_size % 2 == 1 and self.kernel_size > 0, "kernel_size", "odd", self.kernel_size)
        _require(self.level_dim % 2 == 0 and self.level_dim >= 4, "level_dim", "even and at least 4", self.level_dim)
        wrong = [width for width in self.widths if width % self.groups]
        _require(not wrong, "widths", f"multiples of the {self.groups} groups", wrong)
        check_choice("schedule", self.schedule, get_args(ScheduleName))
        check_choice("prediction", self.prediction, get_args(PredictionName))


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained."""

    steps: int = 3000
    """Training steps."""
    batch_size: int = 256
    """Windows in a step."""
    learning_rate: float = 3e-4
    """Highest learning rate of AdamW; it rises during the warm-up and falls to 0 along a cosine."""
    weight_decay: float = 1e-6
    """Weight decay of AdamW."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises; at most a tenth of all."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    average_power: float = 0.75
    """The averaged weights keep 1 - (1 + step)^-power of themselves at each step, ..."""
    average_limit: float = 0.999
    """... but never more than this share."""
    validation_share: float = 0.05
    """Share of the episodes held out; 0 trains on all."""
    validate_every: int = 250
    """Steps between two validations."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the weights, the split, the order and the noise."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("steps", "batch_size", "validate_every", "checkpoint_every"))
        require_at_least(self, 0, ("weight_decay", "warmup_steps"))
        require_seed(self)
        for name in ("learning_rate", "gradient_clip", "average_power"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        _require(0 <= self.average_limit < 1, "average_limit", "from 0 to below 1", self.average_limit)
        _require(0 <= self.validation_share < 1, "validation_share", "from 0 to below 1", self.validation_share)


@dataclass(frozen=True)
class SampleConfig:
    """How action sequences are drawn."""

    sampler: SamplerName = "ddim"
    """Sampler: ddim is deterministic after its first noise, ddpm adds noise at every step."""
    sampling_steps: int = 16
    """Denoising steps, at most the policy's noise levels."""

    def __post_init__(self) -> None:
        check_choice("sampler", self.sampler, get_args(SamplerName))
        require_at_least(self, 1, ("sampling_steps",))


def require_seed(config: object) -> None:
    """Raise ConfigError when the field `seed` is negative or too large for every generator that it feeds."""
    seed = getattr(config, "seed")  # noqa: B009
    _require(0 <= seed < 2**32, "seed", "from 0 to below 2^32", seed)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ConfigError, listing what there is, when `value` is none of the choices."""
    if value not in choices:
        raise ConfigError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


ConfigT = TypeVar("ConfigT", PolicyConfig, TrainConfig, SampleConfig)


def from_dict(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a config from JSON's types; raises ConfigError for unknown names (with the nearest) and wrong types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"the options of {kind.__name__} must be a JSON object; got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(fields)}"
            raise ConfigError(f"unknown option {name!r}; {hint}")
        default = fields[name].default
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if isinstance(default, float) and type(value) is int else value
        wrong_item = isinstance(value, tuple) and any(type(item) is not int for item in value)
        if type(value) is not type(default) or wrong_item:
            raise ConfigError(f"{name} must be {type(default).__name__}; got {value!r}")
        arguments[name] = value
    return kind(**arguments)
