"""A checkpoint's identity: the SHA-256 of its weights and its configuration."""

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from perplexit.atomic_files import cache_folder, write_bytes
from perplexit.errors import ModelError
from perplexit.fingerprints import json_fingerprint, sha256_of_file
from perplexit.untrusted_files import LARGEST_TABLE, Expected, FileName, read_json

_CONFIG = Expected("JSON of a model's configuration", ModelError, "is the download complete?")
_INDEX = Expected(
    "an index of weight files (a weight_map)", ModelError, "is the download complete?"
)
_SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "n_embd", "n_layer", "n_head",
    "n_positions", "n_ctx", "d_model", "num_layers", "num_heads",
}  # fmt: skip
_LARGEST = 1 << 40
_LARGE_FILE_BYTES = 32 * 2**20
_SETTLED_SECONDS = 3.0


class _Index(TypedDict):
    weight_map: dict[str, FileName]


# Who saved a configuration and from where says nothing about the numbers that the model gives.
_IRRELEVANT_KEYS = ("_name_or_path", "transformers_version")


def weights_fingerprint(path: Path) -> str:
    """Return the identity of a `.gguf` file (the SHA-256 of its bytes) or of a safetensors folder.

    A folder's is the SHA-256 of a canonical JSON text: the weight files' names with their digests
    in order of name, and config.json without the keys that cannot change a number.
    Raises ModelError where there are no weights or no configuration.
    """
    if path.is_file():
        return file_digest(path)
    identity = {
        "config": deciding_settings(read_config(path)),
        "weights": {file.name: file_digest(file) for file in weight_files(path)},
    }
    return json_fingerprint(identity, allow_nan=True)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal; a large file's is remembered.

    Remembered under its path, size, inode and times of change (the inode's time cannot be set by
    a program), and only once the file has rested, so that two changes within one tick of the file
    system's clock cannot share a digest.
    """
    stat = path.stat()
    if stat.st_size < _LARGE_FILE_BYTES:
        return sha256_of_file(path)
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_ino}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    remembered = cache_folder() / "digests" / hashlib.sha256(key.encode()).hexdigest()
    if remembered.is_file():
        return remembered.read_text(encoding="ascii")
    digest = sha256_of_file(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
        with suppress(OSError):  # a read-only home: the digest is computed again next time
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(remembered, digest.encode())
    return digest


def weights_stamp(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return names, sizes, inodes and times of the files that `weights_fingerprint` reads.

    Another stamp means that they may have changed. Raises ModelError where they are not there.
    """
    files = [path] if path.is_file() else [path / "config.json", *weight_files(path)]
    try:
        found = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise ModelError(f"expected the checkpoint in {path} to be there, but {error}") from error
    return tuple((name, s.st_size, s.st_ino, s.st_mtime_ns) for name, s in found)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises ModelError where it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"expected a Hugging Face model folder with config.json and *.safetensors, but "
            f"{folder} has no config.json; name the folder that save_pretrained wrote"
        )
    config = read_json(path, _CONFIG, dict[str, Any], non_finite=True)
    for name, value in config.items():
        if name in _SIZES:
            _check_size(path, name, value)
    return config


def _check_size(path: Path, name: str, value: Any) -> None:
    """Raise ModelError for a wrong size: "12", true, -1; some models list one for each layer."""
    sizes = value if isinstance(value, list) else [value]
    wrong = [x for x in sizes if x is not None and (type(x) is not int or not 0 <= x <= _LARGEST)]
    if wrong:
        _CONFIG.refuse(path, f"{str(wrong[0])[:40]!r} at `$.{name}`, where a size belongs")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up a folder's weights, in order of name.

    With an index, the files that it names; else `model.safetensors`, as transformers reads them.
    Raises ModelError where one is missing, or where the weights are pickles.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        files = [folder / name for name in sorted(set(weight_map(index).values()))]
        for file in files:
            if not file.is_file():
                raise ModelError(
                    f"{index.name} names {file.name}, which is not in {folder}; "
                    "is the download complete?"
                )
        return files
    pickles = sorted(file.name for file in folder.glob("*.bin") if file.is_file())
    if pickles:
        raise ModelError(
            f"expected safetensors weights in {folder}, got {pickles[0]}: pickled weights can run "
            "code and are not read. Convert once, where you trust them: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise ModelError(
        f"expected model.safetensors or model.safetensors.index.json in {folder}, found neither; "
        "is the download complete?"
    )


def weight_map(index: Path) -> dict[str, str]:
    """Read the file of each tensor from an index of sharded weights. Raises ModelError."""
    return read_json(index, _INDEX, _Index, largest=LARGEST_TABLE)["weight_map"]


def deciding_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that can change a number."""
    return {key: value for key, value in config.items() if key not in _IRRELEVANT_KEYS}
