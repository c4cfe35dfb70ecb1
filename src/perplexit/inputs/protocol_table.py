"""The protocols by name: what each fixes, allows and means.

A further protocol is one entry here, with its generator of windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

from numpy.typing import ArrayLike

from perplexit.inputs.tool_windows import (
    hf_evaluate_windows,
    hf_guide_windows,
    llama_cpp_windows,
    lm_eval_windows,
    mlc_windows,
    qefficient_windows,
)
from perplexit.inputs.windows import (
    BosPolicy,
    WindowArray,
    disjoint_windows,
    document_windows,
    sliding_windows,
)

Aggregate = Literal["tokens", "window-means", "hf-guide", "window-perplexities"]
Words = Literal["runs", "pieces"]
Prefix = Literal["tokenizer", "bos", "bos-or-eos"]

BLANK_LINE = "\n\n"


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
    summary: str
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


def _half(max_length: int) -> int:
    return max_length // 2


_OWN = (
    Protocol(
        name="sliding",
        summary="windows advance by stride; each target is scored once, with long context",
        generate=sliding_windows,
        stride=_half,
    ),
    Protocol(
        name="disjoint",
        summary="consecutive chunks; the first id of each is context alone",
        generate=disjoint_windows,
    ),
    Protocol(
        name="document",
        summary="one window per document",
        generate=document_windows,
        max_length=None,
    ),
)

_SEEDS = (
    Protocol(
        name="qefficient",
        summary="QEfficient: joined by blank lines, full windows, overlap scored twice",
        generate=qefficient_windows,
        joined_with=BLANK_LINE,
        max_length=2048,
        stride=_half,
        bos=("none", "first"),
        scores_repeatedly=True,
    ),
    Protocol(
        name="mlc",
        summary="MLC: joined by blank lines, short tails kept, overlap scored twice",
        generate=mlc_windows,
        joined_with=BLANK_LINE,
        max_length=256,
        stride=_half,
        bos=("none", "first"),
        aggregate="window-means",
        scores_repeatedly=True,
    ),
)

_TOOLS = (
    Protocol(
        name="hf-guide",
        summary="the transformers guide: joined, sliding, the last window short",
        generate=hf_guide_windows,
        joined_with=BLANK_LINE,
        stride=_half,
        bos=("none", "first"),
        aggregate="hf-guide",
    ),
    Protocol(
        name="hf-evaluate",
        summary="the evaluate metric: each text cut off, mean of the texts' perplexities",
        generate=hf_evaluate_windows,
        bos=("none", "first"),
        prefix="bos",
        aggregate="window-perplexities",
    ),
    Protocol(
        name="lm-eval",
        version=2,  # version 1 counted words as all other protocols do
        summary="lm-evaluation-harness: rolling windows, a prefix token before each document",
        generate=lm_eval_windows,
        max_length=2048,
        bos=("first",),
        prefix="bos-or-eos",
        beyond_max_length=1,
        words="pieces",
    ),
    Protocol(
        name="llama-cpp",
        summary="llama.cpp: whole chunks, the second half of each scored",
        generate=llama_cpp_windows,
        joined_with=BLANK_LINE,
        max_length=512,
        bos=("none", "first"),
    ),
    Protocol(
        name="gptq-2048",
        summary="the GPTQ papers: joined by blank lines, whole chunks of 2048, tail dropped",
        generate=partial(disjoint_windows, keep_tail=False),
        joined_with=BLANK_LINE,
        max_length=2048,
        fixed_length=True,
        bos=("none", "first"),
    ),
    Protocol(
        name="vllm",
        summary="vLLM's own test: joined by blank lines, chunks of 1023",
        generate=disjoint_windows,
        joined_with=BLANK_LINE,
        max_length=1023,
        bos=("none", "first"),
    ),
)

PROTOCOLS: dict[str, Protocol] = {entry.name: entry for entry in (*_OWN, *_SEEDS, *_TOOLS)}
