"""The measurement on a CUDA device, as a page of Markdown."""

from collections.abc import Mapping
from typing import Any


def cuda_page(report: Mapping[str, Any], ours: str) -> str:
    """Conditions, a row a contender, what was left out, and the aims of `ours`."""
    header = [
        "contender",
        "median s (min-max)",
        "tokens/s",
        "of torch.mm",
        f"× {report['compared_with']}",
        "peak MB beyond weights",
        "of its peak",
        "mean nll",
    ]
    lines = [
        f"{report['device']}, {report['num_parameters']:,} parameters, vocabulary "
        f"{report['vocab_size']:,}, {report['windows']} windows of {report['max_length']} ids, "
        f"batches of {report['batch_size']}, {report['dtype']}, torch "
        f"{report['machine']['versions']['torch']}; torch.mm reaches "
        f"{report['ceiling_tflops']:.3g} TFLOP/s.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for name, row in report["contenders"].items():
        peak_bytes = row["peak_bytes_beyond_weights"]
        peak = _written(None if peak_bytes is None else peak_bytes / 1e6, "{:.1f}")
        share, nll = _written(row["peak_share"], "{:.3f}"), _written(row["mean_nll"], "{:.5f}")
        times = row["seconds"]
        spread = f"{row['median_seconds']:.4f} ({min(times):.4f}-{max(times):.4f})"
        lines.append(
            f"| {name} | {spread} | {row['tokens_per_second']:,.0f} | "
            f"{row['share_of_ceiling']:.3f} | {row['ratio']:.2f} | {peak} | {share} | {nll} |"
        )
    lines += ["", *(f"Left out: {name}: {why}" for name, why in report["left_out"].items())]
    return "\n".join([*lines, _verdict(report, ours), ""])


def _verdict(report: Mapping[str, Any], ours: str) -> str:
    if not report["aims_apply"]:
        return (
            "Not the aim's conditions (CUDA, the large model, bfloat16): this proves the script. "
            "On the CPU a peak counts the tensors that torch's operations return, so what compiled "
            "code takes inside is not in it."
        )
    row, aims = report["contenders"][ours], report["aims"]
    found = [
        (f"share of the ceiling >= {aims['share_of_ceiling']}", row["share_of_ceiling"], 1),
        (f"ratio >= {aims['ratio']}", row["ratio"], 1),
        (f"peak share <= {aims['peak_share']}", row["peak_share"], -1),
    ]
    limits = (aims["share_of_ceiling"], aims["ratio"], aims["peak_share"])
    return "Aims: " + "; ".join(
        f"{text}: {value:.3f} ({'met' if sign * value >= sign * limit else 'NOT met'})"
        for (text, value, sign), limit in zip(found, limits, strict=True)
    )


def _written(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
