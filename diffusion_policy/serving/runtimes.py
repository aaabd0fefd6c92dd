"""What runs an ONNX graph on the CPU: onnxruntime, or OpenVINO. No torch.

Both take the same bytes. OpenVINO can compute in bf16 where the processor has it.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from diffusion_policy.config import ConfigError, PlanningPrecision
from diffusion_policy.serving.plan_folder import ExportedError

RuntimeName = Literal["onnxruntime", "openvino"]
Interface = dict[str, tuple[str, list[Any]]]
"""Type, as numpy calls it, and shape, by name."""
TYPES = {
    "tensor(double)": "float64", "tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8",
    "f64": "float64", "f32": "float32", "i64": "int64", "u8": "uint8",
}  # fmt: skip
"""What the runtimes call them."""


class Graph(Protocol):
    """A graph that is ready to run."""

    inputs: Interface
    outputs: Interface

    def run(self, output: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """One output; raises what the runtime raises. Several threads may call."""
        ...


class OnnxRuntime:
    """A graph in onnxruntime."""

    def __init__(self, graph: bytes, threads: int | None, precision: PlanningPrecision) -> None:
        """Raises ImportError without onnxruntime, ConfigError for another precision than the graph's."""
        import onnxruntime

        if precision != "fp32":
            raise ConfigError(f"onnxruntime computes as the graph says; the precision {precision} is for openvino")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 4  # what is wrong is raised
        options.add_session_config_entry("session.load_model_format", "ONNX")
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        self.inputs: Interface = {one.name: _describe(one.type, one.shape) for one in self._session.get_inputs()}
        self.outputs: Interface = {one.name: _describe(one.type, one.shape) for one in self._session.get_outputs()}

    def run(self, output: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Graph.run`."""
        return np.asarray(self._session.run([output], dict(inputs))[0])


class OpenVino:
    """A graph in OpenVINO."""

    def __init__(self, graph: bytes, threads: int | None, precision: PlanningPrecision) -> None:
        """Raises ImportError without OpenVINO."""
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "PERFORMANCE_HINT": "LATENCY",
            **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
        }
        model = openvino.Core().read_model(model=graph)
        # as it was read: compiled, an input is also called as what was folded into it
        self.inputs: Interface = {one.get_any_name(): _describe_port(one) for one in model.inputs}
        self.outputs: Interface = {one.get_any_name(): _describe_port(one) for one in model.outputs}
        self._compiled = openvino.Core().compile_model(model, "CPU", options)
        self._own = threading.local()

    def run(self, output: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Graph.run`."""
        if not hasattr(self._own, "request"):  # each thread has its own
            self._own.request = self._compiled.create_infer_request()
        self._own.request.infer(dict(inputs), share_inputs=True)
        return np.array(self._own.request.get_tensor(output).data)  # a copy: the next call writes there


def _describe(kind: object, shape: Any) -> tuple[str, list[Any]]:
    return TYPES.get(str(kind), str(kind)), list(shape)


def _describe_port(port: Any) -> tuple[str, list[Any]]:
    return _describe(port.get_element_type().get_type_name(), port.get_partial_shape().to_shape())


RUNTIMES: dict[RuntimeName, Callable[[bytes, int | None, PlanningPrecision], Graph]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}


def open_graph(
    graph: bytes, runtime: RuntimeName, threads: int | None, precision: PlanningPrecision, where: str
) -> Graph:
    """A graph that is ready to run, with so many threads, by default one a core. Raises ExportedError for what is no
    graph, ImportError where the runtime is not installed."""
    try:
        return RUNTIMES[runtime](graph, threads, precision)
    except ConfigError:
        raise
    except ImportError as error:
        raise ImportError(
            f"this needs {runtime}: pip install {runtime}, or 'diffusion-policy-toolkit[onnx]' to export as well"
        ) from error
    except Exception as error:  # runtimes have their own for each
        raise ExportedError(f"{where}: {runtime} cannot read the graph: {error!s:.300}") from error
