"""`fedfog export RUN --onnx FILE`: the model in a format that runs without PyTorch.

It is written only after ONNX Runtime has given PyTorch's outputs for all test data.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedfog.cli.saved import SavedModelError, load
from fedfog.files import write_atomically
from fedfog.ml.task import DataError
from fedfog.service import EXIT_FAILED, EXIT_OK

TOLERANCE = 1e-5
BATCH = 512


def run(folder: Path, onnx: Path, data_dir: Path) -> int:
    """Write the model as ONNX; returns the exit code: 1 if it is not PyTorch's to 1e-5."""
    try:
        task, model = load(folder, data_dir)
        inputs = task.test_data().tensors[0]
        content = to_onnx(model, inputs[:2])
        difference = largest_difference(content, model, inputs)
    except ImportError as error:
        sys.stderr.write(f"{error.name} is not installed: pip install 'fedfog[onnx]'\n")
        return EXIT_FAILED
    except (SavedModelError, DataError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    told = (
        f"largest difference to PyTorch over {len(inputs):,} test examples: {difference:.2e} "
        f"(allowed: {TOLERANCE:.0e})"
    )
    if not difference <= TOLERANCE:  # NaN is not
        sys.stderr.write(f"{onnx} is not written: {told}\n")
        return EXIT_FAILED
    try:
        write_atomically(onnx, content)
    except OSError as error:
        sys.stderr.write(f"{onnx} cannot be written ({error.strerror})\n")
        return EXIT_FAILED
    sys.stdout.write(f"{onnx}: {len(content):,} bytes; {told}\n")
    return EXIT_OK


def to_onnx(model: nn.Module, examples: Tensor) -> bytes:
    """The model with one input `input` (batch, ...) and one output `output` (batch, scores), for
    any number of examples. Raises ImportError."""
    import onnx  # noqa: F401  the exporter needs it, and would not say so as clearly

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = Path(folder) / "model.onnx"
        # The newer exporter needs two packages more, and gives the same graph for such models.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (examples,),
            path,
            dynamo=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
        )
        return path.read_bytes()


@torch.inference_mode()
def largest_difference(content: bytes, model: nn.Module, inputs: Tensor) -> float:
    """Between the outputs of ONNX Runtime and of PyTorch, relative to those above 1. Raises
    ImportError."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = []
    for batch in torch.split(inputs, BATCH):
        wanted = model(batch).numpy()
        found = session.run(["output"], {"input": batch.numpy()})[0]
        largest.append((np.abs(found - wanted) / np.maximum(1, np.abs(wanted))).max())
    return float(np.max(largest))
