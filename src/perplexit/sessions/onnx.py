"""ONNX Runtime: a program that `perplexit compile --to onnx` made, whole windows at a time.

Shape suffixes: B = windows, T = ids a window (padded), N = targets over all windows, V =
vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray

from perplexit.errors import (
    CapabilityError,
    ModelError,
    UsageError,
    VocabularyError,
)
from perplexit.inputs.windows import WindowIds
from perplexit.programs import PROGRAM_FILE, ProgramMetadata
from perplexit.quantization.precisions import canonical_dtype, canonical_precision
from perplexit.resources.freed_memory import return_freed_memory
from perplexit.sessions.base import (
    LogitsChunk,
    ModelDescription,
    QuantizationDescription,
    SessionDescription,
    TokenDetails,
)
from perplexit.sessions.logit_rows import details_of_rows
from perplexit.sessions.onnx_engine import (
    has_shared_arena,
    num_cores,
    open_session,
    provider_of,
    translated,
)

_MODEL_FILE = "model.onnx"
_MOST_IDS = 4096  # ids a batch: beyond, a CPU gains no speed and only pays memory


class OnnxInferenceSession:
    """A compiled program on ONNX Runtime; with logits, it is an `OnnxLogitsSession`.

    folder:  made by `perplexit compile --to onnx`.
    dtype, quantization: what the program must be; they were settled when it was compiled.
    device:  "cpu" or "cuda". threads: of one operator; None: one a core.
    Raises ModelError where the folder holds no program or a damaged one, and CapabilityError
    where it is not what was asked for.
    """

    def __new__(cls, folder: str | Path, **_: Any) -> "OnnxInferenceSession":
        """A session that has `token_details` only where the program gives logits."""
        if cls is not OnnxInferenceSession or ProgramMetadata.read(_program(folder)).perplexity:
            return super().__new__(cls)
        return super().__new__(OnnxLogitsSession)

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
        path = _program(folder)
        self._metadata = ProgramMetadata.read(path)
        _check_asked(self._metadata, dtype, quantization)
        self._metadata.check_files(path)
        provider = provider_of(device or "cpu")
        self._threads = threads or num_cores()
        self._session: Any = open_session(path / _MODEL_FILE, provider, self._threads)
        made_from = asdict(self._metadata.model)
        self._model = ModelDescription(**{**made_from, "address": address or f"onnx:{folder}"})
        self._description = _describe(
            self._metadata, device or "cpu", self._threads, self._session.get_providers()
        )

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
        if not windows:
            return []
        nll_N = [self._program_nll(windows[part]) for part in self._parts(len(windows))]
        return _split(np.concatenate(nll_N), windows)

    def max_batch_size(self, window_length: int) -> int:
        """How many windows of that many ids take half of the free memory, at most 4096 ids."""
        shapes = self._metadata.shapes
        if shapes.length is not None and window_length > shapes.length:
            return 1  # it will be refused
        if shapes.batch_size is not None:
            return shapes.batch_size
        free = int(psutil.virtual_memory().available) // 2
        return max(1, min(_MOST_IDS // window_length, free // self._window_bytes(window_length)))

    def close(self) -> None:
        """Release the program."""
        self._session = None
        return_freed_memory()

    def _window_bytes(self, length: int) -> int:
        memory = self._metadata.memory
        return length * (memory.bytes_per_id + length * memory.bytes_per_id_pair)

    def _parts(self, num_windows: int) -> list[slice]:
        size = self._metadata.shapes.batch_size or max(1, num_windows)
        return [slice(start, start + size) for start in range(0, num_windows, size)]

    def _program_nll(self, windows: Sequence[WindowIds]) -> NDArray[np.float32]:
        feed = self._feed(windows)
        length = feed["input_ids"].shape[1]
        rows_N = [row * length + window.targets_N - 1 for row, window in enumerate(windows)]
        ids_N = [window.ids_T[window.targets_N] for window in windows]
        num_targets = sum(len(rows) for rows in rows_N)
        if num_targets == 0:
            return np.empty(0, np.float32)
        padding = (0, (self._metadata.shapes.num_targets or num_targets) - num_targets)
        feed["target_rows"] = np.pad(np.concatenate(rows_N).astype(np.int64), padding)
        feed["target_ids"] = np.pad(np.concatenate(ids_N).astype(np.int64), padding)
        nll_N: NDArray[np.float32] = self._run(feed)
        return nll_N[:num_targets]

    def _feed(self, windows: Sequence[WindowIds]) -> dict[str, NDArray[np.int64]]:
        """Right-padded ids (each row with its own last id) and the mask that hides the padding."""
        shapes = self._metadata.shapes
        longest = max(len(window.ids_T) for window in windows)
        if shapes.length is not None and longest > shapes.length:
            raise CapabilityError(
                f"{self._model.address} was compiled for windows of {shapes.length} ids, got one "
                f"of {longest}; prepare the input with --max-length {shapes.length}, or compile "
                "the program for longer ones"
            )
        self._check_vocabulary(windows)
        num_rows = shapes.batch_size or len(windows)
        ids_BT = np.empty((num_rows, shapes.length or longest), np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, window in enumerate(windows):
            fed = len(window.ids_T)
            ids_BT[row, :fed], ids_BT[row, fed:] = window.ids_T, window.ids_T[-1]
            mask_BT[row, :fed] = 1
        ids_BT[len(windows) :], mask_BT[len(windows) :] = ids_BT[0], mask_BT[0]
        return {"input_ids": ids_BT, "attention_mask": mask_BT}

    def _check_vocabulary(self, windows: Sequence[WindowIds]) -> None:
        lowest = min(int(window.ids_T.min()) for window in windows)
        largest = max(int(window.ids_T.max()) for window in windows)
        if lowest < 0 or largest >= self._model.vocab_size:
            raise VocabularyError(
                f"expected ids below the model's vocabulary of {self._model.vocab_size}, got "
                f"{largest if lowest >= 0 else lowest}; prepare the input with this model's own "
                "tokenizer"
            )

    def _run(self, feed: dict[str, NDArray[np.int64]]) -> Any:
        if self._session is None:
            raise UsageError(f"the session of {self._model.address} is closed; load it again")
        try:
            return self._session.run(None, feed)[0]
        except Exception as error:  # ONNX Runtime's errors have no common root
            raise translated(error, f"running {self._model.address}") from error


class OnnxLogitsSession(OnnxInferenceSession):
    """A program that gives logits (`--no-perplexity`): it tells whole distributions too."""

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """The nll of each target; see InferenceSession."""
        return [details.nll_N for details in self._details(windows, with_details=False, top_k=0)]

    def token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """The nll with entropy, rank and alternatives; see DetailedSession."""
        return self._details(windows, with_details=True, top_k=top_k)

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """The logits of every target, chunk by chunk; see LogitsSession."""
        for place, window in enumerate(windows):
            rows_NV = _rows_before(self._run(self._feed([window]))[0], window.targets_N)
            for start in range(0, len(rows_NV), chunk_rows):
                yield LogitsChunk(place, start, rows_NV[start : start + chunk_rows])

    def _window_bytes(self, length: int) -> int:
        # The logits of every position, and once more while they are handed over.
        return super()._window_bytes(length) + 2 * 4 * length * self._model.vocab_size

    def _details(
        self, windows: Sequence[WindowIds], *, with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        results = []
        for part in self._parts(len(windows)):
            logits_BTV = self._run(self._feed(windows[part]))
            for window, logits_TV in zip(
                windows[part], logits_BTV, strict=False
            ):  # rows of padding
                results.append(
                    details_of_rows(
                        _rows_before(logits_TV, window.targets_N),
                        window.ids_T[window.targets_N],
                        with_details=with_details,
                        top_k=top_k,
                    )
                )
        return results


def _rows_before(
    logits_TV: NDArray[np.float32], targets_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The rows that predict the targets; a view, not a copy, where the targets are consecutive."""
    if len(targets_N) and targets_N[-1] - targets_N[0] + 1 == len(targets_N):
        return logits_TV[targets_N[0] - 1 : targets_N[-1]]
    return logits_TV[targets_N - 1]


