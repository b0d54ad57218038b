"""A model as a graph that needs no Python of ours: ONNX, or torch.export. Written, read back and run."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from sslmed.config import DataError, MissingDependencyError
from sslmed.exporting.deployed import Deployed

OPSET = 18
MOST_IMAGES, MOST_PIXELS = 4096, 16384  # in a batch, and along a side

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[Tensors], Tensors]


def write_onnx(module: Deployed, example: Tensors, path: Path, about: str) -> Run:
    """Write ``path``, and what runs it in ONNX Runtime on the CPU.

    Args:
        example: inputs, of at least two images.
        about: goes along as the model's metadata ``sslmed``.

    Raises:
        MissingDependencyError: onnx, onnxruntime or onnxscript is not there.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch.onnx needs, said now
    except ImportError as error:
        raise MissingDependencyError(
            f"export to ONNX needs {error.name}, which is not installed: pip install 'sslmed[onnx]'"
        ) from error
    with _quietly():
        program = torch.onnx.export(
            _graph(module, example),
            example,
            input_names=list(module.inputs),
            output_names=list(module.outputs),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
        )
    assert program is not None  # noqa: S101  # for the reader of types
    program.model.metadata_props["sslmed"] = about
    program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(given: Tensors) -> Tensors:
        named = {name: each.numpy() for name, each in zip(module.inputs, given, strict=True)}
        return tuple(torch.from_numpy(each) for each in session.run(list(module.outputs), named))

    return run


def write_program(module: Deployed, example: Tensors, path: Path, about: str) -> Run:
    """Write ``path`` by `torch.export.save`, and what runs it once it is read back.

    Args:
        example: inputs, of at least two images.
        about: goes along as the extra file ``card.json``.
    """
    with _quietly():
        torch.export.save(_graph(module, example), path, extra_files={"card.json": about})
        read: Any = torch.export.load(path).module()

    def run(given: Tensors) -> Tensors:
        with torch.no_grad():
            return tuple(read(*given))

    return run


def _graph(module: Deployed, example: Tensors) -> torch.export.ExportedProgram:
    batch = Dim("batch", min=1, max=MOST_IMAGES)
    image: dict[int, Dim] = {0: batch}
    if module.prepare.whole:
        image |= {2: Dim("height", min=1, max=MOST_PIXELS), 3: Dim("width", min=1, max=MOST_PIXELS)}
    shapes: Sequence[Any] = (image, {0: batch})[: len(example)]
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=tuple(shapes))


def refused(error: Exception, module: Deployed, form: str) -> DataError:
    """What torch's exporters cannot do with a network, in a sentence; they raise almost anything."""
    told = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(
        f"torch cannot write {module.card.backbone.name} as {form}: {type(error).__name__}: {told[0][:300]}\n"
        "Its backbone alone goes along with --format timm"
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What torch's exporters tell of their steps is not for users; their errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
