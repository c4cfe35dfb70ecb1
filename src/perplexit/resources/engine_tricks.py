"""The engine tricks by name: what makes scoring faster or smaller without being asked for.

`PERPLEXIT_WITHOUT=packed_linear,window_threads` switches tricks off. docs/engine-tricks.md says
what each does, what it gains, and where a run's record shows it.
"""

import os

from perplexit.errors import UsageError

ENVIRONMENT = "PERPLEXIT_WITHOUT"
ENGINE_TRICKS = {
    "packed_linear": "PyTorch, CPU: linear layers and feed-forward blocks over packed weights",
    "window_threads": "PyTorch, CPU: each thread scores windows of its own",
    "head_blocks": "PyTorch, CPU: the head's logits in blocks that stay in the cache",
    "memory_advice": "Linux: pages that are no longer needed go back to the system",
    "openvino_attention": "OpenVINO, when compiled: attention without most future keys",
    "openvino_streams": "OpenVINO: each stream scores windows of its own",
    "tvm_schedule": "TVM, when compiled: tiled matrix products on all threads",
}


def left_out() -> list[str]:
    """Return the tricks that PERPLEXIT_WITHOUT names, sorted.

    Raises UsageError for a name that is not in ENGINE_TRICKS.
    """
    names = {name.strip() for name in os.environ.get(ENVIRONMENT, "").split(",")} - {""}
    unknown = sorted(names - ENGINE_TRICKS.keys())
    if unknown:
        raise UsageError(
            f"expected {ENVIRONMENT} to name engine tricks ({', '.join(ENGINE_TRICKS)}), got "
            f"{', '.join(unknown)}"
        )
    return sorted(names)


def is_on(name: str) -> bool:
    """Return whether a trick of ENGINE_TRICKS may be used. Raises UsageError as `left_out` does."""
    return name not in left_out()


def compiled_without() -> dict[str, str]:
    """Return the tricks left out, as an entry for the record of a program; empty without any."""
    names = left_out()
    return {"without": ", ".join(names)} if names else {}
