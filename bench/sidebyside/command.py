"""The command `bench/run.py`: which sections are measured, their records, and the report."""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from perplexit.resources.cores import num_cores
from sidebyside.alternation import Alternation, Bench, say
from sidebyside.growth import draw_growth, growth_axes, growth_sections, growth_table
from sidebyside.report import machine, report, write_part
from sidebyside.sections import IDS_PER_TURN, KINDS, Section, alternations, fixed_sections
from sidebyside.workers import WorkerError, in_own_process

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """Return 0 where every section that was asked for has its record."""
    options = _options(arguments, description)
    plan = list(_plan(options))
    if options.list:
        print(*(f"{item.name:30}{item.question}" for item in plan), sep="\n")
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    failed = measure(plan, options)
    write_report(options.output, options.page)
    return 1 if failed or not plan else 0


def _options(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "bench")
    only = "a kind of section, or part of a name"
    parser.add_argument("--only", action="append", default=[], help=only)
    parser.add_argument("--contenders", nargs="+", help="only these, by name")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, help="5, or 3 with --quick")
    parser.add_argument("--windows", type=int, nargs="+", help="window lengths")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER of your own")
    parser.add_argument("--against", type=Path, metavar="SRC", help="`src` of an older version")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page", type=Path, help="write its generated parts between their marks")
    found = parser.parse_args(arguments)
    found.rounds = found.rounds or (3 if found.quick else 5)
    found.windows = tuple(found.windows or ((512,) if found.quick else (512, 1024, 2048)))
    if found.against is not None:
        found.against = found.against.resolve()
        found.only = found.only or ["against-"]
        if not (found.against / "perplexit" / "__init__.py").exists():
            parser.error(f"expected a source tree with `perplexit` in it, got {found.against}")
    return found


def _plan(options: argparse.Namespace) -> Iterator[Section]:
    names = [text.partition("=")[0] for text in options.model]
    models = names or (["demo"] if options.quick else ["demo", "gpt2"])
    ids = IDS_PER_TURN // 2 if options.quick else IDS_PER_TURN
    sized = alternations(models, options.windows, ids, options.threads)
    fixed = fixed_sections(options.quick, options.threads)
    for section in (*sized, *fixed, *growth_sections(2 if options.quick else None)):
        named = any(_is_named(section, text) for text in options.only)
        if named or options.list or not (options.only or section.opt_in):
            wanted = options.contenders or section.contenders
            kept = tuple(name for name in section.contenders if name in wanted)
            yield replace(section, contenders=kept)


def _is_named(section: Section, text: str) -> bool:
    """Return whether `--only` means the section: its kind, part of its name, a first part."""
    if text in KINDS:
        return section.kind == text
    return section.name.startswith(text) if section.opt_in else text in section.name


def measure(plan: Sequence[Section], options: argparse.Namespace) -> int:
    """Write the record of each section that has none; return how many could not be measured."""
    models = {name: Path(path) for name, _, path in (t.partition("=") for t in options.model)}
    amounts = options.threads, options.rounds, options.quick
    bench = Bench(options.output, *amounts, models, next(iter(models), "demo"), options.against)
    failed = 0
    for section in plan:
        path = options.output / f"{section.name}.json"
        conditions = _conditions(section, options)
        kept = path.exists() and not options.again
        if kept and json.loads(path.read_text("utf-8"))["conditions"] == conditions:
            say(f"{section.name}: kept")
            continue
        say(section.name)
        began = time.perf_counter()
        try:
            if section.function:
                record = in_own_process(bench.threads, section.function, bench)
            else:
                record = Alternation(bench, section).measure()
        except WorkerError as error:
            say(f"{section.name}: {error}")
            failed += 1
            continue
        took = time.perf_counter() - began
        record |= {"kind": section.kind, "conditions": conditions, "took_seconds": took}
        record |= {"machine": machine(), "date": f"{date.today()}"}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        say(f"{section.name}: measured in {took:.0f} s")
    shutil.rmtree(options.output / "scratch", ignore_errors=True)
    return failed


def _conditions(section: Section, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a kept record must have been measured under."""
    found = {"threads": section.threads or options.threads, "quick": options.quick}
    found["rounds"] = section.rounds or options.rounds
    if section.contenders:
        found |= {"windows": section.windows, "contenders": list(section.contenders)}
    if section.kind.startswith("against-"):
        found["against"] = str(options.against)
    return found


def write_report(folder: Path, page: Path | None = None) -> None:
    """Print the tables of all records and write them to `report.md`; also to the page, if given.

    The page has the usual sections and, where every point was measured, growth.
    """
    found = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }
    records: dict[str, Any] = {name: r for name, r in found.items() if r.get("kind") in KINDS}
    usual = {name: r for name, r in records.items() if not KINDS[r["kind"]].opt_in}
    axes, growth = growth_axes(records), list[str]()
    if axes is not None:
        growth = growth_table(axes)
        records = {name: r for name, r in records.items() if r["kind"] != "growth"}
    text = "\n".join([*report(records), "", *growth])
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if page is not None and usual:
        write_part(page, "measured", report(usual))
    if page is not None and axes is not None:
        write_part(page, "growth", growth)
        print(*draw_growth(axes, page.parent / "images"), sep="\n")
