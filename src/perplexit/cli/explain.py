"""`perplexit explain`: two runs → what differs, and how much each difference contributes."""

from pathlib import Path
from typing import Annotated

import typer

import perplexit as px
from perplexit.cli.command_group import examples
from perplexit.cli.output import AsJson, print_json, stdout_kept_clean, tell

EXAMPLES = examples(
    "perplexit explain runs/mine runs/theirs",
    "perplexit explain runs/fp32 runs/int8 --no-measure --json",
    "perplexit explain runs/old runs/new --model smollm2/ --input old.safetensors",
)


def explain(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="The first run's folder.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="The second run's folder.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="A run's token file, if it was moved.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A run's model, if it was moved.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            help="Change one setting at a time and evaluate again, to measure how many nats each "
            "difference contributes."
        ),
    ] = True,
    json: AsJson = False,
) -> None:
    """Name every difference between two runs, and how many nats each contributes.

    Text, tokenizer, windows, BOS, scored tokens, precision, engine, weights. The contributions add
    up to the whole difference; measuring them needs the runs' inputs and models.
    """
    with stdout_kept_clean():
        explanation = px.explain(first, second, inputs=inputs or (), model=models, measure=measure)
    tell(str(explanation))
    if json:
        print_json(explanation.to_json())
