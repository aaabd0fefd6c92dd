"""DiffusionPolicy: encoders + network + diffusion (schedule and prediction) + normalizer.

Observations and actions are raw outside and normalized inside. The timeline, for To = 2, T = 16, Ta = 8:

    step        t-1   t   t+1  ...  t+7   t+8 ... t+14
    observed     x    x
    predicted    x    x    x   ...   x     x  ...   x
    executed          x    x   ...   x

The predicted sequence starts at the first observed step, so what is executed is `[To - 1 : To - 1 + Ta]`.
Knows no simulator and no file.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from diffusion_policy.basics.names import nearest_instructions
from diffusion_policy.config import PolicyConfig, SampleConfig, parse_columns, to_json
from diffusion_policy.datasets.statistics import Measuring, Statistics, as_rows, measure
from diffusion_policy.diffusion.guidance import (
    CLIPS,
    GUIDANCE_SCHEDULES,
    agreeing,
    classifier_free,
    descending,
    preferring,
)
from diffusion_policy.diffusion.inpainting import Given, Held, giving, holding, inpainted
from diffusion_policy.diffusion.objectives import OBJECTIVES, Classifying
from diffusion_policy.diffusion.process import count_draws
from diffusion_policy.diffusion.samplers import SAMPLERS, Denoise, Levels, Sampler, ddim, ddpm
from diffusion_policy.diffusion.schedules import make_schedule
from diffusion_policy.networks import ENCODERS, FOR_FEW_ROWS, NETWORKS
from diffusion_policy.networks.autoencoder import Autoencoder
from diffusion_policy.networks.encoders import CondPart
from diffusion_policy.networks.inverse_dynamics import InverseDynamics
from diffusion_policy.networks.labels import LabelRows
from diffusion_policy.networks.representation import ActionFrame
from diffusion_policy.networks.sequences import TARGET, Horizons, Inpainting, Sequences, Shapes
from diffusion_policy.networks.vision import (
    AUGMENTATION_DRAWS,
    BACKBONES,
    ImageEncoder,
    center_crop,
    crop_size,
    jitter,
    random_crop,
)
from diffusion_policy.normalizer import IMAGE_NORMALIZATIONS, NORMALIZATIONS, Normalizer

MOST_DRAWN = 2**28
"""Numbers of noise for one batch of plans: 1 GB."""

MEASURED_WINDOWS = 4096
"""That are measured at once."""
SAID = 4
"""Instructions that a message names."""


Wrap = Callable[[Denoise], Denoise]
"""Makes another denoiser of one, (xt, level) → x0 in normalized numbers: a cost's gradient, inpainting, a soft mask."""
Lead = Callable[["DiffusionPolicy", Mapping[str, Tensor], int], Wrap]
"""Makes such a wrapper for raw observations {key: (B, To, ...)} of which N sequences each are sampled."""


