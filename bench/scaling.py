"""How time and memory grow with the window, the vocabulary, the batch and the documents.

    python bench/scaling.py            measures, then draws docs/images/scaling-*.png
    python bench/scaling.py --draw     draws what was measured before
    python bench/scaling.py --page docs/benchmarks.md     writes the exponents there as well

The figures go to `build/bench/scaling/scaling.json`. An axis that was measured is kept, unless
`--again` is given.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from sidebyside.growth import AXES, measure_axis
from sidebyside.growth_plot import draw_growth, growth_table
from sidebyside.machine import machine
from sidebyside.measuring import in_own_process
from sidebyside.pages import write_part
from sidebyside.pool import worker_environment
from sidebyside.scripts import Job, run_script
from sidebyside.telling import Telling

ROOT = Path(__file__).parent.parent
DOCUMENTS = "documents"
THREADS = 1


def main() -> None:
    """Measure each axis that is not there, and draw."""
    options = _options()
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(worker_environment(THREADS))
    path = folder / "scaling.json"
    known = path.exists() and not options.again
    document: dict[str, Any] = json.loads(path.read_text("utf-8")) if known else {"axes": {}}
    document |= {"machine": machine()}
    if not options.draw:
        with Telling(len(AXES) + 1) as told:
            for name in [*(axis.name for axis in AXES), DOCUMENTS]:
                if name not in document["axes"]:
                    document["axes"][name] = _measured(name, folder, told)
                    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                told.done(name)
    for picture in draw_growth(document, options.images):
        print(picture)
    table = growth_table(document)
    print("\n".join(table))
    if options.page is not None:
        write_part(options.page, "growth", table)


def _measured(name: str, folder: Path, told: Telling) -> dict[str, Any]:
    for axis in AXES:
        if axis.name == name:
            return measure_axis(axis, folder, THREADS, told)
    model = str(in_own_process("sidebyside.building:demo_model"))
    return run_script("sidebyside.many_documents", Job(str(folder), model, "", THREADS, 1, False))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "bench" / "scaling")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--page", type=Path, help="write the table between its two marks")
    parser.add_argument("--again", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
