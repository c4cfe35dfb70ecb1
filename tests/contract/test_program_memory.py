"""What the head inside saves: a compiled program's memory beside that of one with logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "run.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_head_inside_needs_less_than_half_of_the_memory_of_logits(tmp_path: Path):
    """AOTInductor at 49,152 ids and a window of 1024; TVM takes minutes, its page has the figures.

    ONNX Runtime and OpenVINO are held to the same on the real model.
    """
    section = "program-memory-pt2"
    command = [sys.executable, str(BENCH), "--only", section, "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / f"{section}.json").read_text())["contenders"]
    added = {name: entry["memory"]["peak_bytes"] for name, entry in found.items()}
    assert added["pt2, logits"] > 4 * 1023 * 49_152
    assert added["pt2"] < added["pt2, logits"] / 2
