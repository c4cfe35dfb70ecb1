"""`perplexit runs`: list, show, verify and export what is on disk."""

from pathlib import Path
from typing import Annotated, Any

import typer

import perplexit as px
from perplexit.cli.command_group import examples
from perplexit.cli.output import AsJson, Force, people, print_json, stdout_kept_clean, tell
from perplexit.cli.record_tables import run_table, runs_table
from perplexit.errors import RunError, UsageError

app = typer.Typer(no_args_is_help=True, help="List, show, verify and export runs.")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]


@app.command("list", epilog=examples("perplexit runs list", "perplexit runs list runs/ --json"))
def list_(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with runs in it, at any depth.")
    ] = Path("runs"),
    json: AsJson = False,
) -> None:
    """List the runs in a folder, oldest first."""
    with stdout_kept_clean():
        every = px.find_runs(folder)
    found = [each for each in every if not isinstance(each, px.UnreadableRun)]
    unreadable = [each for each in every if isinstance(each, px.UnreadableRun)]
    records = [_record(run) for run in found]
    folders = [str(run.folder) for run in found]
    if found:
        people().print(runs_table(records, folders))
    else:
        tell(f"no run in {folder}" + (" that can be read" if unreadable else ""))
    for place, record in zip(folders, records, strict=True):
        if record["status"] == "damaged":
            tell(f"{place}: {record['damage']}; evaluate again with the same --run")
    for each in unreadable:
        tell(f"{each.folder} is unreadable: {each.reason}")
    if json:
        rows = [{"folder": f, **r} for f, r in zip(folders, records, strict=True)]
        rows += [
            {"folder": str(e.folder), "status": "unreadable", "reason": e.reason}
            for e in unreadable
        ]
        print_json(rows)


def _record(run: Any) -> dict[str, Any]:
    """Return the run's record; its status is "damaged" where it only claims to be complete."""
    record: dict[str, Any] = run.to_json()
    damage = run.damage()
    return record if damage is None else {**record, "status": "damaged", "damage": damage}


@app.command("show", epilog=examples("perplexit runs show runs/fp32"))
def show(run: RunFolder, json: AsJson = False) -> None:
    """Show one run's figures and the conditions under which they were measured."""
    with stdout_kept_clean():
        record = _record(px.Run.open(run))
    people().print(run_table(record))
    if json:
        print_json(record)


@app.command("verify", epilog=examples("perplexit runs verify runs/fp32"))
def verify(run: RunFolder, json: AsJson = False) -> None:
    """Compute a run's figures again from its tokens, and check hashes; exit code 1 if unsound."""
    with stdout_kept_clean():
        findings = [str(finding) for finding in px.verify_run(run)]
    if json:
        print_json({"run": str(run), "sound": not findings, "findings": findings})
    if findings:
        raise RunError(f"{run} is not sound: " + "; ".join(findings))
    tell(f"{run} is sound")


@app.command(
    "export",
    epilog=examples(
        "perplexit runs export runs/fp32 -o tokens.csv",
        "perplexit runs export runs/fp32 --words -o words.csv",
        "perplexit runs export runs/fp32 --documents -o documents.csv",
    ),
)
def export(
    run: RunFolder,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Ends in .csv, .parquet or .jsonl."),
    ],
    words: Annotated[
        bool, typer.Option("--words", help="One row per word: surprisal and offsets.")
    ] = False,
    documents: Annotated[
        bool, typer.Option("--documents", help="One row for each document: source and figures.")
    ] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="INPUT",
            help="With --words: the run's input, if it was moved.",
        ),
    ] = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Write a run's scored tokens, one row per token, in the format that the file's name ends in.

    Each row has the document's source file, row and the columns that `prepare --keep` named.
    With --words one row per word: the losses of tokens summed over the words that they spell.
    """
    if input_file is not None and not words:
        raise UsageError("--input is for --words: tokens are exported from the run alone")
    if words and documents:
        raise UsageError("expected --words or --documents, got both; a file holds one table")
    with stdout_kept_clean():
        if documents:
            px.export_documents(run, output, force=force)
        elif words:
            px.export_words(run, output, tokens=input_file, force=force)
        else:
            px.export_tokens(run, output, force=force)
    what = "words" if words else "documents" if documents else "scored tokens"
    tell(f"The {what} of {run} are in {output}")
    if json:
        print_json({"run": str(run), "output": str(output), "words": words, "documents": documents})
