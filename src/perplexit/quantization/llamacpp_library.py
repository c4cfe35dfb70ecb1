"""llama.cpp's C library through llama-cpp-python: its log, its quantizer, names of precisions.

Its log is kept, not printed: it is the only place where llama.cpp says which settings it really
uses, so the session reads its effective settings from here.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp

from perplexit.atomic_files import cache_folder
from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.errors import QuantizationError
from perplexit.quantization.gguf_header import read_gguf_header
from perplexit.quantization.precisions import DTYPE_NAMES, canonical_precision, known_precisions

_INFO = 2
_lock = threading.RLock()
_lines: list[str] = []
_keep = False

_PLAIN_TYPES = {
    "float32": "ALL_F32",
    "float16": "MOSTLY_F16",
    "bfloat16": "MOSTLY_BF16",
}
# precision → llama.cpp's name of the file type; those that need an importance matrix are left out
FILE_TYPES = _PLAIN_TYPES | {
    name: f"MOSTLY_{name.upper()}" for name in known_precisions("gguf", on_loading=True)
}


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    # Level 5 continues the line before; debug lines (level 1) come by the thousand.
    if _keep and level >= _INFO:
        _lines.append(text.decode("utf-8", "replace"))


@contextmanager
def library_log() -> Iterator[list[str]]:
    """Yield the lines that llama.cpp logs inside the block, in a list that fills as they come."""
    global _keep  # noqa: PLW0603 - the callback belongs to the process, as the library's log does
    with _lock:
        llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _lines.clear()
        _keep = True
        try:
            yield _lines
        finally:
            _keep = False


def last_words(lines: list[str], count: int = 3) -> str:
    """Return the log's last lines that speak of an error, or simply its last ones, on one line."""
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    chosen = (errors or lines)[-count:]
    return " / ".join(line.strip() for line in chosen) or "it logged nothing"


def file_type_number(precision: str) -> int:
    """Return llama.cpp's number of a file type, `q4_k_m` → 15.

    Raises QuantizationError that lists the names.
    """
    name = canonical_precision(precision)
    name = DTYPE_NAMES.get(name, name)
    if name not in FILE_TYPES:
        raise QuantizationError(
            f"expected a GGUF type that llama.cpp's quantizer makes: {', '.join(FILE_TYPES)}; "
            f"got {precision!r}"
        )
    return int(getattr(llama_cpp, f"LLAMA_FTYPE_{FILE_TYPES[name]}"))


def quantize_gguf(
    source: Path, target: Path, precision: str, *, threads: int | None = None
) -> Path:
    """Write `target` with llama.cpp's quantizer from the GGUF file `source`; return it.

    A source that is quantized already is dequantized first; what it lost stays lost. Written
    under another name and moved, so that `target` is whole where it exists. Raises
    QuantizationError with llama.cpp's last words.
    """
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = file_type_number(precision)
    options.nthread = threads or os.cpu_count() or 1
    options.allow_requantize = True
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with library_log() as log:
            code = llama_cpp.llama_model_quantize(bytes(source), bytes(partial), options)
            if code != 0:
                raise QuantizationError(
                    f"llama.cpp could not make {precision} from {source}: {last_words(log)}"
                )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def requantized_gguf(source: Path, precision: str | None, *, threads: int | None = None) -> Path:
    """Return `source` in another precision, made once and cached; `source` itself for None.

    Raises QuantizationError where nothing was quantized, or where the name is unknown.
    """
    if precision is None:
        return source
    file_type_number(precision)
    name = canonical_precision(precision)
    already = read_gguf_header(source).quantization
    if already is not None and already.name == name:
        return source
    made_by = f"llama-cpp-python-{llama_cpp.__version__}"
    target = cache_folder() / "gguf" / f"{weights_fingerprint(source)[:32]}-{name}-{made_by}.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        quantize_gguf(source, target, name, threads=threads)
    header = read_gguf_header(target)
    if header.quantization is None and name not in _PLAIN_TYPES:
        target.unlink()
        raise QuantizationError(
            f"llama.cpp quantized none of the tensors of {source} to {precision}: their rows are "
            "no multiple of its blocks"
        )
    return target
