"""Records → Markdown: the conditions, the aims, and for each question a table with its command."""

import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from perplexit.resources.cores import num_cores
from sidebyside.records import Record, Spread, findings, mean_nll, mebibytes, rate, share, speedup
from sidebyside.sections import KINDS, section_order

AIMS_HEADER = ("what", "section", "aim", "measured", "met")
PACKAGES = (
    *("perplexit", "torch", "transformers", "lm-eval", "openvino", "llama-cpp-python"),
    *("tokenizers", "numpy"),
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def report(records: Mapping[str, Record]) -> Iterator[str]:
    """Yield the tables of all records, by section name, as Markdown lines."""
    if not records:
        return
    newest = max(records.values(), key=lambda record: str(record["date"]))
    yield (
        f"{newest['date']}, {newest['machine']}. A figure is a median, with the least and the "
        "greatest of the rounds behind it; a ratio is taken round by round."
    )
    ordered = sorted(records, key=lambda name: section_order(records[name]["kind"], name))
    found = [
        [what, section, aim, f"{figure:.3g}", "yes" if met else "no"]
        for name in ordered
        if not records[name]["conditions"]["quick"]  # other sizes than the aims are about
        for what, section, aim, figure, met in findings(
            name, records[name], KINDS[records[name]["kind"]].aims
        )
    ]
    if found:
        yield from ("", *table(AIMS_HEADER, found))
    for kind, names in groupby(ordered, lambda name: str(records[name]["kind"])):
        yield from _section(kind, {name: records[name] for name in names})


def _section(kind: str, members: Mapping[str, Record]) -> Iterator[str]:
    """Yield the question, how, when and in how long it was answered, and the answer's table."""
    conditions = next(iter(members.values()))["conditions"]
    dates = ", ".join(sorted({str(record["date"]) for record in members.values()}))
    minutes = sum(record["took_seconds"] for record in members.values()) / 60
    options = " --quick" * conditions["quick"]
    options += f" --against {conditions['against']}" if "against" in conditions else ""
    yield ""
    yield (
        f"**{KINDS[kind].question}** `python bench/run.py --only {kind}{options}`, {dates}, "
        f"{conditions['threads']} threads, {conditions['rounds']} rounds, {minutes:.1f} minutes"
        + (f"; {KINDS[kind].unit} per second." if KINDS[kind].contenders else ".")
    )
    yield ""
    rows = [row for record in members.values() for row in record.get("rows", ())]
    if rows:
        yield from table(list(rows[0]), [[_shown(value) for value in row.values()] for row in rows])
        return
    cells = [row for name, record in members.items() for row in contender_rows(name, record)]
    kept = [column for column in range(len(CONTENDERS_HEADER)) if any(row[column] for row in cells)]
    header, *rest = ([row[column] for column in kept] for row in (CONTENDERS_HEADER, *cells))
    yield from table(header, rest)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    text = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [text[0], "|" + "---|" * len(header), *text[1:]]


# The columns of an alternation: heading, format, and how a contender's figure is found.
COLUMNS: tuple[tuple[str, str, Callable[[Record, str], Any]], ...] = (
    ("per second", ",.4g", rate),
    ("× base", ".2f", lambda r, n: speedup(r, n, r["base"])),
    ("× lm-eval", ".2f", lambda r, n: speedup(r, n, "lm-eval")),
    ("share of the GEMM ceiling", ".2f", share),
    ("with attention", ".2f", partial(share, attention=True)),
    ("loaded (MiB)", ",.0f", lambda r, n: mebibytes(r, n, "loaded_bytes")),
    ("peak beyond that (MiB)", ",.0f", lambda r, n: mebibytes(r, n, "peak_bytes")),
    ("process (MiB)", ",.0f", lambda r, n: mebibytes(r, n, "process_bytes")),
    ("tensors (MiB)", ",.0f", lambda r, n: mebibytes(r, n, "tensor_bytes")),
    ("mean nll, nats from the base", "+.1e", lambda r, n: mean_nll(r, n) - mean_nll(r, r["base"])),
)
CONTENDERS_HEADER = ("section", "", *(heading for heading, _, _ in COLUMNS))


def contender_rows(section: str, record: Record) -> Iterator[list[str]]:
    """Yield the cells of every contender of an alternation; empty: not measured."""
    for name, entry in record["contenders"].items():
        cells = [""] * len(COLUMNS)
        if "error" in entry:
            error = " ".join(entry["error"].split()).replace("|", "/")[:160]
            yield [section, name, f"failed: {error}", *cells[1:]]
            continue
        for column, (_, spec, figure) in enumerate(COLUMNS):
            with suppress(KeyError):
                cells[column] = format(figure(record, name), spec)
        yield [section, f"{name} (the base)" if name == record["base"] else name, *cells]


def _shown(value: Any) -> str:
    """Return a value of a row as text: a list as its median and extremes."""
    known = [x for x in value if x is not None] if isinstance(value, list) else value
    if value is None or known == []:
        return ""
    shown = Spread.of(known) if isinstance(known, list) else known
    return str(shown) if isinstance(shown, str | bool) else f"{shown:,.5g}"


def machine() -> str:
    """Return processor, cores, memory, system, Python, and the versions of what is compared."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    features = ", ".join(name for name in INSTRUCTIONS if f" {name} " in text)
    installed = {
        found.name.lower().replace("_", "-"): found.version for found in metadata.distributions()
    }
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    return (
        f"{model[1] if model else platform.processor()}, {num_cores()} cores ({features}), "
        f"{psutil.virtual_memory().total / 2**30:.1f} GiB, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}; {versions}"
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
