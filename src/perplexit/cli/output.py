"""Where a command's words go: people read stderr, programs read one JSON document on stdout."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console

PLAIN_WIDTH = 120  # columns of a log file, where no terminal gives a width


def people() -> Console:
    """The console on stderr, made when it is needed (stderr may have been replaced since)."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=True, highlight=False, width=PLAIN_WIDTH)
    return console


def tell(line: str) -> None:
    """Print one line for people as it is: no markup in it, no break where it is long."""
    people().print(line, markup=False, soft_wrap=True)


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """While inside, whatever a library prints goes to stderr: stdout is for the JSON document."""
    with redirect_stdout(sys.stderr):
        yield


def print_json(document: Any) -> None:
    """Write the command's one JSON document to stdout; ValueError for a non-finite number."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """`18.30 [17.1, 19.6]`: five significant digits; a figure that does not exist is a dash."""
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:.5g}"
    return f"{value:.5g} [{low:.5g}, {high:.5g}]"


def in_mib(num_bytes: float | None) -> str:
    """Bytes as MiB, rounded to a whole one; a dash where unknown."""
    return "-" if num_bytes is None else f"{num_bytes / 2**20:,.0f} MiB"
