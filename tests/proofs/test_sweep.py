"""Every causal-LM class of transformers, tiny and random, against plain transformers in float64.

Each is saved, opened as a user would (`hf:FOLDER`), and scored alone, in one batch of different
lengths, in reverse order, and in part by a new session, as a resumed run does. The oracle is a
fresh copy of the model for each window, its own forward pass, and a log-softmax in float64.
`make sweep` runs all; the table goes to build/sweep.json.
"""

import copy
import inspect
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

import perplexit
from perplexit.errors import PerplexitError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.prefill_decode import cached_session
from tests.proofs.share import WHOLE, chosen
from tests.proofs.tiny_causal_models import NOT_MADE, VOCAB, class_of, model_types, tiny_model

LENGTHS = (49, 33, 20, 20, 7)  # ids; the first two beyond a border of 32, one of them by one
TOLERANCE = 1e-4  # nats of one token
TABLE = Path(__file__).parents[2] / "build" / "sweep.json"
MOST_NOT_MADE = 25

_BORDER, _FREQUENCIES = 32, 8
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * n for n in range(_FREQUENCIES)],
    "long_factor": [3.0 + 0.5 * n for n in range(_FREQUENCIES)],
    "original_max_position_embeddings": _BORDER,
    "factor": 4.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": _BORDER}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": _BORDER,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}


def _rope(kind: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {**kind, "rope_theta": 10_000.0}, **more}


@dataclass(frozen=True)
class Case:
    """A model type and what is changed in its tiny config; `name` says what is shown."""

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)


_SHORT = {"max_position_embeddings": _BORDER}
VARIANTS = [
    Case("RoPE default", "llama", _rope({"rope_type": "default"})),
    Case("RoPE linear", "llama", _rope(_LINEAR)),
    Case("RoPE linear, partly", "gpt_neox", _rope({**_LINEAR, "partial_rotary_factor": 0.5})),
    Case("RoPE dynamic", "llama", _rope(_DYNAMIC, **_SHORT)),
    Case("RoPE dynamic, sliding layers", "mistral", _rope(_DYNAMIC, **_SHORT)),
    Case("RoPE dynamic, biases", "qwen2", _rope(_DYNAMIC, **_SHORT)),
    Case("RoPE yarn", "llama", _rope(_YARN)),
    Case("RoPE yarn, latent attention", "deepseek_v3", _rope(_YARN)),
    Case("RoPE longrope", "llama", _rope(_LONG)),
    Case("RoPE longrope of Phi-3", "phi3", _rope(_LONG, original_max_position_embeddings=_BORDER)),
    Case(
        "RoPE longrope, a rule of its own",
        "phimoe",
        _rope({**_LONG, "short_mscale": 1.0, "long_mscale": 1.5}),
    ),
    Case("RoPE llama3", "llama", _rope(_LLAMA3)),
    Case("RoPE of one kind of layer, dynamic", "gemma3_text", {
        **_SHORT,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {**_DYNAMIC, "rope_theta": 10_000.0},
        },
    }),
    Case("biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case("tied head", "llama", {"tie_word_embeddings": True}),
    Case("untied head", "gpt2", {"tie_word_embeddings": False}),
    Case("soft-caps", "gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    Case("sliding window of some layers", "qwen2", {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }),
    Case("experts by groups", "deepseek_v2", {
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    }),
    Case("ALiBi", "falcon", {"alibi": True}),
    Case("ALiBi, one key for all heads", "falcon", {"alibi": True, "multi_query": True}),
    Case("norms after the layers", "opt", {"do_layer_norm_before": False}),
    Case("an index with ties", "hy_v4", {"index_n_heads": 2}),
]  # fmt: skip
CASES = [Case(name, name) for name in model_types()] + VARIANTS
# What must be among the models that are scored right.
MUST_BE_SCORED = {
    "sliding windows": ["mistral", "gemma2", "gpt_oss", "sliding window of some layers"],
    "soft-caps": ["gemma2", "soft-caps"],
    "MoE": ["mixtral", "qwen3_moe", "deepseek_v3", "experts by groups"],
    "state-space layers": ["mamba", "mamba2", "jamba", "falcon_h1", "recurrent_gemma", "rwkv"],
    "RoPE": [case.name for case in VARIANTS if case.name.startswith("RoPE")],
    "biases": ["biases", "qwen2"],
    "heads": ["tied head", "untied head", "LlamaForCausalLM", "GPT2LMHeadModel"],
}
_results: dict[str, "Result"] = {}


@dataclass
class Result:
    """What became of a case; differences are the largest of a token, in nats."""

    name: str
    model_class: str
    outcome: str
    reason: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    cached: float | str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", chosen(CASES), ids=lambda case: case.name)
def test_scored_right_or_refused_by_name(case, tmp_path):
    result = _swept(case, tmp_path)
    _results[case.name] = result
    assert result.outcome in ("scored", "refused", "not made"), result


def test_the_counts():
    """Runs last: writes the table, and holds the counts to what was promised."""
    counts = Counter(result.outcome for result in _results.values())
    if not WHOLE:
        assert counts["wrong"] == 0
        return
    TABLE.parent.mkdir(exist_ok=True)
    table = {
        "transformers": transformers.__version__,
        "counts": dict(counts),
        "counts_of_classes": dict(
            Counter(_results[name].outcome for name in model_types() if name in _results)
        ),
        "results": [asdict(result) for result in _results.values()],
    }
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"\n{len(model_types())} classes: {table['counts_of_classes']}; with variants: {counts}")
    assert counts["not made"] <= MOST_NOT_MADE
    right = [result for result in _results.values() if result.outcome == "scored"]
    scored = {known for result in right for known in (result.name, result.model_class)}
    for kind, names in MUST_BE_SCORED.items():
        for name in names:
            assert name in scored, (kind, name)


