"""An experiment's document, as `experiment.json` holds it: opened, checked, typed.

Nothing here needs an engine, so that a report can be made without one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perplexit.errors import RunError
from perplexit.igf.resume_conditions import CONDITIONS_FILE
from perplexit.igf.tensors_with_record import json_kind
from perplexit.protected_outputs import Kind, OutputFile, OutputFolder, paths_among
from perplexit.untrusted_files import Expected, read_json, stated

SCHEMA_VERSION = 1
EXPERIMENT_KIND = "igf-experiment"
EXPERIMENT_FILE = "experiment.json"
_EXPECTED = Expected("a whole experiment", RunError, "experiment again")


@dataclass(frozen=True, slots=True)
class MethodOutcome:
    """The result of one way to select contexts, over its seeds.

    median, low, high: test perplexity at each of `steps`, with the median's interval over seeds;
                the ends are None with one seed.
    acceptance: ids trained on, over ids that the filter judged.
    tokens:     ids `trained`, `scored` (a forward pass to be selected) and `judged`, per run.
    seconds:    `select`, `train` and `evaluate`, per run.
    """

    name: str
    num_seeds: int
    steps: tuple[int, ...]
    median: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    acceptance: float
    tokens: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def needs_labels(self) -> bool:
        """Return whether it filters by predicted gain, so that its labels are part of the cost."""
        return self.name.startswith("igf-")


@dataclass(frozen=True, slots=True)
class PairedOutcome:
    """A method's final test perplexity over the reference method's, paired by seed.

    p_t, p_wilcoxon: after Holm's correction for the experiment's comparisons; None where not known.
    curve_ratio: of the whole curves' mean log-perplexities.
    steps_to_reference_end: the step at which its median reached the reference's last one, or None.
    """

    method: str
    num_seeds: int
    ratio: float
    low: float
    high: float
    seeds_better: int
    p_t: float | None
    p_wilcoxon: float | None
    curve_ratio: float
    steps_to_reference_end: int | None

    def verdict(self, confidence: float) -> str:
        """Return `better`, `worse` or `inconclusive`, by the corrected paired t-test."""
        if self.p_t is None or not self.p_t < 1 - confidence:
            return "inconclusive"
        return "better" if self.ratio < 1 else "worse"


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment as it was written; `document` is the whole of it."""

    title: str
    folder: Path | None
    status: str
    reference: str
    confidence: float
    num_runs: int
    total_runs: int
    methods: tuple[MethodOutcome, ...]
    comparisons: tuple[PairedOutcome, ...]
    document: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "Experiment":
        """Return the experiment in a folder, or in its file.

        Raises RunError where there is none, it cannot be read, or nothing of it is finished.
        """
        path = Path(path)
        path = path / EXPERIMENT_FILE if path.is_dir() else path
        if not path.exists():
            raise RunError(
                f"expected an experiment's {EXPERIMENT_FILE} at {path}, but there is none; "
                "`perplexit igf experiment` makes one"
            )
        document = read_json(path, _EXPECTED, object, halves=True)  # a report escapes them
        return cls.of(document, folder=path.parent)

    @classmethod
    def of(cls, document: Any, *, folder: Path | None = None) -> "Experiment":
        """Return the experiment that a document describes; raises RunError as `open` does."""
        head: Mapping[str, Any] = document if isinstance(document, Mapping) else {}
        kind, version = head.get("kind"), head.get("schema_version")
        where = f" in {folder}" if folder else ""
        if kind != EXPERIMENT_KIND or version != SCHEMA_VERSION:
            raise RunError(
                f"expected an {EXPERIMENT_KIND} of version {SCHEMA_VERSION}{where}, got "
                f"{kind!r:.60} of version {version!r:.40}; use the Perplexit that wrote it, or "
                "experiment again"
            )
        with stated(folder or "an experiment", _EXPECTED):
            found = _typed(document, folder)
        if not found.methods:
            raise RunError(
                f"expected at least one finished fine-tuning{where}, got none; give the same "
                "`perplexit igf experiment` again, which continues it"
            )
        return found

    def comparison(self, method: str) -> PairedOutcome | None:
        """Return a method's comparison with the reference; None for itself, or before 2 seeds."""
        return next((row for row in self.comparisons if row.method == method), None)


def holds_experiment(path: str | Path) -> bool:
    """Return whether this is an experiment's folder, or its file."""
    path = Path(path)
    return path.name == EXPERIMENT_FILE or (path / EXPERIMENT_FILE).is_file()


def check_experiment_output(folder: str | Path, *, inputs: object = ()) -> None:
    """Raise OutputError for a folder that holds something else than an experiment."""
    kind = Kind("an experiment", lambda found: (found / CONDITIONS_FILE).is_file())
    output = OutputFolder(Path(folder), kind, paths_among(inputs))
    OutputFile(output.path / EXPERIMENT_FILE, json_kind("kind"), paths_among(inputs))


def _typed(document: Mapping[str, Any], folder: Path | None) -> Experiment:
    plan = document["plan"]
    methods = tuple(_method(str(name), row) for name, row in document["methods"].items())
    return Experiment(
        title=str(document.get("title") or document.get("model") or ""),
        folder=folder,
        status=str(document["status"]),
        reference=str(document.get("reference", "")),
        confidence=float(plan["confidence"]),
        num_runs=sum(method.num_seeds for method in methods),
        total_runs=len(plan["methods"]) * len(plan["seeds"]),
        methods=methods,
        comparisons=tuple(_paired(row) for row in document["comparisons"]),
        document=document,
    )


def _method(name: str, row: Mapping[str, Any]) -> MethodOutcome:
    steps = tuple(int(step) for step in row["steps"])

    def curve(kind: str) -> tuple[float | None, ...]:
        found = tuple(_number_or_none(x) for x in row[f"{kind}_perplexity"])
        if len(found) != len(steps) or not steps:
            raise ValueError(f"the {kind} curve of {name} does not have a figure a step")
        return found

    return MethodOutcome(
        name=name,
        num_seeds=int(row["num_seeds"]),
        steps=steps,
        median=tuple(_number(x) for x in curve("median")),
        low=curve("low"),
        high=curve("high"),
        acceptance=_number(row["acceptance"]),
        tokens={k: _number(row[f"tokens_{k}"]) for k in ("trained", "scored", "judged")},
        seconds={k: _number(row["seconds"][k]) for k in ("select", "train", "evaluate")},
    )


def _paired(row: Mapping[str, Any]) -> PairedOutcome:
    reached = row["steps_to_reference_end"]
    return PairedOutcome(
        method=str(row["method"]),
        num_seeds=int(row["num_seeds"]),
        ratio=_number(row["ratio"]),
        low=_number(row["ratio_low"]),
        high=_number(row["ratio_high"]),
        seeds_better=int(row["seeds_better"]),
        p_t=_number_or_none(row["p_t_holm"]),
        p_wilcoxon=_number_or_none(row["p_wilcoxon_holm"]),
        curve_ratio=_number(row["curve_ratio"]),
        steps_to_reference_end=None if reached is None else int(reached),
    )


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number
