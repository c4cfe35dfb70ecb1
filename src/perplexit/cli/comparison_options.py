"""The options that every command with comparisons has, declared once with their help."""

from typing import Annotated

import typer

Confidence = Annotated[float, typer.Option(help="Coverage of the intervals, in (0, 1).")]
NoiseFloor = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Nats within which runs of one model are known to vary: per token, or per byte "
        "where runs are compared byte by byte.",
    ),
]
Margin = Annotated[
    str,
    typer.Option(
        metavar="SHARE",
        help="The change of the perplexity that does not matter, 1% or 0.01: runs that differ "
        "by less are equivalent, and worse or better must differ by more.",
    ),
]
