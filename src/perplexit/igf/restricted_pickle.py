"""Arrays and numbers from a pickle or a joblib file, and nothing else.

A pickle is a program. Here only NumPy's own constructors are found by their names; anything else
that a file asks for ends the reading. joblib writes large arrays raw between pickle's opcodes,
which its NumpyArrayWrapper describes; the stand-in below reads exactly those bytes.
"""

import io
import pickle
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from perplexit.igf.stored import StoredFileError

_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): dict,
}
_NUMPY_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")


class _RawArray:
    """Stands for joblib's NumpyArrayWrapper: what its attributes say, read from the stream."""

    def __init__(self, *_: Any) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(float)
        self.order = "C"

    def read(self, file: io.BufferedIOBase) -> np.ndarray[Any, Any]:
        """The array whose bytes come next in the stream."""
        dtype = np.dtype(self.dtype)
        if dtype.hasobject:
            raise StoredFileError("the pickle holds an array of objects; arrays of numbers only")
        if getattr(self, "numpy_array_alignment_bytes", None) is not None:
            padding = file.read(1)[0]
            file.read(padding)
        count = int(np.prod(self.shape, dtype=np.int64))
        data = file.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise StoredFileError("the joblib file ends inside an array; it is damaged")
        found: np.ndarray[Any, Any] = np.frombuffer(data, dtype=dtype)
        if self.order == "F":
            return found.reshape(self.shape[::-1]).T.copy()
        return found.reshape(self.shape).copy()


# The one written in Python: joblib puts raw arrays between opcodes, which needs a hook after BUILD
_Unpickler: Any = vars(pickle)["_Unpickler"]


class _Reader(_Unpickler):  # type: ignore[misc]
    """Finds NumPy's constructors of arrays and numbers, and nothing else."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_CORE and name in ("_reconstruct", "scalar"):
            return getattr(import_module("numpy._core.multiarray"), name)
        if module.startswith("joblib.numpy_pickle") and name == "NumpyArrayWrapper":
            return _RawArray
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        found = _ALLOWED.get((module, name))
        if found is None:
            _refuse(f"{module}.{name}")
        return found

    def load_build(self) -> None:
        super().load_build()
        if isinstance(self.stack[-1], _RawArray):
            self.stack[-1] = self.stack[-1].read(self._file)

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> NoReturn:
        _refuse(f"the persistent id {pid!r}")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        _refuse(f"the encoding {encoding}")
    return text.encode("latin1")


def _refuse(what: str) -> NoReturn:
    raise StoredFileError(
        f"expected a pickle of arrays and numbers, got one that asks for {what}; it was not read. "
        "Convert it where you trust it, to text or to .safetensors"
    )


def read_arrays(path: str | Path) -> Any:
    """The lists, tuples, dicts, numbers and arrays in a pickle or joblib file (zlib too).

    Raises StoredFileError for anything else, before it could run.
    """
    data = Path(path).read_bytes()
    if data[:1] == b"\x78":  # zlib, joblib's default compression
        data = zlib.decompress(data)
    try:
        return _Reader(io.BytesIO(data)).load()
    except StoredFileError:
        raise
    except Exception as error:
        raise StoredFileError(f"{path} cannot be read as a pickle ({error})") from None
