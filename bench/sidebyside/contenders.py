"""Who takes turns: a name, what opens it, and what a turn gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from sidebyside.workloads import Workload


@dataclass(frozen=True, slots=True)
class Setting:
    """What a contender is opened with: a checkpoint folder, a dtype, threads, a scratch folder.

    program: a compiled program of the same checkpoint, for the engines that want one.
    """

    model: str
    dtype: str
    threads: int
    scratch: str
    program: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """What a turn gives.

    nll_sum:    nats; None where the turn has no loss (a bare product of matrices).
    own_perplexity: the tool's own aggregate, where it is not exp(nll_sum / num_tokens).
    seconds:    of the part that counts, where that is not the whole turn.
    nll:        of each token, in the text's order, where the contender gives them.
    """

    nll_sum: float | None
    num_tokens: int
    own_perplexity: float | None = None
    seconds: float | None = None
    nll: list[float] | None = None


class Contender(Protocol):
    """One loaded model, and one way to score with it."""

    def prepare(self, workload: Workload) -> Callable[[], Scored]:
        """A turn: all that is neither model nor loss is done before it is called."""
        ...


class _Home(Protocol):
    def __call__(self, setting: Setting) -> Contender: ...


CEILING = "gemm"
# name → module:function. Imported in the worker alone: each brings its own libraries.
CONTENDERS = {
    "perplexit": "sidebyside.perplexit_ways:evaluating",
    "perplexit nll": "sidebyside.perplexit_ways:losses_alone",
    "perplexit cached, 128 a call": "sidebyside.perplexit_ways:chunked_prefill",
    "perplexit bf16": "sidebyside.perplexit_ways:evaluating_bfloat16",
    "openvino fp32": "sidebyside.perplexit_ways:openvino_float32",
    "openvino bf16": "sidebyside.perplexit_ways:openvino_bfloat16",
    "openvino int8": "sidebyside.perplexit_ways:openvino_float32",
    "openvino int8 bf16": "sidebyside.perplexit_ways:openvino_bfloat16",
    "plain loop": "sidebyside.transformers_loops:plain_loop",
    "hf evaluate": "sidebyside.transformers_loops:hf_evaluate",
    "hf guide": "sidebyside.transformers_loops:hf_guide",
    "mlc's hf loop": "sidebyside.transformers_loops:mlc_hf_loop",
    "lm-eval": "sidebyside.lm_eval_peer:rolling_loglikelihood",
    "llama.cpp": "sidebyside.llama_cpp_peer:python_binding",
    "one token a call": "sidebyside.decoding:one_token_a_call",
    "perplexit cached, 64 windows": "sidebyside.decoding:windows_together",
    CEILING: "sidebyside.gemm:GemmCeiling",
}
# program → the quantization that `perplexit compile` is given for it.
PROGRAMS = {
    "openvino fp32": ("openvino", None),
    "openvino bf16": ("openvino", None),
    "openvino int8": ("openvino", "int8"),
    "openvino int8 bf16": ("openvino", "int8"),
    "llama.cpp": ("gguf", None),
}


def open_contender(name: str, setting: Setting) -> Contender:
    """The contender, loaded. Raises KeyError for a name that CONTENDERS does not have."""
    module, _, function = CONTENDERS[name].partition(":")
    home: _Home = getattr(import_module(module), function)
    return home(setting)
