"""What the sessions of compiled programs share: open a program, check it, feed it windows.

An engine's own file opens the program (`_open`) and reports the conditions under which it runs.
Shape suffixes: N = targets of a window, V = vocabulary.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, ModelError, TrustWarning, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.program_batches import Feed, ProgramCalls, RunProgram, check_vocabulary
from perplexit.program_record import PROGRAM_FILE, ProgramMetadata
from perplexit.quantization.precisions import canonical_dtype, canonical_precision
from perplexit.resources.memory_advice import return_freed_memory
from perplexit.session_descriptions import (
    ModelDescription,
    QuantizationDescription,
    SessionDescription,
)
from perplexit.sessions.base import ClosedByWith, LogitsChunk
from perplexit.sessions.logit_rows import ScoresByDetails, details_of_rows
from perplexit.sessions.options import EngineOptions, Only, engine_options
from perplexit.token_columns import TokenDetails


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


class ProgramSession(ClosedByWith, ABC):
    """A program in a folder that `perplexit compile` made; see `InferenceSession`.

    A program that gives logits is opened as a class that is a `ProgramLogits` too.
    Raises ModelError where the folder holds no such program or a damaged one, CapabilityError
    where it is not what was asked for.
    """

    _engine: ClassVar[str]  # the program's engine, as in its record and in addresses
    _cpu_only: ClassVar[str] = ""  # the message, where it takes no other device
    _native: ClassVar[bool] = False  # whether the program is machine code, not a graph
    _dtypes: ClassVar[tuple[str, ...]] = ()  # that a program can run in, beside its own
    _most_ids: ClassVar[int] = 2048  # of a batch: beyond, a CPU gains no speed and needs memory
    _takes_mask: ClassVar[bool] = False  # whether the program takes an attention mask
    _head_fields: ClassVar[tuple[str, ...]] = ("head_rows", "head_columns")  # settings to record

    def __new__(cls, folder: str | Path, **_: Any) -> Self:
        """Make a session that has `token_details` only where the program gives logits."""
        return super().__new__(cls._class_for(folder) if "_engine" in vars(cls) else cls)

    def __init__(
        self, folder: str | Path, *, address: str | None = None, **options: Unpack[EngineOptions]
    ) -> None:
        only = {"device": Only(self._cpu_only, ("cpu",))} if self._cpu_only else {}
        asked = engine_options(self._engine, options, only=only)
        path = path_of_program(folder, self._engine)
        self._metadata = self._read(path)
        asked["dtype"] = dtype = self._checked_dtype(asked["dtype"], asked["quantization"])
        if (path / PROGRAM_FILE).is_file():
            self._metadata.check_files(path)
        if self._native:
            warnings.warn(
                f"{self._engine}:{folder} is a native program: its code is run with your full "
                "rights. Open only programs that you, or people you trust, compiled",
                TrustWarning,
                stacklevel=2,
            )
        address = address or f"{self._engine}:{folder}"
        self.model = ModelDescription(**{**asdict(self._metadata.model), "address": address})
        program = self._open(path, asked)
        self._program: RunningProgram | None = program
        self._calls = ProgramCalls(
            self._run, self._metadata.shapes, program.calls_at_a_time, self._takes_mask
        )
        self.description = self._describe(program, dtype)

    @classmethod
    def _class_for(cls, folder: str | Path) -> type[Self]:
        """Return the class that has the abilities of the program in `folder`, made if need be."""
        record = ProgramMetadata.read(path_of_program(folder, cls._engine), engine=cls._engine)
        return cls if record.perplexity else type(cls.__name__, (ProgramLogits, cls), {})

    def _read(self, folder: Path) -> ProgramMetadata:
        """Return the record of the program in `folder`."""
        return ProgramMetadata.read(folder, engine=self._engine)

    @abstractmethod
    def _open(self, folder: Path, asked: EngineOptions) -> RunningProgram:
        """Open the program to run as asked, in the dtype given; None leaves a setting to it."""

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return the nll of each target, from the head inside the program; see InferenceSession."""
        self._check_windows(windows)
        return self._calls.nll(windows)

    def max_batch_size(self, window_length: int) -> int:
        """Return how many windows of that length fit half of the free memory and one batch."""
        return self._calls.windows_at_once(
            window_length, window_bytes=self._window_bytes(window_length), most_ids=self._most_ids
        )

    def close(self) -> None:
        """Release the program."""
        self._program = None
        return_freed_memory()

    def _check_windows(self, windows: Sequence[WindowIds]) -> None:
        check_vocabulary(windows, self.model.vocab_size)

    def _window_bytes(self, length: int) -> int:
        memory = self._metadata.memory
        return length * (memory.bytes_per_id + length * memory.bytes_per_id_pair)

    def _running(self) -> RunningProgram:
        if self._program is None:
            raise UsageError(f"the session of {self.model.address} is closed; load it again")
        return self._program

    def _run(self, feed: Feed) -> NDArray[np.float32]:
        return self._running().run(feed)

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
        possible = dict.fromkeys((metadata.dtype, *self._dtypes))
        if wanted not in possible:
            raise CapabilityError(
                f"the program was compiled in {metadata.dtype}, got dtype {dtype}; it runs in "
                f"{' or '.join(possible)} only: leave the dtype out"
            )
        return wanted

    def _describe(self, program: RunningProgram, dtype: str) -> SessionDescription:
        metadata = self._metadata
        settings = {
            **program.settings,
            "perplexity_head": metadata.perplexity,
            **{name: getattr(metadata, name) for name in self._head_fields},
            "shapes": asdict(metadata.shapes),
            "program_files": {file.name: file.sha256 for file in metadata.files},
            "made_by": dict(metadata.made_by),
        }
        if (made := metadata.quantization) is not None:
            settings["weights"] = {**made.settings, **program.settings.get("weights", {})}
        return SessionDescription(
            engine=program.engine,
            version=program.version,
            dtype=dtype,
            device=program.device,
            quantization=QuantizationDescription.of(metadata.quantization),
            threads=program.threads,
            settings=settings,
        )


