"""Perplexit and its peers side by side, in turns: `make bench`.

    python bench/run.py                     every section; a second call goes on where it was
    python bench/run.py --only fp32-1024    sections whose name holds that
    python bench/run.py --quick             less of everything (3 minutes; 7 where all is new)
    python bench/run.py --list              the sections' names

Each section is a JSON in `build/bench/`. Where all were asked for, the generated part of
docs/benchmarks.md is written too.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from sidebyside.aims import aims_table
from sidebyside.machine import machine
from sidebyside.measuring import Alternation, Bench, in_own_process
from sidebyside.pages import write_part
from sidebyside.pool import Pool, WorkerError, worker_environment
from sidebyside.scripts import Job, run_script
from sidebyside.sections import IDS_A_TURN, SCRIPTS, Script, Section, section_order, sections
from sidebyside.tables import big_table, machine_lines, script_lines
from sidebyside.telling import Telling
from sidebyside.texts import ids_of_speeches

from perplexit.resources.cores import num_cores

ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every section that was asked for has its record."""
    options = _options(arguments)
    plan = list(_plan(options))
    if options.list:
        print(*(item.name for item in plan), sep="\n")
        return 0
    os.environ.update(worker_environment(options.threads))
    with Telling(len(plan)) as told:
        failed = _measure(plan, options, told)
    if options.page:  # a section that failed is missing there, and is named above
        write_part(options.page, "measured", report(*_records(options.output)))
    for line in report(*_records(options.output)):
        print(line)
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
        "--ids", type=int, help="in a turn, and a window a thread: 2048 (quick: 1024)"
    )
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER of your own")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page", type=Path, help="write the tables between its two marks")
    found = parser.parse_args(arguments)
    found.rounds = found.rounds or (3 if found.quick else 5)
    found.ids = found.ids or (IDS_A_TURN // 2 if found.quick else IDS_A_TURN)
    found.windows = tuple(found.windows or ((512,) if found.quick else (512, 1024, 2048)))
    return found


def _plan(options: argparse.Namespace) -> Iterator[Section | Script]:
    names = [text.partition("=")[0] for text in options.model]
    models = names or (["demo"] if options.quick else ["demo", "gpt2"])
    wanted = options.contenders and options.contenders.split(",")
    paths = dict.fromkeys(models, Path())
    for section in sections(paths, options.windows, options.ids, options.threads):
        if _is_wanted(section.name, options.only):
            yield _narrowed(section, wanted)
    for script in SCRIPTS:
        asked = any(part in script.name for part in options.only)
        if asked or not (options.only or script.opt_in or (options.quick and script.name == "igf")):
            yield script


def _narrowed(section: Section, wanted: Sequence[str] | None) -> Section:
    if not wanted:
        return section
    kept = tuple(name for name in section.contenders if name in wanted)
    return Section(**{**_fields(section), "contenders": kept})


def _fields(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in section.__slots__}


def _is_wanted(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part in name for part in parts)


def _measure(plan: Sequence[Section | Script], options: argparse.Namespace, told: Telling) -> int:
    """How many items of the plan could not be measured."""
    bench = _bench(options, plan, told)
    failed = 0
    with Pool(bench.folder / "logs") as pool:
        for item in plan:
            path = bench.folder / f"{item.name}.json"
            conditions = _conditions(item, options)
            if not options.again and _known(path, conditions):
                told.done(f"{item.name}: kept")
                continue
            try:
                record = _record(item, bench, pool, options)
            except WorkerError as error:
                told(f"{item.name}: {error}")
                failed += 1
                continue
            record |= {"conditions": conditions, "machine": machine(), "date": f"{date.today()}"}
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            told.done(f"{item.name}: measured")
    shutil.rmtree(bench.folder / "scratch", ignore_errors=True)
    return failed


def _record(
    item: Section | Script, bench: Bench, pool: Pool, options: argparse.Namespace
) -> dict[str, Any]:
    if isinstance(item, Section):
        return Alternation(bench, item, pool).measure()
    pool.close()
    bench.told(item.name)
    name = next(iter(bench.models))
    paths = str(bench.folder), str(bench.models[name]), str(bench.ids[name])
    return run_script(item.module, Job(*paths, bench.threads, bench.rounds, options.quick))


def _bench(options: argparse.Namespace, plan: Sequence[Section | Script], told: Telling) -> Bench:
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    models = {name: Path(path) for name, _, path in (t.partition("=") for t in options.model)}
    needed = {item.model for item in plan if isinstance(item, Section)}
    if not models:
        models["demo"] = in_own_process("sidebyside.building:demo_model")
        if "gpt2" in needed:
            random = folder / "models" / "gpt2-124m"
            models["gpt2"] = in_own_process("sidebyside.building:random_gpt2", random)
    first = next(iter(models))
    ids = folder / f"{first}-ids.npy"
    ids_of_speeches(models[first], ids)
    # GPT-2's vocabulary is the larger, so the demo model's ids are ids of both.
    return Bench(folder, models, dict.fromkeys(models, ids), options.threads, options.rounds, told)


def _conditions(item: Section | Script, options: argparse.Namespace) -> dict[str, Any]:
    """What a kept record must have been measured under."""
    found = {"threads": options.threads, "rounds": options.rounds, "quick": options.quick}
    if isinstance(item, Section):
        found |= {"windows": item.windows, "contenders": list(item.contenders)}
    return found


def _known(path: Path, conditions: Mapping[str, Any]) -> bool:
    return path.exists() and json.loads(path.read_text("utf-8")).get("conditions") == conditions


def _records(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(alternations, scripts) that were measured, by name: shorter windows first."""
    records = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    known = [script.name for script in SCRIPTS]
    alternations = [name for name, record in records.items() if "contenders" in record]
    return (
        {name: records[name] for name in sorted(alternations, key=section_order)},
        {name: records[name] for name in known if name in records},
    )


def report(records: Mapping[str, Any], scripts: Mapping[str, Any]) -> Iterator[str]:
    """The tables of all records, as Markdown lines."""
    newest = [*records.values(), *scripts.values()]
    if not newest:
        return
    last = max(newest, key=lambda record: str(record["date"]))
    yield from machine_lines(last["machine"], last["conditions"], last["date"])
    yield from ("", *aims_table(records, scripts), "", *big_table(records), "")
    yield from script_lines(scripts)


if __name__ == "__main__":
    raise SystemExit(main())
