"""A transformers state dict → GGUF tensors and hyperparameters, for Llama and GPT-2.

llama.cpp rotates neighbouring rows of a head where transformers rotates row i with row i + d/2,
so the rows of q and k are reordered; GPT-2 stores its matrices transposed (Conv1D).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from perplexit.checkpoints.gguf_rope import llama3_divisors
from perplexit.errors import CompilationError

Array = NDArray[np.float32]
_SKIPPED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How checkpoints of one transformers class are written."""

    arch: gguf.MODEL_ARCH
    add_hyperparameters: Callable[[gguf.GGUFWriter, Mapping[str, Any]], None]
    converted: Callable[[str, Array, Mapping[str, Any]], Array]
    num_layers: str  # the config's name for it


def architecture_of(config: Mapping[str, Any]) -> GgufArchitecture:
    """Return how to write a checkpoint with this config. Raises CompilationError."""
    names = config.get("architectures") or ["none"]
    if names[0] not in _ARCHITECTURES:
        raise CompilationError(
            f"expected a checkpoint of {', '.join(_ARCHITECTURES)} to write as GGUF, got "
            f"{names[0]}; convert it with llama.cpp's own script and evaluate it as gguf:FILE"
        )
    return _ARCHITECTURES[names[0]]


def gguf_tensors(
    architecture: GgufArchitecture,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Iterator[tuple[str, Array]]:
    """Yield (GGUF name, float32 array) of each tensor, in the order of `state`.

    state: torch tensors by transformers' names. Raises CompilationError for a tensor that GGUF has
    no name for, rather than leave it out.
    """
    num_layers = int(config[architecture.num_layers])
    names = gguf.get_tensor_name_map(architecture.arch, num_layers)
    # tied is GPT-2's default in transformers; Llama writes it out
    is_tied = config.get("tie_word_embeddings", config.get("model_type") == "gpt2")
    for name, tensor in state.items():
        if name.endswith(_SKIPPED) or (name == "lm_head.weight" and is_tied):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise CompilationError(f"GGUF's {architecture.arch.name} has no tensor for {name!r}")
        array = np.asarray(tensor.detach().float().cpu().numpy(), dtype=np.float32)
        yield target, np.ascontiguousarray(architecture.converted(name, array, config))
    yield from _rope_factors(config)


def _add_llama(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    rope = _rope(config)
    if config.get("sliding_window"):
        raise CompilationError("GGUF's llama architecture has no sliding window, this model has")
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(hidden)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        _add_yarn(writer, rope)


def _add_yarn(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    """Add YaRN's parameters. llama.cpp multiplies its attention factor by 0.1 ln(factor) + 1."""
    other = [name for name in ("mscale", "mscale_all_dim") if rope.get(name)]
    if rope.get("truncate") is False:
        other.append("truncate")
    if other:
        raise CompilationError(
            f"YaRN's {', '.join(other)} has no key in GGUF's llama architecture; evaluate the "
            "checkpoint with hf: instead"
        )
    factor = float(rope["factor"])
    usual = 0.1 * math.log(factor) + 1.0
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or usual) / usual)
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))


def _add_gpt2(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    hidden = int(config["n_embd"])
    if config.get("activation_function", "gelu_new") != "gelu_new":
        raise CompilationError(
            f"llama.cpp's GPT-2 uses gelu_new, this one {config['activation_function']}"
        )
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["n_positions"]))
    writer.add_embedding_length(hidden)
    writer.add_block_count(int(config["n_layer"]))
    writer.add_feed_forward_length(int(config.get("n_inner") or 4 * hidden))
    writer.add_head_count(int(config["n_head"]))
    writer.add_layer_norm_eps(float(config["layer_norm_epsilon"]))


def _converted_llama(name: str, array: Array, config: Mapping[str, Any]) -> Array:
    heads = int(config["num_attention_heads"])
    if ".q_proj." in name:
        return _interleaved(array, heads)
    if ".k_proj." in name:
        return _interleaved(array, int(config.get("num_key_value_heads") or heads))
    return array


def _converted_gpt2(name: str, array: Array, config: Mapping[str, Any]) -> Array:
    del config
    return array.T if name.endswith(_TRANSPOSED) else array


def _interleaved(array: Array, num_heads: int) -> Array:
    """Return each head's rows (first axis) in pairs instead of halves: 0, d/2, 1, d/2 + 1."""
    rows = array.reshape(num_heads, 2, len(array) // num_heads // 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters under one name each. Raises CompilationError."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn") and not _is_fixed(rope):
        raise CompilationError(
            f"expected rotary positions of type default, linear, llama3 or yarn, got "
            f"{rope['rope_type']!r}, which is not written to GGUF here"
        )
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CompilationError(
            f"expected heads that are rotated whole, got partial_rotary_factor "
            f"{rope['partial_rotary_factor']}, which is not written to GGUF here"
        )
    return rope


def _is_fixed(rope: Mapping[str, Any]) -> bool:
    """Return whether longrope's divisors are the same at every length, as read from a GGUF file."""
    same = rope.get("short_factor") == rope.get("long_factor") and rope.get("short_factor")
    return bool(rope["rope_type"] == "longrope" and same and rope.get("attention_factor") == 1.0)


def _rope_factors(config: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """Yield the frequencies' divisors, which llama.cpp reads as a tensor, if there are any."""
    rope = _rope(config) if "num_attention_heads" in config else {}
    if rope.get("rope_type") not in ("llama3", "longrope"):
        return
    heads = int(config["num_attention_heads"])
    dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    if rope["rope_type"] == "longrope":
        divisors = np.asarray(rope["short_factor"], dtype=np.float64)
    else:
        divisors = llama3_divisors(
            float(rope["rope_theta"]) ** -(np.arange(0, dim, 2, dtype=np.float64) / dim),
            length=int(rope["original_max_position_embeddings"]),
            factor=float(rope["factor"]),
            low=float(rope["low_freq_factor"]),
            high=float(rope["high_freq_factor"]),
        )
    yield gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", divisors.astype(np.float32)


_LLAMA = GgufArchitecture(
    gguf.MODEL_ARCH.LLAMA, _add_llama, _converted_llama, num_layers="num_hidden_layers"
)
_GPT2 = GgufArchitecture(gguf.MODEL_ARCH.GPT2, _add_gpt2, _converted_gpt2, num_layers="n_layer")
_ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "GPT2LMHeadModel": _GPT2,
}
