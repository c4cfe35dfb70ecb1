"""Options that several `perplexit igf` commands share, and what the commands do alike."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import typer

from perplexit import igf
from perplexit.cli.command_group import continued_by
from perplexit.cli.output import Draw, progress_bar, stdout_kept_clean, tell
from perplexit.declared_options import Option
from perplexit.errors import UsageError
from perplexit.igf.training_options import FinetuneSettings

Corpus = Annotated[
    list[Path],
    typer.Argument(
        metavar="CORPUS...",
        help="Text (one file per article), JSON Lines, Parquet, folders, or tokenised articles.",
    ),
]
Model = Annotated[
    str, typer.Option(metavar="MODEL", help="hf:FOLDER, hf:FILE.gguf, hf:ID@REVISION, or a path.")
]


class ContextOptions(TypedDict, total=False):
    """How contexts are read."""

    context_length: Annotated[int, Option("Ids per context.", 32, lowest=2)]
    min_length: Annotated[
        int, Option("Objective and test articles are longer than this, in ids.", 1026, lowest=1)
    ]
    tokenizer: Annotated[str | None, Option("A tokenizer. [default: the model's own]")]


class FilterOptions(TypedDict, total=False):
    """What filters candidates, and what the model is tested on."""

    learner: Annotated[Path | None, Option("A secondary learner; the igf methods need one.")]
    threshold: Annotated[
        float, Option("The threshold of igf-constant, and of igf-shifting's first 10 steps.", 1.0)
    ]
    share: Annotated[
        float,
        Option("Share of candidates that quantile, random and loss methods accept.", 0.25),
    ]
    test: Annotated[
        list[Path] | None,
        Option(
            "Articles to test on; repeat for several. [default: the hash split of CORPUS]",
            metavar="CORPUS",
        ),
    ]
    num_test: Annotated[int, Option("Number of test contexts.", 100, lowest=1)]


class CommandOptions(TypedDict, total=False):
    """What every command of the group takes."""

    seed: Annotated[int, Option("Every random choice follows from it.", 0, lowest=0)]
    allow_pickle: Annotated[
        bool,
        Option(
            "Read the original's .jbl, a pickle: the code in it is run with your full rights.",
            False,
        ),
    ]
    threads: Annotated[int | None, Option("CPU threads. [default: the engine's own]", lowest=1)]
    json: Annotated[bool, Option("Print one JSON document on stdout.", False)]


TUNING_OPTIONS = (FinetuneSettings, ContextOptions, FilterOptions, CommandOptions)
METHODS = "standard, igf-constant, igf-shifting, igf-quantile, random-skip, high-loss or "
METHODS += "perplexity-band"

# The methods that read an option of the filter.
_READERS = {
    "threshold": {"igf-constant", "igf-shifting"},
    "share": {"igf-quantile", "random-skip", "high-loss", "perplexity-band"},
}


def clip_norm(text: str) -> float | None:
    """Return a limit on the gradient's norm, or None for `none`."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number or `none`, got {text!r}") from None


def names(text: str) -> list[str]:
    """Split a list at its commas, without blanks."""
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
        igf.set_threads(threads)


def one_or_many(paths: list[Path]) -> Any:
    """Return a single path as itself, so that a file of tokenised articles is known as one."""
    if not paths:
        raise UsageError("expected at least one path of a corpus, got none")
    return paths[0] if len(paths) == 1 else paths


@contextmanager
def working(label: str, threads: int | None, *, resumable: bool = True) -> Iterator[Draw]:
    """Yield a callable (done, total, note) that draws a bar where stderr is a terminal.

    Inside, PyTorch computes with `threads`, stdout is kept for the JSON document, and Ctrl-C says
    how to continue, where the work is resumable.
    """
    use_threads(threads)
    resume = continued_by("the same command") if resumable else nullcontext()
    with resume, stdout_kept_clean(), progress_bar(label) as draw:

        def show(done: int, total: int, note: str) -> None:
            if draw is not None:
                draw(done, total, f"{done}/{total}  {note}")

        yield show


def finetune_settings(context: typer.Context) -> FinetuneSettings:
    """Return the settings of a fine-tuning, from the command's options of the same names."""
    names = {field.name for field in fields(FinetuneSettings)}
    return FinetuneSettings(**{k: v for k, v in context.params.items() if k in names})


def train_and_held_out(
    params: Mapping[str, Any], part: Literal["test", "objective"], number: int, *, seed: int = 0
) -> Any:
    """Return training articles, and `number` contexts of those of --test or --objective."""
    held_out = params[part]
    return igf.train_and_test(
        one_or_many(params["corpus"]),
        one_or_many(held_out) if held_out else None,
        part=part,
        tokenizer=params["tokenizer"] or params["model"],
        number=number,
        length=params["context_length"],
        min_len=params["min_length"],
        seed=seed,
        allow_pickle=params["allow_pickle"],
    )


def learner_to_use(path: Path | None) -> Any:
    """Return the learner of a file, None for no file; warn where it does not predict."""
    if path is None:
        return None
    learner = igf.load_learner(path)
    tell_doubt(learner)
    return learner


def tell_doubt(learner: Any) -> None:
    """Warn on stderr of a learner that does not predict; say nothing of one that does."""
    doubt = igf.doubt_about(learner.record.get("scores"))
    if doubt is not None:
        tell(f"Warning: {doubt}")
