"""A finished ONNX program against the checkpoint that it was made from.

Shape suffixes: B = windows, T = ids a window, N = targets over all windows, V = vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from perplexit.compilation.checkpoint_nll import window_nll
from perplexit.errors import CompilationError, QuantizationError
from perplexit.program_record import ProgramModel, ProgramShapes

# Nats a token. In float16, PyTorch and ONNX Runtime round their sums at other places.
TOLERANCES = {"float32": 1e-3, "float16": 0.1}
_LEAST_CHANGE = 1e-6  # nats: less than this is rounding, no quantization
_LENGTHS = (64, 37, 2)  # ids: unequal, so that padding and masks are put to the test


def verification_windows(
    model: ProgramModel, shapes: ProgramShapes
) -> tuple[NDArray[np.int64], ...]:
    """A few windows of random ids (the same every time) that fit the program's shapes."""
    longest = min(shapes.length or _LENGTHS[0], model.max_length or _LENGTHS[0])
    random = np.random.default_rng(0)
    return tuple(
        random.integers(0, model.vocab_size, size=min(length, longest)) for length in _LENGTHS
    )


def checkpoint_nll(model: Any, windows: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
    """The nll of every id but the first of each window, each window alone, unpadded."""
    with torch.inference_mode():
        return [window_nll(model, torch.from_numpy(window)) for window in windows]


def check_quantization_changed(
    before: Sequence[NDArray[np.float64]], after: Sequence[NDArray[np.float64]], precision: str
) -> None:
    """Raise QuantizationError where the quantized weights give the full-precision losses."""
    change = _largest_difference(before, after)
    if change < _LEAST_CHANGE:
        raise QuantizationError(
            f"expected {precision} weights to change the losses, got the full-precision ones "
            f"(largest difference {change:.1e} nats); compile without a quantization"
        )


def program_difference(
    path: Path,
    windows: Sequence[NDArray[np.int64]],
    reference: Sequence[NDArray[np.float64]],
    shapes: ProgramShapes,
    *,
    against: str,
    dtype: str = "float32",
) -> float:
    """The largest difference a token, in nats, between the program and `reference`.

    Raises CompilationError above the dtype's tolerance.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    size = shapes.batch_size or len(windows)
    computed: list[NDArray[np.float64]] = []
    for start in range(0, len(windows), size):
        computed += _batch_nll(session, windows[start : start + size], shapes)
    difference = _largest_difference(computed, reference)
    if not difference <= TOLERANCES[dtype]:
        raise CompilationError(
            f"expected the program's losses within {TOLERANCES[dtype]} nats of {against}, got a "
            f"difference of {difference:.3g}; evaluate the checkpoint with PyTorch instead (hf:…)"
        )
    return difference


def _batch_nll(
    session: Any, windows: Sequence[NDArray[np.int64]], shapes: ProgramShapes
) -> list[NDArray[np.float64]]:
    length = shapes.length or max(len(window) for window in windows)
    ids_BT = np.zeros((shapes.batch_size or len(windows), length), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for row, window in enumerate(windows):
        ids_BT[row, : len(window)], mask_BT[row, : len(window)] = window, 1
    mask_BT[len(windows) :] = 1
    rows_N = np.concatenate(
        [row * length + np.arange(len(window) - 1) for row, window in enumerate(windows)]
    )
    targets_N = np.concatenate([window[1:] for window in windows])
    feed = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if session.get_outputs()[0].name == "nll":
        padding = (0, (shapes.num_targets or len(rows_N)) - len(rows_N))
        feed |= {"target_rows": np.pad(rows_N, padding), "target_ids": np.pad(targets_N, padding)}
        nll_N = session.run(None, feed)[0][: len(rows_N)].astype(np.float64)
    else:
        logits_NV = _logits(session, feed).reshape(ids_BT.size, -1)[rows_N].astype(np.float64)
        shifted_NV = logits_NV - logits_NV.max(-1, keepdims=True)
        own_N = shifted_NV[np.arange(len(targets_N)), targets_N]
        nll_N = np.log(np.exp(shifted_NV).sum(-1)) - own_N
    return np.split(nll_N, np.cumsum([len(window) - 1 for window in windows])[:-1])


def _logits(session: Any, feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    """The logits of every position; of a program with a cache, from a prefill and a decode."""
    pasts = {
        x.name: np.empty(
            (len(feed["input_ids"]), x.shape[1], 0, x.shape[3]),
            np.float16 if x.type == "tensor(float16)" else np.float32,
        )
        for x in session.get_inputs()
        if x.name not in feed
    }
    if not pasts:
        logits_BTV: NDArray[np.float32] = session.run(None, feed)[0]
        return logits_BTV
    ids_BT, mask_BT, length = feed["input_ids"], feed["attention_mask"], feed["input_ids"].shape[1]
    parts: list[NDArray[np.float32]] = []
    prompt = max(1, length // 2)
    # a prefill, one id, and the rest
    for start, stop in ((0, prompt), (prompt, prompt + 1), (prompt + 1, length)):
        if start >= min(stop, length):
            continue
        block = {"input_ids": ids_BT[:, start:stop], "attention_mask": mask_BT[:, :stop]}
        logits, *presents = session.run(None, block | pasts)
        pasts = dict(zip(pasts, presents, strict=True))
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def _largest_difference(
    one: Sequence[NDArray[np.float64]], other: Sequence[NDArray[np.float64]]
) -> float:
    # NaN where either is NaN: no comparison with it is true, so no check passes
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).max())
