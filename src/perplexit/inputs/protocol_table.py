"""The protocols by name: what each fixes, allows and means, and the windows of other tools.

The windows of tools are cut as their sources cut them; they are not the ones we would choose. A
further protocol is one entry of PROTOCOLS, with its generator of windows.

Shape suffixes: D = documents, W = windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from perplexit.inputs.windows import (
    BosPolicy,
    PrefixMode,
    WindowArray,
    cut_windows,
    disjoint_windows,
    document_windows,
    extended_lengths,
    sliding_windows,
    spread_windows,
    window_frame,
)

Aggregate = Literal["tokens", "window-means", "hf-guide", "window-perplexities"]
Words = Literal["runs", "pieces"]
Prefix = Literal["tokenizer", "bos", "bos-or-eos"]


@dataclass(frozen=True, slots=True)
class Protocol:
    r"""One named way to cut text into windows.

    generate:     makes the window table from document lengths; its keyword parameters are the
                  options that the protocol reads (max_length, stride, bos, bos_id).
    joined_with:  the string between documents where they become one; None: windows never cross.
    max_length:   the default; None: a window is as long as its document.
    fixed_length: the default is the only length.
    stride:       the default as a function of max_length; None: the protocol has no stride.
    bos:          the BOS policies it allows.
    prefix:       what `auto` puts in front: what the tokenizer adds by itself, the BOS token, or
                  the BOS token and, where a tokenizer has none, its EOS token.
    aggregate:    how the tool it is named after turns losses into its perplexity.
    scores_repeatedly: a target where windows overlap counts once in each of them.
    beyond_max_length: ids that its longest window feeds beyond max_length.
    words:        what a word is: "runs" of characters that are no white space, as `str.split()`
                  finds them, or the "pieces" of `re.split(r"\s+", text)`, which are more by one
                  for white space at a text's beginning and one for white space at its end.
    """

    name: str
    generate: Callable[..., WindowArray]
    version: int = 1
    joined_with: str | None = None
    max_length: int | None = 1024
    fixed_length: bool = False
    stride: Callable[[int], int] | None = None
    bos: tuple[BosPolicy, ...] = ("none", "first", "every")
    prefix: Prefix = "tokenizer"
    aggregate: Aggregate = "tokens"
    scores_repeatedly: bool = False
    beyond_max_length: int = 0
    words: Words = "runs"

    def windows(self, lengths_D: ArrayLike, **options: Any) -> WindowArray:
        """Return the window table of documents of these lengths: [W, 7].

        options: max_length, stride, bos and bos_id; the generator is given those that it reads.
        """
        read = signature(self.generate).parameters
        chosen = {name: value for name, value in options.items() if name in read}
        return self.generate(lengths_D, **chosen)


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
    lengths_D = np.minimum(lengths_D, max_length - (bos == "first"))
    return document_windows(lengths_D, bos=bos, bos_id=bos_id)


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


def _half(max_length: int) -> int:
    return max_length // 2


_joined_protocol = partial(Protocol, joined_with="\n\n", bos=("none", "first"))

_OWN = (
    Protocol(name="sliding", generate=sliding_windows, stride=_half),
    Protocol(name="disjoint", generate=disjoint_windows),
    Protocol(name="document", generate=document_windows, max_length=None),
)

_SEEDS = (
    _joined_protocol(
        name="qefficient",
        generate=qefficient_windows,
        max_length=2048,
        stride=_half,
        scores_repeatedly=True,
    ),
    _joined_protocol(
        name="mlc",
        generate=mlc_windows,
        max_length=256,
        stride=_half,
        aggregate="window-means",
        scores_repeatedly=True,
    ),
)

_TOOLS = (
    _joined_protocol(
        name="hf-guide",
        generate=hf_guide_windows,
        stride=_half,
        aggregate="hf-guide",
    ),
    Protocol(
        name="hf-evaluate",
        generate=hf_evaluate_windows,
        bos=("none", "first"),
        prefix="bos",
        aggregate="window-perplexities",
    ),
    Protocol(
        name="lm-eval",
        version=2,  # version 1 counted words as all other protocols do
        generate=lm_eval_windows,
        max_length=2048,
        bos=("first",),
        prefix="bos-or-eos",
        beyond_max_length=1,
        words="pieces",
    ),
    _joined_protocol(name="llama-cpp", generate=llama_cpp_windows, max_length=512),
    _joined_protocol(
        name="gptq-2048",
        generate=partial(disjoint_windows, keep_tail=False),
        max_length=2048,
        fixed_length=True,
    ),
    _joined_protocol(name="vllm", generate=disjoint_windows, max_length=1023),
)

PROTOCOLS: dict[str, Protocol] = {entry.name: entry for entry in (*_OWN, *_SEEDS, *_TOOLS)}
