"""The page: figures, charts and token data in the template, with everything escaped.

Tokens are data. They reach the page as text that Jinja escapes, or inside a JSON block in which no
character can end a script element; a content security policy lets only the page's own script and
style run, by their hashes, and lets nothing be fetched.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from perplexit import __version__
from perplexit.comparison.verdict_record import precision_name
from perplexit.metrics.estimate import counted, figure, figure_with_interval, interval, mebibytes
from perplexit.report.chart_drawings import asset, loaded
from perplexit.report.experiment_section import ExperimentSection
from perplexit.report.headlines import findings_of, headline
from perplexit.report.labelled_runs import LabelledRuns, peak_bytes_of
from perplexit.report.run_charts import charts_of
from perplexit.report.run_tables import (
    aligned_rows,
    changed_choices,
    conditions_of,
    notes_of,
    prediction_rows,
)

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
    labelled: LabelledRuns | None, data: dict[str, Any], sections: Sequence[ExperimentSection] = ()
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
        figure=figure,
        figure_with_interval=figure_with_interval,
        interval=interval,
        mebibytes=mebibytes,
        headline=sections[0].headline if labelled is None else headline(labelled),
        findings=[] if labelled is None else findings_of(labelled),
        signs=_SIGNS,
        sections=sections,
        version=__version__,
        **({"runs": []} if labelled is None else _of_runs(labelled, data)),
        data=markup(json_block(data)),
    )
    return rendered


def _of_runs(labelled: LabelledRuns, data: dict[str, Any]) -> dict[str, Any]:
    """Return what the template says of the runs."""
    return {
        "facts": _facts(labelled),
        "confidence": f"{100 * labelled.confidence:g} %",
        "runs": _run_rows(labelled),
        "is_comparison": bool(labelled.comparisons),
        "margin": _margins(labelled),
        "reference_label": labelled.labels[0],
        "charts": charts_of(labelled),
        "domains": _domain_table(labelled),
        "predictions": prediction_rows(labelled),
        "choices": changed_choices(labelled),
        "aligned": aligned_rows(labelled),
        "changed": labelled.comparisons[0].most_changed if labelled.comparisons else (),
        "shown": data["numShown"],
        "total": data["numTokens"],
        "conditions": conditions_of(labelled),
        "notes": notes_of(labelled),
    }


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
    """Return one row per run for the table under the verdict; the template formats the figures."""
    rows = zip(labelled.labels, labelled.runs, (None, *labelled.comparisons), strict=True)
    return [
        {
            "index": index,
            "label": label,
            "precision": precision_name(run.session),
            "address": str(run.model.get("address", "")),
            "run": run,
            "comparison": comparison,
            "memory": peak_bytes_of(run),
        }
        for index, (label, run, comparison) in enumerate(rows)
    ]


def _domain_table(labelled: LabelledRuns) -> list[dict[str, Any]]:
    """Return one row per domain with (each run's perplexity, its paired ratio) as cells.

    The reference has no ratio, and a run without the domain has nothing.
    """
    rows = []
    for entry in labelled.reference.domains:
        name = entry["domain"]
        own = [next((d for d in run.domains if d["domain"] == name), None) for run in labelled.runs]
        ratios = [
            next((d for d in comparison.domains if d.domain == name), None)
            for comparison in labelled.comparisons
        ]
        cells = list(zip(own, (None, *ratios), strict=True))
        rows.append({"domain": name, "num_tokens": entry["num_tokens"], "cells": cells})
    return rows
