"""Runs as tables that people read. Everything shown is a value of `run.json`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from perplexit.cli.output import in_mib, with_interval
from perplexit.metrics.estimate import counted, missing_figures

MOST_DOMAINS = 20  # rows for people; the record has them all


def input_record(token_file: Any) -> dict[str, Any]:
    """Return a token file's identity, its counts and its spec, as JSON values."""
    return {
        "path": str(token_file.path),
        "protocol": token_file.protocol,
        "input_fingerprint": token_file.input_fingerprint,
        "text_fingerprint": token_file.text_fingerprint,
        "tokenizer_fingerprint": token_file.tokenizer_fingerprint,
        "num_documents": token_file.num_documents,
        "num_ids": token_file.num_ids,
        "num_windows": token_file.num_windows,
        "num_tokens": token_file.num_targets,
        "vocab_size": token_file.vocab_size,
        "spec": token_file.spec,
    }


def input_table(token_file: Any) -> Table:
    """Return one token file: what is in it, and what was left out with the reason."""
    protocol = token_file.spec["protocol"]
    chosen = [
        f"{name.replace('_', ' ')} {protocol[name]}"
        for name in ("max_length", "stride", "bos")
        if protocol[name] is not None
    ]
    rows = [
        ("token file", str(token_file.path)),
        ("protocol", ", ".join([token_file.protocol, *chosen])),
        ("documents", _count(token_file.num_documents)),
        ("tokens", _count(token_file.num_ids)),
        ("windows", _count(token_file.num_windows)),
        ("tokens scored", _count(token_file.num_targets)),
        ("input fingerprint", token_file.input_fingerprint),
    ]
    for reason, skipped in token_file.spec["corpus"]["skipped"].items():
        rows.append(("skipped", f"{skipped['count']}: {reason} (first: {skipped['first']})"))
    return _pairs(rows)


def run_table(record: Mapping[str, Any]) -> Table:
    """Return one run: figure by figure, with the conditions under which it was measured."""
    return _pairs(_rows(record))


def program_table(record: Mapping[str, Any]) -> Table:
    """Return a table of one compiled program, with how far its losses are from the checkpoint's."""
    verification, shapes = record["verification"], record["shapes"]
    fixed = [
        f"{name.replace('_', ' ')} {size}" for name, size in shapes.items() if size is not None
    ]
    gives = "one loss per target" if record["perplexity"] else "logits"
    difference = f"{verification['max_abs_nll_difference']:.1e} nats per token"
    checked = f"{verification['reference']}, over {verification['num_tokens']:,} tokens"
    return _pairs(
        [
            ("engine", str(record["engine"])),
            ("model", str(record["model"]["address"])),
            ("gives", f"{gives}, computed in {record['dtype']}"),
            ("shapes", ", ".join(fixed) or "any"),
            ("quantization", _quantization(record)),
            ("size", in_mib(sum(file["num_bytes"] for file in record["files"]))),
            ("verified", f"at most {difference} from {checked}"),
        ]
    )


def runs_table(records: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> Table:
    """Return one line per run."""
    table = Table(box=None, pad_edge=False)
    for name in ("run", "status", "model", "engine", "dtype", "quantization"):
        table.add_column(name, overflow="fold")
    table.add_column("perplexity", justify="right")
    table.add_column("tokens", justify="right")
    for record, folder in zip(records, folders, strict=True):
        session = record["session"]
        table.add_row(
            escape(folder),
            record["status"],
            escape(str(record["model"].get("address", "-"))),
            str(session.get("engine", "-")),
            str(session.get("dtype", "-")),
            quantization_name(session),
            escape(_estimate(record, "perplexity")),
            _count(record["num_tokens"]),
        )
    return table


def quantization_name(session: Mapping[str, Any]) -> str:
    """Return the session's precision, `int4` for example; a dash where nothing is quantized."""
    quantization = session.get("quantization")
    return "-" if not quantization else str(quantization.get("name", "-"))


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def _rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, session = record["model"], record["session"]
    peaks = [f"{name} {in_mib(x)}" for name, x in record["peak_memory_bytes"].items() if x]
    rows = [
        ("status", str(record["status"])),
        ("perplexity", _estimate(record, "perplexity")),
        ("bits per byte", _estimate(record, "bits_per_byte")),
        ("byte perplexity", _estimate(record, "byte_perplexity")),
        ("word perplexity", _estimate(record, "word_perplexity")),
        ("tokens scored", _count(record["num_tokens"])),
        ("interval", _interval(record)),
        ("protocol", str(record["protocol"])),
        ("input", str(record["input_fingerprint"])),
        ("signature", str(record.get("signature", "-"))),
        ("model", f"{model.get('address')} ({model.get('architecture')})"),
        (
            "session",
            f"{session.get('engine')} {session.get('version')}, {session.get('dtype')}, "
            f"{session.get('device')}{_mode(session)}",
        ),
        ("quantization", _quantization(session)),
        ("speed", _speed(record)),
        ("peak memory", ", ".join(peaks) or "-"),
    ]
    if record["protocol_perplexity"] is not None:
        rows.insert(2, ("the protocol's own", _estimate(record, "protocol_perplexity")))
    rows += [
        (f"perplexity of {row['domain']}", _estimate(row, "perplexity"))
        for row in record["domains"][:MOST_DOMAINS]
    ]
    if record.get("macro_average_perplexity") is not None:
        rows.append(("mean over domains", _estimate(record, "macro_average_perplexity")))
    if record["num_windows_resumed"]:
        rows.append(("windows not scored again", _count(record["num_windows_resumed"])))
    if record["num_non_finite"]:
        rows.append(("tokens left out (not finite)", _count(record["num_non_finite"])))
    rows += [("warning", warning) for warning in record["warnings"]]
    reasons = record["reasons"]
    return rows + [
        (f"no {', '.join(said).replace('_', ' ')}", reason)
        for reason, said in missing_figures(reasons).items()
        if reason != reasons.get("perplexity_low")
    ]


def _estimate(record: Mapping[str, Any], name: str) -> str:
    """Return a figure with its interval; a record of an older version may lack the ends."""
    return with_interval(record[name], record.get(f"{name}_low"), record.get(f"{name}_high"))


def _interval(record: Mapping[str, Any]) -> str:
    if "perplexity_low" in record["reasons"]:
        return str(record["reasons"]["perplexity_low"])
    found = counted(record["num_clusters"], "cluster")
    return f"{record['confidence']:.0%}, clustered by {record['interval_method']} ({found})"


def _mode(session: Mapping[str, Any]) -> str:
    if session.get("mode", "full") == "full":
        return ""
    return f", prefill of {session['prompt_len']}, decode by {session['decode_chunk']}"


def _quantization(session: Mapping[str, Any]) -> str:
    what = session.get("quantization")
    if not what:
        return "-"
    return (
        f"{what.get('name')} by {what.get('library')}: {what.get('num_modules')} modules, "
        f"{in_mib(what.get('num_bytes'))}, {what.get('effective_bits'):.3g} bits per parameter"
    )


def _speed(record: Mapping[str, Any]) -> str:
    speed, total = record["tokens_per_second"], record["seconds"].get("total")
    if speed is None or total is None:
        return "-"
    return f"{speed:,.0f} tokens/s, {total:.1f} s in all"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
