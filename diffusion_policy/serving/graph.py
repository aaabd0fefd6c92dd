"""A policy and its sampling as ONNX: raw observations and noise in, raw actions out.

Three graphs come from torch's exporter: `observe`, what observations mean for the network (normalizer, encoders, and
all of the network that does not depend on xt); `denoise`, one call of the network, (xt, place) → x0; `act`, from the
clean sequence to raw actions. The loop between them is a table of weights (`Diffusion.tabulate`), so it is the same for
every sampler. Joined, it is ONNX's Loop with a fixed count: the weights are in the file, and in memory, once.

Shapes are static. Opset 20 and no custom operator, as TensorRT and OpenVINO read them. Knows no file.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from einops import repeat
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from diffusion_policy.config import SampleConfig
from diffusion_policy.policy import DiffusionPolicy, Given, Held
from diffusion_policy.serving.plan_folder import ACTIONS, GIVEN, KNOWN, NOISE, OBSERVATION

OPSET = 20


class ExportError(ValueError):
    """A policy cannot be exported so; the message says why, in one line."""


class Graphs(NamedTuple):
    """The parts of a plan; every name of an input and an output stands in them."""

    observe: ModelProto
    """Raw {observation/key: (B, To, ...)} → films (rows, features)."""
    denoise: ModelProto
    """xt (B N, T, D), place (), films → denoised, x0 (B N, T, D)."""
    act: ModelProto
    """x0 (B N, T, D), and the observation that actions are differences from, if they are → actions
    (B, N, T - To + 1, A)."""
    of_noise: np.ndarray
    """See `SamplingTable`, (E + 1, draws) float32."""
    of_x0: np.ndarray
    """See `SamplingTable`, (E + 1, E) float32."""


def make_graphs(
    policy: DiffusionPolicy,
    sampling: SampleConfig,
    batch: int = 1,
    samples: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Graphs:
    """The parts for B observations and N samples of each, without their joint; `dtype`: of observations, but images,
    which are uint8, and of actions.
    Raises ExportError where a part of sampling has no form in a graph, ValueError where the policy cannot sample so."""
    require_exportable(policy, sampling)
    policy = policy.for_few_rows()
    policy.eval()
    table = policy.diffusion.tabulate(
        *policy.resolve_sampling(sampling), sampling.corrector_steps, sampling.corrector_size
    )
    horizon = policy.config.observation_horizon
    observed = [
        torch.zeros(
            batch, horizon, *policy.shapes.observations[key], dtype=torch.uint8 if key in policy.images else dtype
        )
        for key in policy.keys
    ]
    names = [OBSERVATION + key for key in policy.keys]
    if policy.config.max_delay:
        steps = policy.config.prediction_horizon - horizon + 1
        observed += [torch.zeros(batch, steps, *policy.shapes.action, dtype=dtype), torch.zeros(batch, steps)]
        names += [GIVEN, KNOWN]
    reference_names = [name for name in names if name == OBSERVATION + policy.sequences.frame.key]
    reference = [observed[names.index(name)] for name in reference_names]
    observe = _Observe(policy, sampling, samples)
    xt = torch.zeros(batch * samples, *policy.noise_shape(sampling)[1:])
    denoise = _Denoise(policy, sampling, table.levels)
    with torch.no_grad():
        films = observe(*observed)
        return Graphs(
            _export(observe, observed, names, "films"),
            _export(denoise, [xt, torch.tensor(0), films], ["xt", "place", "films"], "denoised"),
            _export(_Act(policy, samples, dtype), [xt, *reference], ["x0", *reference_names], ACTIONS),
            table.of_noise.numpy().astype(np.float32),
            table.of_x0.numpy().astype(np.float32),
        )


def require_exportable(policy: DiffusionPolicy, sampling: SampleConfig) -> None:
    """Raise ExportError for what has no form in a graph."""
    if policy.leads:
        raise ExportError("costs lead samples by gradients, which a graph has not")
    if policy.config.learn_variance and sampling.sampler == "ddpm":
        raise ExportError(
            "a learned variance multiplies noise by what the network says, which no table of weights can; "
            "export with --sampler ddim, or ddpm-large"
        )
    if policy.choose_clip(sampling) == "dynamic":
        raise ExportError("--clip dynamic needs a quantile, which ONNX has no operator for; export with static or none")


class _Observe(nn.Module):
    """Raw observations → what they say to each layer, side by side, a row for each sequence that is denoised; and
    behind it what is given of the sequence, with a mark for each step, where the policy has learned that."""

    def __init__(self, policy: DiffusionPolicy, sampling: SampleConfig, samples: int) -> None:
        super().__init__()
        self.policy, self.sampling, self.samples = policy, sampling, samples

    def forward(self, *observed: Tensor) -> Tensor:
        policy, label = self.policy, self.policy.find_label(self.sampling)
        observations = dict(zip(policy.keys, observed, strict=False))
        cond = policy.encode(observations, torch.full((len(observed[0]),), label))
        films = policy.network.condition(policy.diffusion.list_levels([0]), policy.conditions(cond, self.sampling))
        rows = repeat(torch.cat(films.of_cond, dim=-1), "b f -> (b n) f", n=self.samples)
        held = policy.hold(observations, self.samples)
        if held is not None:
            return torch.cat([rows, torch.cat([held.sequence.flatten(1)] * (len(rows) // len(held.sequence)))], dim=-1)
        if not policy.config.max_delay:
            return rows
        sequence, known = policy.sequences.place(observed[-2], observed[-1], self.samples, observations)
        given = torch.cat([sequence.flatten(1), known.flatten(1)], dim=-1)
        return torch.cat([rows, torch.cat([given] * (len(rows) // len(given)))], dim=-1)


class _Denoise(nn.Module):
    """One call of the denoiser, that of the table's row `place`: what the levels say is a constant of the graph."""

    def __init__(self, policy: DiffusionPolicy, sampling: SampleConfig, levels: list[int]) -> None:
        super().__init__()
        self.policy, self.sampling = policy, sampling
        cond = torch.zeros(1, policy.cond_dim)
        with torch.no_grad():
            of_levels = policy.network.condition(policy.diffusion.list_levels(levels), cond).of_levels
        self.sizes = [part.shape[-1] for part in of_levels]
        self.register_buffer("levels", torch.tensor(levels))  # (E,)
        self.register_buffer("of_levels", torch.cat(of_levels, dim=-1))  # (E, features)

    def forward(self, xt: Tensor, place: Tensor, films: Tensor) -> Tensor:
        given = held = None
        if self.policy.sequences.held is not None:
            films, sequence = films.split([sum(self.sizes), xt[0].numel()], dim=-1)
            held = Held(sequence[: len(xt)].reshape(xt.shape), self.policy.sequences.held)
        if self.policy.config.max_delay:
            rows, (steps, width) = len(xt), xt.shape[1:]
            films, sequence, known = films.split([sum(self.sizes), steps * width, steps], dim=-1)
            given = Given(sequence[:rows].reshape(xt.shape), known[:rows, :, None] > 0.5)
        parts = (films + self.get_buffer("of_levels")[place]).split(self.sizes, dim=-1)
        denoise = self.policy.decode(
            lambda xt, _: self.policy.network.denoise(xt, parts), self.sampling, given=given, held=held
        )
        return denoise(xt, self.get_buffer("levels")[place])  # pyright: ignore[reportArgumentType]


