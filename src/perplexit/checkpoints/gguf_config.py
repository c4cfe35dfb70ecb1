"""Everything that a GGUF file says of its model, in a transformers configuration.

transformers reads about ten keys of each architecture and skips the rest. Here every key and
tensor of the model is read by transformers, put into the configuration, or known to have no effect;
anything else is refused by its name.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from perplexit.checkpoints.gguf_rope import rope_parameters
from perplexit.errors import ModelError

_ROPE_TENSORS = ("rope_freqs", "rope_factors_short", "rope_factors_long")
# transformers' name of an architecture, where it is another than GGUF's.
_RENAMED = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss",
            "minimax-m2": "minimax_m2"}  # fmt: skip
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
# GGUF's key → the configuration's fields, of which the first that the class has is set.
_FIELDS = {
    "context_length": ("max_position_embeddings",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.layer_norm_epsilon": _EPSILONS,
    "attention.layer_norm_rms_epsilon": _EPSILONS,
    "attention.sliding_window": ("sliding_window",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
# A window in these files is one in these models; elsewhere transformers has none, or another.
_SLIDING = ("mistral", "phi3", "gemma2", "gemma3_text", "gpt_oss", "starcoder2")
# Values that leave the model as it is without the key.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
}
_WITHOUT_EFFECT = ("tensor_data_layout", "vocab_size")
# A bias in the configuration → the tensors that show that the model has it.
_BIASES = {"attention_bias": ("attn_q.bias", "attn_qkv.bias"), "mlp_bias": ("ffn_up.bias",)}


def whole_config(path: Path) -> Any:
    """Return the configuration of the GGUF file at `path`, with every key that the file has.

    Raises ModelError by the name of what transformers would lose.
    """
    given = _ModelKeys(GGUFReader(path), path)
    config = AutoConfig.from_pretrained(
        str(path.parent), gguf_file=path.name, trust_remote_code=False
    )
    if not any(given.keys):
        return config
    try:
        _set_fields(given, config)
        _set_heads(given, config)
        _set_rope(given, config)
        _set_by_architecture(given, config)
        given.check_nothing_left(config)
        given.check_tensors(config)
    except ModelError as error:
        raise ModelError(
            f"expected transformers to read all that {path.name} says of its "
            f"{given.architecture} model, but it would lose {error}; llama.cpp reads the file as "
            f"it is: gguf:{path}"
        ) from None
    return config


class _ModelKeys:
    """A file's keys of the model, without the architecture's name in front, and its tensors."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self._reader = reader
        self.architecture = str(self._general("general.architecture", "unknown"))
        prefix = f"{self.architecture}."
        self.keys: dict[str, Any] = {
            name.removeprefix(prefix): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(prefix)
        }
        self.left = set(self.keys)
        self.tensors = [tensor.name for tensor in reader.tensors]
        self._check_whole(path)

    def _check_whole(self, path: Path) -> None:
        if int(parts := self._general("split.count", 1)) > 1:
            raise ModelError(
                f"expected a whole model in {path}, got one of {parts} parts; put them "
                "together with llama.cpp's llama-gguf-split --merge"
            )
        if (kind := self._general("general.type", "model")) != "model":
            raise ModelError(f"expected a model in {path}, got a GGUF file of type {kind!r}")

    def _general(self, key: str, default: Any) -> Any:
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, which counts as read from now on."""
        self.left.discard(key)
        return self.keys.get(key, default)

    def values_of(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the content of a tensor, flat."""
        tensor = next(t for t in self._reader.tensors if t.name == f"{name}.weight")
        values = dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(values, dtype=np.float64).reshape(-1)

    def check_nothing_left(self, config: Any) -> None:
        """Raise ModelError for the first key that nothing has read and that says something."""
        mapped: dict[str, Any] = GGUF_CONFIG_MAPPING.get(  # type: ignore[assignment]
            _RENAMED.get(self.architecture, self.architecture), {}
        )
        known = {key for key, name in mapped.items() if name is not None}
        if not mapped:  # read by a function of transformers that builds the whole configuration
            known = {key for key in self.left if not key.startswith(("rope.scaling", "attention"))}
            known |= {"attention.head_count", "attention.head_count_kv"}
        for key in sorted(self.left - known - set(_WITHOUT_EFFECT)):
            value = self.keys[key]
            if value not in _NEUTRAL.get(key, ()) and not _repeats_model(key, value, config):
                raise ModelError(f"{self.architecture}.{key} = {str(value)[:40]}")

    def check_tensors(self, config: Any) -> None:
        """Raise ModelError for the first tensor that has no place in the model."""
        if not {self.architecture, _RENAMED.get(self.architecture)} & set(GGUF_CONFIG_MAPPING):
            return  # another reader of transformers, which reports what it leaves out
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        processor: Any = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        processor = processor(config.to_dict())
        places = set(get_gguf_hf_weights_map(model, processor))
        places |= {f"{name}.weight" for name in _ROPE_TENSORS}
        if config.model_type == "gpt2":
            places.add("output.weight")
        lost = sorted(name for name in self.tensors if name not in places)
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise ModelError(f"the tensor {lost[0]}{more}")


