"""What a training in a latent space begins with: an autoencoder that train-latent has trained; and what train-latent
itself trains.

Knows checkpoints and policies. Writes nothing.
"""

import dataclasses
from pathlib import Path

import torch

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands.options.train import Train
from diffusion_policy.config import OF_SEQUENCES, ConfigError
from diffusion_policy.datasets.streaming import StreamedWindows
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.networks.sequences import TARGET
from diffusion_policy.policy import DiffusionPolicy

FITTED = 4096
"""Windows whose latents are standardized."""
USUAL_CHANNELS = 8
"""Of a latent step, where train-latent is not told another number."""


def complete(options: Train) -> Train:
    """The options with the latent space of the run that they name. Raises ConfigError where that does not fit,
    CheckpointError where there is none."""
    policy, named = options.policy, options.training.latent
    if policy.objective == "autoencoding":
        if named is not None:
            raise ConfigError(f"train-latent trains an autoencoder of its own; got --latent {named}")
        channels = policy.latent.latent_channels or USUAL_CHANNELS
        latent = dataclasses.replace(policy.latent, latent_channels=channels)
        return dataclasses.replace(options, policy=dataclasses.replace(policy, latent=latent))
    if options.resume:  # what was learned then holds all of it
        return options
    if named is None:
        if policy.latent.latent_channels:
            raise ConfigError(
                "latent-channels are those of an autoencoder: train it with train-latent, and name --latent"
            )
        return options
    learned = load(named).policy.config
    for name in OF_SEQUENCES:
        if getattr(policy, name) != getattr(learned, name):
            raise ConfigError(
                f"a policy has the {name.replace('_', '-')} of its autoencoder, {getattr(learned, name)}; got "
                f"{getattr(policy, name)}"
            )
    return dataclasses.replace(options, policy=dataclasses.replace(policy, latent=learned.latent))


def load(named: str) -> Checkpoint:
    """The checkpoint of a run of train-latent; raises ConfigError for another run."""
    found = checkpoint.load(checkpoint.find(Path(named)), torch.device("cpu"))
    if found.policy.autoencoder is None or found.policy.config.objective != "autoencoding":
        raise ConfigError(f"--latent needs a run of train-latent; {named} is none")
    return found


def begin(policy: DiffusionPolicy, options: Train, windows: Windows | StreamedWindows) -> None:
    """Freeze what is not trained; a new policy gets the autoencoder that its options name, with the normalizer that
    it was trained under. Raises ConfigError for one of other actions."""
    if policy.autoencoder is None:
        return
    alone = policy.config.objective == "autoencoding"
    if alone:
        policy.requires_grad_(False)
    policy.autoencoder.requires_grad_(alone)
    if alone or options.training.latent is None or options.resume:
        return
    taught = load(options.training.latent).policy
    assert taught.autoencoder is not None
    if taught.shapes.row != policy.shapes.row:
        raise ConfigError(
            f"the autoencoder is of {taught.shapes.row} numbers a step; of this dataset {policy.shapes.row}"
        )
    policy.autoencoder.load_state_dict(taught.autoencoder.state_dict())
    own = policy.normalizer.state_dict()
    policy.normalizer.load_state_dict(
        own
        | {name: numbers for name, numbers in taught.normalizer.state_dict().items() if name.startswith(f"{TARGET}_")}
    )
    batch = next(windows.batches(min(FITTED, len(windows)), options.training.seed))
    policy.autoencoder.fit(policy.sequences.normalize_steps(batch.actions, batch.observations))
