"""The file formats: how each is written and run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_bsr.compat.torch_api import ONNX_REGISTRATION_LOGGER
from peft_bsr.errors import ExportError
from peft_bsr.exporting.prepare import ImageFunction

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        ending: File extension.
        write: (model, sample images, path, whether the batch size is dynamic).
        load: path -> a function of images that runs the file.
        packages: Required packages, by import name.
        install: Command that installs them.
        any_batch: Whether the batch size can be dynamic.
        takes_threads: Whether `load` runs it on `torch.get_num_threads()` threads.
    """

    ending: str
    write: Callable[[ImageFunction, Tensor, Path, bool], None]
    load: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    install: str = ""
    any_batch: bool = True
    takes_threads: bool = True

    def check_installed(self, name: str) -> None:
        """Check that the required packages are installed.

        Raises:
            ExportError: If not; it names the packages and how to install them.
        """
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ExportError(f"`format={name!r}` needs {', '.join(missing)}. Run `{self.install}`.")


def trace(model: ImageFunction, sample: Tensor, is_any_batch: bool) -> torch.export.ExportedProgram:
    """The model's graph by `torch.export`, static except for the batch size."""
    dimensions = {0: torch.export.Dim("batch")} if is_any_batch else None
    with torch.no_grad(), _quiet():
        return torch.export.export(model, (sample,), dynamic_shapes=(dimensions,))


def _write_program(model: ImageFunction, sample: Tensor, path: Path, is_any_batch: bool) -> None:
    with _quiet():
        torch.export.save(trace(model, sample, is_any_batch), path)


def _load_program(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: list(module(images))


def _write_onnx(model: ImageFunction, sample: Tensor, path: Path, is_any_batch: bool) -> None:
    with torch.no_grad(), _quiet():
        outputs = list(model.named_outputs(sample))
        program = torch.onnx.export(
            trace(model, sample, is_any_batch),
            input_names=[model.input_name],
            output_names=outputs,
            dynamic_shapes=({0: "batch"},) if is_any_batch else None,  # the graph is there, they name its axes
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with the paths of this machine, a third of the graph
    program.save(path, external_data=_is_large(model))


def _load_onnx(path: Path) -> Run:
    session = open_onnx(path)
    (images_in,) = session.get_inputs()
    return lambda images: [torch.from_numpy(o) for o in session.run(None, {images_in.name: images.numpy()})]


def open_onnx(path: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> InferenceSession:
    """An onnxruntime session with as many threads as torch.

    Args:
        path: An ONNX file.
        providers: Names of execution providers, in order of preference.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=list(providers))


def quantize_onnx(path: Path, to: Path) -> None:
    """Quantise weights of Linear modules to int8, with one scale per output and dynamic quantisation of activations.

    Linear modules with more inputs than outputs stay in fp32: after an MLP's activation a few values are so large that
    a common scale would lose the others.

    Args:
        path: An ONNX file.
        to: The file to write.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[:]  # noted shapes that its own inference of transposed weights contradicts
    narrowing = {w.name for w in model.graph.initializer if len(w.dims) == 2 and w.dims[0] > w.dims[1]}
    excluded = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in narrowing]
    logger = logging.getLogger()  # it advises, on the root logger, to run a preprocessing that dynamic batches fail
    before, logger.disabled = logger.disabled, True
    try:
        quantize_dynamic(
            model,
            to,
            op_types_to_quantize=["MatMul", "Gemm"],  # the patch embedding's convolution is 1 % of the work
            per_channel=True,
            reduce_range=True,  # 7 bits: sums of 8-bit products saturate on processors without VNNI
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
        )
    finally:
        logger.disabled = before


def _write_executorch(model: ImageFunction, sample: Tensor, path: Path, is_any_batch: bool) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = trace(model, sample, is_any_batch)
    with _quiet():
        program = program.run_decompositions({torch.ops.aten.sort.default: _sort})
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(edge.to_executorch().buffer)


def _sort(values: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """`sort` as `topk` of all: ExecuTorch 1.5 has a kernel for the second alone."""
    return torch.ops.aten.topk.default(values, values.shape[dim], dim, descending)


def _load_executorch(path: Path) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda images: list(method.execute([images]))


def _is_large(model: ImageFunction) -> bool:
    """Whether the weights are too large for one protobuf file (2 GiB)."""
    return sum(p.nbytes for p in model.parameters()) > 2**31 - 2**27


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress output and warnings."""
    logger = logging.getLogger(ONNX_REGISTRATION_LOGGER)  # it warns that torchvision is missing
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


FORMATS = {
    "onnx": Format(
        ".onnx", _write_onnx, _load_onnx, ("onnx", "onnxruntime", "onnxscript"), "pip install 'peft-bsr[export]'"
    ),
    "torch.export": Format(".pt2", _write_program, _load_program),
    "executorch": Format(
        ".pte",
        _write_executorch,
        _load_executorch,
        ("executorch",),
        "pip install executorch",
        any_batch=False,
        takes_threads=False,
    ),
}

__all__ = ["FORMATS", "Format", "Run", "open_onnx", "quantize_onnx", "trace"]
