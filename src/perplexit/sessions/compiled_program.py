"""What the sessions of compiled programs share: a program is opened, checked and asked.

An engine's own file opens the program (`_opened`) and says under which conditions it runs.
Shape suffixes: N = targets of a window, V = vocabulary.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, ModelError, TrustWarning, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.option_ranges import check_numbers
from perplexit.program_batches import (
    MOST_IDS_A_CALL,
    Feed,
    RunProgram,
    check_vocabulary,
    program_nll,
    windows_at_once,
)
from perplexit.program_batches import target_logit_rows as logit_rows
from perplexit.program_record import PROGRAM_FILE, ProgramMetadata
from perplexit.quantization.precisions import canonical_dtype, canonical_precision
from perplexit.resources.freed_memory import return_freed_memory
from perplexit.sessions.base import (
    LogitsChunk,
    ModelDescription,
    QuantizationDescription,
    SessionDescription,
)
from perplexit.sessions.by_details import ScoresByDetails
from perplexit.sessions.logit_rows import details_of_rows
from perplexit.token_columns import TokenDetails

_MOST_IDS = 2048  # ids of a call at a time: beyond, a CPU gains no speed and only pays memory


@dataclass(frozen=True, slots=True)
class Asked:
    """What the caller asked of the session; None: the program's own."""

    dtype: str
    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class RunningProgram:
    """A program ready to run, and the conditions in effect."""

    run: RunProgram
    engine: str
    version: str
    device: str
    threads: int | None
    settings: Mapping[str, Any]
    calls_at_a_time: int = 1


class ProgramSession(ABC):
    """A program in a folder that `perplexit compile` made; see `InferenceSession`.

    Raises ModelError where the folder holds no such program or a damaged one, CapabilityError
    where it is not what was asked for.
    """

    _engine: ClassVar[str]  # the program's engine, as in its record and in addresses
    _native: ClassVar[bool] = False  # whether the program is machine code, not a graph
    _dtypes: ClassVar[tuple[str, ...]] = ("float32",)  # that a program can run in

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        quantization: str | None = None,
        address: str | None = None,
    ) -> None:
        path = program_folder(folder, self._engine)
        self._metadata = ProgramMetadata.read(path, engine=self._engine)
        check_numbers(threads=threads)
        asked = Asked(self._checked_dtype(dtype, quantization), device, threads)
        self._metadata.check_files(path)
        if self._native:
            warnings.warn(
                f"{self._engine}:{folder} is a native program: its code is run with your full "
                "rights. Open only programs that you, or people you trust, compiled",
                TrustWarning,
                stacklevel=2,
            )
        self._opened: RunningProgram | None = self._open(path, asked)
        made_from = asdict(self._metadata.model)
        made_from["address"] = address or f"{self._engine}:{folder}"
        self._model = ModelDescription(**made_from)
        self._calls_at_a_time = self._opened.calls_at_a_time
        self._description = self._described(self._opened, asked.dtype)

    @abstractmethod
    def _open(self, folder: Path, asked: Asked) -> RunningProgram:
        """The program, ready to run as asked."""

    @property
    def model(self) -> ModelDescription:
        """The checkpoint that the program was made from, at the program's address."""
        return self._model

    @property
    def description(self) -> SessionDescription:
        """The engine and the settings in effect."""
        return self._description

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """The nll of each target, from the head inside the program; see InferenceSession."""
        check_vocabulary(windows, self._model.vocab_size)
        return program_nll(
            self._run, windows, self._metadata.shapes, calls_at_a_time=self._calls_at_a_time
        )

    def max_batch_size(self, window_length: int) -> int:
        """How many windows of that many ids half of the free memory and the engine's calls take."""
        return windows_at_once(
            window_length,
            self._metadata.shapes,
            window_bytes=self._window_bytes(window_length),
            most_ids=max(_MOST_IDS, self._calls_at_a_time * MOST_IDS_A_CALL),
            calls_at_a_time=self._calls_at_a_time,
        )

    def close(self) -> None:
        """Release the program."""
        self._opened = None
        return_freed_memory()

    def _window_bytes(self, length: int) -> int:
        memory = self._metadata.memory
        return length * (memory.bytes_per_id + length * memory.bytes_per_id_pair)

    def _run(self, feed: Feed) -> NDArray[np.float32]:
        if self._opened is None:
            raise UsageError(f"the session of {self._model.address} is closed; load it again")
        return self._opened.run(feed)

    def _checked_dtype(self, dtype: str | None, quantization: str | None) -> str:
        metadata = self._metadata
        if metadata.engine != self._engine:
            raise ModelError(
                f"expected a program for {self._engine}, got one for {metadata.engine}; name it by "
                f"its folder alone, or {metadata.engine}:…"
            )
        own = metadata.quantization.name if metadata.quantization else None
        if quantization is not None and canonical_precision(quantization) != own:
            raise CapabilityError(
                f"the program's weights are {own or 'not quantized'}, got quantization "
                f"{quantization!r}; it is settled when a program is compiled: leave it out, or "
                f"compile with --quantization {quantization}"
            )
        wanted = canonical_dtype(dtype or metadata.dtype)
        if wanted not in (metadata.dtype, *self._dtypes):
            raise CapabilityError(
                f"expected dtype {' or '.join(self._dtypes)} for a program of {self._engine}, got "
                f"{dtype}; leave it out"
            )
        return wanted

    def _described(self, opened: RunningProgram, dtype: str) -> SessionDescription:
        metadata = self._metadata
        settings = {
            **opened.settings,
            "perplexity_head": metadata.perplexity,
            "head_rows": metadata.head_rows,
            "head_columns": metadata.head_columns,
            "shapes": asdict(metadata.shapes),
            "program_files": {file.name: file.sha256 for file in metadata.files},
            "made_by": dict(metadata.made_by),
        }
        quantization = None
        if metadata.quantization is not None:
            fields = asdict(metadata.quantization)
            settings["weights"] = {**fields.pop("settings"), **opened.settings.get("weights", {})}
            quantization = QuantizationDescription(**fields)
        return SessionDescription(
            engine=opened.engine,
            version=opened.version,
            dtype=dtype,
            device=opened.device,
            quantization=quantization,
            threads=opened.threads,
            settings=settings,
        )