def _program(folder: str | Path) -> Path:
    path = Path(str(folder).removeprefix("onnx:")).expanduser()
    if path.is_file() or path.suffix == ".onnx":
        raise ModelError(
            f"expected a folder made by `perplexit compile` (with a {PROGRAM_FILE}), got the file "
            f"{path}: a bare .onnx file does not say which checkpoint it holds or what it returns"
        )
    return path


def _check_asked(metadata: ProgramMetadata, dtype: str | None, quantization: str | None) -> None:
    if metadata.engine != "onnx":
        raise ModelError(f"expected a program for ONNX Runtime, got one for {metadata.engine}")
    if dtype is not None and canonical_dtype(dtype) != metadata.dtype:
        raise CapabilityError(
            f"the program was compiled in {metadata.dtype}, got dtype {dtype}; a program's dtype "
            "is settled when it is compiled: leave it out"
        )
    own = metadata.quantization.name if metadata.quantization else None
    if quantization is not None and canonical_precision(quantization) != own:
        raise CapabilityError(
            f"the program's weights are {own or 'not quantized'}, got quantization "
            f"{quantization!r}; it is settled when a program is compiled: leave it out, or compile "
            f"with --quantization {quantization}"
        )


def _describe(
    metadata: ProgramMetadata, device: str, threads: int, providers: Sequence[str]
) -> SessionDescription:
    quantized = metadata.quantization
    settings = {
        "providers": list(providers),
        "graph_optimization": "all",
        "cpu_memory_arena": "shared, grows by need" if has_shared_arena() else "off",
        "perplexity_head": metadata.perplexity,
        "head_rows": metadata.head_rows,
        "opset": metadata.opset,
        "shapes": asdict(metadata.shapes),
        "program_files": {file.name: file.sha256 for file in metadata.files},
        "made_by": dict(metadata.made_by),
    }
    quantization = None
    if quantized is not None:
        settings["weights"] = dict(quantized.settings)
        fields = {key: value for key, value in asdict(quantized).items() if key != "settings"}
        quantization = QuantizationDescription(**fields)
    return SessionDescription(
        engine="onnxruntime",
        version=onnxruntime.__version__,
        dtype=metadata.dtype,
        device=device,
        quantization=quantization,
        threads=threads,
        settings=settings,
    )


def _split(nll_N: NDArray[np.float32], windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
    stops = np.cumsum([len(window.targets_N) for window in windows])
    return np.split(nll_N, stops[:-1])
