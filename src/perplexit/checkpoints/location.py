"""Where a checkpoint is: a folder, a hub id with its commit, or a GGUF file."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from perplexit.checkpoints.gguf_dequantized import dequantized_folder
from perplexit.checkpoints.identity import weights_fingerprint, weights_stamp
from perplexit.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_WANTED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt"]


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint on this machine, ready to be loaded.

    address:  with the commit that a hub id was resolved to, so that it names the same weights
              tomorrow.
    folder:   config.json, safetensors and tokenizer (for a GGUF: dequantized).
    original: what the fingerprint is taken of: the folder, or the GGUF file.
    """

    address: str
    folder: Path
    original: Path
    revision: str | None = None

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of weights and configuration; see `weights_fingerprint`."""
        return weights_fingerprint(self.original)

    def stamp(self) -> tuple[object, ...]:
        """Return a mark that changes when the checkpoint's files do; see `weights_stamp`."""
        return weights_stamp(self.original)


def find_checkpoint(address: str | Path) -> CheckpointSource:
    """Find the checkpoint at `[hf:]PATH_OR_ID[@REVISION]`; download or dequantize it if needed.

    A path that exists wins over a hub id of the same name. Raises ModelError.
    """
    name = str(address).removeprefix("hf:")
    if name.startswith("gguf:"):
        file = name.removeprefix("gguf:")
        raise ModelError(
            f"expected a checkpoint, got {name}, which is how llama.cpp is given a file; for its "
            f"weights dequantized write hf:{file}"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return CheckpointSource(f"hf:{name}", path, path)
    if path.is_file() or path.suffix == ".gguf":
        return _from_file(path, name)
    hub_id, _, revision = name.partition("@")
    if not _HUB_ID.fullmatch(hub_id) or hub_id.startswith("."):
        raise ModelError(
            f"expected a model folder, a .gguf file or a hub id, got {name!r}, and there is no "
            "such folder; check the path"
        )
    return _from_hub(hub_id, revision or None)


def _from_file(path: Path, name: str) -> CheckpointSource:
    if path.suffix != ".gguf":
        raise ModelError(
            f"expected a model folder or a .gguf file, got the file {path}; "
            "name the folder that holds config.json and *.safetensors"
        )
    return CheckpointSource(f"hf:{name}", dequantized_folder(path), path)


def _from_hub(hub_id: str, revision: str | None) -> CheckpointSource:
    asked = f"{hub_id}@{revision}" if revision else hub_id
    try:
        folder = Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=_WANTED_FILES, ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError as error:
        raise ModelError(f"{asked} is gated: accept its terms and run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{hub_id} has no revision {revision!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"there is no folder {asked!r}, and the hub model of that name is not downloaded "
            "and cannot be fetched: the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"there is no folder {asked!r} and no public model of that name on the hub; "
            "check the spelling"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"could not download {asked} from the hub: {error}") from error
    commit = folder.name  # the hub's cache names a snapshot's folder by its commit
    return CheckpointSource(f"hf:{hub_id}@{commit}", folder, folder, commit)