class ProgramLogits(ScoresByDetails, ProgramSession):
    """A program that gives logits (`--no-perplexity`), and with them whole distributions."""

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """Yield the logits of every target, chunk by chunk; see LogitsSession."""
        for place, window in enumerate(windows):
            (rows_NV,) = self._logit_rows([window])
            for start in range(0, len(rows_NV), chunk_rows):
                # the caller may overwrite them, but not the engine's own memory
                yield LogitsChunk(place, start, rows_NV[start : start + chunk_rows].copy())

    def _window_bytes(self, length: int) -> int:
        # The logits of every position, and a second copy while they are passed on.
        return super()._window_bytes(length) + 2 * 4 * length * self.model.vocab_size

    def _logit_rows(self, windows: Sequence[WindowIds]) -> Iterator[NDArray[np.float32]]:
        self._check_windows(windows)
        return self._calls.logit_rows(windows)

    def _details(
        self, windows: Sequence[WindowIds], *, with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        return [
            details_of_rows(
                rows_NV, window.ids_T[window.targets_N], with_details=with_details, top_k=top_k
            )
            for window, rows_NV in zip(windows, self._logit_rows(windows), strict=True)
        ]


def path_of_program(folder: str | Path, engine: str) -> Path:
    """Return the program's folder, from an address or a path. Raises ModelError for a file."""
    path = Path(str(folder).removeprefix(f"{engine}:")).expanduser()
    if path.is_file() or path.suffix == ".onnx":
        raise ModelError(
            f"expected a folder made by `perplexit compile` (with a {PROGRAM_FILE}), got the file "
            f"{path}: a bare {path.suffix or 'program'} file does not say which checkpoint it "
            "holds or what it returns; name its folder"
        )
    return path
