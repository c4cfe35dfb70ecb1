"""A GGUF file made, once, into the float32 safetensors folder that PyTorch loads quickly."""

import io
import json
import logging
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.checkpoints.quiet import quiet_transformers
from perplexit.errors import MissingPackageError, ModelError
from perplexit.files import cache_folder, kept_folder

_LOGGER = logging.getLogger(__name__)


def check_is_gguf(path: Path) -> None:
    """Raise ModelError where `path` is missing or does not begin as a GGUF file does."""
    if not path.is_file():
        raise ModelError(f"expected a .gguf file at {path}, found none; check the path")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"expected a GGUF file (it begins with b'GGUF'), but {path} begins with {magic!r}; "
            "is the download complete?"
        )


def dequantized_folder(path: Path) -> Path:
    """A folder with the weights of `path` in float32 and its tokenizer; made once, then kept.

    It lies in the cache under the file's fingerprint and the version of transformers, which does
    the dequantizing, and appears there whole or not at all.
    Raises ModelError for a file that is not GGUF or an architecture that transformers cannot read,
    MissingPackageError without gguf and accelerate.
    """
    check_is_gguf(path)
    fingerprint = weights_fingerprint(path)
    name = f"gguf-{fingerprint[:32]}-transformers-{transformers.__version__}"
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
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        # Its progress bar over tensors asks no setting of transformers; errors come as exceptions.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            _plain_copy(model).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"transformers cannot dequantize {path.name}: {error}. "
            f"llama.cpp may read it as it is: gguf:{path}"
        ) from error
    source_record = {"file": path.name, "sha256": weights_fingerprint(path)}
    (folder / "source.json").write_text(json.dumps(source_record), encoding="utf-8")


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that was not loaded from GGUF: only that one can be saved."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    # On "meta" and assigned: the weights are never held twice.
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain
