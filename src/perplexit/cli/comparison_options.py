"""The options that every command with comparisons has, declared once with their help."""

from typing import Annotated, TypedDict

from perplexit.declared_options import Option


class ComparisonOptions(TypedDict):
    """How runs are compared: the keywords of `compare` that have these names."""

    confidence: Annotated[float, Option("Coverage of the intervals, in (0, 1).", default=0.95)]
    noise_floor: Annotated[
        float,
        Option(
            "Nats within which runs of one model are known to vary: per token, or per byte where "
            "runs are compared byte by byte.",
            default=0.0,
            lowest=0,
        ),
    ]
    margin: Annotated[
        str,
        Option(
            "The change of the perplexity that does not matter, 1% or 0.01: runs that differ by "
            "less are equivalent, and worse or better must differ by more.",
            default="0",
            metavar="SHARE",
        ),
    ]
