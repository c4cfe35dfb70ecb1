"""The one door to the packages that only a report needs."""

from importlib import import_module
from typing import Any

from perplexit.errors import MissingPackageError


def loaded(module: str) -> Any:
    """Import a module of the extra `report`. Raises MissingPackageError with what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"a report needs the package {module.replace('_', '-')}, which is not installed "
            f"({error}): pip install 'perplexit[report]'"
        ) from None
