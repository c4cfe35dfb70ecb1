"""What one engine trick gains: SmolLM2-135M with it and without it, in turns; one JSON line.

    python bench/engine_tricks.py packed_linear --dtype bfloat16
    python bench/engine_tricks.py memory_advice --peak        peak memory, a process for each turn

A turn scores one window for each thread. The ratios are without / with, turn by turn; a program is
compiled twice. `--cpu` takes processor time, which other work on the machine moves little.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from sidebyside.checkpoints import demo_model
from sidebyside.workloads import ids_of_speeches

import perplexit as px
from perplexit.inputs.windows import WindowIds
from perplexit.resources.engine_tricks import ENGINE_TRICKS, ENVIRONMENT
from perplexit.resources.host_memory import lifetime_peak_bytes
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.registry import load_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trick", choices=[*ENGINE_TRICKS, "none"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--peak", action="store_true")
    parser.add_argument("--once", action="store_true", help="score once and print the peak")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        windows = _windows(options)
        if options.once:
            _session(Path(folder), options).token_nll(windows)
            print(lifetime_peak_bytes())
            return
        turn_with, turn_without = _turns(Path(folder), windows, options)
        ratios = []
        for number in range(options.turns):
            if number % 2:
                without, kept = turn_without(), turn_with()
            else:
                kept, without = turn_with(), turn_without()
            ratios.append(without / kept)
    figures = {"gain": median(ratios), "least": min(ratios), "most": max(ratios)}
    print(json.dumps(vars(options) | {name: round(x, 3) for name, x in figures.items()}))


def _windows(options: argparse.Namespace) -> list[WindowIds]:
    ids = ids_of_speeches(demo_model())
    parts = ids[: options.threads * options.window].reshape(options.threads, -1)
    targets_N = np.arange(1, options.window)
    return [WindowIds(index, part, targets_N) for index, part in enumerate(parts)]


def _turns(
    folder: Path, windows: list[WindowIds], options: argparse.Namespace
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return a turn with the trick and one without it; each gives seconds, or bytes."""
    if options.peak:
        return (lambda: _peak("")), (lambda: _peak(options.trick))
    clock = time.process_time if options.cpu else time.perf_counter

    def turn_of(name: str) -> Callable[[], float]:
        with _without("" if name == "with" else options.trick):
            session = _session(folder / name, options)
            session.token_nll(windows)

        def turn() -> float:
            began = clock()
            session.token_nll(windows)
            return clock() - began

        return turn

    return turn_of("with"), turn_of("without")


def _session(folder: Path, options: argparse.Namespace) -> InferenceSession:
    engine = options.trick.partition("_")[0]
    if engine not in ("openvino", "tvm"):
        return load_session(demo_model(), dtype=options.dtype, threads=options.threads)
    length = options.window if engine == "tvm" else None
    px.compile(demo_model(), to=engine, output=folder, max_length=length)
    dtype = options.dtype if engine == "openvino" else None
    return load_session(folder, dtype=dtype, threads=options.threads)


def _peak(trick: str) -> float:
    command = [sys.executable, *sys.argv, "--once"]
    environment = os.environ | {ENVIRONMENT: trick}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


@contextmanager
def _without(trick: str) -> Iterator[None]:
    os.environ[ENVIRONMENT] = "" if trick == "none" else trick
    try:
        yield
    finally:
        del os.environ[ENVIRONMENT]


if __name__ == "__main__":
    main()
