"""What the page is made with: its own files, and the packages that only a report needs."""

from importlib import import_module, resources
from typing import Any

from perplexit.errors import needing


def asset(name: str) -> str:
    """Return a file of the page as text."""
    return (resources.files("perplexit.report") / "assets" / name).read_text(encoding="utf-8")


def loaded(module: str) -> Any:
    """Import a module of the extra `report`. Raises MissingPackageError with what to install."""
    with needing("a report", "pip install 'perplexit[report]'", module.replace("_", "-")):
        return import_module(module)