def _swept(case: Case, folder: Path) -> Result:
    made = Result(case.name, class_of(case.model_type).__name__, "not made")
    if case.name in NOT_MADE:
        made.reason = NOT_MADE[case.name]
        return made
    model = tiny_model(case.model_type, **case.changes)
    model.save_pretrained(folder)
    try:
        session = perplexit.load_session(f"hf:{folder}")
    except PerplexitError as error:
        made.outcome, made.reason = "refused", f"{type(error).__name__}: {error}"
        return made
    windows = _windows()
    right = _oracle(type(model), folder, windows)
    half = len(windows) // 2
    later = perplexit.load_session(f"hf:{folder}")
    differences = {
        "alone": _difference([session.token_nll([w])[0] for w in windows], right),
        "mixed": _difference(session.token_nll(windows), right),
        "reversed": _difference(session.token_nll(windows[::-1]), right[::-1]),
        "resumed": _difference(later.token_nll(windows[half:]), right[half:]),
    }
    made.cached = _cached(later, windows, right)
    made.differences, made.settings = differences, dict(session.description.settings)
    for each in (session, later):
        each.close()
    largest = max([*differences.values(), made.cached if isinstance(made.cached, float) else 0.0])
    made.outcome = "scored" if largest <= TOLERANCE else "wrong"
    return made


def _windows() -> list[WindowIds]:
    random = np.random.default_rng(7)
    return [
        WindowIds(n, random.integers(3, VOCAB, size).astype(np.int32), np.arange(1, size))
        for n, size in enumerate(LENGTHS)
    ]


def _oracle(
    kind: type[nn.Module], folder: Path, windows: Sequence[WindowIds]
) -> list[NDArray[np.float64]]:
    fresh: Any = kind
    fresh = fresh.from_pretrained(folder, dtype=torch.float32).eval()
    takes_cache = "use_cache" in inspect.signature(kind.forward).parameters
    options = {"use_cache": False} if takes_cache else {}
    losses = []
    for window in windows:
        with torch.no_grad():
            ids = torch.tensor([window.ids_T.tolist()])
            logits_TV = copy.deepcopy(fresh)(input_ids=ids, **options).logits[0].double()
        logprobs_TV = torch.log_softmax(logits_TV, dim=-1).numpy()
        losses.append(-logprobs_TV[window.targets_N - 1, window.ids_T[window.targets_N]])
    return losses


def _cached(
    session: InferenceSession, windows: Sequence[WindowIds], right: list[NDArray[np.float64]]
) -> float | str:
    """The largest difference by prefill and decode, or why there is none."""
    try:
        return _difference(
            cached_session(session, prompt_len=10, decode_chunk=3).token_nll(windows), right
        )
    except PerplexitError as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def _difference(got: Sequence[NDArray[Any]], right: Sequence[NDArray[np.float64]]) -> float:
    """The largest difference of a token; not finite where one is not."""
    return max(float(np.abs(one - other).max()) for one, other in zip(got, right, strict=True))
