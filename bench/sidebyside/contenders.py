"""The contenders: how each one is opened, what it scores, and what one of its turns gives back.

Only names that older versions of Perplexit have are used here, in `workers` and in
`perplexit_contenders`: with `--against` these modules run over an older version.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import perplexit as px
from sidebyside.paired_ratios import ForwardFlops


@dataclass(frozen=True, slots=True)
class Setting:
    """What a contender is opened with: a checkpoint folder, and a program of it or None."""

    model: str
    dtype: str
    threads: int
    program: str | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Workload:
    """A token file of one text's windows, each of `max_length` ids, the last target included.

    strided:    windows advance by half a window and score what is new, as the guide of Hugging Face
        does. Else windows share one id with the one before, so that every id but the text's first
        is scored once, with the context that lm-evaluation-harness gives it.
    batch_size: windows per call, for those contenders that can be told; None: their own default.
    """

    path: Path
    max_length: int
    strided: bool = False
    batch_size: int | None = None

    @property
    def tokens(self) -> px.TokenFile:
        """Return the token file, which is opened once."""
        return _opened(self.path)

    def windows(self) -> list[Any]:
        """Return the ids of each window and the positions in it that are scored."""
        return [self.tokens.window_ids(index) for index in range(self.tokens.num_windows)]


@cache
def _opened(path: Path) -> px.TokenFile:
    return px.TokenFile.open(path)


@dataclass(frozen=True, slots=True)
class Scored:
    """What a turn gives back.

    nll_sum: nats; None where the turn has no loss (a bare product of matrices, labels of gain).
    num_tokens: what the turn made: scored tokens, or labels.
    own_perplexity: the tool's own aggregate, where it is not exp(nll_sum / num_tokens).
    seconds: of the part that counts, where that is not the whole turn.
    nll:     of each token, in the text's order, where the contender gives them.
    flops:   of one forward pass over the workload; given by the ceiling alone.
    """

    nll_sum: float | None
    num_tokens: int
    own_perplexity: float | None = None
    seconds: float | None = None
    nll: list[float] | None = None
    flops: ForwardFlops | None = None


# An opened contender. One with a method `prepare` is given the workload there before its turns.
Score = Callable[[Workload], Scored]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to score.

    opener:  `module:function` of this package; the function takes a Setting and returns a Score. It
        is imported in the worker process alone, because each one brings its own libraries.
    options: keyword arguments of the function.
    program: keyword arguments of `perplexit.compile`, which is called first; None: no program.
    without: an engine trick that is switched off. before: whether the version of `--against` runs.
    """

    opener: str
    options: Mapping[str, Any] = field(default_factory=dict)
    program: Mapping[str, Any] | None = None
    without: str = ""
    before: bool = False


EVALUATION, LOSSES = "perplexit_contenders:evaluation", "perplexit_contenders:losses_alone"
FLOAT32, BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
OPENVINO, INT8 = {"to": "openvino"}, {"to": "openvino", "quantization": "int8"}
CEILING = "gemm"
FUSED_ON_CUDA = {
    "perplexit, liger": {"head": "liger"},
    "perplexit, cce": {"head": "cce"},
    "perplexit, compiled layers": {"compile_mode": "default", "head": "compiled"},
    "perplexit, graphs": {"compile_mode": "reduce-overhead", "head": "compiled"},
}
CONTENDERS = {
    "perplexit": Contender(EVALUATION),
    "perplexit nll": Contender(LOSSES),
    "perplexit bf16": Contender(EVALUATION, BFLOAT16),
    "perplexit cached, 128 a call": Contender("perplexit_contenders:chunked_prefill"),
    "perplexit cached, 64 windows": Contender("decoding:windows_together"),
    "perplexit, compiled head": Contender(EVALUATION, {"head": "compiled"}),
    **{name: Contender(EVALUATION, options) for name, options in FUSED_ON_CUDA.items()},
    "openvino": Contender(EVALUATION, {}, OPENVINO),
    "openvino fp32": Contender(EVALUATION, FLOAT32, OPENVINO),
    "openvino bf16": Contender(EVALUATION, BFLOAT16, OPENVINO),
    "openvino int8": Contender(EVALUATION, FLOAT32, INT8),
    "openvino int8 bf16": Contender(EVALUATION, BFLOAT16, INT8),
    **{
        f"{engine}{', logits' * (not inside)}": Contender(
            LOSSES, FLOAT32, {"to": engine, "max_length": 1024, "perplexity": inside}
        )
        for engine in ("tvm", "pt2")
        for inside in (True, False)
    },
    "run": Contender("costs:run_kept", {"replays": False}),
    "run, replayed": Contender("costs:run_kept", {"replays": True}),
    "prepare": Contender("costs:DocumentsPrepared"),
    "evaluate": Contender("costs:without_model"),
    "objects": Contender("costs:tracked", {"work": "objects"}),
    "objects, traced": Contender("costs:tracked", {"work": "objects", "torch_cpu": False}),
    "operations": Contender("costs:tracked", {"work": "operations"}),
    "operations, counted": Contender("costs:tracked", {"work": "operations", "python": False}),
    "operations, both": Contender("costs:tracked", {"work": "operations", "python": True}),
    "plain loop": Contender("transformers_loops:plain_loop"),
    "hf evaluate": Contender("transformers_loops:hf_evaluate"),
    "hf guide": Contender("transformers_loops:hf_guide"),
    "mlc's hf loop": Contender("transformers_loops:mlc_hf_loop"),
    "lm-eval": Contender("lm_eval_peer:rolling_loglikelihood"),
    "lm-eval's algorithm": Contender("transformers_loops:lm_eval_algorithm"),
    "llama.cpp": Contender("llama_cpp_peer:PythonBinding", {}, {"to": "gguf", "perplexity": False}),
    "one token a call": Contender("decoding:one_token_a_call"),
    CEILING: Contender("gemm:GemmCeiling"),
    **{
        f"igf {way}": Contender("igf_labels:labels", {"way": way})
        for way in ("exact", "first-order", "directional", "original", "context pass", "forward")
    },
}


def contender_named(name: str) -> Contender:
    """Return the contender NAME, also as `NAME without TRICK` and `NAME, before`.

    Raises KeyError for a name that CONTENDERS does not have.
    """
    named, _, trick = name.partition(" without ")
    plain = named.removesuffix(", before")
    return replace(CONTENDERS[plain], without=trick, before=plain != named)


def open_contender(name: str, setting: Setting) -> Score:
    """Load the contender. Raises KeyError for a name that CONTENDERS does not have."""
    contender = contender_named(name)
    module, _, function = contender.opener.partition(":")
    opener: Callable[..., Score] = getattr(import_module(f"sidebyside.{module}"), function)
    return opener(setting, **contender.options)
