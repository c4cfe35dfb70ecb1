"""Records → Markdown: the conditions, the aims, a row for each contender, a line per script."""

import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

from perplexit.resources.cores import num_cores
from sidebyside.paired_ratios import Spread, times_faster, tokens_per_second
from sidebyside.records import (
    Record,
    findings,
    loaded_bytes,
    mean_nll,
    peak_bytes,
    ratio_to,
    shares,
    timed,
)
from sidebyside.sections import FUNCTIONS, aims_of, section_order

MIB = 2**20
AIMS_HEADER = ("what", "section", "aim", "measured", "met")
CONTENDERS_HEADER = (
    "section",
    "",
    "tokens/s",
    "× base",
    "× lm-eval",
    "share of the GEMM ceiling",
    "with attention",
    "loaded (MiB)",
    "peak beyond that (MiB)",
    "mean nll, nats from the base",
)


def report(records: Mapping[str, Record]) -> Iterator[str]:
    """Yield the tables of all records, by section name, as Markdown lines."""
    if not records:
        return
    taken = [name for name, record in records.items() if "contenders" in record]
    ordered = {name: records[name] for name in sorted(taken, key=section_order)}
    rows = [row for name, record in ordered.items() for row in contender_rows(name, record)]
    ordered |= {entry.name: records[entry.name] for entry in FUNCTIONS if entry.name in records}
    yield _conditions(max(ordered.values(), key=lambda record: str(record["date"])))
    found = [
        finding.row()
        for name, record in ordered.items()
        for finding in findings(name, record, aims_of(name))
    ]
    yield from ("", *table(AIMS_HEADER, found), "", *table(CONTENDERS_HEADER, rows), "")
    for name, sentence in SENTENCES.items():
        if name in records:
            yield sentence(records[name])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    text = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [text[0], "|" + "---|" * len(header), *text[1:]]


def contender_rows(section: str, record: Record) -> Iterator[list[str]]:
    """Yield the cells of every contender of an alternation."""
    base = record["base"]
    for name, entry in record["contenders"].items():
        if "error" in entry:
            error = " ".join(entry["error"].split()).replace("|", "/")[:160]
            yield [section, name, f"failed: {error}", *[""] * 7]
            continue
        taken = timed(record, name) or {"seconds": [float("nan")], "num_tokens": 0}
        share = shares(record, name) or (None, None)
        nll, base_nll = mean_nll(record, name), mean_nll(record, base)
        yield [
            section,
            f"{name} (the base)" if name == base else name,
            f"{tokens_per_second(taken['seconds'], taken['num_tokens']):,.0f}",
            _shown(ratio_to(record, name, base), ".2f"),
            _shown(ratio_to(record, name, "lm-eval"), ".2f"),
            _shown(share[0], ".2f"),
            _shown(share[1], ".2f"),
            _in_mib(loaded_bytes(record, name)),
            _in_mib(peak_bytes(record, name)),
            "" if nll is None or base_nll is None else f"{nll - base_nll:+.1e}",
        ]


def _shown(value: Spread | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def _in_mib(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / MIB:,.0f}"


def _overhead(record: Record) -> str:
    replays = Spread.of(record["replay_seconds"])
    return (
        f"- Beside the model, an evaluation of {record['num_tokens']:,} tokens (windows of "
        f"{record['window']}) took {record['beside_seconds']:.2f} s of "
        f"{record['total_seconds']:.1f} s, {record['share']:.1%}; replayed without the model "
        f"{replays:.2f} s, {record['replay_share']:.1%}."
    )


def _prepare(record: Record) -> str:
    seconds = record["seconds"]
    ratio = times_faster(seconds["prepare"], seconds["encode"])
    return (
        f"- `prepare` took {ratio:.2f} times the tokenizer's own `encode_batch` on "
        f"{record['num_bytes'] / 1e6:.1f} MB in {record['num_documents']} documents "
        f"({Spread.of(seconds['prepare']):.2f} s; the same ids: {record['same_ids']})."
    )


def _igf(record: Record) -> str:
    seconds = record["seconds"]
    ratios = {mode: times_faster(seconds["original"], seconds[mode]) for mode in record["modes"]}
    return "- Labels of information gain a second, against the original's way: " + (
        ", ".join(f"{mode} × {ratio:.1f}" for mode, ratio in ratios.items()) + "."
    )


def _large_corpus(record: Record) -> str:
    held = [num_bytes / MIB for _, num_bytes in record["held"]]
    half = len(held) // 2
    return (
        f"- {record['num_bytes'] / 1e9:.2f} GB of documents prepared in {record['seconds']:.0f} s, "
        f"peak {record['peak_bytes'] / MIB:,.0f} MiB beyond the start; {max(held[:half]):,.0f} MiB "
        f"at most in the first half, {max(held[half:]):,.0f} in the second."
    )


SENTENCES = {"overhead": _overhead, "prepare": _prepare, "igf": _igf, "1gb": _large_corpus}


PACKAGES = (
    *("perplexit", "torch", "transformers", "lm-eval", "openvino", "llama-cpp-python"),
    *("tokenizers", "numpy"),
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, system, Python, and the versions of what is compared.

    The processor's features are known on Linux alone; a version is None where it is not installed.
    """
    installed = {found.name.lower(): found.version for found in distributions()}
    features = _cpuinfo("flags").split()
    return {
        "processor": _cpuinfo("model name") or platform.processor(),
        "cores": num_cores(),
        "instructions": [name for name in INSTRUCTIONS if name in features],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in PACKAGES},
    }


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _conditions(record: Record) -> str:
    """Return one paragraph: where and when, with which versions and how many threads."""
    machine, conditions = record["machine"], record["conditions"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    return (
        f"{record['date']}, {machine['processor']}, {machine['cores']} cores ("
        f"{', '.join(machine['instructions'])}), {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']}; {versions}. {conditions['threads']} threads, "
        f"{conditions['rounds']} rounds. A figure is a median, with the least and the greatest of "
        "the rounds behind it; a ratio is taken round by round."
    )


def write_part(page: Path, part: str, lines: Iterable[str]) -> None:
    """Put the lines between `<!-- PART: begin -->` and `<!-- PART: end -->`, and nothing else.

    Raises ValueError where the page has no such marks.
    """
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"expected the lines {begin} and {end} in {page}")
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    written = "\n".join(lines)
    page.write_text(f"{head}{begin}\n\n{written}\n\n{end}{tail}", encoding="utf-8")
