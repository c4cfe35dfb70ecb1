"""The conditions under which work was begun: it continues under the same ones, or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perplexit.atomic_files import write_json
from perplexit.errors import ResumeError
from perplexit.runs.measurement import measurement_differences, plain_json
from perplexit.untrusted_files import Expected, read_json

CONDITIONS_FILE = "conditions.json"
FINGERPRINT_VERSION = 2  # of a model in memory; version 1 was of its tensors alone
_EXPECTED = Expected(
    "the conditions of what was begun here", ResumeError, "remove the folder, or name another"
)


def keep_conditions(folder: Path, conditions: Mapping[str, Any], work: str) -> None:
    """Write the conditions into a new folder, or hold them against those in it.

    work: "collection", as the message of `require_same` names it. Raises as that does.
    """
    path = folder / CONDITIONS_FILE
    if path.exists():
        require_same(read_json(path, _EXPECTED, dict[str, Any]), conditions, work, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, conditions)


def require_same(
    found: Mapping[str, Any], wanted: Mapping[str, Any], work: str, place: Path
) -> None:
    """Raise ResumeError, with what differs, where `place` holds work of other conditions.

    A file of an older version that does not identify its model differs in that.
    """
    names = [name for name in wanted if name != "measurement_fingerprint"]  # its parts say more
    differences = []
    if not identifies_its_model(found.get("measurement")):
        names = [name for name in names if name not in ("measurement", "weights_fingerprint")]
        differences = ["the model (an older Perplexit identified models in another way)"]
    differences += measurement_differences(
        plain_json({name: found.get(name) for name in names}),
        plain_json({name: wanted[name] for name in names}),
    )
    if differences:
        raise ResumeError(
            f"expected {place} to hold the same {work}, but {', '.join(differences)} differ; "
            "name another output, or remove it"
        )


def identifies_its_model(measurement: Any) -> bool:
    """Return whether a recorded measurement identifies its model as this version does."""
    settings = measurement.get("settings") if isinstance(measurement, Mapping) else None
    found = settings.get("fingerprint_version") if isinstance(settings, Mapping) else None
    return bool(found == FINGERPRINT_VERSION)
