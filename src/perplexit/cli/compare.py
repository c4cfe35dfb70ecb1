"""`perplexit compare`: runs over the same input → paired ratios, verdicts, gates."""

from pathlib import Path
from typing import Annotated, Literal, Unpack

import typer

import perplexit as px
from perplexit.cli.command_group import examples
from perplexit.cli.comparison_options import ComparisonOptions, MarkdownSummary, junit_output
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import Force, print_json, stdout_kept_clean, tell, tell_wrapped
from perplexit.errors import GateError, UsageError

EXAMPLES = examples(
    "perplexit compare runs/fp32 runs/bf16",
    "perplexit compare runs/fp32 runs/bf16 --margin 1%",
    "perplexit compare runs/fp32 runs/bf16 runs/onnx-int4 --confidence 0.99 --most-changed 10",
    "perplexit compare runs/fp32 runs/q8 --gate 'ppl_ratio<=1.01' --gate 'mean_kl<=0.02'",
    "perplexit compare runs/fp32 runs/port --gate fp16 --junit gates.xml --markdown gates.md",
)


@takes_options(ComparisonOptions)
def compare(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="The run's folder to compare with.")
    ],
    candidates: Annotated[
        list[Path], typer.Argument(metavar="CANDIDATE", help="Folders of the runs in question.")
    ],
    most_changed: Annotated[
        int, typer.Option(min=0, help="How many of the most changed tokens to show.")
    ] = 5,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE",
            help="A bound that must hold: 'ppl_ratio<=1.01', 'mean_kl<=0.02', "
            "'top1_agreement>=0.97', or the presets fp16 (ratio 1.001) and mx (1.01). "
            "If one fails, the exit code is 3.",
        ),
    ] = None,
    gate_on: Annotated[
        Literal["interval", "value"],
        typer.Option(
            help="Judge gates by the interval's bad end, or by the value. Without an interval a "
            "gate fails as not measured, unless the value is asked for."
        ),
    ] = "interval",
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the gates as JUnit XML.")
    ] = None,
    markdown_file: Annotated[
        Path | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Append the gates as a Markdown table, e.g. to $GITHUB_STEP_SUMMARY.",
        ),
    ] = None,
    force: Force = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON on stdout: an object, for several candidates a list."
        ),
    ] = False,
    **options: Unpack[ComparisonOptions],
) -> None:
    """Compare runs token by token: worse, better, equivalent or inconclusive, with an interval.

    Several candidates are ranked, ties shown as ties. Runs of different tokenizers over the same
    text are compared byte by byte. Runs over different texts are refused, and the error says what
    differs.
    """
    runs = [reference, *candidates]
    junit_file = None if junit is None else junit_output(junit, inputs=runs, force=force)
    summary = None if markdown_file is None else MarkdownSummary(markdown_file, inputs=runs)
    if junit and markdown_file and junit.absolute() == markdown_file.absolute():
        raise UsageError(f"--junit and --markdown expected two files, got {junit} twice; name two")
    with stdout_kept_clean():
        compared = px.compare_runs(
            reference,
            candidates,
            num_most_changed=most_changed,
            gates=gate or [],
            gates_on=gate_on,
            **options,
        )
    tell(f"reference: {reference}")
    tell_wrapped(str(compared))
    if junit_file is not None:
        junit_file.write_text(compared.gates_as_junit_xml())
    if summary is not None:
        summary.append(compared.gates_as_markdown())
    if json:
        print_json(compared.to_json())
    if compared.failed:
        raise GateError("expected every gate to hold, but " + "; ".join(map(str, compared.failed)))
