"""`perplexit compare`: runs over the same input → a paired ratio and a verdict."""

from pathlib import Path
from typing import Annotated

import typer

import perplexit as px
from perplexit.cli.group import examples
from perplexit.cli.output import print_json, stdout_kept_clean, tell

EXAMPLES = examples(
    "perplexit compare runs/fp32 runs/bf16",
    "perplexit compare runs/fp32 runs/bf16 runs/onnx-int4 --confidence 0.99 --most-changed 10",
)


def compare(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="The run's folder to compare with.")
    ],
    candidates: Annotated[
        list[Path], typer.Argument(metavar="CANDIDATE", help="Folders of the runs in question.")
    ],
    confidence: Annotated[float, typer.Option(help="Coverage of the interval, in (0, 1).")] = 0.95,
    most_changed: Annotated[
        int, typer.Option(min=0, help="How many of the most changed tokens to show.")
    ] = 5,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON on stdout: an object, for several candidates a list."
        ),
    ] = False,
) -> None:
    """Compare runs token by token: better, worse, or not distinguishable, with an interval.

    Runs over different inputs are refused, with what differs.
    """
    with stdout_kept_clean():
        base = px.Run.open(reference)
        comparisons = [
            px.compare(base, px.Run.open(c), confidence=confidence, num_most_changed=most_changed)
            for c in candidates
        ]
    for candidate, comparison in zip(candidates, comparisons, strict=True):
        tell(f"{candidate} against {reference}")
        tell(str(comparison))
    if json:
        documents = [comparison.to_json() for comparison in comparisons]
        print_json(documents[0] if len(documents) == 1 else documents)
