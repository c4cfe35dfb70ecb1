"""Every reader is shown files changed at random: it reads them, or says in words what is wrong.

`make fuzz` shows 1,500 to each reader, the ordinary suite a tenth. A failing case prints reader,
seed and number; `tests.proofs.fuzz.worker.repeat` runs it again.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from tests.proofs.fuzz.bugs import BUGS
from tests.proofs.fuzz.readers import READERS
from tests.proofs.share import SEED, WHOLE, times

CASES = 1_500
MOST_SECONDS = 10.0
MOST_BYTES = 256 << 20
_NAMES = [reader.name for reader in READERS]
_START_SECONDS = 300.0  # imports of PyTorch and transformers, on a busy machine


def cases_of(folder: Path, names: list[str], count: int, *, bug: str | None = None) -> Any:
    """Every case of these readers with how it ended; a process that dies ends a case, too."""
    done = dict.fromkeys(names, 0)
    while left := [name for name in names if done[name] < count]:
        # a reader whose process ended midway goes on first, alone
        batch = left[:1] if done[left[0]] else [name for name in left if not done[name]]
        begun: tuple[str, int] | None = None
        for told in _worker(folder, batch, done[batch[0]], count, bug):
            if "number" in told:
                begun = told["reader"], told["number"]
                continue
            assert begun is not None, f"no case began: {told}"
            yield {"reader": begun[0], "case": begun[1], **told}
            done[begun[0]], begun = begun[1] + 1, None


def _worker(
    folder: Path, names: list[str], first: int, count: int, bug: str | None
) -> Iterator[dict[str, Any]]:
    """What one warm process tells; the last is `hung` or `died` if it did not come to its end."""
    command = [sys.executable, "-m", "tests.proofs.fuzz.worker", str(folder), str(SEED), str(count)]
    command += ["--first", str(first), *(["--bug", bug] if bug else []), *names]
    errors = folder / "errors.txt"
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with (
        errors.open("w") as err,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, text=True, env=environment
        ) as p,
    ):
        lines: Queue[str | None] = Queue()
        threading.Thread(target=_listen, args=(p, lines), daemon=True).start()
        patience = _START_SECONDS
        while True:
            try:
                line = lines.get(timeout=patience)
            except Empty:
                p.kill()
                yield {"how": "hung", "detail": f"silent for {patience} s", "seconds": patience}
                return
            if line is None:
                break
            told = json.loads(line)
            # a first case may still import something; a machine may be busy
            patience = 6 * MOST_SECONDS
            yield told
        if p.wait() != 0:
            tail = errors.read_text()[-1_500:]
            yield {"how": "died", "detail": f"exit code {p.returncode}: {tail}", "seconds": 0.0}


def _listen(process: subprocess.Popen[str], lines: "Queue[str | None]") -> None:
    with contextlib.suppress(ValueError):
        for line in process.stdout or ():
            lines.put(line)
    lines.put(None)


def is_bad(case: dict[str, Any]) -> bool:
    """Whether a case ended otherwise than it may."""
    fine = case["how"] in ("read", "stated") and case["seconds"] <= MOST_SECONDS
    return not fine or case["num_bytes"] > MOST_BYTES


@pytest.mark.timeout(3_600)
def test_every_reader_reads_a_changed_file_or_says_what_is_wrong(tmp_path: Path) -> None:
    began = time.perf_counter()
    count = times(CASES)
    found = list(cases_of(tmp_path, _NAMES, count))
    bad = [case for case in found if is_bad(case)]
    for case in bad[:10]:
        print(f"reader {case['reader']!r}, seed {SEED}, case {case['case']}: {case['how']}")
        print(f"  {case['seconds']:.2f} s, {case.get('num_bytes', 0):,} bytes; {case['detail']}")
    for name in _NAMES:
        own = [case for case in found if case["reader"] == name]
        read = sum(case["how"] == "read" for case in own)
        slowest = max(case["seconds"] for case in own)
        largest = max(case.get("num_bytes", 0) for case in own)
        print(
            f"{name}: {len(own)} cases, {read} read, slowest {slowest:.2f} s, "
            f"{largest / 2**20:.0f} MiB at most"
        )
        assert len(own) == count
        assert 0 < read < len(own), f"every case of {name} ends alike: the changes are no good"
    print(f"{len(found):,} cases in {time.perf_counter() - began:.0f} s, {len(bad)} bad")
    assert not bad


def _bugs_tried() -> list[str]:
    return list(BUGS) if WHOLE else list(BUGS)[:1]


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("bug", _bugs_tried())
def test_a_bug_that_is_put_back_is_found(bug: str, tmp_path: Path) -> None:
    """Each bug of `fuzz.bugs` is a fault that this version mended; without the mend, it shows."""
    found = cases_of(tmp_path, [bug], times(CASES), bug=bug)
    first = next((case for case in found if is_bad(case)), None)
    found.close()
    assert first is not None, f"the fuzz test is blind to the bug in {bug!r}"
    print(f"{bug}: found by case {first['case']}: {first['how'][:200]}")
