"""Options that several `perplexit igf` commands share, and their progress bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from perplexit import igf
from perplexit.cli.output import people, tell
from perplexit.errors import UsageError

Corpus = Annotated[
    list[Path],
    typer.Argument(
        metavar="CORPUS...",
        help="Text (a file an article), JSON Lines, Parquet, folders, or tokenised articles.",
    ),
]
Model = Annotated[
    str, typer.Option(metavar="MODEL", help="hf:FOLDER, hf:FILE.gguf, hf:ID@REVISION, or a path.")
]
TokenizerOption = Annotated[
    str | None, typer.Option(help="A tokenizer. \\[default: the model's own]")
]
TestCorpus = Annotated[
    list[Path] | None,
    typer.Option(
        "--test",
        metavar="CORPUS",
        help="Articles to test on; repeat for several. \\[default: the hash split of CORPUS]",
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read the original's .jbl, a pickle: the code in it is run with your full rights.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="What is drawn at random follows from it.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. \\[default: the engine's own]")
]
# Which methods read an option of the filter.
_READERS = {
    "threshold": {"igf-constant", "igf-shifting"},
    "share": {"igf-quantile", "random-skip", "high-loss", "perplexity-band"},
}

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def clip_norm(text: str) -> float | None:
    """A limit on the gradient's norm, or None for `none`."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number or `none`, got {text!r}") from None


def names(text: str) -> list[str]:
    """A list divided by commas, blanks dropped."""
    return [name.strip() for name in text.split(",") if name.strip()]


def refuse_idle(context: typer.Context, *options: str, because: str) -> None:
    """Raise UsageError for an option given on the command line that would change nothing."""
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"expected no --{name.replace('_', '-')}: {because}, so it would change nothing; "
                "leave it out"
            )


def refuse_idle_of_methods(context: typer.Context, methods: list[str]) -> None:
    """Raise UsageError for a filter's option that none of the methods reads."""
    for option, readers in _READERS.items():
        if not readers & set(methods):
            readers_named = ", ".join(sorted(readers))
            refuse_idle(context, option, because=f"only {readers_named} read it")


def use_threads(threads: int | None) -> None:
    """Set the number of threads that PyTorch computes with, where one was asked for."""
    if threads is not None:
        from perplexit.igf.language_model import set_threads  # noqa: PLC0415 - keeps --help quick

        set_threads(threads)


def one_or_many(paths: list[Path]) -> Any:
    """A single path as itself, so that a file of tokenised articles or pairs is known as one."""
    if not paths:
        raise UsageError("expected at least one path of a corpus, got none")
    return paths[0] if len(paths) == 1 else paths


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """A callable (done, total, figures) that draws a bar, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=people(), transient=True) as drawn:
        task = drawn.add_task(label, total=None, figures="")
        yield lambda done, total, figures: drawn.update(
            task, completed=done, total=total, figures=figures
        )


def learner_to_use(path: Path | None) -> Any:
    """The learner of a file, with a word to people where it does not predict; None for no file."""
    if path is None:
        return None
    learner = igf.load_learner(path)
    tell_doubt(learner)
    return learner


def tell_doubt(learner: Any) -> None:
    """Say in one sentence on stderr that a learner does not predict; nothing of one that does."""
    doubt = igf.doubt_about(learner.record.get("scores"))
    if doubt is not None:
        tell(f"Warning: {doubt}")
