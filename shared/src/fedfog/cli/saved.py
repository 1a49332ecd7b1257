"""The model that a run has left behind, for `fedfog export` and `fedfog predict`."""

from pathlib import Path

from pydantic import ValidationError
from torch import nn

from fedfog.messages.codec import CodecError, decode, digest_of
from fedfog.messages.schemas import ModelMeta
from fedfog.ml.task import Task, TaskError, load_task
from fedfog.ml.training import load_arrays
from fedfog.runs import RunInfo

MODEL = "model.safetensors"


class SavedModelError(Exception):
    """A run's model cannot be used; the text says why."""


def load(folder: Path, data_dir: Path) -> tuple[Task, nn.Module]:
    """The task of the run in `folder` and its final model, ready to be applied.

    Raises:
        SavedModelError: there is none, or it is not one of the run's task.
    """
    path = folder / MODEL
    try:
        info = RunInfo.model_validate_json((folder / "settings.json").read_bytes())
        saved = decode(path.read_bytes(), ModelMeta)
        if digest_of(saved.vector) != saved.meta.digest:
            raise CodecError("the digest is not that of the tensors")
        task = load_task(info.settings["task"], data_dir=data_dir)
        model = task.build_model(0)
        load_arrays(model, saved.table.unflatten(saved.vector))
    except OSError as error:
        raise SavedModelError(
            f"{error.filename} cannot be read ({error.strerror}): name the folder of a run that "
            "has ended, such as runs/latest"
        ) from error
    except (ValidationError, CodecError, TaskError, RuntimeError) as error:
        raise SavedModelError(f"{path}: {error}") from error
    return task, model.eval()
