"""Perplexit and its peers side by side, in turns: `make bench`.

    python bench/run.py                     every section; a second call continues where it stopped
    python bench/run.py --only fp32-1024    sections whose name holds that
    python bench/run.py --only growth       how time and memory grow; measured only when named
    python bench/run.py --quick             less of everything (3 minutes; 7 where all is new)
    python bench/run.py --list              the sections' names and questions

Each section is a JSON file in `build/bench/`. `--page docs/benchmarks.md` writes its generated
parts: the tables, and, where every point was measured, the growth.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from sidebyside.alternation import Alternation, Bench, say
from sidebyside.growth import draw_growth, growth_axes, growth_table
from sidebyside.records import Record
from sidebyside.report import machine, report, write_part
from sidebyside.sections import FUNCTIONS, IDS_PER_TURN, Section, alternations, growth_sections
from sidebyside.workers import WorkerError, in_own_process

from perplexit.resources.cores import num_cores

ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 where every section that was asked for has its record."""
    options = _options(arguments)
    plan = list(_plan(options))
    if options.list:
        print(*(f"{item.name:28}{item.question}" for item in plan), sep="\n")
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    failed = measure(plan, options)
    write_report(options.output, options.page)
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--only", action="append", default=[], help="part of a section's name")
    parser.add_argument("--contenders", help="only these, by name, separated by commas")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, default=None, help="5, or 3 with --quick")
    parser.add_argument("--windows", type=int, nargs="+", default=None, help="window lengths")
    parser.add_argument(
        "--ids", type=int, help="in a turn, and a window per thread: 2048 (quick: 1024)"
    )
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER of your own")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page", type=Path, help="write its generated parts between their marks")
    found = parser.parse_args(arguments)
    found.rounds = found.rounds or (3 if found.quick else 5)
    found.ids = found.ids or (IDS_PER_TURN // 2 if found.quick else IDS_PER_TURN)
    found.windows = tuple(found.windows or ((512,) if found.quick else (512, 1024, 2048)))
    return found


def _plan(options: argparse.Namespace) -> Iterator[Section]:
    names = [text.partition("=")[0] for text in options.model]
    models = names or (["demo"] if options.quick else ["demo", "gpt2"])
    usual = alternations(models, options.windows, options.ids, options.threads)
    for section in (*usual, *growth_sections(), *FUNCTIONS):
        left_out = section.opt_in or (options.quick and section.name == "igf")
        named = any(part in section.name for part in options.only)
        if named or not (options.only or left_out):
            wanted = options.contenders.split(",") if options.contenders else section.contenders
            kept = tuple(name for name in section.contenders if name in wanted)
            yield replace(section, contenders=kept)


def measure(plan: Sequence[Section], options: argparse.Namespace) -> int:
    """Write the record of each section that has none; return how many could not be measured."""
    models = {name: Path(path) for name, _, path in (t.partition("=") for t in options.model)}
    amounts = options.threads, options.rounds, options.quick
    bench = Bench(options.output, *amounts, models, first=next(iter(models), "demo"))
    failed = 0
    for section in plan:
        path = options.output / f"{section.name}.json"
        conditions = _conditions(section, options)
        if not options.again and path.exists() and _read(path)["conditions"] == conditions:
            say(f"{section.name}: kept")
            continue
        say(section.name)
        try:
            record = (
                in_own_process(bench.threads, section.function, bench)
                if section.function
                else Alternation(bench, section).measure()
            )
        except WorkerError as error:
            say(f"{section.name}: {error}")
            failed += 1
            continue
        write_record(bench, section, record, conditions)
        say(f"{section.name}: measured")
    shutil.rmtree(options.output / "scratch", ignore_errors=True)
    return failed


def write_record(
    bench: Bench, section: Section, record: dict[str, Any], conditions: Mapping[str, Any]
) -> None:
    """Write a section's record with what it was measured under."""
    record |= {"conditions": conditions, "machine": machine(), "date": f"{date.today()}"}
    text = json.dumps(record, indent=1) + "\n"
    (bench.folder / f"{section.name}.json").write_text(text, encoding="utf-8")


def _conditions(section: Section, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a kept record must have been measured under."""
    found = {"threads": options.threads, "rounds": options.rounds, "quick": options.quick}
    if section.contenders:
        found |= {"windows": section.windows, "contenders": list(section.contenders)}
    return found


def _read(path: Path) -> Record:
    record: Record = json.loads(path.read_text("utf-8"))
    return record


def write_report(folder: Path, page: Path | None = None) -> str:
    """Print and return the tables of all records; write them to the page where one is given."""
    records = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
    axes = growth_axes(records)
    growth = [] if axes is None else growth_table(axes)
    text = "\n".join([*report(records), *growth])
    print(text)
    usual = {n: r for n, r in records.items() if not n.startswith(("growth-", "1gb"))}
    if page is not None and usual:
        write_part(page, "measured", report(usual))
    if page is not None and axes is not None:
        write_part(page, "growth", growth)
        print(*draw_growth(axes, page.parent / "images"), sep="\n")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
