"""What the head inside saves: a compiled program's memory beside that of one with logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "program_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_head_inside_needs_less_than_half_of_the_memory_of_logits():
    """AOTInductor at 49,152 ids and a window of 1024; TVM takes minutes, its page has the figures.

    ONNX Runtime and OpenVINO are held to the same on the real model.
    """
    command = [sys.executable, str(BENCH), "pt2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    added = json.loads(done.stdout)
    assert added["logits"] > 4 * 1023 * 49_152
    assert added["head_inside"] < added["logits"] / 2
