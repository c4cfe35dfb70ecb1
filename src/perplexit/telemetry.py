"""Telemetry of engines and hubs: off, before any of them can be imported.

Perplexit's package runs this first, so it holds for the command line, for Python and for every
process that they start. There is no option to switch it on: what the environment says is
overridden. No request is made for it, and nothing is written.
"""

import os
import sys

# ONNX Runtime makes a device id and a queue of events in the home folder. Hugging Face libraries
# name themselves and the user's environment in requests. Ray reports usage.
_SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    # Where the package `kernels` is installed, transformers would fetch code for some layers.
    "USE_HUB_KERNELS": "NO",
}
# OpenVINO and NNCF send through this package, which has no switch but a file in the home folder;
# without it they use their own stub, which sends nothing.
_SENDER = "openvino_telemetry"


def switch_off() -> None:
    """Switch telemetry off in this process and in its children; a second call changes nothing.

    What another part of the program imported before is switched off from here on.
    """
    os.environ.update(_SWITCHES)
    sender = sys.modules.get(_SENDER)
    if sender is None:
        sys.modules[_SENDER] = None  # type: ignore[assignment]  # importing it now fails
    else:
        sender.Telemetry.send_event = _nothing
        sender.Telemetry.start_session = sender.Telemetry.end_session = _nothing
        sender.Telemetry.send_error = sender.Telemetry.send_stack_trace = _nothing
    runtime = sys.modules.get("onnxruntime")
    if runtime is not None and hasattr(runtime, "disable_telemetry_events"):
        runtime.disable_telemetry_events()
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None:
        hub.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]


def _nothing(*_: object, **__: object) -> None:
    return
