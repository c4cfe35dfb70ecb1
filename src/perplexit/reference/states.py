"""Final hidden states on disk: what a reference's logits can be made of again, window by window.

A float32 state of SmolLM2-135M takes 2,304 bytes; its logits in float16 would take 98,304. The head
is copied only where the model's address does not give it again (see `heads`).

    reference/reference.json            the head's model, the states' dtype, the measured floor
    reference/states-<hash>.safetensors some windows' states, one file a committed batch
    reference/head.safetensors          the head, where the checkpoint does not have it

Shape suffixes: N = targets of one window, D = hidden size.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from safetensors.torch import save_file

from perplexit.atomic_files import write_atomically, write_bytes
from perplexit.errors import RunError
from perplexit.fingerprints import canonical_json, sha256_of_file
from perplexit.functional.output_head import OutputHead
from perplexit.untrusted_files import Expected, check_regular, open_regular, read_json, stated
from perplexit.untrusted_tensors import opened_tensors

FOLDER = "reference"
RECORD = "reference.json"
MEASURED = "measured.json"
HEAD = "head.safetensors"
_EXPECTED = Expected(
    "the record of a reference", RunError, "evaluate the reference again with --save-reference"
)
_STATES = Expected("hidden states", RunError, "evaluate the reference again")
StatesDtype = Literal["float32", "float16"]


class ReferenceRecord(TypedDict, total=False):
    """What `reference.json` says that a reader goes by."""

    dtype: str
    proof: dict[str, float] | None
    head_file: dict[str, str] | None


@dataclass(frozen=True)
class StatesWriter:
    """Writes the hidden states of a run's windows below its folder."""

    folder: Path
    dtype: StatesDtype = "float32"

    def add(self, windows: Sequence[int], states: Sequence[NDArray[np.float32]]) -> None:
        """Commit the states of some windows (rows of the window table); atomic."""
        tensors = {
            str(window): np.ascontiguousarray(states_ND.astype(self.dtype))
            for window, states_ND in zip(windows, states, strict=True)
            if len(states_ND)
        }
        if not tensors:
            return
        data = bytes(save(tensors))
        name = f"states-{hashlib.sha256(data).hexdigest()[:24]}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / name, data)

    def keep_measured(self, measured: Mapping[str, Any]) -> None:
        """Keep what was measured of the states beside them, for a run that is resumed at its end.

        measured: the self-KL (`self_kl_mean`, `self_kl_max`) and the head's `proof`.
        """
        text = json.dumps(measured)
        write_bytes(self.folder / MEASURED, text.encode())

    def measured(self) -> dict[str, Any] | None:
        """Return what an earlier process of this run kept so; None where it is not there whole."""
        try:
            return read_json(self.folder / MEASURED, _EXPECTED, dict[str, Any])
        except RunError:
            return None

    def keep_head(self, head: OutputHead) -> dict[str, str]:
        """Write the head beside the states; its file's name and hash, for the record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, numbers = self.folder / HEAD, {"perplexit": canonical_json(head.numbers())}
        write_atomically(path, lambda at: save_file(head.tensors(), at, metadata=numbers))
        return {"name": HEAD, "sha256": sha256_of_file(path)}

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the record that makes the states a reference."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"dtype": self.dtype, **record}, indent=2, allow_nan=False) + "\n"
        write_bytes(self.folder / RECORD, text.encode())


class ReferenceStates:
    """The stored states of a run, read window by window.

    Raises RunError where the run was not made with --save-reference, or a file is damaged.
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / FOLDER
        if not (self.folder / RECORD).exists():
            raise RunError(
                f"expected a run with stored hidden states, got {run_folder} without "
                f"{FOLDER}/{RECORD}; evaluate the reference with --save-reference"
            )
        self.record = read_json(self.folder / RECORD, _EXPECTED, ReferenceRecord)
        self._file_of: dict[int, Path] = {}
        for path in sorted(self.folder.glob("states-*.safetensors")):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    _check_states(path, name, file.get_slice(name), self._file_of)
                    self._file_of[int(name)] = path
        self.num_bytes = sum(p.stat().st_size for p in set(self._file_of.values()))

    @property
    def windows(self) -> set[int]:
        """Return the windows whose states are stored."""
        return set(self._file_of)

    @property
    def keeps_head(self) -> bool:
        """Return whether the head is kept with the states."""
        return bool(self.record.get("head_file"))

    def head(self, device: torch.device) -> OutputHead:
        """Return the head that is kept with the states, on a device.

        Raises RunError where its file is missing, damaged or of another kind.
        """
        path, file = self.folder / HEAD, self.record.get("head_file") or {}
        expected = Expected(
            "the head of the stored states", RunError, "evaluate the reference again"
        )
        check_regular(path, expected)
        if sha256_of_file(path) != file.get("sha256"):
            expected.refuse(path, "another file than was saved (its hash differs)")
        with opened_tensors(path, expected, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return OutputHead.of(tensors, json.loads(content.metadata()["perplexit"])).on(device)

    def of_window(self, window: int) -> NDArray[np.float32]:
        """Return the states of a window's targets, float32 (N, D)."""
        path = self._file_of.get(window)
        if path is None:
            raise RunError(
                f"the reference in {self.folder} has no states for window {window}; "
                "evaluate it again with --save-reference"
            )
        with _opened(path) as file:
            states_ND: NDArray[np.float32] = file.get_tensor(str(window)).astype(np.float32)
        return states_ND


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    expected = path.stem.removeprefix("states-")
    with open_regular(path, _STATES) as file, stated(path, _STATES):
        found = hashlib.file_digest(file, "sha256").hexdigest()[: len(expected)]
    if found != expected:
        raise RunError(f"{path} is damaged (its hash differs); evaluate the reference again")
    with opened_tensors(path, _STATES) as tensors:
        yield tensors


def _check_states(path: Path, name: str, states: Any, known: Mapping[int, Path]) -> None:
    """Raise RunError unless a tensor is the states (N, D) of a window that has none yet."""
    if not re.fullmatch(r"[0-9]{1,12}", name) or int(name) in known:
        _STATES.refuse(path, f"states of the window {name!r} twice, or of none")
    if states.get_dtype() not in ("F32", "F16") or len(states.get_shape()) != 2:
        _STATES.refuse(path, f"states of {states.get_dtype()} {states.get_shape()}")
