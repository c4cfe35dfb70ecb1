"""An experiment's document, as `experiment.json` holds it: opened, checked, typed.

Nothing here needs an engine, so that a report can be made without one.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from perplexit.errors import RunError
from perplexit.igf.resumable_work import CONDITIONS_FILE
from perplexit.igf.tensors_with_record import json_kind
from perplexit.protected_outputs import Kind, OutputFile, OutputFolder, paths_among
from perplexit.untrusted_files import Expected, read_json, stated

SCHEMA_VERSION = 1
EXPERIMENT_KIND = "igf-experiment"
EXPERIMENT_FILE = "experiment.json"
DOCUMENT_HEAD = {"schema_version": SCHEMA_VERSION, "kind": EXPERIMENT_KIND}
_EXPECTED = Expected("a whole experiment", RunError, "experiment again")
_SECONDS = {"select", "train", "evaluate"}
Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]


class MethodOutcome(
    msgspec.Struct,
    frozen=True,
    rename={kind: f"{kind}_perplexity" for kind in ("median", "low", "high")},
):
    """The result of one way to select contexts, over its seeds.

    median, low, high: test perplexity at each of `steps`, with the median's interval over seeds;
                the ends are None with one seed.
    acceptance: ids trained on, over ids that the filter judged.
    tokens_*:   ids trained on, scored (a forward pass to be selected) and judged, per run.
    seconds:    `select`, `train` and `evaluate`, per run.
    """

    name: str
    num_seeds: int
    steps: tuple[int, ...]
    median: tuple[Finite, ...]
    low: tuple[Finite | None, ...]
    high: tuple[Finite | None, ...]
    acceptance: Finite
    tokens_trained: Finite
    tokens_scored: Finite
    tokens_judged: Finite
    seconds: dict[str, Finite]

    def __post_init__(self) -> None:
        for kind in ("median", "low", "high"):
            if not len(getattr(self, kind)) == len(self.steps) > 0:
                raise ValueError(f"the {kind} curve does not have a figure a step")
        if not self.seconds.keys() >= _SECONDS:
            raise ValueError(f"seconds of {', '.join(self.seconds)} alone")

    @property
    def needs_labels(self) -> bool:
        """Return whether it filters by predicted gain, so that its labels are part of the cost."""
        return self.name.startswith("igf-")


class PairedOutcome(
    msgspec.Struct,
    frozen=True,
    rename={
        "low": "ratio_low",
        "high": "ratio_high",
        "p_t": "p_t_holm",
        "p_wilcoxon": "p_wilcoxon_holm",
    },
):
    """A method's final test perplexity over the reference method's, paired by seed.

    p_t, p_wilcoxon: after Holm's correction for the experiment's comparisons; None where not known.
    curve_ratio: of the whole curves' mean log-perplexities.
    steps_to_reference_end: the step at which its median reached the reference's last one, or None.
    """

    method: str
    num_seeds: int
    ratio: Finite
    low: Finite
    high: Finite
    seeds_better: int
    p_t: Finite | None
    p_wilcoxon: Finite | None
    curve_ratio: Finite
    steps_to_reference_end: int | None

    def verdict(self, confidence: float) -> str:
        """Return `better`, `worse` or `inconclusive`, by the corrected paired t-test."""
        if self.p_t is None or not self.p_t < 1 - confidence:
            return "inconclusive"
        return "better" if self.ratio < 1 else "worse"


class Experiment(msgspec.Struct, frozen=True):
    """An experiment as it was written; `document` is the whole of it."""

    title: str
    status: str
    confidence: Finite
    total_runs: int
    methods: tuple[MethodOutcome, ...]
    comparisons: tuple[PairedOutcome, ...]
    document: Mapping[str, Any]
    folder: Path | None
    reference: str = ""

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
            plan, methods = document["plan"], document["methods"].items()
            read = {
                **document,
                "title": document.get("title") or document.get("model") or "",
                "confidence": plan["confidence"],
                "total_runs": len(plan["methods"]) * len(plan["seeds"]),
                "methods": [{**row, "name": name} for name, row in methods],
                "document": document,
                "folder": folder,
            }
            found = msgspec.convert(read, cls)
        if not found.methods:
            raise RunError(
                f"expected at least one finished fine-tuning{where}, got none; give the same "
                "`perplexit igf experiment` again, which continues it"
            )
        return found

    @property
    def num_runs(self) -> int:
        """Return how many fine-tunings are finished."""
        return sum(method.num_seeds for method in self.methods)

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
