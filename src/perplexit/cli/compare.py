"""`perplexit compare`: runs over the same input → paired ratios, verdicts, gates."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import perplexit as px
from perplexit.cli.group import examples
from perplexit.cli.output import print_json, stdout_kept_clean, tell
from perplexit.comparison import (
    Comparison,
    Gate,
    GateResult,
    RankedRun,
    judge,
    junit_xml,
    markdown,
    parse_gate,
    ranked,
)
from perplexit.errors import GateError
from perplexit.runs.run import Run

EXAMPLES = examples(
    "perplexit compare runs/fp32 runs/bf16",
    "perplexit compare runs/fp32 runs/bf16 runs/onnx-int4 --confidence 0.99 --most-changed 10",
    "perplexit compare runs/fp32 runs/q8 --gate 'ppl_ratio<=1.01' --gate 'mean_kl<=0.02'",
    "perplexit compare runs/fp32 runs/port --gate fp16 --junit gates.xml --markdown gates.md",
)


class GateOn(StrEnum):
    """What a gate is held against."""

    INTERVAL = "interval"
    VALUE = "value"


def compare(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="The run's folder to compare with.")
    ],
    candidates: Annotated[
        list[Path], typer.Argument(metavar="CANDIDATE", help="Folders of the runs in question.")
    ],
    confidence: Annotated[float, typer.Option(help="Coverage of the interval, in (0, 1).")] = 0.95,
    noise_floor: Annotated[
        float,
        typer.Option(
            min=0.0, help="Nats a token within which runs of one model are known to vary."
        ),
    ] = 0.0,
    most_changed: Annotated[
        int, typer.Option(min=0, help="How many of the most changed tokens to show.")
    ] = 5,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE",
            help="A bound that must hold: 'ppl_ratio<=1.01', 'mean_kl<=0.02', "
            "'top1_agreement>=0.97', or the presets fp16 (ratio 1.001) and mx (1.01). "
            "One that fails ends with exit code 3.",
        ),
    ] = None,
    gate_on: Annotated[
        GateOn, typer.Option(help="Hold gates against the interval's bad end, or the value.")
    ] = GateOn.INTERVAL,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the gates as JUnit XML.")
    ] = None,
    markdown_file: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="Write the gates as a Markdown table."),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON on stdout: an object, for several candidates a list."
        ),
    ] = False,
) -> None:
    """Compare runs token by token: better, worse, or not distinguishable, with an interval.

    Several candidates are ranked, ties shown as ties. Runs over different inputs are refused, with
    what differs.
    """
    gates = [parse_gate(text) for text in gate or []]
    with stdout_kept_clean():
        base = px.Run.open(reference)
        runs = [px.Run.open(candidate) for candidate in candidates]
        comparisons = [
            px.compare(
                base,
                run,
                confidence=confidence,
                noise_floor=noise_floor,
                num_most_changed=most_changed,
            )
            for run in runs
        ]
        names = [str(candidate) for candidate in candidates]
        results = {
            name: judge(comparison, gates, judged_on=gate_on.value)
            for name, comparison in zip(names, comparisons, strict=True)
        }
    for name, comparison in zip(names, comparisons, strict=True):
        tell(f"{name} against {reference}")
        tell(str(comparison))
    places = _ranking(names, runs, comparisons)
    _tell_gates(results)
    _write(junit, junit_xml(results))
    _write(markdown_file, markdown(results))
    if json:
        documents = [
            _document(comparison, results[name], gates, places.get(name))
            for name, comparison in zip(names, comparisons, strict=True)
        ]
        print_json(documents[0] if len(documents) == 1 else documents)
    failed = [str(result) for found in results.values() for result in found if not result.passed]
    if failed:
        raise GateError("expected every gate to hold, but " + "; ".join(failed))


def _ranking(
    names: list[str], runs: list[Run], comparisons: list[Comparison]
) -> dict[str, RankedRun]:
    """Each candidate's place, shown where there are several."""
    if len(names) < 2:
        return {}
    places = ranked(list(zip(names, runs, strict=True)), comparisons)
    tell("ranking (a shared place is a tie):")
    for place in places:
        tell(f"  {place.rank}. {place.name}  ratio {place.comparison.ppl_ratio:.6f}")
    return {place.name: place for place in places}


def _tell_gates(results: dict[str, list[GateResult]]) -> None:
    for name, found in results.items():
        for result in found:
            tell(f"{result}  ({name}, judged on the {result.judged_on})")


def _document(
    comparison: Comparison, results: list[GateResult], gates: list[Gate], place: RankedRun | None
) -> dict[str, Any]:
    document = comparison.to_json()
    if gates:
        document["gates"] = [result.to_json() for result in results]
    if place is not None:
        document["rank"] = place.rank
    return document


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
