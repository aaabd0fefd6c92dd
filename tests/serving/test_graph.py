"""The parts of a graph, run in torch and joined by the table: what is exported is this, whatever the sampling."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from diffusion_policy.config import PolicyConfig, SampleConfig, with_options
from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving import graph
from diffusion_policy.serving.export import draw_observations
from diffusion_policy.serving.graph import ExportError, make_graphs, require_exportable

TINY = with_options(PolicyConfig(), widths=(8,), level_dim=16, prediction_horizon=8, action_horizon=4)
GUIDANCE = {"plain": {}, "guided": {"guidance": 0.6, "guidance_schedule": "rising"}}


def run_parts(policy: DiffusionPolicy, sampling: SampleConfig, observations: dict, noise: np.ndarray) -> torch.Tensor:
    """What a runtime does with the parts, but in float64, (B, N, steps, A)."""
    samples = noise.shape[1]
    table = policy.diffusion.tabulate(
        *policy.resolve_sampling(sampling), sampling.corrector_steps, sampling.corrector_size
    )
    laid_out = policy.for_few_rows()
    with torch.no_grad():
        films = graph._Observe(laid_out, sampling, samples)(*(torch.from_numpy(observations[k]) for k in policy.keys))
        denoise = graph._Denoise(laid_out, sampling, table.levels)
        drawn = torch.from_numpy(noise).flatten(0, 1)  # (B N, draws, T, D)
        inputs = torch.einsum("ed,bdtk->ebtk", table.of_noise, drawn)
        for place in range(len(table.levels)):
            x0 = denoise(inputs[place], torch.tensor(place), films)
            inputs += table.of_x0[:, place, None, None, None] * x0
        return graph._Act(laid_out, samples, torch.float64)(inputs[-1])


@pytest.fixture(scope="module")
def policies(make_policy: Callable[..., DiffusionPolicy]) -> dict[str, DiffusionPolicy]:
    """One of each prediction, that can be guided and says its variance; all in float64, so that no rounding hides a
    fault."""
    angles = {"noise": (1,), "action": (0,)}
    config = dataclasses.replace(TINY, condition_dropout=0.1, learn_variance=True, schedule="sigmoid")
    made = {name: make_policy(dataclasses.replace(config, prediction=name), angles=angles) for name in PREDICTIONS}
    for policy in made.values():
        policy.network.double()
        policy.normalizer.normalize = partial(in_float64, policy.normalizer.normalize)  # pyright: ignore
    return made


def in_float64(normalize: Callable[[str, torch.Tensor], torch.Tensor], key: str, x: torch.Tensor) -> torch.Tensor:
    return normalize(key, x).double()


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_parts_give_what_the_policy_samples(
    policies: dict, sampler: str, prediction: str, guidance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "zeros", partial(torch.zeros, dtype=torch.float64))
    policy, rng = policies[prediction], np.random.default_rng(0)
    observations = draw_observations(policy, 2, rng)
    tensors = {key: torch.from_numpy(rows) for key, rows in observations.items()}
    for clip, corrector in (("none", 0), ("static", 1)):
        sampling = SampleConfig(sampler, 3, clip=clip, corrector_steps=corrector, **GUIDANCE[guidance])
        if sampler == "ddpm":
            sampling = dataclasses.replace(sampling, sampler="ddim", eta=1.0)  # a learned variance has no table
        noise = policy.draw_noise([rng, rng], 2, sampling).astype(np.float64)
        expected = policy.sample_from(tensors, noise, sampling)[:, :, 1:]
        found = run_parts(policy, sampling, observations, noise)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config, sampling, message",
    [
        (
            {"learn_variance": True},
            SampleConfig("ddpm"),
            "a learned variance multiplies noise by what the network says",
        ),
        ({}, SampleConfig(clip="dynamic"), "--clip dynamic needs a quantile, which ONNX has no operator for"),
    ],
)
def test_what_has_no_form_in_a_graph_is_refused_with_what_has(make_policy, config, sampling, message) -> None:
    policy = make_policy(dataclasses.replace(TINY, **config))
    for refuse in (require_exportable, make_graphs):
        with pytest.raises(ExportError, match=message):
            refuse(policy, sampling)
    for fine in (SampleConfig("ddim"), SampleConfig("ddpm-large"), SampleConfig("ddim", clip="static")):
        require_exportable(policy, fine)
    require_exportable(make_policy(TINY), SampleConfig("ddpm"))


def test_what_the_exporter_cannot_write_is_one_line(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no decomposition\nfor aten::warp")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"^torch's exporter cannot write films: no decomposition$"):
        make_graphs(make_policy(TINY), SampleConfig(sampling_steps=2))


def test_what_the_exporter_remarks_is_not_heard(capsys: pytest.CaptureFixture[str], caplog) -> None:
    import logging
    import warnings

    with graph.quiet():
        print("here")
        warnings.warn("here", stacklevel=1)
        logging.getLogger("onnxscript").warning("here")
    assert "here" not in capsys.readouterr().out + caplog.text
    logging.getLogger("onnxscript").warning("again")
    assert "again" in caplog.text
