"""A warm process that shows changed files to readers; one line of JSON on stdout before and after.

    python -m tests.proofs.fuzz.worker FOLDER SEED COUNT [--bug NAME] READER...

A case is known by reader, seed and number alone: `repeat` runs one again in this process.
"""

import argparse
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from random import Random

import psutil

from perplexit.errors import PerplexitError
from tests.proofs.fuzz.bugs import BUGS
from tests.proofs.fuzz.readers import READERS, Reader, fresh_copy

_SPARE_BYTES = 6 << 30  # of addresses: a case that wants more fails instead of the machine


def main() -> None:
    """Run the cases that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--bug")
    parser.add_argument("readers", nargs="+")
    asked = parser.parse_args()
    os.environ["PERPLEXIT_CACHE"] = str(asked.folder / "cache")
    readers = [reader for reader in READERS if reader.name in asked.readers]
    for reader in readers:
        sound = asked.folder / reader.name / "sound"
        if not sound.exists():
            sound.mkdir(parents=True)
            reader.make(sound)
        for _ in range(2):  # what is loaded on first use is no case's memory
            reader.read(fresh_copy(sound, asked.folder / reader.name / "case"))
    if asked.bug:
        BUGS[asked.bug]()
    addresses = psutil.Process().memory_info().vms + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    for reader in readers:
        for number in range(asked.first, asked.count):
            _tell(reader=reader.name, number=number)
            _tell(**run_case(reader, asked.folder, asked.seed, number))


def run_case(reader: Reader, folder: Path, seed: int, number: int) -> dict[str, object]:
    """Change a copy of the sound files and read it: how it ended, seconds, bytes above before."""
    random = Random(f"{seed} {reader.name} {number}")
    case = fresh_copy(folder / reader.name / "sound", folder / reader.name / "case")
    reader.change(case, random)
    before = _forget_peak()
    began = time.perf_counter()
    how, detail = "read", ""
    try:
        reader.read(case)
    except PerplexitError as error:
        how, detail = "stated", str(error)
        if not detail or len(detail) > 3_000:
            how = "unclear"
    except BaseException as error:
        how = f"{type(error).__name__}: {str(error)[:200]}"
        detail = traceback.format_exc()[-2_000:]
    seconds = time.perf_counter() - began
    return {
        "how": how,
        "detail": detail,
        "seconds": seconds,
        "num_bytes": _peak() - before,
    }


def repeat(reader: str, seed: int, number: int, folder: Path) -> dict[str, object]:
    """Run one case again here, to look into it; its files stay in `folder`/READER/case."""
    (found,) = (each for each in READERS if each.name == reader)
    sound = folder / reader / "sound"
    sound.mkdir(parents=True, exist_ok=True)
    found.make(sound)
    return run_case(found, folder, seed, number)


def _forget_peak() -> int:
    """Let the system forget the process's peak memory; the memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def _peak() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _tell(**record: object) -> None:
    print(json.dumps(record), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
