"""write_report: runs and experiments → one HTML file that needs nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perplexit.errors import UsageError
from perplexit.igf.experiment_file import Experiment, holds_experiment
from perplexit.inputs.token_file import TokenFile
from perplexit.protected_outputs import Kind, OutputFile, begins_with_mark, paths_among
from perplexit.report.experiment_section import experiment_sections
from perplexit.report.headlines import headline
from perplexit.report.html_page import page_of
from perplexit.report.labelled_runs import LabelledRuns
from perplexit.report.token_data import token_data
from perplexit.runs.run import Run
from perplexit.runs.words import input_of

_MARK = b'<meta name="generator" content="Perplexit '
REPORT = Kind("a report", lambda path: begins_with_mark(path, _MARK))
MAX_TOKENS = 100_000
MAX_ALTERNATIVES = 8


@dataclass(frozen=True, slots=True)
class Report:
    """A written report: where it is, and what it says first."""

    path: Path
    num_bytes: int
    headline: str
    runs: LabelledRuns | None  # None where it is of experiments alone
    num_tokens: int  # with their text, scored or not
    num_tokens_shown: int
    experiments: tuple[Experiment, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return {
            "output": str(self.path),
            "num_bytes": self.num_bytes,
            "headline": self.headline,
            "num_tokens": self.num_tokens,
            "num_tokens_shown": self.num_tokens_shown,
            **_runs_to_json(self.runs),
            "experiments": [_experiment_to_json(found) for found in self.experiments],
        }


def _runs_to_json(labelled: LabelledRuns | None) -> dict[str, Any]:
    if labelled is None:
        return {"input_fingerprint": None, "runs": [], "comparisons": [], "aligned": []}
    return {
        "input_fingerprint": labelled.reference.input_fingerprint,
        "runs": [
            {
                "label": label,
                "folder": None if run.folder is None else str(run.folder),
                "perplexity": run.perplexity,
                "perplexity_low": run.perplexity_low,
                "perplexity_high": run.perplexity_high,
                "bits_per_byte": run.bits_per_byte,
            }
            for label, run in zip(labelled.labels, labelled.runs, strict=True)
        ],
        "comparisons": [
            {"label": label, **comparison.to_json()} for label, _, comparison in labelled.candidates
        ],
        "aligned": [{"label": label, **found.to_json()} for label, found in labelled.aligned],
    }


def _experiment_to_json(experiment: Experiment) -> dict[str, Any]:
    return {
        "title": experiment.title,
        "folder": None if experiment.folder is None else str(experiment.folder),
        "status": experiment.status,
        "reference": experiment.reference,
        "methods": [
            {
                "method": method.name,
                "num_seeds": method.num_seeds,
                "median_perplexity": method.median[-1],
                "ratio": None if row is None else row.ratio,
                "verdict": None if row is None else row.verdict(experiment.confidence),
            }
            for method in experiment.methods
            for row in [experiment.comparison(method.name)]
        ],
    }


def write_report(
    runs: Sequence[Run | Experiment | str | Path],
    output: str | Path,
    *,
    labels: Sequence[str] | None = None,
    tokens: TokenFile | str | Path | None = None,
    tokenizer: str | Path | None = None,
    confidence: float = 0.95,
    noise_floor: float = 0.0,
    margin: float | str = 0.0,
    max_tokens: int = MAX_TOKENS,
    max_alternatives: int = MAX_ALTERNATIVES,
    force: bool = False,
) -> Report:
    """Write the report of runs over one text as one HTML file; the first run is the reference.

    runs:      runs, or their folders; every other one is compared with the first. An experiment
        (`perplexit igf experiment`), or its folder, gets a section; a report may be of those alone.
    labels:    a name for each run; None takes the folders' names.
    tokens:    the runs' input, for the text that was not scored; None looks where it was.
    tokenizer: where alternatives are spelled; None looks in the models' own folders.
    confidence, noise_floor, margin: as in `compare`; the verdicts follow them.
    max_tokens: how many tokens of text the page holds, in reading order; all count in the figures.
    max_alternatives: how many recorded alternatives a token keeps in the page; fewer where many
        runs over much text would make the file too large to open with pleasure.
    force:     whether another report at `output` is replaced.

    Raises OutputError where `output` holds something else; FingerprintMismatchError for runs over
    different inputs, or another input or tokenizer than theirs; RunError for a run that is not
    complete; MissingPackageError without the extra `report`; UsageError.
    """
    _check_limits(max_tokens, max_alternatives)
    file = OutputFile(Path(output), REPORT, paths_among(*runs, tokens, tokenizer), force)
    measured, experiments = _opened(runs)
    sections = experiment_sections(experiments)
    labelled = None
    data: dict[str, Any] = {"numTokens": 0, "numShown": 0}
    if measured or not experiments:
        labelled = LabelledRuns.of(
            measured, labels=labels, confidence=confidence, noise_floor=noise_floor, margin=margin
        )
        if tokens is None:
            tokens = input_of(labelled.reference)
        elif not isinstance(tokens, TokenFile):
            tokens = TokenFile.open(tokens)
        data = token_data(
            labelled,
            tokens=tokens,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            max_alternatives=max_alternatives,
        )
    elif labels or tokens is not None or tokenizer is not None:
        raise UsageError(
            "expected runs for the labels, input or tokenizer given, got experiments alone; "
            "an experiment is called by its --title"
        )
    # a name may hold half a surrogate pair
    page = page_of(labelled, data, sections).encode("utf-8", "replace")
    file.write_text(page.decode())
    says = sections[0].headline if labelled is None else headline(labelled)
    shown = (data["numTokens"], data["numShown"])
    return Report(file.path, len(page), says, labelled, *shown, tuple(experiments))


def _check_limits(max_tokens: int, max_alternatives: int) -> None:
    if max_tokens < 0 or max_alternatives < 0:
        raise UsageError(
            f"max_tokens and max_alternatives must be 0 or more, got {max_tokens} and "
            f"{max_alternatives}; 0 leaves the text or the alternatives out"
        )


def _opened(paths: Sequence[Run | Experiment | str | Path]) -> tuple[list[Run], list[Experiment]]:
    """Return the runs and the experiments among them, each in their order."""
    runs: list[Run] = []
    experiments: list[Experiment] = []
    for found in paths:
        if isinstance(found, Run):
            runs.append(found)
        elif isinstance(found, Experiment):
            experiments.append(found)
        elif holds_experiment(found):
            experiments.append(Experiment.open(found))
        else:
            runs.append(Run.open(found))
    return runs, experiments