def _repeats_model(key: str, value: Any, config: Any) -> bool:
    """Return whether a key repeats what the model does anyway."""
    if key == "attention.scale":
        return math.isclose(value, _head_dim(config) ** -0.5, rel_tol=1e-5)
    if key == "feed_forward_length":
        return bool(value == 4 * config.hidden_size)
    if key == "attention.max_alibi_bias":
        return bool(config.model_type == "bloom" and value == 8.0)
    if key == "attention.sliding_window":
        return bool(value >= getattr(config, "max_position_embeddings", math.inf))
    return key == "context_length"  # of a model without a limit, such as bloom


def _declared(config: Any, names: Iterable[str]) -> str | None:
    known = {field.name for field in fields(type(config))} | set(config.attribute_map)
    return next((name for name in names if name in known), None)


def _set_fields(given: _ModelKeys, config: Any) -> None:
    for key, names in _FIELDS.items():
        value, name = given.keys.get(key), _declared(config, names)
        if value is None or name is None or value in _NEUTRAL.get(key, ()):
            continue
        if key == "attention.sliding_window" and config.model_type not in _SLIDING:
            continue
        if isinstance(value, list):
            if len(set(value)) != 1:
                continue  # one value per layer, which one field cannot hold
            value = value[0]
        setattr(config, name, value)
        given.take(key)


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _set_heads(given: _ModelKeys, config: Any) -> None:
    """Set the heads' size, and the part of it that is rotated."""
    if config.model_type.startswith("gemma4") or not hasattr(config, "num_attention_heads"):
        return
    # A list says other numbers of heads in other layers; transformers' reader knows which it takes.
    usual = int(config.hidden_size // config.num_attention_heads)
    head = int(given.take("attention.key_length", usual))
    if given.take("attention.value_length", head) != head:
        raise ModelError(f"{given.architecture}.attention.value_length, unlike the keys' length")
    if _declared(config, ("head_dim",)):
        config.head_dim = head
    elif head != usual:
        raise ModelError(f"{given.architecture}.attention.key_length = {head}")
    rotated = given.take("rope.dimension_count")
    rope = getattr(config, "rope_parameters", None)
    if rotated is None or not rope:
        return
    if "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = rotated / head
    elif rotated != head and config.model_type != "minimax_m2":
        raise ModelError(f"{given.architecture}.rope.dimension_count = {rotated}, of {head}")


def _set_rope(given: _ModelKeys, config: Any) -> None:
    divisors = {
        name: given.values_of(name) for name in _ROPE_TENSORS if f"{name}.weight" in given.tensors
    }
    scaling = {
        key.removeprefix("rope.scaling."): given.take(key)
        for key in sorted(given.left)
        if key.startswith("rope.scaling.")
    }
    linear = given.take("rope.scale_linear")
    if linear is not None:
        scaling.setdefault("factor", linear)
    theta = float(given.take("rope.freq_base", 10000.0))
    sliding = given.take("rope.freq_base_swa")
    if not _declared(config, ("rope_parameters",)):
        if scaling or divisors:
            raise ModelError(f"rope.scaling of {type(config).__name__}, which has no rope")
        return
    found = rope_parameters(
        scaling,
        divisors,
        theta=theta,
        head_dim=_head_dim(config),
        max_length=int(config.max_position_embeddings),
    )
    before = config.rope_parameters or {}
    nested = {k: v for k, v in before.items() if isinstance(v, dict)}
    kept = {k: v for k, v in before.items() if k == "partial_rotary_factor"}
    # longrope in Phi-3 and its like: the trained length is a field of the configuration
    trained = "original_max_position_embeddings"
    if found.get("rope_type") == "longrope" and _declared(config, (trained,)):
        setattr(config, trained, found[trained])
    if config.model_type == "gpt_oss" and found.get("rope_type") == "yarn":
        kept["truncate"] = False
    whole = {"rope_type": "default", "rope_theta": theta, **kept, **found}
    if not nested:
        if sliding not in (None, theta):
            raise ModelError(f"{given.architecture}.rope.freq_base_swa = {sliding}")
        config.rope_parameters = whole
        return
    config.rope_parameters = {**nested, "full_attention": whole}
    if sliding is not None:
        config.rope_parameters["sliding_attention"]["rope_theta"] = float(sliding)


def _set_by_architecture(given: _ModelKeys, config: Any) -> None:
    """Set what llama.cpp knows of an architecture and the file does not state."""
    for name, endings in _BIASES.items():
        if _declared(config, (name,)):
            setattr(config, name, any(tensor.endswith(endings) for tensor in given.tensors))
    # The largest of each Gemma has hidden / heads, all others their head's size.
    largest = {"gemma2": 46, "gemma3_text": 62}.get(config.model_type)
    if largest is not None:
        usual = config.hidden_size // config.num_attention_heads
        is_largest = config.num_hidden_layers == largest
        config.query_pre_attn_scalar = usual if is_largest else _head_dim(config)
    if config.model_type == "gpt_oss" and given.take("expert_feed_forward_length"):
        config.intermediate_size = int(given.keys["expert_feed_forward_length"])
    if given.architecture == "stablelm":
        given.take("use_parallel_residual")  # transformers finds it from the tensors
    if config.model_type == "qwen3_moe":
        gating = str(given.take("expert_gating_func", 1))
        if re.search("softmax|1", gating) is None:
            raise ModelError(f"{given.architecture}.expert_gating_func")
