"""E2: telemetry of engines and hubs is off before any of them is imported.

`tests/proofs/test_watch.py` watches whole commands; here are the switches, and what they switch.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.proofs.watching import Watched, watched

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
}
_ONNX = (
    "import onnx, onnxruntime\n"
    "from onnx import helper, TensorProto\n"
    "value = lambda n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [1])\n"
    "node = helper.make_node('Identity', ['a'], ['b'])\n"
    "graph = helper.make_graph([node], 'g', [value('a')], [value('b')])\n"
    "model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)])\n"
    "model.ir_version = 10\n"
    "session = onnxruntime.InferenceSession(model.SerializeToString())\n"
    "session.run(None, {'a': __import__('numpy').ones(1, 'float32')})\n"
)
_OPENVINO = "import time, openvino.tools.ovc\ntime.sleep(0.5)\n"


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.strip()


def _watch(code: str, folder: Path) -> Watched:
    """What a program does, with an empty home and an environment that wants telemetry."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace: apt-get install -y strace")
    tried = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], check=False)
    if tried.returncode:
        pytest.skip("strace may not trace here (a container without it)")
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    for name in ("home", "tmp", "traces"):
        (folder / name).mkdir()
    wanted = {name: "01"[value == "0"] for name, value in SWITCHES.items()}
    return watched(
        [sys.executable, "-c", code],
        cwd=folder / "tmp",
        environment=kept
        | wanted
        | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"},
        traces=folder / "traces",
    )


def test_e2_every_switch_is_set_whatever_the_environment_says() -> None:
    code = f"import os, perplexit; print({{n: os.environ[n] for n in {list(SWITCHES)}}})"
    for value in ("0", "1", "", "yes"):
        assert _run(code, **dict.fromkeys(SWITCHES, value)) == str(SWITCHES)


@pytest.mark.parametrize("module", ["sessions.onnx", "compilation.targets", "igf", "cli.app"])
def test_e2_sibling_a_part_of_perplexit_imported_alone_switches_off_too(module: str) -> None:
    """Also in the processes that it starts."""
    if module in ("sessions.onnx", "igf"):
        pytest.importorskip("onnxruntime" if module == "sessions.onnx" else "torch")
    child = "import os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    code = (
        f"import perplexit.{module}, subprocess, sys\n"
        f"print(subprocess.check_output([sys.executable, '-c', {child!r}], text=True))"
    )
    assert _run(code, ORT_DISABLE_TELEMETRY="0") == "1"


@pytest.mark.parametrize("order", ["after", "before"])
def test_e2_hub_clients_name_nobody(order: str) -> None:
    pytest.importorskip("huggingface_hub")
    lines = ["import perplexit", "import huggingface_hub.constants as c"]
    lines = lines if order == "after" else lines[::-1]
    assert _run("\n".join([*lines, "print(c.HF_HUB_DISABLE_TELEMETRY)"]), DO_NOT_TRACK="") == "True"


@pytest.mark.parametrize(
    ("package", "code"), [("onnxruntime", _ONNX), ("openvino", _OPENVINO)], ids=["onnx", "openvino"]
)
def test_e2_an_engine_looks_nothing_up_and_leaves_the_home_folder_empty(
    package: str, code: str, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    done = _watch("import perplexit\n" + code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.lookups == ()
    assert [p for p in done.made_beyond(tmp_path / "tmp") if "__pycache__" not in p] == []
    assert list((tmp_path / "home").iterdir()) == []


def test_e2_sibling_an_engine_imported_before_perplexit_sends_nothing_afterwards() -> None:
    if "openvino-telemetry" not in {d.name for d in distributions()}:
        pytest.skip("needs openvino-telemetry, which openvino brings")
    code = (
        "import openvino_telemetry as t\n"
        "import perplexit\n"
        "sent = []\n"
        "telemetry = t.Telemetry.__new__(t.Telemetry)\n"
        "telemetry.consent = True\n"
        "telemetry.backend = type('B', (), {'__getattr__': lambda *_: lambda *a, **k: a})()\n"
        "telemetry.sender = type('S', (), {'send': lambda self, *a: sent.append(a)})()\n"
        "telemetry.send_event('a', 'b', 'c', force_send=True)\n"
        "telemetry.start_session('a'); telemetry.end_session('a')\n"
        "telemetry.send_error('a', 'b'); telemetry.send_stack_trace('a', 'b')\n"
        "print(sent)"
    )
    assert _run(code) == "[]"


def test_e2_sibling_a_figure_leaves_matplotlibs_font_list_in_perplexits_cache(
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    code = (
        "from perplexit.igf.experiment_summary import _figure_class\n"
        "_figure_class()()\n"
        "import matplotlib, matplotlib.font_manager, os\n"
        "print(matplotlib.get_cachedir(), 'MPLCONFIGDIR' in os.environ)"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    environment |= {"HOME": str(home), "PERPLEXIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    folder, still_set = done.stdout.split()
    assert folder == str(tmp_path / "cache" / "matplotlib")
    assert still_set == "False"
    assert list(home.iterdir()) == []
