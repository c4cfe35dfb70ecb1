"""Fine-tuned models as folders, and where they and experiments may be written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from perplexit.checkpoints.quiet import quiet_transformers
from perplexit.igf.experiment_file import EXPERIMENT_FILE
from perplexit.igf.stored import PICKLE_SUFFIXES, json_kind, object_in
from perplexit.protected_outputs import Kind, OutputFile, OutputFolder, paths_among

MODEL_FILE = "perplexit.json"
_MODEL_KIND = "a fine-tuned model"


def model_output(
    path: str | Path,
    *,
    inputs: object = (),
    request: Mapping[str, Any] | None = None,
    force: bool = False,
) -> OutputFolder:
    """The folder for a fine-tuned model; a pickle's suffix is dropped.

    request: what was asked for; a model that the same request made is made again without `force`.
    Raises OutputError where another model or anything else is there.
    """
    folder = Path(path)
    folder = folder.with_suffix("") if folder.suffix in PICKLE_SUFFIXES else folder
    output = OutputFolder(folder, Kind(_MODEL_KIND, _is_model), paths_among(inputs), force)
    if output.exists:
        output.check_replaceable(request is not None and _record(folder)["request"] == request)
    return output


def save_in(output: OutputFolder, model: nn.Module, request: Mapping[str, Any] | None) -> Path:
    """Put the model in place as a Hugging Face folder (safetensors), whole or not at all."""
    with output.staged() as staging:
        with quiet_transformers():
            model.save_pretrained(staging)  # type: ignore[operator]
        files = sorted(entry.name for entry in staging.iterdir())
        record = {"kind": _MODEL_KIND, "version": 1, "request": request, "files": files}
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (staging / MODEL_FILE).write_text(text, encoding="utf-8")
    return output.path


def check_experiment_output(folder: str | Path, *, inputs: object = ()) -> None:
    """Raise OutputError for a folder that holds something else than an experiment."""
    kind = Kind("an experiment", lambda found: (found / "conditions.json").is_file())
    output = OutputFolder(Path(folder), kind, paths_among(inputs))
    path = output.path / EXPERIMENT_FILE
    OutputFile(path, json_kind("kind"), paths_among(inputs))


def _record(folder: Path) -> dict[str, Any]:
    found = object_in(folder / MODEL_FILE)
    return found if found.get("kind") == _MODEL_KIND and "request" in found else {}


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model that was fine-tuned here and nothing put beside it."""
    files = _record(folder).get("files", ())
    own = {MODEL_FILE, *(files if isinstance(files, list) else ())}
    return len(own) > 1 and all(entry.name in own for entry in folder.iterdir())
