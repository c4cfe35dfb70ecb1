"""Starting is quick: `import perplexit` and `--help` load no array library and no engine."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HEAVY = {"numpy", "scipy", "pyarrow", "torch", "transformers", "tokenizers", "onnx", "onnxruntime"}
PERPLEXIT = Path(sys.executable).with_name("perplexit")
ATTEMPTS = 7


def _fastest_seconds(command: Sequence[str | Path]) -> float:
    """The smallest CPU time of several runs: the wall time on a machine that does nothing else."""
    fastest = float("inf")
    for _ in range(ATTEMPTS):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        spent = after.children_user - before.children_user
        fastest = min(fastest, spent + after.children_system - before.children_system)
    return fastest


def _loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_import_is_under_150_ms() -> None:
    bare = _fastest_seconds([sys.executable, "-c", "pass"])
    assert _fastest_seconds([sys.executable, "-c", "import perplexit"]) - bare < 0.150


def test_help_is_under_400_ms() -> None:
    assert _fastest_seconds([PERPLEXIT, "--help"]) < 0.400


@pytest.mark.parametrize(
    "code", ["import perplexit", "import perplexit.cli.app", "import perplexit; dir(perplexit)"]
)
def test_no_heavy_package_is_loaded_at_the_start(code: str) -> None:
    assert _loaded_by(code) & HEAVY == set()


@pytest.mark.parametrize(
    "name", ["metrics.intervals", "inputs.token_file", "runs.store", "comparison", "evaluation"]
)
def test_what_a_reviewer_must_trust_loads_no_engine(name: str) -> None:
    assert (
        _loaded_by(f"import perplexit.{name}") & {"torch", "transformers", "onnxruntime"} == set()
    )
