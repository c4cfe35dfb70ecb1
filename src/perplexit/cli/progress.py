"""A progress bar on stderr: tokens per second, the perplexity so far, the time that is left."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from perplexit.cli.output import people

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
def preparing_progress() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callable that shows how much is prepared, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with people().status("Preparing") as status:
        yield lambda documents, tokens: status.update(
            f"Preparing: {documents:,} documents, {tokens:,} tokens"
        )


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