class DiffusionPolicy(nn.Module):
    """Draws action sequences given observations, by denoising.

    The conditioning vector is [kept | droppable]. With goals, or a label (a mode or an instruction), as condition the
    observations are kept, and the goals and the label's row (`networks.labels`) are droppable; without them the
    observations themselves are. Where there is no label, a 1 marks what was not dropped. What is dropped becomes zeros:
    that is the unconditional side of classifier-free guidance.
    """

    def __init__(
        self,
        config: PolicyConfig,
        shapes: Shapes,
        modes: Sequence[str] = (),
        instructions: Sequence[str] = (),
        embedding_size: int = 0,
    ) -> None:
        """`modes`, `instructions`: labels to condition on, when `config.condition_on_mode`, or `_on_instruction`;
        `embedding_size`: of the instructions' embeddings, 0 for none. Raises ValueError when an action is not one row
        of numbers, when there are no labels to condition on, for angles in columns that are not there, or when the
        schedule's options make none."""
        super().__init__()
        if len(shapes.action) != 1:
            raise ValueError(f"an action must be one row of numbers, (A,); got shape {shapes.action}")
        _require_labels(config, modes, instructions)
        _require_goals(config, shapes)
        _require_alone(config)
        self.config = config
        self.shapes = shapes
        self.modes = tuple(modes) if config.condition_on_mode else ()
        self.instructions = tuple(instructions) if config.condition_on_instruction else ()
        self.label_rows = LabelRows(len(self.labels), embedding_size if self.instructions else 0)
        columns = {**shapes.observations, TARGET: shapes.row}
        self.normalizer = Normalizer(columns, shapes.angles, list_rotations(config))
        self.leads: tuple[Lead, ...] = ()
        """What leads its samples elsewhere, see `with_leads`."""
        self.watched = dict(shapes.observations)
        """Shapes of the observations that it takes: beside its own those that its leads look at."""
        self.keys = tuple(sorted(shapes.observations, key=lambda key: (key in config.goal, key)))
        """Observation keys, in the order of their features in the condition: the goals come last."""
        self.images = tuple(key for key in self.keys if key in self.normalizer.images)
        """Those that are images."""
        self.encoders = nn.ModuleList()
        self._encoder_of = {key: self._add_encoder(key) for key in self.keys}
        parts = [CondPart(self.steps_of(key), self.encoder_of(key).numbers) for key in self.keys]
        self.features = sum(map(math.prod, parts))
        """Numbers of a condition that come from observations."""
        schedule = make_schedule(config.schedule, config.noise_levels, config.schedule_options)
        self.diffusion = OBJECTIVES[config.objective](schedule, config)
        self.autoencoder = make_autoencoder(config, *self.normalizer.shapes[TARGET])
        """Of the sequences, where diffusion runs in a latent space."""
        self.inverse = make_inverse(config, shapes, self.normalizer)
        """The actions of states, where diffusion is over these alone."""
        self.sequences = make_sequences(config, shapes, self.normalizer, self.autoencoder, self.inverse)
        """What the network predicts."""
        marks = self.label_rows.numbers or (1 if config.condition_dropout else 0)
        cond_parts = parts + [CondPart(1, marks)] * bool(marks)
        goals = sum(math.prod(part) for key, part in zip(self.keys, parts, strict=True) if key in config.goal)
        self.kept = self.features - goals if self.labels or goals else 0
        """Numbers of a condition, the first ones, that are never dropped."""
        self.cond_dim = self.features + marks
        """C, numbers of a condition."""
        self.network = self._make_network(cond_parts)

    def _make_network(self, cond_parts: Sequence[CondPart]) -> Any:
        config, (steps, target_dim) = self.config, self.sequences.shape
        return NETWORKS[config.network.kind](
            target_dim + bool(config.max_delay),  # a column that marks what is given
            cond_parts,
            steps,
            outputs=self.diffusion.count_outputs(target_dim, len(self.labels)),
            level_inputs=self.diffusion.level_inputs,
            **_own_options(config.network),
        )

    def _add_encoder(self, key: str) -> int:
        """Make the encoder of a key, unless it shares one; returns its place. Raises ValueError for images that it
        cannot take."""
        shape, images = self.normalizer.shapes[key], self.config.images
        if key not in self.images:
            self.encoders.append(ENCODERS[self.config.encoder.kind](shape))
            return len(self.encoders) - 1
        alike = [self.normalizer.shapes[other] for other in self.images]
        if images.share_encoder and self.images.index(key):
            if len(set(alike)) > 1:
                raise ValueError(f"cameras with share-encoder must have images of one size; got {alike}")
            return self.keys.index(self.images[0])
        cropped = (*(crop_size(side, images.image_crop) for side in shape[:2]), shape[-1])
        backbone = BACKBONES[images.vision.kind](cropped, images.image_features, **_own_options(images.vision))
        self.encoders.append(ImageEncoder(backbone, images.image_features))
        return len(self.encoders) - 1

    def steps_of(self, key: str) -> int:
        """Observed steps of a key that are encoded: a goal stays the same, so the last one says it."""
        return 1 if key in self.config.goal else self.config.observation_horizon

    def encoder_of(self, key: str) -> Any:
        """The encoder of a key, which several cameras may share."""
        return self.encoders[self._encoder_of[key]]

    @classmethod
    def for_statistics(
        cls,
        config: PolicyConfig,
        statistics: Mapping[str, Statistics],
        modes: Sequence[str] = (),
        angles: Mapping[str, tuple[int, ...]] | None = None,
        instructions: Sequence[str] = (),
        embeddings: np.ndarray | None = None,
        episodes: Iterable[Mapping[str, np.ndarray]] = (),
        target: Mapping[str, int] | None = None,
    ) -> "DiffusionPolicy":
        """A new policy with shapes and normalizer taken from the statistics of `action` and each observation key;
        `embeddings`: of the instructions, (instructions, E); `episodes`: the rows of each, of which actions that are
        not absolute are measured; `target`: see `Shapes`."""
        shapes = {key: part.shape for key, part in statistics.items()}
        row = shapes.pop(TARGET)
        action = (target["action"],) if target and "action" in target else row
        size = 0 if embeddings is None else embeddings.shape[1]
        policy = cls(config, Shapes(shapes, action, dict(angles or {}), dict(target or {})), modes, instructions, size)
        if embeddings is not None and policy.instructions:
            policy.label_rows.fit(embeddings)
        if config.action_form != "absolute":
            statistics = {**statistics, TARGET: policy.measure_target(episodes)}
        of_images = IMAGE_NORMALIZATIONS[config.images.image_normalization]
        policy.normalizer.fit(statistics, NORMALIZATIONS[config.normalization], of_images)
        return policy

    @classmethod
    def for_data(
        cls,
        config: PolicyConfig,
        data: Mapping[str, np.ndarray],
        modes: Sequence[str] = (),
        angles: Mapping[str, tuple[int, ...]] | None = None,
        instructions: Sequence[str] = (),
        embeddings: np.ndarray | None = None,
    ) -> "DiffusionPolicy":
        """As `for_statistics`, of the rows of one episode, {`action` and each observation key: (steps, ...)}."""
        statistics = {key: measure(rows) for key, rows in data.items()}
        return cls.for_statistics(config, statistics, modes, angles, instructions, embeddings, [data])

    @property
    def labels(self) -> tuple[str, ...]:
        """What it can be told, by index: modes or instructions."""
        return self.modes or self.instructions

    @property
    def takes_new_instructions(self) -> bool:
        """Whether it can be told a text that it was not trained on, with that text's embedding."""
        return bool(self.instructions) and bool(self.label_rows.size)

    def with_instruction(self, text: str, embedding: np.ndarray) -> "DiffusionPolicy":
        """This policy, which knows one more instruction by its embedding (E,); the rest is shared. Raises ValueError
        for a policy without embeddings, and for one of another size."""
        if not self.takes_new_instructions:
            raise ValueError("only a policy that was trained with embeddings of instructions can be told a new one")
        other = copy.copy(self)
        other._modules = {**self._modules, "label_rows": self.label_rows.with_label(embedding)}
        other.instructions = (*self.instructions, text)
        return other

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.diffusion.get_buffer("alpha").device

    def encode(
        self, observations: Mapping[str, Tensor], labels: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """Raw observations {key: (B, To, ...)} → conditioning vectors (B, C). `labels`: index of each row's mode or
        instruction, (B,) int64, −1 where it is unknown or to be left open; None leaves all open. `augmentation`: draws
        from 0 to below 1 by which images are cropped and changed in training, (B, images, AUGMENTATION_DRAWS); None
        crops their middle. Raises ValueError for observations of other keys or shapes; those beside them are left
        alone."""
        self._require_observations(observations)
        features = [self._encode_key(key, observations[key], augmentation) for key in self.keys]
        cond = torch.cat(features, dim=-1)
        if self.labels:
            labels = torch.full((len(cond),), -1, device=cond.device) if labels is None else labels
            return torch.cat([cond, self.label_rows(labels).to(cond)], dim=-1)
        return torch.cat([cond, torch.ones_like(cond[:, :1])], dim=-1) if self.config.condition_dropout else cond

    def _require_observations(self, observations: Mapping[str, Tensor]) -> None:
        """Raise ValueError for observations of other keys or shapes."""
        needed = {key: (self.config.observation_horizon, *self.shapes.observations[key]) for key in self.keys}
        needed = {key: shape for key, shape in needed.items() if not self._is_maps(key, observations.get(key))}
        for key in self.images:
            if key not in needed and tuple(observations[key].shape[2:]) == self.shapes.observations[key]:
                raise ValueError(f"the images {key} must be uint8; got {observations[key].dtype}")
        found = {key: tuple(observations[key].shape[1:]) for key in needed if key in observations}
        if found != needed:
            raise ValueError(f"the policy observes {needed} beside the axis of rows; got {found}")

    def _is_maps(self, key: str, observed: Tensor | None) -> bool:
        """Whether it is what the trunk of an encoder has made of images; images are uint8."""
        return key in self.images and observed is not None and observed.is_floating_point()

    def _encode_key(self, key: str, observed: Tensor, augmentation: Tensor | None) -> Tensor:
        encoder, observed = self.encoder_of(key), observed[:, -self.steps_of(key) :]
        if self._is_maps(key, observed):
            return encoder.features_of(observed)
        return encoder(self.prepare(key, observed, augmentation))

    def is_frozen(self, key: str) -> bool:
        """Whether the trunk of a camera's encoder does not learn."""
        return not any(weight.requires_grad for weight in self.encoder_of(key).backbone.trunk.parameters())

    def maps_of(self, key: str, images: Tensor) -> Tensor:
        """What the trunk of a camera's encoder makes of images (B, To, H, W, C) uint8: (B, To, *maps) float32, which
        `encode` takes in their place."""
        return self.encoder_of(key).maps_of(self.prepare(key, images))

    def prepare(self, key: str, observed: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """What the encoder of a key is given, (B, To, ...): normalized numbers; of images the crop. See `encode`."""
        if key not in self.images:
            return self.normalizer.normalize(key, observed)
        share, strength = self.config.images.image_crop, self.config.images.color_jitter
        if augmentation is None:
            return self.normalizer.normalize(key, center_crop(observed, share))
        draws = augmentation[:, self.images.index(key)]
        cropped = self.normalizer.normalize(key, random_crop(observed, share, draws[:, :2]))
        return jitter(cropped, strength, draws[:, 2:]) if strength else cropped

    def draw_augmentation(self, rows: int, generator: torch.Generator) -> Tensor | None:
        """What `encode` needs to change the images of so many windows; None for a policy that sees none."""
        if not self.images:
            return None
        return torch.rand(rows, len(self.images), AUGMENTATION_DRAWS, generator=generator)

    def unconditional(self, cond: Tensor) -> Tensor:
        """Conditioning vectors (B, C) with the droppable part dropped."""
        return torch.cat([cond[:, : self.kept], torch.zeros_like(cond[:, self.kept :])], dim=-1)

    @torch.no_grad()
    def sample(
        self,
        observations: Mapping[str, Tensor],
        generators: Sequence[np.random.Generator],
        num_samples: int = 1,
        config: SampleConfig | None = None,
        wrap: Sequence[Wrap] = (),
    ) -> Tensor:
        """Draw N action sequences for each observation: raw {key: (B, To, ...)} of any type → raw (B, N, T, A), float64
        (float32 on MPS).

        One generator a row draws that row's noise: a row's result does not depend on its neighbours. `wrap`: wrappers
        of the denoiser, the first one next to the network; within them gradients can be computed
        (`torch.enable_grad`). Raises ValueError where `resolve_sampling` and `draw_noise` do.
        """
        return self.sample_from(observations, self.draw_noise(generators, num_samples, config), config, wrap)

    @property
    def steps_ahead(self) -> int:
        """Steps of a plan from now on."""
        return self.config.prediction_horizon - self.config.observation_horizon + 1

    def noise_shape(self, config: SampleConfig | None = None) -> tuple[int, ...]:
        """What one sequence takes of noise: (draws, T, D). Raises ValueError where `resolve_sampling` does."""
        config = config or SampleConfig()
        sampler, levels = self.resolve_sampling(config)
        draws = count_draws(sampler, levels, config.corrector_steps)
        return (draws, *self.sequences.shape)

    def draw_noise(
        self, generators: Sequence[np.random.Generator], num_samples: int = 1, config: SampleConfig | None = None
    ) -> np.ndarray:
        """Noise of N sequences for each generator, (B, N, draws, T, D) float32; raises ValueError for more than
        `MOST_DRAWN` numbers."""
        shape = self.noise_shape(config)
        if len(generators) * num_samples * math.prod(shape) > MOST_DRAWN:
            raise ValueError(
                f"sampling needs {len(generators)} x {shape[0]} draws of noise of "
                f"{num_samples * math.prod(shape[1:])} numbers, at most {MOST_DRAWN} numbers are drawn at once; fewer "
                "samples, steps or corrector steps"
            )
        rows = [generator.standard_normal((num_samples, *shape), np.float32) for generator in generators]
        return np.stack(rows)

    @torch.no_grad()
    def sample_from(
        self,
        observations: Mapping[str, Tensor],
        noise: np.ndarray,
        config: SampleConfig | None = None,
        wrap: Sequence[Wrap] = (),
        given: Given | None = None,
    ) -> Tensor:
        """As `sample`, from noise that was drawn, (B, N, draws, T, D). `given`: steps of each sequence, for a policy
        that was trained with a max_delay. Raises ValueError for observations that are not finite."""
        config = config or SampleConfig()
        self.resolve_sampling(config)
        for key, rows in observations.items():
            if not torch.isfinite(rows).all():
                raise ValueError(f"the observation {key} holds NaN or infinity")
        led = (lead(self, observations, noise.shape[1]) for lead in self.leads)
        drawn = torch.from_numpy(noise).to(self.device)
        return self.sample_on_device(observations, drawn, config, [*wrap, *led], given)

    def sample_on_device(
        self,
        observations: Mapping[str, Tensor],
        noise: Tensor,
        config: SampleConfig,
        wrap: Sequence[Wrap] = (),
        given: Given | None = None,
    ) -> Tensor:
        """`sample_from` without a look at the numbers: with all tensors on the device nothing waits for it, so that
        encoder, sampling loop and normalizer compile, and are captured, as one graph."""
        number = noise.shape[1]
        cond = self.encode(observations, torch.full((len(noise),), self.find_label(config), device=self.device))
        drawn = rearrange(noise, "b n draws t d -> draws (b n) t d")
        _, levels = self.resolve_sampling(config)
        cond = repeat(cond, "b c -> (b n) c", n=number)
        held = self.hold(observations, number)
        x0 = self.denoise_from(drawn, cond, levels, config, wrap, given, held)
        return self.sequences.unnormalize(x0, number, observations)

    def hold(self, observations: Mapping[str, Tensor], number: int = 1) -> Held | None:
        """What is inpainted under raw observations {key: (B, To, ...)}, of N sequences for each; None for nothing."""
        mask = self.sequences.held
        return None if mask is None else Held(self.sequences.hold(observations, number), mask)

    def measure_target(self, episodes: Iterable[Mapping[str, np.ndarray]]) -> Statistics:
        """Statistics of the actions of these episodes' rows as they are said, before they are normalized. Raises
        ValueError where there are none."""
        measuring = Measuring()
        for rows in episodes:
            for told in self.express_rows(rows):
                measuring.add(told.numpy())
        return measuring.result()

    def express_rows(self, rows: Mapping[str, np.ndarray]) -> Iterator[Tensor]:
        """The actions of an episode's rows {key: (steps, ...)} as they are said, (.., A): each once where they are
        absolute, else those of all windows."""
        actions = torch.from_numpy(as_rows(rows[TARGET]))
        frame = self.sequences.frame
        if frame.form == "absolute":
            yield actions
            return
        seen, now = torch.from_numpy(as_rows(rows[frame.key])), self.config.observation_horizon - 1
        for some in torch.arange(len(actions)).split(MEASURED_WINDOWS):
            steps = some[:, None] + torch.arange(self.config.prediction_horizon) - now  # (windows, T)
            steps = steps.clamp(0, len(actions) - 1)
            told = frame.express(actions[steps].double(), {frame.key: seen[steps[:, : now + 1]]})
            yield told.flatten(0, 1)

    def descend(self, denoise: Denoise, gradient: Callable[[Tensor], Tensor], weights: Tensor, steps: int) -> Denoise:
        """See `diffusion.guidance.descending`."""
        return descending(denoise, gradient, weights, steps)

    def prefer(self, slope: Callable[[Tensor, int], Tensor], weight: float) -> Wrap:
        """A wrapper by which samples follow the gradient of a classifier; see `diffusion.guidance.preferring`."""
        tables = self.diffusion.schedule.alpha, self.diffusion.schedule.sigma
        return lambda denoise: preferring(denoise, slope, weight, *tables)

    def classify(self, observations: Mapping[str, Tensor], number: int, mode: str) -> Callable[[Tensor, int], Tensor]:
        """Of a classifier: the gradient by xt of log p(mode | xt) under raw observations {key: (B, To, ...)}, N
        sequences for each: (xt (B N, T, D), level) → (B N, T, D)."""
        assert isinstance(self.diffusion, Classifying)
        index, diffusion = self.modes.index(mode), self.diffusion
        cond = self.encode({key: observations[key] for key in self.keys}).repeat_interleave(number, dim=0)

        def slope(xt: Tensor, level: int) -> Tensor:
            with torch.enable_grad():
                xt = xt.detach().requires_grad_()
                levels = torch.full((len(xt),), level, device=xt.device)
                of_mode = diffusion.log_probabilities(self.network, xt, levels, cond)[:, index]
                (gradient,) = torch.autograd.grad(of_mode.sum(), xt)
            return gradient

        return slope

    def guide(self, sequence: Tensor, weights: Tensor, strength: float, deviation: float = 1.0) -> Wrap:
        """A wrapper by which samples agree with a normalized sequence (B, T, D) where weights (B, T, 1) say so; see
        `diffusion.guidance.agreeing`."""
        tables = self.diffusion.schedule.alpha, self.diffusion.schedule.sigma
        return lambda denoise: agreeing(denoise, sequence, weights, *tables, strength, deviation)

    def with_leads(self, leads: Sequence[Lead], watched: Mapping[str, tuple[int, ...]]) -> "DiffusionPolicy":
        """This policy, whose samples are led elsewhere, by observations of these shapes too; the rest is shared."""
        other = copy.copy(self)
        other.leads, other.watched = tuple(leads), {**watched, **self.shapes.observations}
        return other

    def for_few_rows(self) -> "DiffusionPolicy":
        """This policy with its network laid out for few sequences, by which plans for one robot are ready sooner on the
        CPU; with weights as they are now. Itself where its network has no such form."""
        lay_out = FOR_FEW_ROWS.get(type(self.network))
        if lay_out is None:
            return self
        return self.with_network(lay_out(self.network, self.sequences.shape[0]))

    def with_network(self, network: nn.Module) -> "DiffusionPolicy":
        """This policy with another network, the rest shared."""
        other = copy.copy(self)
        other._modules = {**self._modules, "network": network}
        return other.train(self.training)

    def compiled(self) -> "DiffusionPolicy":
        """This policy with its network compiled by torch.compile at its first call, which needs a C++ compiler on the
        CPU. It can change the last digits of a sequence. (The whole loop is one graph too, but takes minutes for 16
        steps.)"""
        network = copy.copy(self.network)
        network.denoise = torch.compile(self.network.denoise, fullgraph=True)
        return self.with_network(network)

    def resolve_sampling(self, config: SampleConfig) -> tuple[Sampler, list[int]]:
        """The sampler and the levels that these options mean. Raises ValueError for more steps than noise levels, for
        guidance without condition dropout in training or without a label to guide to, for a mode or an instruction
        that the policy was not trained on, and for a way to sample that a student or an objective was not trained
        for."""
        if self.config.objective == "autoencoding":
            raise ValueError("this is an autoencoder, which acts as part of a policy: train one with --latent")
        if self.config.objective == "classifying":
            raise ValueError("this is a classifier, which guides a policy: name it with --classifier")
        if config.guidance and not self.config.condition_dropout:
            raise ValueError(
                f"guidance {config.guidance} needs a policy trained with --condition-dropout above 0; "
                "this one was trained without"
            )
        if self.find_label(config) < 0 and self.labels:
            what = f"a mode, one of {', '.join(self.modes)}"
            if self.instructions:
                what = f"an instruction, such as {'; '.join(map(repr, self.instructions[:SAID]))}"
            if not self.config.condition_dropout:
                raise ValueError(f"this policy must be told {what}")
            if config.guidance:
                raise ValueError(f"guidance needs {what.replace(', ', ' to guide to, ', 1)}")
        sampler = self.diffusion.adapt(find_sampler(config))
        steps = self.diffusion.choose_steps(sampler, config.sampling_steps)
        if self.config.is_few_step and not config.is_plain:
            raise ValueError(
                f"{self.config.describe_objective()} is sampled by ddim with trailing levels, without eta, corrector "
                "and jump"
            )
        return sampler, self.diffusion.choose_levels(sampler, steps, config.spacing, config.jump_from)

    def find_label(self, config: SampleConfig) -> int:
        """Index of the mode or the instruction that these options name, −1 for none. Raises ValueError for one that the
        policy does not know."""
        mode, text = config.mode, config.instruction
        if mode is not None and mode not in self.modes:
            known = f"choose from {', '.join(self.modes)}" if self.modes else "it was trained without condition-on-mode"
            raise ValueError(f"this policy cannot be steered to mode {mode!r}; {known}")
        if text is not None and text not in self.instructions:
            known = "it was trained without condition-on-instruction"
            if self.instructions:
                known = nearest_instructions(text, self.instructions)
            if self.takes_new_instructions:
                known = f"{known}; evaluate, rollout, study and live take any with its dataset's --instruction-encoder"
            raise ValueError(f"this policy does not know the instruction {text!r}; {known}")
        label = text if mode is None else mode
        return -1 if label is None else self.labels.index(label)

    def complete(self, config: SampleConfig) -> SampleConfig:
        """The same options with the number of steps that they mean. Raises ValueError where `resolve_sampling` does."""
        return replace(config, sampling_steps=len(self.resolve_sampling(config)[1]))

    def choose_clip(self, config: SampleConfig) -> str:
        """The clipping that these options mean: `auto` cuts off nothing that was demonstrated."""
        if config.clip != "auto":
            return config.clip
        return "static" if self.config.normalization == "limits" and self.autoencoder is None else "none"

    def conditions(self, cond: Tensor, config: SampleConfig) -> Tensor:
        """What the network is conditioned on to sample so, given conditions (B, C): these, and behind them the
        unconditional ones where they guide, (2 B, C)."""
        return torch.cat([cond, self.unconditional(cond)]) if config.guidance else cond

    def decode(
        self,
        outputs: Denoise,
        config: SampleConfig,
        wrap: Sequence[Wrap] = (),
        given: Given | None = None,
        held: Held | None = None,
    ) -> Denoise:
        """What the network's outputs under `conditions` mean, guided, clipped and wrapped: (xt (B, T, D), level) →
        x0."""
        if self.config.max_delay:
            outputs = giving(outputs, given)
        if held is not None:
            outputs = holding(outputs, held)
        denoise = self.diffusion.decode(outputs)
        if config.guidance:
            weights = config.guidance * GUIDANCE_SCHEDULES[config.guidance_schedule](self.config.noise_levels)
            denoise = classifier_free(denoise, weights)
        for one in wrap:
            denoise = one(denoise)
        denoise = CLIPS[self.choose_clip(config)](denoise)
        if held is not None:
            denoise = inpainted(denoise, *held)
        return denoise if given is None else inpainted(denoise, *given)

    def denoiser(self, cond: Tensor, config: SampleConfig, levels: Levels | None = None) -> Denoise:
        """The network under these conditions (B, C), guided and clipped: (xt (B, T, D), level) → x0, for these levels,
        by default all."""
        return self.decode(self.diffusion.condition(self.network, self.conditions(cond, config), levels), config)

    def predictor(self, observations: Mapping[str, Tensor], labels: Tensor | None, levels: Levels) -> Denoise:
        """The network under raw observations, neither guided nor clipped, with what is inpainted in place:
        (xt (B, T, D), level) → x0, for these levels."""
        outputs = self.diffusion.condition(self.network, self.encode(observations, labels), levels)
        held = self.hold(observations)
        if held is None:
            return self.diffusion.decode(outputs)
        return inpainted(self.diffusion.decode(holding(outputs, held)), *held)

    def denoise_from(
        self,
        noise: Tensor,
        cond: Tensor,
        levels: Levels,
        config: SampleConfig,
        wrap: Sequence[Wrap] = (),
        given: Given | None = None,
        held: Held | None = None,
    ) -> Tensor:
        """The sampling loop alone: noise (draws, B, T, D) → normalized sequences (B, T, D). No random numbers and no
        synchronisation inside, so it compiles as one graph."""
        sampler = self.diffusion.adapt(find_sampler(config))
        if self.config.learn_variance and config.sampler == "ddpm":
            shares = self.diffusion.condition(self.network, cond, levels)
            share = self.diffusion.learned_share(giving(shares, given) if self.config.max_delay else shares)
            sampler = sampler._replace(formula=partial(ddpm, share=share))
        outputs = self.diffusion.condition(self.network, self.conditions(cond, config), levels)
        denoise = self.decode(outputs, config, wrap, given, held)
        return self.diffusion.sample(denoise, noise, sampler, levels, config.corrector_steps, config.corrector_size)


def make_sequences(
    config: PolicyConfig,
    shapes: Shapes,
    normalizer: Normalizer,
    autoencoder: Autoencoder | None,
    inverse: InverseDynamics | None,
) -> Sequences:
    """What the network predicts. Raises ValueError where `Sequences` and `make_frame` do, and for steps that are not
    predicted and would be held."""
    horizons = Horizons(config.observation_horizon, config.prediction_horizon, config.prediction_stride)
    if config.inpaint_start and (horizons.observed - 1) % horizons.stride:
        raise ValueError(
            f"inpaint-start holds the last observed step, which a prediction-stride of {horizons.stride} skips with an "
            f"observation-horizon of {horizons.observed}; use 1 more than a multiple of the stride"
        )
    return Sequences(
        horizons,
        shapes,
        normalizer,
        make_frame(config, shapes),
        Inpainting(config.inpaint_start, config.inpaint_goal),
        autoencoder,
        inverse,
        limit=1.0 if config.normalization == "limits" else math.inf,
    )


def list_rotations(config: PolicyConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Columns of each key that are rotations."""
    rotations: dict[str, tuple[tuple[int, ...], ...]] = {}
    for key, columns in map(parse_columns, config.rotations):
        rotations[key] = (*rotations.get(key, ()), columns)
    return rotations


def make_frame(config: PolicyConfig, shapes: Shapes) -> ActionFrame:
    """How the network says actions. Raises ValueError for a reference that is no such columns of an observation, and
    where there is one without use, or none."""
    if (config.action_form == "absolute") != (config.action_reference is None):
        needed = "needs an action-reference" if config.action_reference is None else "takes no action-reference"
        raise ValueError(f"action-form {config.action_form} {needed}; got {config.action_reference}")
    if config.action_reference is None:
        return ActionFrame()
    key, columns = parse_columns(config.action_reference)
    shape = shapes.observations.get(key, ())
    if len(shape) != 1:
        numbers = ", ".join(name for name, one in shapes.observations.items() if len(one) == 1) or "none"
        raise ValueError(f"action-reference must be an observation of numbers in a row, {numbers}; got {key}")
    columns = columns or tuple(range(shape[0]))
    if max(columns) >= shape[0] or len(columns) > shapes.row[0]:
        raise ValueError(
            f"action-reference must name at most {shapes.row[0]} of the {shape[0]} columns of {key}, one for each "
            f"of the action's; got {', '.join(map(str, columns))}"
        )
    turned = list_rotations(config).get(TARGET, ())
    return ActionFrame(config.action_form, (key, columns), shapes.angles.get(TARGET, ()), turned)


def _require_labels(config: PolicyConfig, modes: Sequence[str], instructions: Sequence[str]) -> None:
    """Raise ValueError where there are too few labels to condition on."""
    if config.condition_on_mode and len(modes) < 2:
        raise ValueError(f"condition-on-mode needs data with at least two modes; it has {len(modes)}")
    if config.condition_on_instruction and len(instructions) < 2:
        raise ValueError(
            f"condition-on-instruction needs data with at least two instructions; it has {len(instructions)}; give "
            "them to its episodes with: dataset instruct"
        )


def _require_goals(config: PolicyConfig, shapes: Shapes) -> None:
    """Raise ValueError for goals that are no observations, or all of them."""
    unknown = [key for key in config.goal if key not in shapes.observations]
    if unknown or (config.goal and len(set(config.goal)) == len(shapes.observations)):
        observed = ", ".join(shapes.observations)
        raise ValueError(f"a goal is one of several observations, {observed}; got {', '.join(config.goal)}")


def _require_alone(config: PolicyConfig) -> None:
    """Raise ValueError for options that do not go together with what is predicted or inpainted."""
    inpaints = config.inpaint_start or config.inpaint_goal is not None
    if config.latent.latent_channels and (inpaints or config.max_delay):
        raise ValueError("a latent space is without inpaint-start, inpaint-goal and max-delay, which hold single steps")
    if config.prediction_stride > 1 and (config.latent.latent_channels or config.max_delay):
        raise ValueError(
            "prediction-stride above 1 is without a latent space and max-delay, which need each step; got "
            f"{config.prediction_stride}"
        )
    beside = {
        "max-delay": config.max_delay,
        "learn-variance": config.learn_variance,
        "objective": config.objective != "denoising" and config.objective,
        "student-steps": config.student_steps,
        "action-form": config.action_form != "absolute" and config.action_form,
    }
    for name, value in beside.items():
        if inpaints and value:
            raise ValueError(f"inpaint-start and inpaint-goal are without {name}; got {value}")
    if config.max_delay and len(config.target) > 1:
        raise ValueError(f"max-delay is of a policy that predicts actions alone; got {config.max_delay}")


def make_inverse(config: PolicyConfig, shapes: Shapes, normalizer: Normalizer) -> InverseDynamics | None:
    """The inverse dynamics of what is predicted, None for none. Raises ValueError where that is not states and the
    action, and for an autoencoder, which has its own way to say actions."""
    if not config.inverse_dynamics:
        return None
    if "action" not in shapes.target or len(shapes.target) < 2 or config.latent.latent_channels:
        raise ValueError(
            "inverse-dynamics needs an observation and the action in --target, as in --target position action, and no "
            f"latent space; got {', '.join(shapes.target) or 'the action alone'}"
        )
    acts = normalizer.places(TARGET, range(shapes.row[0])[shapes.executed])
    return InverseDynamics(normalizer.shapes[TARGET][0] - len(acts), len(acts))


def make_autoencoder(config: PolicyConfig, numbers: int) -> Autoencoder | None:
    """The autoencoder of sequences (T, D) with D = `numbers`, None for none. Raises ValueError where it cannot halve
    them so often, and where one shall be learned without a size."""
    asked = config.latent
    if not asked.latent_channels:
        if config.objective == "autoencoding":
            raise ValueError("an autoencoder needs latent-channels above 0; got 0")
        return None
    if config.prediction_horizon % asked.latent_stride:
        raise ValueError(
            f"latent-stride must divide the prediction-horizon {config.prediction_horizon}; got {asked.latent_stride}"
        )
    return Autoencoder(numbers, asked.latent_channels, asked.latent_stride, asked.latent_width)


def _own_options(config: Any) -> dict[str, Any]:
    """The options of a network or a backbone, without its kind."""
    return {name: value for name, value in to_json(config).items() if name != "kind"}


def find_sampler(config: SampleConfig) -> Sampler:
    """The sampler that these options name."""
    return Sampler(partial(ddim, eta=config.eta), needs_noise=True) if config.eta else SAMPLERS[config.sampler]


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"no device {name!r} here; choose from auto, cpu, cuda, mps (only what is present)")
    return device
