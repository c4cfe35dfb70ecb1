"""llama.cpp: a GGUF file on llama.cpp's own kernels, through llama-cpp-python.

Nothing is left to llama.cpp's defaults that costs precision: the KV cache is float32 and flash
attention is off unless another dtype is asked for. Ids go in as they are: no BOS is added and no
text is tokenised. Each window is computed from an empty cache.

Shape suffixes: T = ids of a window, R = rows of logits in one chunk, V = vocabulary.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.errors import CapabilityError, EngineOutOfMemoryError, ModelError, TokenizerError
from perplexit.inputs.windows import WindowIds
from perplexit.program_batches import check_vocabulary
from perplexit.program_record import PROGRAM_FILE, ProgramMetadata
from perplexit.quantization.gguf_header import GgufHeader, read_gguf_header
from perplexit.quantization.llamacpp_library import last_words, library_log, requantized_gguf
from perplexit.quantization.precisions import canonical_dtype
from perplexit.session_descriptions import (
    ModelDescription,
    QuantizationDescription,
    SessionDescription,
)
from perplexit.sessions.base import LogitsChunk
from perplexit.sessions.logit_rows import ScoresByDetails, details_of_rows
from perplexit.sessions.options import EngineOptions, engine_options
from perplexit.token_columns import TokenDetails

_KV_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's numbers
_FLASH_ATTENTION_OFF = 0
_CHUNK_ELEMENTS = 1 << 24  # logits computed at a time: 64 MiB of float32


class LlamaCppInferenceSession(ScoresByDetails):
    """A GGUF model on llama.cpp; the logits exist for one chunk of targets at a time.

    path:   a `.gguf` file, or a folder with `model.gguf` (as `perplexit compile --to gguf` makes).
    dtype:  of the KV cache; the weights have the types that the file gives them.
    quantization: another type (`q4_k_m`), made once by llama.cpp's quantizer and kept.
    device: "cpu", or "gpu" / "cuda" where this build of llama.cpp can offload.
    Raises ModelError, CapabilityError, EngineOutOfMemoryError.
    """

    def __init__(
        self, path: str | Path, *, address: str | None = None, **options: Unpack[EngineOptions]
    ) -> None:
        asked = engine_options("gguf", options)
        original = _model_file(Path(path))
        self._dtype = canonical_dtype(asked["dtype"] or "float32")
        self._device = _checked_device(asked["device"])
        self._threads = asked["threads"] or os.cpu_count() or 1
        self._path = requantized_gguf(original, asked["quantization"], threads=self._threads)
        header = read_gguf_header(self._path)
        self._model = self._load_model()
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self._chunk = int(np.clip(_CHUNK_ELEMENTS // self._vocab_size, 32, 512))
        self._batch = llama_cpp.llama_batch_init(self._chunk, 0, 1)
        self._context: Any = None
        self._context_length = 0
        self._rope_border = header.rope_border
        try:
            effective = self._make_context(1)
        except BaseException:
            self.close()
            raise
        self.model = ModelDescription(
            address=address or f"gguf:{original}",
            architecture=header.architecture,
            num_parameters=header.num_parameters,
            weights_fingerprint=weights_fingerprint(self._path),
            vocab_size=self._vocab_size,
            max_length=int(llama_cpp.llama_model_n_ctx_train(self._model)) or None,
        )
        self.description = self._describe(header, effective)

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """Yield the logits of every target, a decoded chunk at a time; see LogitsSession."""
        check_vocabulary(windows, self._vocab_size)
        if self._rope_border is None:
            self._fit(max((len(window.ids_T) for window in windows), default=0))
        for place, window in enumerate(windows):
            first = 0
            for logits_RV in self._window_logits(window):
                for start in range(0, len(logits_RV), chunk_rows):
                    yield LogitsChunk(place, first + start, logits_RV[start : start + chunk_rows])
                first += len(logits_RV)

    def max_batch_size(self, window_length: int) -> int:
        """Return 1: windows are computed one after another, so a larger batch gains nothing."""
        del window_length
        return 1

    def own_token_ids(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of `text` by the file's own tokenizer; see TokenizesText.

        Raises TokenizerError where the file holds no vocabulary to tokenise with.
        """
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        if llama_cpp.llama_vocab_type(vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            raise TokenizerError("expected a GGUF file with a vocabulary, got one without")
        data = text.encode("utf-8")
        size = len(data) + 8  # a token is at least a byte, and a few special ones are added
        ids = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, size, special, True)
        if count < 0:
            raise TokenizerError(f"llama.cpp could not tokenise a text of {len(data)} bytes")
        return list(ids[:count])

    def close(self) -> None:
        """Release the context, the batch and the model."""
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        if self._model is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_model_free(self._model)
        self._context = self._model = None

    def _details(
        self, windows: Sequence[WindowIds], *, with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        k = min(top_k, self._vocab_size)
        empty = TokenDetails.empty(with_details=with_details, num_alternatives=k)
        parts = [[empty] for _ in windows]
        for chunk in self.target_logits(windows, chunk_rows=self._chunk):
            window, stop = windows[chunk.place], chunk.start + len(chunk.logits_NV)
            ids_R = window.ids_T[window.targets_N[chunk.start : stop]]
            details = details_of_rows(
                chunk.logits_NV, ids_R, with_details=with_details, top_k=top_k
            )
            parts[chunk.place].append(details)
        return [TokenDetails.joined(part) for part in parts]

    def _fit(self, length: int) -> None:
        """Make a context that a window fits in, with the frequencies of its own length.

        llama.cpp chooses between a LongRoPE's two by the size of the context, not by the window.
        """
        border, held = self._rope_border, self._context_length
        if length <= held and (border is None or (length > border) == (held > border)):
            return
        self._make_context(length)
        made = int(llama_cpp.llama_n_ctx(self._context))  # in steps of 256
        if border is not None and length <= border < made:
            self._context_length = 0
            raise CapabilityError(
                f"expected windows of more than {border} ids, got one of {length}: llama.cpp makes "
                f"a context of {made} for it, in which it takes the long factors of the LongRoPE "
                f"in {self._path.name}; score the checkpoint itself (hf:…), or longer windows"
            )

    def _window_logits(self, window: WindowIds) -> Iterator[NDArray[np.float32]]:
        """Yield the logits of consecutive targets; each view is valid until the next one."""
        # From an empty cache: reusing the overlap of sliding windows would be another protocol.
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        if self._rope_border is not None:
            self._fit(len(window.ids_T))
        ids_T, rows_N = window.ids_T, window.targets_N - 1
        wanted_T = np.zeros(len(ids_T), dtype=np.int8)
        wanted_T[rows_N] = 1
        stop = int(rows_N[-1]) + 1 if len(rows_N) else 0  # what follows the last row is not needed
        for start in range(0, stop, self._chunk):
            end = min(start + self._chunk, stop)
            logits_RV = self._decode(ids_T, start, end, wanted_T)
            if len(logits_RV):
                yield logits_RV

    def _decode(
        self, ids_T: NDArray[np.int32], start: int, end: int, wanted_T: NDArray[np.int8]
    ) -> NDArray[np.float32]:
        """Return the wanted logits in [start, end): a view, valid until the next call."""
        batch, length = self._batch, end - start
        batch.n_tokens = length
        _array(batch.token, length)[:] = ids_T[start:end]
        _array(batch.pos, length)[:] = np.arange(start, end)
        _array(batch.n_seq_id, length)[:] = 1
        _array(batch.logits, length)[:] = wanted_T[start:end]
        for index in range(length):
            batch.seq_id[index][0] = 0
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise EngineOutOfMemoryError(
                f"llama.cpp stopped with code {code} at ids {start} to {end} of a window"
            )
        rows = int(np.count_nonzero(wanted_T[start:end]))
        if rows == 0:
            return np.empty((0, self._vocab_size), np.float32)
        return _array(llama_cpp.llama_get_logits(self._context), (rows, self._vocab_size))

    def _load_model(self) -> Any:
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0 if self._device == "cpu" else -1
        with library_log() as lines:
            model = llama_cpp.llama_model_load_from_file(bytes(self._path), options)
            if not model:
                raise ModelError(f"llama.cpp could not load {self._path}: {last_words(lines)}")
            log = list(lines)
        if (
            llama_cpp.llama_model_has_encoder(model)
            or _logged_setting(log, r"causal attn += (\d)") == "0"
        ):
            llama_cpp.llama_model_free(model)
            raise CapabilityError(
                f"expected a causal language model, but {self._path} has an encoder or attends in "
                "both directions, so its tokens have no left-to-right probability"
            )
        return model

    def _make_context(self, length: int) -> dict[str, str]:
        """Replace the context by one for windows of `length` ids; return what is in effect."""
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            self._context, self._context_length = None, 0
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = length
        options.n_batch = options.n_ubatch = self._chunk
        options.n_outputs_max = options.n_outputs_max_per_seq = 0  # as many as the chunk has
        options.n_threads = options.n_threads_batch = self._threads
        options.type_k = options.type_v = _KV_TYPES[self._dtype]
        options.flash_attn_type = _FLASH_ATTENTION_OFF
        options.offload_kqv = options.op_offload = self._device != "cpu"
        with library_log() as lines:
            context = llama_cpp.llama_init_from_model(self._model, options)
            log = list(lines)
        if not context:
            raise EngineOutOfMemoryError(
                f"llama.cpp could not make a context of {length} ids: {last_words(log)}"
            )
        self._context, self._context_length = context, length
        kv_type = _logged_setting(log, r"K \((\w+)\)")
        return {
            "kv_cache": canonical_dtype(kv_type) if kv_type else "none (no KV cache)",
            "flash_attention": _logged_setting(log, r"flash_attn += (\w+)") or "unknown",
        }

    def _describe(self, header: GgufHeader, effective: dict[str, str]) -> SessionDescription:
        narrow = [x for x in (effective["kv_cache"], header.matrix_dtype) if x != "float32"]
        return SessionDescription(
            engine="llama.cpp",
            version=f"llama-cpp-python {llama_cpp.__version__}",
            dtype=narrow[0] if narrow else "float32",
            device=self._device,
            quantization=QuantizationDescription.of(header.quantization),
            threads=self._threads,
            settings={
                **effective,
                "weights": header.tensor_types,
                "chunk": self._chunk,
                "cpu": llama_cpp.llama_print_system_info().decode().strip(),
            },
        )


def _array(pointer: Any, shape: int | tuple[int, int]) -> NDArray[Any]:
    return np.ctypeslib.as_array(pointer, shape=(shape,) if isinstance(shape, int) else shape)


def _logged_setting(log: list[str], pattern: str) -> str | None:
    """Return the first group of `pattern` in what llama.cpp logged; None where it says nothing."""
    found = re.search(pattern, "".join(log))
    return found.group(1) if found else None


def _model_file(path: Path) -> Path:
    """Return the GGUF file at `path`, or in the folder `path`.

    Raises ModelError where there is none, or where a record beside it is of another file.
    """
    file = path / "model.gguf" if path.is_dir() else path
    if not file.is_file():
        hint = " (a folder needs a model.gguf; make one with: perplexit compile --to gguf)"
        raise ModelError(
            f"expected a GGUF file, found none at {file}{hint if path.is_dir() else ''}"
        )
    if path.is_dir() and (path / PROGRAM_FILE).is_file():
        ProgramMetadata.read(path, engine="gguf").check_files(path)
    return file


def _checked_device(device: str | None) -> str:
    """Return the device's name; cpu by default. Raises CapabilityError if this build lacks it."""
    name = (device or "cpu").lower()
    if name != "cpu" and not llama_cpp.llama_supports_gpu_offload():
        raise CapabilityError(
            f"expected device cpu: this build of llama.cpp cannot offload to {device!r}; "
            "reinstall llama-cpp-python with CMAKE_ARGS for that backend"
        )
    return name
