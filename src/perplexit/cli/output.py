"""Where a command's words go: people read stderr, programs read one JSON document on stdout."""

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace what is at the output, if Perplexit made it. Anything else stays."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
PLAIN_WIDTH = 100_000  # a pipe or a log file gives no width, so that no line is broken there


class _Unpadded:
    """A text stream that writes each line without the blanks with which tables end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(re.sub(r" +(?=\n|$)", "", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def people() -> Console:
    """Return the console on stderr, made when it is needed (stderr may have been replaced since).

    A terminal's lines are broken between words; where stderr is no terminal, no line is broken.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        plain: Any = _Unpadded(sys.stderr)
        console = Console(file=plain, highlight=False, width=PLAIN_WIDTH)
    return console


def tell(line: str) -> None:
    """Print one line for people as it is: no markup in it, no break where it is long."""
    people().print(line, markup=False, emoji=False, soft_wrap=True)


_HANGING = re.compile(r"(\w[\w ]*: +| *)")


def tell_wrapped(text: str) -> None:
    """Print lines for people, each broken between words where a terminal is narrower.

    A line goes on under its value: under the `w` of `verdict:    worse …`.
    """
    console = people()
    for line in text.split("\n"):
        begin = _HANGING.match(line)
        indent = begin.end() if begin and begin[0].strip() else 4 if line.startswith("  ") else 0
        broken = textwrap.wrap(
            line,
            console.width,
            subsequent_indent=" " * min(indent, 16),
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
            drop_whitespace=True,
        )
        console.print("\n".join(broken), markup=False, emoji=False, soft_wrap=True)


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Send whatever a library prints to stderr: stdout is for the JSON document."""
    with redirect_stdout(sys.stderr):
        yield


def print_json(document: Any) -> None:
    """Write the command's one JSON document to stdout; ValueError for a non-finite number."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return `18.30 [17.1, 19.6]`: five significant digits; a dash for a missing figure."""
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:.5g}"
    return f"{value:.5g} [{low:.5g}, {high:.5g}]"


def in_mib(num_bytes: float | None) -> str:
    """Return bytes as MiB, rounded to a whole one; a dash where unknown."""
    return "-" if num_bytes is None else f"{num_bytes / 2**20:,.0f} MiB"


Draw = Callable[[int, int, str], None]


@contextmanager
def progress_bar(label: str, note: str = "") -> Iterator[Draw | None]:
    """Yield a callable (done, total, note) that draws a bar; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=people(), transient=True) as bar:
        task = bar.add_task(label, total=None, note=note)
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


@contextmanager
def scoring_progress(label: str) -> Iterator[Callable[[Any], None] | None]:
    """Yield a callable that draws ProgressUpdates, or None where stderr is no terminal."""
    with progress_bar(label, "loading the model") as draw:
        yield draw and (lambda u: draw(u.num_tokens, u.total_tokens, running_figures(u)))


@contextmanager
def status_line(text: str) -> Iterator[Callable[[str], None] | None]:
    """Yield a callable that shows what is going on, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with people().status(text) as status:
        yield status.update


@contextmanager
def preparing_progress() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callable that shows how much is prepared, or None where stderr is no terminal."""
    with status_line("Preparing") as show:
        yield show and (lambda texts, ids: show(f"Preparing: {texts:,} documents, {ids:,} tokens"))


def running_figures(update: Any) -> str:
    """Return `430 tokens/s  perplexity 18.31`: this process's speed, the perplexity so far.

    What an earlier process scored counts in the perplexity but not in the speed.
    """
    parts = []
    if update.seconds > 0:
        speed = (update.num_tokens - update.num_tokens_resumed) / update.seconds
        parts.append(f"{speed:,.0f} tokens/s")
    if update.num_tokens and update.nll_sum / update.num_tokens < math.log(sys.float_info.max):
        parts.append(f"perplexity {math.exp(update.nll_sum / update.num_tokens):.4g}")
    return "  ".join(parts)
