"""Labels of information gain beside the original's algorithm: `bench/igf_labels.py speed`."""

from pathlib import Path
from typing import Any

from igf_labels import MODES, speed

from sidebyside.scripts import Job, printed


def measure(job: Job, scratch: Path) -> dict[str, Any]:
    """Seconds a label of each way, in turns."""
    rounds = 1 if job.quick else min(job.rounds, 2)  # the original takes long
    found = speed(rounds, scratch)
    return {"seconds": found["seconds"], "modes": list(MODES)}


if __name__ == "__main__":
    printed(measure)
