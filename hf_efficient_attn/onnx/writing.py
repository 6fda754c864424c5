"""The graph of a program, in the operators of ONNX."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .inputs import ProgramInputs
from .program import Program


if TYPE_CHECKING:
    from torch.onnx import ONNXProgram


def write_program(
    program: Program, example: dict[str, Tensor], inputs: ProgramInputs, names: tuple[str, ...], opset: int
) -> "ONNXProgram":
    """The graph of `program` in an operator set.

    Args:
        program: what is written.
        example: inputs to trace it with.
        inputs: which of their sizes may change.
        names: of the outputs.
        opset: the operator set.

    Raises:
        ValueError: a model that is not one graph, or an operator that the set has no form of.
    """
    from .operators import TRANSLATIONS

    with _silence():
        sizes = inputs.sizes()
        try:
            graph = torch.export.export(program, (example,), dynamic_shapes=(sizes,))
        except Exception as error:  # of many classes
            raise ValueError(
                f"{type(program.model).__name__} is not one graph: {str(error).splitlines()[0]} Are there hooks on it, "
                "or parts that are not the package's?"
            ) from error
        try:
            written = torch.onnx.export(
                graph,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(inputs.names),
                output_names=list(names),
                custom_translation_table=TRANSLATIONS,
            )
        except torch.onnx.OnnxExporterError as error:
            found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", str(error))
            what = f"no form of {found[1]}" if found else f"not all of it: {str(error).splitlines()[0]}"
            raise ValueError(f"operator set {opset} has for {type(program.model).__name__} {what}.") from error
    _name_sizes(written, inputs.names, sizes)
    _forget_origin(written)
    return written


def _name_sizes(program: "ONNXProgram", names: Sequence[str], sizes: Mapping[str, Mapping[int, Any]]) -> None:
    """Give the dynamic sizes of a program their own names in place of the tracer's."""
    graph = program.model.graph
    own = {
        str(value.shape[axis]): dim.__name__
        for name, value in zip(names, graph.inputs, strict=True)
        for axis, dim in sizes[name].items()
    }
    for value in (*graph.inputs, *graph.outputs, *(x for node in graph for x in node.outputs)):
        for axis, size in enumerate(() if value.shape is None else value.shape):
            if str(size) in own:
                value.shape[axis] = own[str(size)]


def _forget_origin(program: "ONNXProgram") -> None:
    """Drop what the exporter says of where each operator comes from: most of a small program, with paths of its own."""
    program.model.metadata_props.clear()
    for graph in (program.model.graph, *(function.graph for function in program.model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


@contextmanager
def _silence() -> Iterator[None]:
    """Without what torch's exporter says about itself, such as that torchvision is not there."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
