"""Records → Markdown: what was measured, a row a contender, and the aims with what was found."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sidebyside.contenders import CEILING
from sidebyside.figures import (
    ForwardFlops,
    Spread,
    share_of_ceiling,
    times_faster,
    tokens_per_second,
)

Record = Mapping[str, Any]
MIB = 2**20


def ratio_to(record: Record, name: str, base: str) -> Spread | None:
    """How many times the rate of `base` the contender's is; None where either has none."""
    ours, theirs = (timed(record, contender) for contender in (name, base))
    if ours is None or theirs is None:
        return None
    return times_faster(
        theirs["seconds"],
        ours["seconds"],
        base_tokens=theirs["num_tokens"],
        tokens=ours["num_tokens"],
    )


def shares(record: Record, name: str) -> tuple[Spread, Spread] | None:
    """Shares of the GEMM ceiling: weight products alone, and with attention counted."""
    ours, gemm = timed(record, name), timed(record, CEILING)
    if ours is None or gemm is None or record.get("flops") is None:
        return None
    return share_of_ceiling(gemm["seconds"], ours["seconds"], ForwardFlops(**record["flops"]))


def timed(record: Record, name: str) -> Record | None:
    """A contender's entry, where it took turns."""
    entry: Record = record["contenders"].get(name, {})
    return entry if entry.get("seconds") else None


def peak_bytes(record: Record, name: str) -> float | None:
    """The most memory of a turn beyond the loaded model; None where it was not measured."""
    found = record["contenders"].get(name, {}).get("memory", {}).get("peak_bytes")
    return None if found is None else float(found)


def loaded_bytes(record: Record, name: str) -> float | None:
    """The resident set before a turn: libraries, weights, and whatever was made of them."""
    found = record["contenders"].get(name, {}).get("memory", {}).get("loaded_bytes")
    return None if found is None else float(found)


def mean_nll(record: Record, name: str) -> float | None:
    """Nats a token: of the check where there was one, else of the turn that measured memory."""
    entry = record["contenders"].get(name, {})
    found = entry.get("check") or entry.get("memory") or {}
    return None if found.get("nll_sum") is None else found["nll_sum"] / found["num_tokens"]


def big_table(records: Mapping[str, Record]) -> list[str]:
    """Every contender of every alternation."""
    lines = [
        "| section | | tokens/s | × base | × lm-eval | share of the GEMM ceiling "
        "| with attention | loaded (MiB) | peak beyond that (MiB) | mean nll, nats from the base |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for section, record in records.items():
        for name, entry in record["contenders"].items():
            if "error" in entry:
                lines.append(
                    f"| {section} | {name} | failed: {_one_line(entry['error'])} |{' |' * 7}"
                )
            else:
                base = " (the base)" if name == record["base"] else ""
                lines.append(f"| {section} | {name}{base} | {_row(record, name)} |")
    return lines


def _row(record: Record, name: str) -> str:
    entry = timed(record, name) or {"seconds": [float("nan")], "num_tokens": 0}
    base = record["base"]
    share = shares(record, name)
    cells = [
        f"{tokens_per_second(entry['seconds'], entry['num_tokens']):,.0f}",
        _shown(ratio_to(record, name, base), ".2f"),
        _shown(ratio_to(record, name, "lm-eval"), ".2f"),
        _shown(share and share[0], ".2f"),
        _shown(share and share[1], ".2f"),
        _shown(_mib(loaded_bytes(record, name)), ",.0f"),
        _shown(_mib(peak_bytes(record, name)), ",.0f"),
        _difference(mean_nll(record, name), mean_nll(record, base)),
    ]
    return " | ".join(cells)


def _shown(value: Spread | float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def _mib(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / MIB


def _difference(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value - base:+.1e}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:160]


def script_lines(scripts: Mapping[str, Record]) -> Iterator[str]:
    """A sentence for each measurement that is no alternation."""
    if overhead := scripts.get("overhead"):
        replays, share = Spread.of(overhead["replay_seconds"]), overhead["replay_share"]
        yield (
            f"- Beside the model, an evaluation of {overhead['num_tokens']:,} tokens (windows of "
            f"{overhead['window']}) took {overhead['beside_seconds']:.2f} s "
            f"of {overhead['total_seconds']:.1f} s, {overhead['share']:.1%}; replayed without "
            f"the model {replays:.2f} s, {share:.1%}."
        )
    if preparing := scripts.get("prepare"):
        seconds = preparing["seconds"]
        ratio = times_faster(seconds["prepare"], seconds["encode"])
        yield (
            f"- `prepare` took {ratio:.2f} times the tokenizer's own `encode_batch` on "
            f"{preparing['num_bytes'] / 1e6:.1f} MB in {preparing['num_documents']} documents "
            f"({Spread.of(seconds['prepare']):.2f} s; the same ids: {preparing['same_ids']})."
        )
    if igf := scripts.get("igf"):
        seconds = igf["seconds"]
        ratios = {m: times_faster(seconds["original"], seconds[m]) for m in igf["modes"]}
        yield "- Labels of information gain a second, against the original's way: " + (
            ", ".join(f"{mode} × {ratio:.1f}" for mode, ratio in ratios.items()) + "."
        )
    if large := scripts.get("1gb"):
        held = [num_bytes for _, num_bytes in large["held"]]
        yield (
            f"- {large['num_bytes'] / 1e9:.2f} GB of documents prepared in "
            f"{large['seconds']:.0f} s, peak {large['peak_bytes'] / MIB:,.0f} MiB beyond the "
            f"start; {max(held[: len(held) // 2]) / MIB:,.0f} MiB at most in the first half, "
            f"{max(held[len(held) // 2 :]) / MIB:,.0f} in the second."
        )


def machine_lines(machine: Record, conditions: Record, date: str) -> Sequence[str]:
    """One paragraph: where and when, with which versions and how many threads."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    return [
        f"{date}, {machine['processor']}, {machine['cores']} cores ("
        f"{', '.join(machine['instructions'])}), {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']}; {versions}. {conditions['threads']} threads, "
        f"{conditions['rounds']} rounds. A figure is a median, with the least and the greatest of "
        "the rounds behind it; a ratio is taken round by round."
    ]
