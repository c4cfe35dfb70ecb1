"""The rows behind the report's charts: figures of runs and comparisons, under their labels."""

from perplexit.comparison.compared_tokens import losses_above
from perplexit.report.labelled_runs import LabelledRuns

Row = dict[str, str | float | int | None]


def change_rows(labelled: LabelledRuns) -> list[Row]:
    """Return how much losses change: a curve for each candidate and direction."""
    return [
        {"run": label, "direction": direction, "change": x, "share": share}
        for label, _, comparison in labelled.candidates
        if comparison.tokens is not None
        for direction, curve in (
            ("worse", comparison.tokens.rises()),
            ("better", comparison.tokens.falls()),
        )
        for x, share in curve
    ]


def kl_rows(labelled: LabelledRuns) -> list[Row]:
    """Return how far distributions moved, for the candidates whose comparison has a KL."""
    return [
        {"run": label, "kl": x, "share": share}
        for label, _, comparison in labelled.candidates
        if comparison.tokens is not None
        for x, share in comparison.tokens.kl_above()
    ]


def loss_rows(labelled: LabelledRuns) -> list[Row]:
    """Return how losses are spread, a curve for each run."""
    return [
        {"run": label, "loss": x, "share": share}
        for label, run in zip(labelled.labels, labelled.runs, strict=True)
        for x, share in losses_above(run)
    ]


def position_rows(labelled: LabelledRuns) -> list[Row]:
    """Mean loss by the target's position in its window, one row per run and bucket."""
    return [
        {
            "run": label,
            "from": bucket["start"],
            "to": bucket["stop"] - 1,
            "middle": (bucket["start"] + bucket["stop"] - 1) / 2,
            "loss": bucket["mean_nll"],
            "tokens": bucket["num_tokens"],
        }
        for label, run in zip(labelled.labels, labelled.runs, strict=True)
        for bucket in run.loss_by_position
        if bucket["mean_nll"] is not None
    ]


def agreement_rows(labelled: LabelledRuns) -> list[Row]:
    """Return the share of equal first choices, by the reference's confidence in its own."""
    return [
        {
            "run": label,
            "confidence": f"{100 * bucket.low_confidence:g}–{100 * bucket.high_confidence:g} %",
            "bucket": bucket.low_confidence,
            "share": bucket.share.value,
            "low": bucket.share.low,
            "high": bucket.share.high,
            "tokens": bucket.num_tokens,
        }
        for label, _, comparison in labelled.candidates
        if comparison.tokens is not None
        for bucket in comparison.tokens.agreement_by_confidence()
    ]
