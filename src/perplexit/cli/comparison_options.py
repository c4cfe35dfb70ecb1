"""Options of `compare` and `report`, and the files of gates that they read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from perplexit.declared_options import Option
from perplexit.errors import OutputError
from perplexit.protected_outputs import (
    Kind,
    OutputFile,
    begins_with_mark,
    check_place,
    is_same_file,
)


class ComparisonOptions(TypedDict):
    """How runs are compared: the keywords of `compare` that have these names."""

    confidence: Annotated[float, Option("Coverage of the intervals, in (0, 1).", default=0.95)]
    noise_floor: Annotated[
        float,
        Option(
            "Nats within which runs of one model are known to vary: per token, or per byte where "
            "runs are compared byte by byte.",
            default=0.0,
            lowest=0,
        ),
    ]
    margin: Annotated[
        str,
        Option(
            "The change of the perplexity that does not matter, 1% or 0.01: runs that differ by "
            "less are equivalent, and worse or better must differ by more.",
            default="0",
            metavar="SHARE",
        ),
    ]


SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
_MARKDOWN_SUFFIXES = ("", ".md", ".markdown")
_JUNIT = Kind(
    "the gates as JUnit XML",
    lambda path: begins_with_mark(path, b'<testsuites name="perplexit compare"'),
)
_SUMMARY = Kind("the gates as Markdown", lambda _: True)


def junit_output(path: str | Path, *, inputs: Sequence[Path], force: bool = False) -> OutputFile:
    """Return the file for gates as JUnit XML. Raises OutputError where something else is there."""
    return OutputFile(Path(path), _JUNIT, tuple(inputs), force)


class MarkdownSummary:
    """A Markdown file that the gates are appended to: what is in it stays as it is.

    Continuous integration has one summary for a whole job, to which every step adds its section.
    Making one raises OutputError for a file that is no Markdown text (by its name: none or `.md`,
    or the one that $GITHUB_STEP_SUMMARY names), and for one of `inputs`.
    """

    def __init__(self, path: str | Path, *, inputs: Sequence[Path]) -> None:
        self.path = Path(path)
        check_place(self.path, _SUMMARY, inputs)
        if self.path.is_dir():
            raise self._refused("a folder")
        if self.path.is_file():
            self._check_is_markdown()

    def append(self, section: str) -> None:
        """Add a section, with a blank line before it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.is_file() else b""
        gap = "" if not before else "\n" if before.endswith(b"\n") else "\n\n"
        with self.path.open("ab") as file:
            file.write((gap + section).encode())

    def _check_is_markdown(self) -> None:
        summary = os.environ.get(SUMMARY_VARIABLE)
        named = self.path.suffix.lower() in _MARKDOWN_SUFFIXES
        if not named and not (summary and is_same_file(self.path, Path(summary))):
            raise self._refused("a file of another kind")
        try:
            text = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise self._refused("a file that holds no text")

    def _refused(self, what: str) -> OutputError:
        return OutputError(
            f"expected a new file or a Markdown file to append the gates to, got {self.path}, "
            f"{what}; name one that ends in .md"
        )
