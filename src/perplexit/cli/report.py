"""`perplexit report`: runs over one input → one HTML file that needs nothing else."""

from pathlib import Path
from typing import Annotated, Unpack

import typer

import perplexit as px
from perplexit.cli.command_group import examples
from perplexit.cli.comparison_options import ComparisonOptions
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import Force, print_json, stdout_kept_clean, tell

EXAMPLES = examples(
    "perplexit report runs/fp32 runs/bf16 -o report.html",
    "perplexit report runs/fp32 runs/q4 --label 'full precision' --label '4 bits' -o report.html",
    "perplexit report experiment/ -o experiment.html",
)


@takes_options(ComparisonOptions)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders of runs over one input; the first is the reference. Folders of igf "
            "experiments, beside them or alone, get a section each.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")
    ],
    label: Annotated[
        list[str] | None,
        typer.Option(help="A run's name in the report; once for each run, in their order."),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="INPUT",
            help="The runs' input, if it was moved.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Spells the alternatives, if the models' folders are missing."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="How many tokens of text the page holds.")
    ] = 100_000,
    force: Force = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
    **options: Unpack[ComparisonOptions],
) -> None:
    """Write a report: the verdict, figures with intervals, charts, and the text by surprise.

    The file needs no other file and no network. Runs over different texts are refused, and the
    error says what differs.
    """
    with stdout_kept_clean():
        written = px.write_report(
            runs,
            output,
            labels=label or None,
            tokens=input_file,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            force=force,
            **options,
        )
    tell(written.headline)
    tell(f"The report is in {output} ({written.num_bytes / 1e6:.1f} MB)")
    if json:
        print_json(written.to_json())
