"""What an examination finds: one Finding a check, and the Diagnosis that holds them all."""

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from perplexit.runs.html_table import html_table
from perplexit.runs.measurement import plain_json

Status = Literal["pass", "warn", "fail", "skipped"]
Figure = float | int | str | None

_COLUMNS = ("check", "status", "figure", "limit", "what was found")
_WIDTHS = (14, 7, 9, 9)  # check, status, figure, limit
_SENTENCE_WIDTH = 76  # with the others, a line of 120 columns


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    figure, limit: what was measured and what it is held against; None where there is no number.
    sentence: what was found, in words and units. advice: what to do; empty on a pass.
    """

    check: str
    status: Status
    sentence: str
    figure: Figure = None
    limit: Figure = None
    advice: str = ""


def passed(sentence: str, figure: Figure = None, limit: Figure = None) -> Finding:
    """Return a pass. Each of these findings gets the name of its check from the list of checks."""
    return Finding("", "pass", sentence, figure, limit)


def warned(sentence: str, figure: Figure = None, limit: Figure = None, *, advice: str) -> Finding:
    """Return a warning with what to do."""
    return Finding("", "warn", sentence, figure, limit, advice)


def failed(sentence: str, figure: Figure = None, limit: Figure = None, *, advice: str) -> Finding:
    """Return a failure with what to do."""
    return Finding("", "fail", sentence, figure, limit, advice)


def skipped(why: str) -> Finding:
    """Return that a check could not be done, and why."""
    return Finding("", "skipped", why)


def within_limit(
    figure: float, limit: float, sentence: str, *, advice: str, above: Status = "fail"
) -> Finding:
    """Return a pass where `figure <= limit`, else `above`; NaN is above every limit."""
    if figure <= limit:
        return passed(sentence, figure, limit)
    return Finding("", above, sentence, figure, limit, advice)


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnosis:
    """What `doctor` found about a model on its engine.

    model, session: as in a run's record. input_fingerprint: of the INPUT; None where the doctor
    made its own probe. max_length: ids of the longest window that was tried.
    """

    model: Mapping[str, Any]
    session: Mapping[str, Any]
    input_fingerprint: str | None
    max_length: int
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def status(self) -> Status:
        """Return `fail` where a check failed, else `warn` where one warned, else `pass`."""
        found = {finding.status for finding in self.findings}
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"

    def named(self, status: str) -> tuple[str, ...]:
        """Return the names of the checks that ended in `status`, in order."""
        return tuple(finding.check for finding in self.findings if finding.status == status)

    def __getitem__(self, check: str) -> Finding:
        """Return the finding of one check. Raises KeyError for a name that is none."""
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(check)

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis as plain JSON values, every number finite or null."""
        record = {"status": self.status, **asdict(self)}
        record["counts"] = {
            status: len(self.named(status)) for status in ("pass", "warn", "fail", "skipped")
        }
        return dict(plain_json(record))

    def __repr__(self) -> str:
        return f"Diagnosis({self.status}: {self._summary()})"

    def _repr_html_(self) -> str:
        """Return a small HTML table for notebooks, one row per check."""
        return html_table(
            f"Diagnosis: {self.status}",
            [
                (
                    found.check,
                    found.status,
                    _shown(found.figure),
                    _shown(found.limit),
                    found.sentence + (f"\n→ {found.advice}" if found.advice else ""),
                )
                for found in self.findings
            ],
            header=_COLUMNS,
            notes=[self._summary()],
        )

    def __str__(self) -> str:
        lines = [_row(*_COLUMNS)]
        for finding in self.findings:
            figures = (_shown(finding.figure), _shown(finding.limit))
            first, *more = textwrap.wrap(finding.sentence, _SENTENCE_WIDTH) or [""]
            if finding.advice:
                more += textwrap.wrap(f"→ {finding.advice}", _SENTENCE_WIDTH)
            lines.append(_row(finding.check, finding.status, *figures, first))
            lines += [_row("", "", "", "", line) for line in more]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        failed, warned, omitted = (self.named(s) for s in ("fail", "warn", "skipped"))
        whose = f"{self.model['address']} on {self.session['engine']} ({self.session['dtype']})"
        verdict = f"failed: {', '.join(failed)}" if failed else "no check failed"
        more = [f"{len(n)} {what}" for n, what in ((warned, "warned"), (omitted, "skipped")) if n]
        return f"{whose}: {verdict}" + (f"; {', '.join(more)}" if more else "")


def _row(*cells: str) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=False)]
    return " ".join([*padded, cells[-1]]).rstrip()


def _shown(figure: Figure) -> str:
    if figure is None:
        return ""
    return f"{figure:.3g}" if isinstance(figure, float) else str(figure)
