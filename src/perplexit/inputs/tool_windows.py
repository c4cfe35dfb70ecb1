"""The windows of other tools, each as its source cuts them; not the ones we would choose.

Shape suffixes: D = documents, W = windows.
"""

import numpy as np
from numpy.typing import ArrayLike

from perplexit.inputs.windows import (
    BosPolicy,
    PrefixMode,
    WindowArray,
    cut_windows,
    extended_lengths,
    spread_windows,
    window_frame,
)


def hf_guide_windows(
    lengths_D: ArrayLike, *, max_length: int, stride: int, bos: BosPolicy = "none", bos_id: int = -1
) -> WindowArray:
    """Cut windows at `range(0, n, stride)` up to the first that reaches the end: [W, 7].

    Only what the window before did not reach is scored; the last window is not moved back, so it
    may be short. Where windows touch without overlapping, the first id of each is not scored.
    Source: https://huggingface.co/docs/transformers/perplexity
    """
    extended_D = extended_lengths(lengths_D, bos)
    overhang_D = np.maximum(extended_D - max_length, 0)
    counts_D = np.where(extended_D > 1, 1 - (-overhang_D // stride), 0)
    document_W, ordinal_W = spread_windows(counts_D)
    start_W = ordinal_W * stride
    stop_W = np.minimum(start_W + max_length, extended_D[document_W])
    reached_W = np.where(ordinal_W == 0, 0, start_W - stride + max_length)
    target_W = np.maximum(reached_W, start_W + 1)
    table = cut_windows(document_W, start_W, stop_W, target_W, bos=bos, bos_id=bos_id)
    kept: WindowArray = table[target_W < stop_W]  # a tail of one id has no target
    return kept


def hf_evaluate_windows(
    lengths_D: ArrayLike, *, max_length: int, bos: BosPolicy = "none", bos_id: int = -1
) -> WindowArray:
    """Cut one window per document, of at most `max_length` fed ids: [W, 7].

    Source: https://github.com/huggingface/evaluate/blob/main/metrics/perplexity/perplexity.py
    """
    extended_D = np.minimum(extended_lengths(lengths_D, bos), max_length)
    document_W = np.flatnonzero(extended_D > 1)
    start_W = np.zeros_like(document_W)
    return cut_windows(
        document_W, start_W, extended_D[document_W], start_W + 1, bos=bos, bos_id=bos_id
    )


def lm_eval_windows(lengths_D: ArrayLike, *, max_length: int, bos_id: int) -> WindowArray:
    """Cut windows of `max_length` disjoint targets with one id of context: [W, 7].

    The context of a document's first window is the prefix token. A last window is filled up with
    more context to full length. A full window feeds `max_length + 1` ids, the last target included.
    Source: https://github.com/EleutherAI/lm-evaluation-harness, `get_rolling_token_windows`.
    """
    lengths = np.asarray(lengths_D, dtype=np.int64)
    document_W, ordinal_W = spread_windows(-(-lengths // max_length))
    target_W = ordinal_W * max_length
    stop_W = np.minimum(target_W + max_length, lengths[document_W])
    start_W = np.where(ordinal_W == 0, 0, stop_W - max_length - 1)
    table = cut_windows(document_W, start_W, stop_W, target_W, bos="none", bos_id=bos_id)
    table[:, 5] = np.where(ordinal_W == 0, PrefixMode.INSERT, PrefixMode.NONE)
    table[:, 6] = np.where(ordinal_W == 0, bos_id, -1)
    return table


def llama_cpp_windows(
    lengths_D: ArrayLike, *, max_length: int, bos: BosPolicy = "none", bos_id: int = -1
) -> WindowArray:
    """Cut whole chunks of `max_length` ids, of which the second half is scored: [W, 7].

    With a BOS, the text is tokenised with it in front, and the first id of every later chunk is
    overwritten by it. Of 512 ids the targets 257 … 511 count (255); the tail is dropped.
    Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/perplexity.cpp
    """
    counts_D = extended_lengths(lengths_D, bos) // max_length
    document_W, ordinal_W = spread_windows(counts_D)
    start_W = ordinal_W * max_length
    stop_W = start_W + max_length
    target_W = start_W + max_length // 2 + 1
    table = cut_windows(document_W, start_W, stop_W, target_W, bos=bos, bos_id=bos_id)
    if bos != "none":
        table[ordinal_W > 0, 5] = PrefixMode.OVERWRITE
        table[ordinal_W > 0, 6] = bos_id
    kept: WindowArray = table[target_W < stop_W]  # chunks of two ids have no second half
    return kept


def qefficient_windows(
    lengths_D: ArrayLike, *, max_length: int, stride: int, bos: BosPolicy = "none", bos_id: int = -1
) -> WindowArray:
    """Cut full windows at `range(0, n - max_length + 1, stride)`, every target scored: [W, 7].

    Tokens where windows overlap are scored more than once, and the tail is dropped; that is this
    protocol, not a defect of this function.
    """
    room, first_target, extended_D = window_frame(lengths_D, max_length, bos)
    counts_D = np.where(extended_D >= room, (extended_D - room) // stride + 1, 0)
    document_W, ordinal_W = spread_windows(counts_D)
    start_W = ordinal_W * stride
    return cut_windows(
        document_W, start_W, start_W + room, start_W + first_target, bos=bos, bos_id=bos_id
    )


def mlc_windows(
    lengths_D: ArrayLike, *, max_length: int, stride: int, bos: BosPolicy = "none", bos_id: int = -1
) -> WindowArray:
    """Cut windows at `range(0, n, stride)`, the short ones at the end included: [W, 7].

    Every window scores all its ids but the first, so overlaps count more than once. A last window
    of a single id has no target and is dropped.
    """
    room, first_target, extended_D = window_frame(lengths_D, max_length, bos)
    # range(0, n, stride) less a start at n - 1, which would leave one id alone
    counts_D = -(-np.maximum(extended_D - first_target, 0) // stride)
    document_W, ordinal_W = spread_windows(counts_D)
    start_W = ordinal_W * stride
    stop_W = np.minimum(start_W + room, extended_D[document_W])
    return cut_windows(document_W, start_W, stop_W, start_W + first_target, bos=bos, bos_id=bos_id)
