"""Final hidden states on disk: what a reference's logits can be made of again, window by window.

A float32 state of SmolLM2-135M takes 2,304 bytes; its logits in float16 would take 98,304. The head
is not copied: it is known by the checkpoint's fingerprint and loaded from the checkpoint.

    reference/reference.json            the head's model, the states' dtype, the measured floor
    reference/states-<hash>.safetensors some windows' states, one file a committed batch

Shape suffixes: N = targets of one window, D = hidden size.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from perplexit.errors import RunError
from perplexit.files import write_atomically

FOLDER = "reference"
RECORD = "reference.json"
FLOOR = "floor.json"
StatesDtype = Literal["float32", "float16"]


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
        write_atomically(self.folder / name, lambda path: _write_bytes(path, data))

    def keep_floor(self, mean: float, largest: float) -> None:
        """Keep the measured self-KL beside the states, for a run that is resumed at its end."""
        text = json.dumps({"mean": mean, "max": largest})
        write_atomically(self.folder / FLOOR, lambda path: _write_bytes(path, text.encode()))

    def floor(self) -> tuple[float, float]:
        """The self-KL (mean, largest) that was kept."""
        kept = json.loads((self.folder / FLOOR).read_text("utf-8"))
        return kept["mean"], kept["max"]

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the record that makes the states a reference."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"dtype": self.dtype, **record}, indent=2, allow_nan=False) + "\n"
        write_atomically(self.folder / RECORD, lambda path: _write_bytes(path, text.encode()))


class ReferenceStates:
    """The stored states of a run, read window by window.

    Raises RunError where the run was not made with --save-reference, or a file is damaged.
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / FOLDER
        try:
            self.record: dict[str, Any] = json.loads((self.folder / RECORD).read_text("utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"expected a run with stored hidden states, got {run_folder} without "
                f"{FOLDER}/{RECORD}; evaluate the reference with --save-reference"
            ) from None
        self._file_of: dict[int, Path] = {}
        for path in sorted(self.folder.glob("states-*.safetensors")):
            with _opened(path) as file:
                self._file_of |= {int(name): path for name in file.keys()}  # noqa: SIM118
        self.num_bytes = sum(p.stat().st_size for p in set(self._file_of.values()))

    @property
    def windows(self) -> set[int]:
        """The windows whose states are stored."""
        return set(self._file_of)

    def of_window(self, window: int) -> NDArray[np.float32]:
        """The states of a window's targets, float32 (N, D)."""
        path = self._file_of.get(window)
        if path is None:
            raise RunError(
                f"the reference in {self.folder} has no states for window {window}; "
                "evaluate it again with --save-reference"
            )
        with _opened(path) as file:
            states_ND: NDArray[np.float32] = file.get_tensor(str(window)).astype(np.float32)
        return states_ND


def _opened(path: Path) -> Any:
    expected = path.stem.removeprefix("states-")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[: len(expected)]
        if found != expected:
            raise RunError(f"{path} is damaged (its hash differs); evaluate the reference again")
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); evaluate the reference again") from None


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
