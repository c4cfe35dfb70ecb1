"""The contenders: how each one is opened, and what one of its turns gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from sidebyside.paired_ratios import ForwardFlops
from sidebyside.workloads import Workload


@dataclass(frozen=True, slots=True)
class Setting:
    """What a contender is opened with.

    model:   a checkpoint folder.
    program: a compiled program of the same checkpoint, for the engines that want one.
    """

    model: str
    dtype: str
    threads: int
    program: str | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Scored:
    """What a turn gives back.

    nll_sum: nats; None where the turn has no loss (a bare product of matrices).
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


Turn = Callable[[], Scored]
# All that is neither model nor loss is done here, before the turn is called.
Prepare = Callable[[Workload], Turn]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to score.

    opener:  `module:function` of this package; the function takes a Setting and returns a Prepare.
        It is imported in the worker process alone, because each one brings its own libraries.
    options: keyword arguments of the function.
    program: (engine, quantization) that `perplexit compile` is given first; None: no program.
    """

    opener: str
    options: Mapping[str, Any] = field(default_factory=dict)
    program: tuple[str, str | None] | None = None


EVALUATION = "perplexit_contenders:evaluation"
FLOAT32, BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
CEILING = "gemm"
ON_CUDA_TOO = {
    "liger": {"head": "liger"},
    "cce": {"head": "cce"},
    "compiled-layers": {"compile_mode": "default", "head": "compiled"},
    "graphs": {"compile_mode": "reduce-overhead", "head": "compiled"},
}
CONTENDERS = {
    "perplexit": Contender(EVALUATION),
    "perplexit nll": Contender("perplexit_contenders:losses_alone"),
    "perplexit bf16": Contender(EVALUATION, BFLOAT16),
    "perplexit cached, 128 a call": Contender("perplexit_contenders:chunked_prefill"),
    "perplexit cached, 64 windows": Contender("decoding:windows_together"),
    "perplexit, compiled head": Contender(EVALUATION, {"head": "compiled"}),
    **{
        f"perplexit, {name}": Contender(EVALUATION, options)
        for name, options in ON_CUDA_TOO.items()
    },
    "openvino fp32": Contender(EVALUATION, FLOAT32, ("openvino", None)),
    "openvino bf16": Contender(EVALUATION, BFLOAT16, ("openvino", None)),
    "openvino int8": Contender(EVALUATION, FLOAT32, ("openvino", "int8")),
    "openvino int8 bf16": Contender(EVALUATION, BFLOAT16, ("openvino", "int8")),
    "plain loop": Contender("transformers_loops:plain_loop"),
    "hf evaluate": Contender("transformers_loops:hf_evaluate"),
    "hf guide": Contender("transformers_loops:hf_guide"),
    "mlc's hf loop": Contender("transformers_loops:mlc_hf_loop"),
    "lm-eval": Contender("lm_eval_peer:rolling_loglikelihood"),
    "lm-eval's algorithm": Contender("transformers_loops:lm_eval_algorithm"),
    "llama.cpp": Contender("llama_cpp_peer:python_binding", program=("gguf", None)),
    "one token a call": Contender("decoding:one_token_a_call"),
    CEILING: Contender("gemm:ceiling"),
}


def open_contender(name: str, setting: Setting) -> Prepare:
    """Load the contender. Raises KeyError for a name that CONTENDERS does not have."""
    contender = CONTENDERS[name]
    module, _, function = contender.opener.partition(":")
    opener: Callable[..., Prepare] = getattr(import_module(f"sidebyside.{module}"), function)
    return opener(setting, **contender.options)
