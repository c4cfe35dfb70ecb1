"""explain: two runs → every difference by name, and what each contributes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perplexit.comparison.pairing import opened
from perplexit.diagnosis.run_differences import Difference, differences
from perplexit.diagnosis.step_contributions import Inputs, Model, Step, measured, steps_between
from perplexit.errors import FingerprintMismatchError, PerplexitError
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.html_table import html_table
from perplexit.runs.measurement import plain_json
from perplexit.runs.run import Run


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """Why two runs differ.

    differences: everything that differs, by name; empty for two runs under the same conditions.
    steps:  one change after another from the first run to the second; their `nats` add up to
            `total_nats`, the difference of the mean nll per token. One step where they cannot be
            told apart, and `notes` says why; what a step contributes can depend on the order.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    differences: tuple[Difference, ...]
    steps: tuple[Step, ...]
    total_nats: float | None
    notes: tuple[str, ...] = ()

    @property
    def aspects(self) -> tuple[str, ...]:
        """Return the names of what differs, each once, in order."""
        return tuple(dict.fromkeys(difference.aspect for difference in self.differences))

    def to_json(self) -> dict[str, Any]:
        """Return the explanation as plain JSON values, every number finite or null."""
        return dict(plain_json(asdict(self) | {"aspects": list(self.aspects)}))

    def __repr__(self) -> str:
        total = "" if self.total_nats is None else f"{self.total_nats:+.3g} nats per token: "
        return f"Explanation({total}{', '.join(self.aspects) or 'nothing differs'})"

    def _repr_html_(self) -> str:
        """Return a small HTML table for notebooks: one row per difference, then per step."""
        total = "" if self.total_nats is None else f", {self.total_nats:+.6f} nats per token in all"
        rows = [(d.aspect, d.sentence, "") for d in self.differences]
        rows += [
            (
                " and ".join(step.aspects),
                f"perplexity {step.perplexity_before:.6g} → {step.perplexity_after:.6g}",
                f"{step.nats:+.6f}",
            )
            for step in self.steps
        ]
        return html_table(
            f"Explanation: {len(self.differences)} differences{total}",
            rows,
            header=("what differs", "how", "nats per token"),
            notes=self.notes,
        )

    def __str__(self) -> str:
        lines = [f"first:  {_run_line(self.first)}", f"second: {_run_line(self.second)}"]
        if not self.differences:
            lines.append("nothing differs: same input, weights, engine, precision and settings")
        width = max((len(difference.aspect) for difference in self.differences), default=0)
        lines += [f"  {d.aspect:<{width}}  {d.sentence}" for d in self.differences]
        if self.total_nats is not None:
            lines.append(f"mean nll: {self.total_nats:+.6f} nats per token, of which")
        lines += [_step_line(step) for step in self.steps]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain(
    first: Run | str | Path,
    second: Run | str | Path,
    *,
    inputs: Sequence[TokenFile | str | Path] = (),
    model: Model | Sequence[Model] | None = None,
    measure: bool = True,
) -> Explanation:
    """Return every difference between two runs by name, and what each contributes to the mean nll.

    inputs: token files of the runs, in any order; without them those are read that lie where the
        runs found them.
    model:  an address or open session (or several) whose weights are those of a run, for models
        that are no longer where the run found them.
    measure: evaluate again between the runs' conditions, one setting turned at a time. Without it
        (or where no model is at hand) all differences are one step.
    Raises FingerprintMismatchError for a token file that neither run scored, RunError.
    """
    runs = [opened(run) for run in (first, second)]
    models = () if model is None else model if isinstance(model, list | tuple) else (model,)
    token_files = _inputs_of(runs, inputs)
    found = differences(runs[0], runs[1], token_files)
    aspects = tuple(dict.fromkeys(difference.aspect for difference in found))
    ends = [measured(run) for run in runs]
    total = None if ends[0] is None or ends[1] is None else ends[1].mean_nll - ends[0].mean_nll
    steps: list[Step] = []
    notes: list[str] = []
    if found and measure:
        steps, notes = steps_between(
            runs[0], runs[1], inputs=token_files, aspects=aspects, models=models
        )
    if runs[0].tokenizer_fingerprint != runs[1].tokenizer_fingerprint:
        notes.append(
            "nats per token of two tokenizers are not comparable; `compare` aligns by bytes"
        )
    if not found and total:
        notes.append("the figures differ by rounding alone: the engine does not repeat itself")
    return Explanation(
        first=_conditions(runs[0]),
        second=_conditions(runs[1]),
        differences=tuple(found),
        steps=tuple(steps),
        total_nats=total,
        notes=tuple(notes),
    )


def _inputs_of(runs: Sequence[Run], given: Sequence[TokenFile | str | Path]) -> Inputs:
    """Return each run's token file: one of those given, else where the run found it, else None."""
    opened = [item if isinstance(item, TokenFile) else TokenFile.open(item) for item in given]
    by_fingerprint = {tokens.input_fingerprint: tokens for tokens in opened}
    wanted = [run.input_fingerprint for run in runs]
    for tokens in opened:
        if tokens.input_fingerprint not in wanted:
            raise FingerprintMismatchError(
                f"expected a token file that one of the runs scored, got {tokens.path} "
                f"({tokens.input_fingerprint[:12]}…); name those that `perplexit eval` was given"
            )
    for run in runs:
        if run.input_fingerprint not in by_fingerprint and run.input_path is not None:
            try:
                tokens = TokenFile.open(run.input_path)
            except (PerplexitError, OSError):
                continue  # gone or overwritten since: the run is explained without it
            by_fingerprint[tokens.input_fingerprint] = tokens
    first, second = (by_fingerprint.get(fingerprint) for fingerprint in wanted)
    return first, second


def _conditions(run: Run) -> dict[str, Any]:
    return {
        "folder": None if run.folder is None else str(run.folder),
        "perplexity": run.perplexity,
        "protocol_perplexity": run.protocol_perplexity,
        "bits_per_byte": run.bits_per_byte,
        "num_tokens": run.num_tokens,
        "protocol": run.protocol,
        "input_fingerprint": run.input_fingerprint,
        "model": run.model.get("address"),
        "engine": run.session.get("engine"),
        "dtype": run.session.get("dtype"),
    }


def _run_line(record: dict[str, Any]) -> str:
    figure = record["perplexity"]
    shown = "-" if figure is None else f"{figure:.6g}"
    own = record["protocol_perplexity"]
    by_protocol = "" if own is None else f" (the protocol's own: {own:.6g})"
    return (
        f"perplexity {shown}{by_protocol} over {record['num_tokens']} tokens, "
        f"{record['protocol']}, {record['engine']} {record['dtype']}, {record['model']}"
    )


def _step_line(step: Step) -> str:
    return (
        f"  {step.nats:+.6f}  {' and '.join(step.aspects)}: perplexity "
        f"{step.perplexity_before:.6g} -> {step.perplexity_after:.6g}"
    )
