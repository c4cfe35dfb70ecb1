"""`perplexit prepare`: text → a token file."""

from pathlib import Path
from typing import Annotated, Unpack

import typer

import perplexit as px
from perplexit.cli.command_group import examples
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import (
    Force,
    people,
    preparing_progress,
    print_json,
    stdout_kept_clean,
    tell,
)
from perplexit.cli.record_tables import input_record, input_table
from perplexit.errors import UsageError
from perplexit.inputs.preparing_options import PreparingOptions
from perplexit.protected_outputs import Kind, check_place

EXAMPLES = examples(
    "perplexit prepare speech.txt --tokenizer smollm2/ -o speech.safetensors",
    "perplexit prepare pages.jsonl --text-key page --tokenizer model.gguf --protocol disjoint "
    "--max-length 512 -o pages.safetensors",
    "perplexit prepare qa.jsonl --prompt-key question --text-key answer --tokenizer smollm2/ "
    "--protocol document -o qa.safetensors",
    "perplexit prepare ids.txt --from-ids -o ids.safetensors",
)


@takes_options(PreparingOptions)
def prepare(
    context: typer.Context,
    corpus: Annotated[
        list[Path],
        typer.Argument(
            metavar="CORPUS",
            help="Texts, JSONL, CSV, TSV (also .gz, .zst, .bz2, .xz) or Parquet files, or "
            "folders of them.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="INPUT", help="The token file to write.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer folder, tokenizer.json, SentencePiece model, GGUF file or hub id."
        ),
    ] = None,
    from_ids: Annotated[
        bool,
        typer.Option(
            "--from-ids", help="CORPUS is one file of ids: one window per line, with blanks."
        ),
    ] = False,
    export_ids: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the windows as lines of ids to this file."),
    ] = None,
    check_overlap: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Calibration or training data (text, JSONL, Parquet or a token file): say how "
            "much of the corpus is also in it.",
        ),
    ] = None,
    force: Force = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the token file's record as JSON on stdout.")
    ] = False,
    **options: Unpack[PreparingOptions],
) -> None:
    """Tokenise a corpus once, into a token file that says which tokens are scored in which window.

    Every run over the same token file has the same input fingerprint, so any two can be compared.
    """
    for place in filter(None, (output, export_ids)):
        check_place(place, Kind("what is prepared", lambda _: True), check_overlap or ())
    with stdout_kept_clean():
        if export_ids is not None:
            px.check_id_lines_output(export_ids, output, corpus)
        if from_ids:
            _refuse_text_options(context)
            token_file = px.import_id_lines(
                _only(corpus), output=output, tokenizer=tokenizer, force=force
            )
        elif tokenizer is None:
            raise UsageError(
                "expected --tokenizer, got none; name the model's folder or tokenizer.json"
            )
        else:
            with preparing_progress() as progress:
                token_file = px.prepare(
                    corpus,
                    tokenizer=tokenizer,
                    output=output,
                    progress=progress,
                    force=force,
                    **options,
                )
        if export_ids is not None:
            px.export_id_lines(token_file, export_ids)
        overlaps = {
            str(file): px.ngram_overlap(token_file, file, text_key=options["text_key"] or "text")
            for file in check_overlap or ()
        }
    people().print(input_table(token_file))
    for file, overlap in overlaps.items():
        tell(f"overlap with {file}: {overlap}")
    if json:
        record = {file: overlap.to_json() for file, overlap in overlaps.items()}
        print_json(input_record(token_file) | ({"overlap": record} if overlaps else {}))


def _refuse_text_options(context: typer.Context) -> None:
    """Raise UsageError for an option that has no meaning where windows are given as ids."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in PreparingOptions.__annotations__
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if given:
        raise UsageError(
            f"--from-ids takes the windows as they are, but {', '.join(given)} decides how text "
            "is cut; leave out one of the two"
        )


def _only(corpus: list[Path]) -> Path:
    if len(corpus) != 1:
        raise UsageError(f"--from-ids expected one file of ids, got {len(corpus)}; join them first")
    return corpus[0]
