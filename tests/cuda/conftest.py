"""Tests that need a CUDA device: run with `make test-cuda`, skipped loudly where there is none.

PERPLEXIT_REQUIRE_CUDA=1 (which `make test-cuda` sets) makes a missing device a failure.
"""

import os
from pathlib import Path

import pytest
import torch

REASON = "CUDA TESTS WERE NOT RUN: torch sees no CUDA device here (make test-cuda where one is)"


def _missing() -> bool:
    return not torch.cuda.is_available() and os.environ.get("PERPLEXIT_REQUIRE_CUDA") != "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if _missing():
                item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _missing():
        terminalreporter.write_sep("!", REASON, yellow=True)
