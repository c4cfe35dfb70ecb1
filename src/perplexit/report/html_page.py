"""The page: figures, charts and token data in the template, with everything escaped.

Tokens are data. They reach the page as text that Jinja escapes, or inside a JSON block in which no
character can end a script element; a content security policy lets only the page's own script and
style run, by their hashes, and lets nothing be fetched.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from perplexit import __version__
from perplexit.comparison import ChangedToken, Comparison
from perplexit.metrics.estimate import counted
from perplexit.metrics.number_format import DASH, figure, interval
from perplexit.report.chart_drawings import Chart
from perplexit.report.experiment_section import ExperimentSection
from perplexit.report.headlines import Finding, headline, mebibytes
from perplexit.report.labelled_runs import LabelledRuns, peak_bytes_of, precision_of
from perplexit.report.measurement_table import conditions_of, notes_of
from perplexit.report.prediction_tables import aligned_rows, changed_choices, prediction_rows
from perplexit.report.report_packages import loaded

SCRIPTS = ("columns.js", "tokens.js", "details.js", "list.js", "page.js", "start.js")
_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
# A verdict is told by its sign and its word, not by colour alone
_SIGNS = {"worse": "▲", "better": "▼", "equivalent": "=", "inconclusive": "?"}


def page_of(
    labelled: LabelledRuns | None,
    charts: Sequence[Chart],
    data: dict[str, Any],
    findings: Sequence[Finding],
    sections: Sequence[ExperimentSection] = (),
) -> str:
    """Render the whole HTML document: of runs, of experiments (`labelled` is None), or of both."""
    jinja = loaded("jinja2")
    markup = loaded("markupsafe").Markup
    style = asset("report.css")
    scripts = SCRIPTS if labelled is not None else SCRIPTS[-1:]
    script = "\n".join(asset(name) for name in scripts)
    environment = jinja.Environment(
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja.FunctionLoader(asset),
    )
    rendered: str = environment.get_template("report.html.j2").render(
        policy=policy_of(script, style),
        style=markup(style),
        script=markup(script),
        drawing=markup,
        headline=sections[0].headline if labelled is None else headline(labelled),
        findings=findings,
        signs=_SIGNS,
        sections=sections,
        version=__version__,
        **({"runs": []} if labelled is None else _of_runs(labelled, charts, data)),
        data=markup(json_block(data)),
    )
    return rendered


def _of_runs(
    labelled: LabelledRuns, charts: Sequence[Chart], data: dict[str, Any]
) -> dict[str, Any]:
    """Return what the template says of the runs."""
    return {
        "facts": _facts(labelled),
        "confidence": f"{100 * labelled.confidence:g} %",
        "runs": _run_rows(labelled),
        "is_comparison": bool(labelled.comparisons),
        "margin": _margins(labelled),
        "reference_label": labelled.labels[0],
        "charts": charts,
        "domains": _domain_table(labelled),
        "predictions": prediction_rows(labelled),
        "choices": changed_choices(labelled),
        "aligned": aligned_rows(labelled),
        "changed": _changed(labelled),
        "shown": data["numShown"],
        "total": data["numTokens"],
        "conditions": conditions_of(labelled),
        "notes": notes_of(labelled),
    }


def asset(name: str) -> str:
    """Return a file of the page, as text."""
    folder = resources.files("perplexit.report") / "assets"
    return (folder / name).read_text(encoding="utf-8")


def policy_of(script: str, style: str) -> str:
    """Return the content security policy: this script, this style, and nothing from anywhere."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def json_block(data: Any) -> str:
    """Return JSON in which no character can end the script element that it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _margins(labelled: LabelledRuns) -> str:
    """Return the margins of the verdicts in words; runs may have noise floors of their own."""
    judged = [found.judged for found in labelled.comparisons]
    judged += [found.judged for _, found in labelled.aligned]
    return " or ".join(dict.fromkeys(found.margin_in_words for found in judged)) or "none"


def _facts(labelled: LabelledRuns) -> list[str]:
    """Return the conditions that a reader needs beside the first sentence."""
    run = labelled.reference
    protocol = run.input_spec.get("protocol", {})
    windows = f"protocol {run.protocol}"
    if protocol.get("max_length"):
        windows += f", windows of {protocol['max_length']:,}"
    scored = counted(run.num_tokens, "scored token")
    if run.num_bytes:
        scored += f" ({run.num_bytes:,} bytes)"
    documents = counted(run.num_documents, "document")
    return [f"{scored} in {documents}", windows, f"input {run.input_fingerprint[:12]}"]


def _run_rows(labelled: LabelledRuns) -> list[dict[str, Any]]:
    """Return a row a run of the table under the verdict."""
    comparisons = (None, *labelled.comparisons)
    rows = []
    for index, (label, run) in enumerate(zip(labelled.labels, labelled.runs, strict=True)):
        comparison = comparisons[index]
        memory, where = peak_bytes_of(run)
        speed, load = run.tokens_per_second, run.seconds.get("load")
        low, high = run.bits_per_byte_low, run.bits_per_byte_high
        rows.append(
            {
                "index": index,
                "label": label,
                "precision": precision_of(run),
                "address": str(run.model.get("address", "")),
                "perplexity": figure(run.perplexity, run.perplexity_low, run.perplexity_high),
                "perplexity_interval": interval(run.perplexity_low, run.perplexity_high),
                "bits": figure(run.bits_per_byte, low, high),
                "bits_interval": interval(low, high),
                **_ratio_cells(comparison),
                "verdict": None if comparison is None else comparison.verdict,
                "memory": mebibytes(memory),
                "memory_where": where if memory is not None else "",
                "speed": DASH if speed is None else f"{speed:,.0f}",
                "load": DASH if load is None else f"{load:.1f}",
            }
        )
    return rows


def _ratio_cells(comparison: Comparison | None) -> dict[str, str]:
    if comparison is None:
        return {"ratio": "1", "ratio_interval": ""}
    low, high = comparison.ppl_ratio_low, comparison.ppl_ratio_high
    ratio = figure(comparison.ppl_ratio, low, high)
    return {"ratio": ratio, "ratio_interval": interval(low, high)}


def _domain_table(labelled: LabelledRuns) -> list[dict[str, Any]]:
    """Return perplexity by domain, a column a run, with paired ratios; empty without domains."""
    runs = labelled.runs
    rows = []
    for entry in runs[0].domains:
        cells = []
        for index, run in enumerate(runs):
            own = next((d for d in run.domains if d["domain"] == entry["domain"]), None)
            shown = _domain_perplexity(own) if own else DASH
            ratio, verdict = _domain_ratio(labelled, index, entry)
            cells.append({"perplexity": shown, "ratio": ratio, "verdict": verdict})
        rows.append(
            {"domain": entry["domain"], "tokens": f"{entry['num_tokens']:,}", "cells": cells}
        )
    return rows


def _domain_perplexity(own: Mapping[str, Any]) -> str:
    """Return a domain's perplexity with its interval, which runs of version 1 do not have."""
    low, high = own.get("perplexity_low"), own.get("perplexity_high")
    return f"{figure(own['perplexity'], low, high)} {interval(low, high)}".strip()


def _domain_ratio(labelled: LabelledRuns, index: int, entry: dict[str, Any]) -> tuple[str, str]:
    """Return (the paired ratio as text, the verdict) of a run in a domain; reference: empty."""
    if index == 0:
        return "", ""
    for domain in labelled.comparisons[index - 1].domains:
        if domain.domain == entry["domain"]:
            low, high = domain.ppl_ratio_low, domain.ppl_ratio_high
            shown = f"× {figure(domain.ppl_ratio, low, high)} {interval(low, high)}".strip()
            return shown, domain.verdict
    return "", ""


def _changed(labelled: LabelledRuns) -> list[ChangedToken]:
    """Return the first candidate's most changed tokens, for readers without the script."""
    return list(labelled.comparisons[0].most_changed) if labelled.comparisons else []