class ProgramLogits(ScoresByDetails, ProgramSession):
    """A program that gives logits (`--no-perplexity`): it tells whole distributions too."""

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """The logits of every target, chunk by chunk; see LogitsSession."""
        check_vocabulary(windows, self._model.vocab_size)
        for place, window in enumerate(windows):
            (rows_NV,) = logit_rows(self._run, [window], self._metadata.shapes)
            for start in range(0, len(rows_NV), chunk_rows):
                # the caller may overwrite them, and the engine's own memory is not its to write
                yield LogitsChunk(place, start, rows_NV[start : start + chunk_rows].copy())

    def _window_bytes(self, length: int) -> int:
        # The logits of every position, and once more while they are handed over.
        return super()._window_bytes(length) + 2 * 4 * length * self._model.vocab_size

    def _details(
        self, windows: Sequence[WindowIds], *, with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        check_vocabulary(windows, self._model.vocab_size)
        rows = logit_rows(self._run, windows, self._metadata.shapes)
        return [
            details_of_rows(
                rows_NV, window.ids_T[window.targets_N], with_details=with_details, top_k=top_k
            )
            for window, rows_NV in zip(windows, rows, strict=True)
        ]


def program_folder(folder: str | Path, engine: str) -> Path:
    """The program's folder, from an address or a path. Raises ModelError for a file."""
    path = Path(str(folder).removeprefix(f"{engine}:")).expanduser()
    if path.is_file():
        raise ModelError(
            f"expected a folder made by `perplexit compile` (with a {PROGRAM_FILE}), got the file "
            f"{path}: it does not say which checkpoint it holds or what it returns"
        )
    return path


def gives_logits(folder: str | Path, engine: str) -> bool:
    """Whether the program in `folder` was compiled with `--no-perplexity`."""
    return not ProgramMetadata.read(program_folder(folder, engine), engine=engine).perplexity
