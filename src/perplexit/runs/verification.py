"""Stored runs checked against themselves."""

import math
from pathlib import Path
from typing import Any

from perplexit.errors import PerplexitError
from perplexit.metrics.intervals import MIN_CLUSTERS
from perplexit.runs.run import Run
from perplexit.runs.run_figures import figures_of


def verify_run(folder: str | Path) -> list[str]:
    """What is wrong with a stored run, one sentence each; empty where it is sound.

    The token table must be the one that was recorded (SHA-256), and every figure in `run.json`
    must follow from it: all are computed again, without a model.
    Raises RunError where there is no run to check.
    """
    run = Run.open(folder)
    if run.status != "complete":
        return [f"the run is {run.status}; go on with `perplexit eval` and the same --run"]
    damage = run.damage()
    if damage is not None:
        return [f"{damage}; evaluate again with the same --run"]
    if run.measurement_fingerprint != run.identified().measurement_fingerprint:
        return ["measurement_fingerprint is not that of the conditions that are recorded"]
    try:
        figures = figures_of(
            run.tokens,
            confidence=run.confidence,
            on_non_finite=run.on_non_finite,
            spec=run.input_spec,
        )
    except PerplexitError as error:
        return [str(error)]
    recorded = run.to_json()
    computed = Run.from_json(recorded | figures).to_json()
    if run.schema_version == 1:
        recorded = _as_now(recorded, computed)
    return list(_differences(recorded, computed))


def _as_now(recorded: dict[str, Any], computed: dict[str, Any]) -> dict[str, Any]:
    """A record of version 1 with what it lacks, or measured in another way, as it is now.

    Version 1 scaled the interval of bits per byte from that of the loss, gave two and three
    clusters an interval, and domains and the other figures none.
    """
    new = {name for name in recorded if name.endswith(("_low", "_high"))} | {"reasons"}
    if recorded["interval_method"] is not None and recorded["num_clusters"] >= MIN_CLUSTERS:
        new -= {"perplexity_low", "perplexity_high"}
    domains = [
        now | then for now, then in zip(computed["domains"], recorded["domains"], strict=False)
    ]
    if len(domains) != len(recorded["domains"]):
        domains = recorded["domains"]
    return recorded | {name: computed[name] for name in new} | {"domains": domains}


def _differences(recorded: dict[str, Any], computed: dict[str, Any]) -> list[str]:
    return [
        f"{name}: recorded {recorded[name]!r}, but the tokens give {computed[name]!r}"
        for name in recorded
        if not _same(recorded[name], computed[name])
    ]


def _same(a: Any, b: Any) -> bool:
    """Equal, floats to the last few bits (another platform's exp may differ there)."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-300)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
