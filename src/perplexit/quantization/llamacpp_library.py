"""llama.cpp's C library through llama-cpp-python: what it logs is kept, not printed.

Its log is the only place where llama.cpp says which settings it really uses, so the session reads
its effective settings from here.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

_INFO = 2
_lock = threading.RLock()
_lines: list[str] = []
_keep = False


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
