"""`perplexit demo`: a real model, a real text, two engines, three precisions, one table."""

from pathlib import Path
from typing import Annotated

import typer

from perplexit.cli import demo_runs
from perplexit.cli.command_group import continued_by, examples
from perplexit.cli.output import people, print_json, stdout_kept_clean, tell_wrapped

EXAMPLES = examples("perplexit demo", "perplexit demo --out elsewhere/ --json")


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything is put.")] = Path(
        "demo"
    ),
    json: Annotated[
        bool, typer.Option("--json", help="Print runs and comparisons as JSON on stdout.")
    ] = False,
) -> None:
    """Score a State of the Union address with SmolLM2-135M four ways, and compare.

    PyTorch fp32 is the reference; PyTorch bf16, ONNX Runtime fp32 and ONNX Runtime with 4-bit
    weights are the candidates. It takes two to eight minutes on two cores, most of them for the
    compilation, and needs no network.
    """
    with continued_by(f"perplexit demo --out {out}"), stdout_kept_clean():
        scored = demo_runs.score_four_ways(out)
    people().print(demo_runs.table(scored))
    tell_wrapped("\n" + demo_runs.explanation(scored, out))
    if json:
        print_json(demo_runs.document(scored))