class _Act(nn.Module):
    """Clean sequences → raw actions from *now* on; with the observation that they are differences from, if they are."""

    def __init__(self, policy: DiffusionPolicy, samples: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.policy, self.samples, self.dtype = policy, samples, dtype

    def forward(self, x0: Tensor, *reference: Tensor) -> Tensor:
        observations = dict(zip([self.policy.sequences.frame.key], reference, strict=False))
        actions = self.policy.sequences.unnormalize(x0, self.samples, observations).to(self.dtype)
        return actions[:, :, self.policy.config.observation_horizon - 1 :]


def _export(module: nn.Module, arguments: list[Tensor], inputs: list[str], output: str) -> ModelProto:
    """A module as torch's exporter writes it. Raises ExportError where it cannot."""
    names = [f"in/{i}" for i in range(len(inputs))]  # a key may be called like something inside
    try:
        with quiet():
            program = torch.onnx.export(
                module.eval(),
                tuple(arguments),
                input_names=names,
                output_names=["out"],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                external_data=False,
            )
    except Exception as error:  # whatever the exporter could not do
        raise ExportError(f"torch's exporter cannot write {output}: {str(error).splitlines()[0]:.200}") from error
    assert program is not None
    return _rename(program.model_proto, dict(zip([*names, "out"], [*inputs, output], strict=True)), f"{output}/")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What exporters remark is about operators, not about the policy."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _rename(model: ModelProto, names: dict[str, str], prefix: str) -> ModelProto:
    """Inputs and outputs by these names, all else with a prefix; without the exporter's notes, which are longer than a
    small network and hold paths of this machine."""

    def renamed(name: str) -> str:
        return names.get(name, prefix + name) if name else ""

    graph = model.graph
    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
        assert not any(attribute.HasField("g") for attribute in node.attribute)
    for one in (*graph.input, *graph.output, *graph.initializer):
        one.name = renamed(one.name)
    for noted in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph, model):
        del noted.metadata_props[:]
        noted.doc_string = ""
    del graph.value_info[:]
    return model


