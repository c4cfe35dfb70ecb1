"""A GGUF file made, once, into the float32 safetensors folder that PyTorch loads quickly."""

import io
import json
import logging
from collections.abc import Mapping
from contextlib import redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from perplexit.atomic_files import cache_folder, kept_folder
from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.checkpoints.quiet import quiet_transformers
from perplexit.errors import MissingPackageError, ModelError, PerplexitError
from perplexit.inputs.gguf_header_check import check_gguf
from perplexit.untrusted_files import Expected, open_regular

_EXPECTED = Expected("a GGUF file", ModelError, "is the download complete?")
_LOGGER = logging.getLogger(__name__)
_VERSION = 2  # of what is made of a file: a folder of another version is not used


def check_is_gguf(path: Path) -> None:
    """Raise ModelError where `path` is missing or does not begin as a GGUF file does."""
    if not path.is_file():
        raise ModelError(f"expected a .gguf file at {path}, found none; check the path")
    with open_regular(path, _EXPECTED) as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"expected a GGUF file (it begins with b'GGUF'), but {path} begins with {magic!r}; "
            "is the download complete?"
        )


def dequantized_folder(path: Path) -> Path:
    """Return a folder with the float32 weights and the tokenizer of `path`, made once and kept.

    It lies in the cache under the file's fingerprint and the version of transformers, which does
    the dequantizing, and appears there whole or not at all.
    Raises ModelError for a file that is not GGUF or an architecture that transformers cannot read,
    MissingPackageError without gguf and accelerate.
    """
    check_is_gguf(path)
    fingerprint = weights_fingerprint(path)
    name = f"gguf-{fingerprint[:32]}-transformers-{transformers.__version__}-{_VERSION}"
    folder = cache_folder() / "checkpoints" / name
    if not (folder / "config.json").is_file():
        _check_packages(path)
        # A warning, so that it is seen where logging was never set up: this takes half a minute.
        _LOGGER.warning("dequantizing %s to float32, once, into %s", path.name, folder)
    return kept_folder(folder, "config.json", lambda staging: _convert(path, staging))


def _check_packages(path: Path) -> None:
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingPackageError(
                f"dequantizing {path.name} for PyTorch needs the package {package}: "
                "pip install 'perplexit[pytorch]'"
            )


def _convert(path: Path, folder: Path) -> None:
    try:
        check_gguf(path, _EXPECTED)
    except ModelError as error:
        raise ModelError(
            f"transformers cannot dequantize {path.name}: {error}. "
            f"llama.cpp may say more: gguf:{path}"
        ) from error
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        # Its progress bar over tensors asks no setting of transformers; errors come as exceptions.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            # Here alone gguf is imported, whose absence was reported before.
            gguf_config = import_module("perplexit.checkpoints.gguf_config")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source,
                config=gguf_config.whole_config(path),
                dtype=torch.float32,
                output_loading_info=True,
            )
            model, loading_info = loaded
            _check_complete(path, model, loading_info)
            _plain_copy(model).save_pretrained(folder)
            _save_tokenizer(source, folder)
    except PerplexitError:
        raise
    except Exception as error:  # of transformers and of the readers below it: any kind
        raise ModelError(
            f"transformers cannot dequantize {path.name}: {error}. "
            f"llama.cpp may read it as it is: gguf:{path}"
        ) from error
    source_record = {"file": path.name, "sha256": weights_fingerprint(path)}
    (folder / "source.json").write_text(json.dumps(source_record), encoding="utf-8")


def _save_tokenizer(source: Mapping[str, str], folder: Path) -> None:
    """Put the file's tokenizer into the folder, where it has one that transformers can read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # of transformers: any kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _LOGGER.debug("no tokenizer of %s: %s", source["gguf_file"], reason)
        return  # ids are what is scored; the text became ids elsewhere
    tokenizer.save_pretrained(folder)


def _check_complete(path: Path, model: PreTrainedModel, loading_info: Mapping[str, Any]) -> None:
    """Raise ModelError where weights are missing (they would be random) or left over."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in loading_info.get(kind, ()))
        if names:
            raise ModelError(
                f"expected {path.name} to hold the weights of a {type(model).__name__}, all of "
                f"them and no others, but {len(names)} are {kind.removesuffix('_keys')} "
                f"({', '.join(names[:3])}); llama.cpp may read it as it is: gguf:{path}"
            )


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return the weights in a model that was not loaded from GGUF: only that can be saved."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    # On "meta" and assigned: the weights are never held twice.
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain
