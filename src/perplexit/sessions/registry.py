"""Model addresses: `prefix:location` → the class that opens it, imported when it is asked for.

This is the one lazy door through which an engine's packages come in. A new engine is one line in
`_ENGINES` and one file beside this one.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict, Unpack

from perplexit.errors import CapabilityError, ModelError, UsageError, needing
from perplexit.program_record import PROGRAM_FILE
from perplexit.quantization.precisions import canonical_dtype, require_known_precision
from perplexit.sessions.base import InferenceSession, OpenSession
from perplexit.sessions.options import EngineOptions, engine_options, given_options
from perplexit.untrusted_files import Expected, read_json

_PROGRAM = Expected("a compiled program's record", ModelError, "compile the checkpoint again")


class _Program(TypedDict):
    engine: str


@dataclass(frozen=True, slots=True)
class _Engine:
    """Where a session class lives, the extra that installs its packages, what it opens.

    The class takes the location, and of `dtype, quantization, device, threads, address` whatever
    means something to it.
    """

    home: str
    extra: str
    opens: str


_ENGINES = {
    "hf": _Engine(
        "perplexit.sessions.pytorch:PytorchInferenceSession",
        "pytorch",
        "hf:FOLDER_OR_HUB_ID[@REVISION], or a .gguf that PyTorch dequantizes",
    ),
    "onnx": _Engine(
        "perplexit.sessions.onnx:OnnxInferenceSession",
        "onnx",
        "onnx:DIR, made by `perplexit compile --to onnx` or another exporter",
    ),
    "gguf": _Engine(
        "perplexit.sessions.llamacpp:LlamaCppInferenceSession", "llamacpp", "gguf:FILE (llama.cpp)"
    ),
    "openvino": _Engine(
        "perplexit.sessions.openvino:OpenVinoInferenceSession",
        "openvino",
        "openvino:DIR, made by `perplexit compile --to openvino`",
    ),
    "tvm": _Engine(
        "perplexit.sessions.tvm:TvmInferenceSession",
        "tvm",
        "tvm:DIR, made by `perplexit compile --to tvm`",
    ),
    "pt2": _Engine(
        "perplexit.sessions.pt2:Pt2InferenceSession",
        "pytorch",
        "pt2:DIR, made by `perplexit compile --to pt2`",
    ),
    "completions": _Engine(
        "perplexit.sessions.completions:CompletionsInferenceSession",
        "completions",
        "completions:URL#MODEL",
    ),
    "ngram": _Engine("perplexit.sessions.ngram:NgramInferenceSession", "ngram", "ngram:FILE"),
    "recorded": _Engine(
        "perplexit.sessions.loss_file:RecordedInferenceSession", "all", "recorded:FILE"
    ),
}
_PREFIX_OF_SUFFIX = {".gguf": "gguf", ".arpa": "ngram"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def load_session(address: str | Path, **options: Unpack[EngineOptions]) -> OpenSession:
    """Return an open session on the model at `address`; use it as a context manager.

    address: `prefix:location`, or a path known by what it is. options: see EngineOptions; what is
    left out, or None, takes the engine's default.
    Raises ModelError for an address that leads nowhere, CapabilityError for an engine or option
    that is not to be had, MissingPackageError with the command that installs what is missing.
    """
    prefix, location = split_address(address)
    given = given_options(EngineOptions, options)
    if given.get("merge_adapter") and "adapter" not in given:
        raise UsageError("expected an adapter to merge, got none; name its folder with --adapter")
    if "dtype" in given:
        canonical_dtype(given["dtype"])
    if "quantization" in given:
        require_known_precision(given["quantization"])
    session_class = _session_class(prefix)
    parameters = inspect.signature(session_class.__init__).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        engine_options(prefix, given, taken=tuple(parameters))
    if "address" in parameters:
        given["address"] = f"{prefix}:{location}"
    session: OpenSession = session_class(location, **given)
    return session


@contextmanager
def opened_session(model: Any, **options: Unpack[EngineOptions]) -> Iterator[InferenceSession]:
    """Yield the session on a model, and close it if it was opened here.

    model: an open session, which is yielded as it is; an address; or a `torch.nn.Module`.
    Raises UsageError for another object, and for options of a session that is open already; and
    what loading raises.
    """
    if isinstance(model, str | Path) or _is_module(model):
        opens = _session_class("hf") if _is_module(model) else load_session
        with opens(model, **options) as session:
            yield session
        return
    require_model(model)
    given = given_options(EngineOptions, options)
    if given:
        raise UsageError(
            f"{', '.join(given)}: these options are for a model that is being loaded, but an open "
            "session was given; give them to load_session"
        )
    yield model


def require_model(given: object) -> None:
    """Raise UsageError unless this is an address, an open session or a `torch.nn.Module`."""
    if not isinstance(given, str | Path | InferenceSession) and not _is_module(given):
        raise UsageError(
            "expected an inference session, a model's address or a torch.nn.Module, got "
            f"{type(given).__name__}: make one with perplexit.load_session('hf:FOLDER')"
        )


def _is_module(given: object) -> bool:
    torch = sys.modules.get("torch")  # whoever has a module has loaded torch
    return torch is not None and isinstance(given, torch.nn.Module)


def split_address(address: str | Path) -> tuple[str, str]:
    """Return `(prefix, location)` of an address; a bare path's prefix is found by looking at it.

    Raises ModelError for a path that does not exist, or that is none of the things known.
    """
    text = str(address)
    prefix, colon, location = text.partition(":")
    if colon and prefix in _ENGINES:
        if not location:
            raise ModelError(f"expected {_ENGINES[prefix].opens}, got {text!r} without a location")
        return prefix, location
    path = Path(text).expanduser()
    if path.is_dir():
        return _prefix_of_folder(path), str(path)
    if path.is_file():
        return _prefix_of_file(path), str(path)
    hint = f"; for a model on the hub write hf:{text}" if _HUB_ID.fullmatch(text) else ""
    raise ModelError(
        f"expected a model address, got {text!r}, which is no path here{hint}{_known()}"
    )


def _prefix_of_folder(folder: Path) -> str:
    if (folder / PROGRAM_FILE).is_file():
        path = folder / PROGRAM_FILE
        engine = read_json(path, _PROGRAM, _Program)["engine"]
        if engine not in _ENGINES:
            raise ModelError(
                f"{folder} is a program for the unknown engine {engine!r:.60}{_known()}"
            )
        return str(engine)
    if any(folder.glob("*.onnx")) and not any(folder.glob("*.safetensors")):
        return "onnx"  # of another exporter; a checkpoint may hold an export beside its weights
    if (folder / "config.json").is_file():
        return "hf"
    raise ModelError(
        f"expected a model folder, with config.json (a checkpoint) or {PROGRAM_FILE} (a compiled "
        f"program); {folder} has neither{_known()}"
    )


def _prefix_of_file(path: Path) -> str:
    prefix = _PREFIX_OF_SUFFIX.get(path.suffix.lower())
    if prefix is None:
        raise ModelError(
            f"expected a model folder or a {' or '.join(_PREFIX_OF_SUFFIX)} file, got the file "
            f"{path}; for a checkpoint name its folder{_known()}"
        )
    return prefix


def _known() -> str:
    return ". Addresses: " + "; ".join(e.opens for e in _ENGINES.values() if _is_here(e))


def _is_here(engine: _Engine) -> bool:
    return find_spec(engine.home.partition(":")[0]) is not None


def _session_class(prefix: str) -> Any:
    engine = _ENGINES[prefix]
    module, _, name = engine.home.partition(":")
    if not _is_here(engine):
        here = [prefix for prefix, known in _ENGINES.items() if _is_here(known)]
        raise CapabilityError(
            f"the engine {prefix!r} is not in this version of Perplexit; it has {', '.join(here)}"
        )
    with needing(f"the engine {prefix!r}", f"pip install 'perplexit[{engine.extra}]'"):
        return getattr(import_module(module), name)