def join(graphs: Graphs) -> ModelProto:
    """One graph of all parts, with the loop over the table's rows."""
    shape = _shape(graphs.denoise.graph.output[0])  # (B N, T, D)
    body = _make_body(graphs, shape)
    actions = graphs.act.graph.output[0]
    batch, samples = _shape(actions)[:2]
    draws = graphs.of_noise.shape[1]
    nodes = [
        *graphs.observe.graph.node,
        helper.make_node("Transpose", [NOISE], ["loop/noise"], perm=[2, 0, 1, 3, 4]),
        helper.make_node("Reshape", ["loop/noise", "loop/flat"], ["loop/rows"]),
        helper.make_node("MatMul", ["loop/of_noise", "loop/rows"], ["loop/sums"]),
        helper.make_node("Reshape", ["loop/sums", "loop/inputs_shape"], ["loop/first"]),
        helper.make_node("Loop", ["loop/calls", "loop/true", "loop/first"], ["loop/all"], body=body),
        helper.make_node("Gather", ["loop/all", "loop/calls"], ["x0"], axis=0),
        *graphs.act.graph.node,
    ]
    noise_shape = [batch, samples, draws, *shape[1:]]
    graph = helper.make_graph(
        nodes,
        "plan",
        [*graphs.observe.graph.input, helper.make_tensor_value_info(NOISE, TensorProto.FLOAT, noise_shape)],
        [actions],
        [
            *graphs.observe.graph.initializer,
            *graphs.act.graph.initializer,
            *(numpy_helper.from_array(value, name) for name, value in _list_constants(graphs, shape).items()),
        ],
    )
    imports = {one.domain: one for part in graphs[:3] for one in part.opset_import}
    model = helper.make_model(graph, opset_imports=list(imports.values()), ir_version=graphs.denoise.ir_version)
    onnx.checker.check_model(model)
    return model


def _list_constants(graphs: Graphs, shape: list[int]) -> dict[str, np.ndarray]:
    """The table, and sizes, by their names in the graph."""
    calls, draws = graphs.of_x0.shape[1], graphs.of_noise.shape[1]
    return {
        "loop/of_noise": graphs.of_noise,
        "loop/of_x0": np.ascontiguousarray(graphs.of_x0.T),  # (E, E + 1)
        "loop/flat": np.array([draws, -1]),
        "loop/inputs_shape": np.array([calls + 1, *shape]),
        "loop/weights_shape": np.array([calls + 1, 1, 1, 1]),
        "loop/calls": np.array(calls),
        "loop/true": np.array(True),
    }


def _make_body(graphs: Graphs, shape: list[int]) -> Any:
    """One turn of the loop: the inputs of all calls so far come in, (E + 1, B N, T, D); what this call found adds its
    share to those of the later ones. The weights stand in the body, where runtimes lay them out for products once."""
    calls = graphs.of_x0.shape[1]
    sums = [calls + 1, *shape]
    info: Callable[..., Any] = helper.make_tensor_value_info
    nodes: list[NodeProto] = [
        helper.make_node("Gather", ["loop/inputs", "place"], ["xt"], axis=0),
        *graphs.denoise.graph.node,
        helper.make_node("Gather", ["loop/of_x0", "place"], ["loop/share"], axis=0),
        helper.make_node("Reshape", ["loop/share", "loop/weights_shape"], ["loop/weights"]),
        helper.make_node("Mul", ["loop/weights", "denoised"], ["loop/added"]),
        helper.make_node("Add", ["loop/inputs", "loop/added"], ["loop/next"]),
        helper.make_node("Identity", ["loop/go_on"], ["loop/going_on"]),
    ]
    return helper.make_graph(
        nodes,
        "denoise",
        [
            info("place", TensorProto.INT64, []),
            info("loop/go_on", TensorProto.BOOL, []),
            info("loop/inputs", TensorProto.FLOAT, sums),
        ],
        [info("loop/going_on", TensorProto.BOOL, []), info("loop/next", TensorProto.FLOAT, sums)],
        list(graphs.denoise.graph.initializer),
    )


def _shape(value: Any) -> list[int]:
    """Of an input or output."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
