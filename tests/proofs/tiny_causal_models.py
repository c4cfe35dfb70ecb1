"""A tiny random model of each causal-LM class of transformers: its default config, made small.

Sizes are replaced by name wherever a config has them; what a class needs beyond that is listed
under its model type. Weights are drawn wide, so that every part of a model shows in its losses.
"""

from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, LAYERS, MAX_LENGTH = 128, 3, 64
WINDOW = 8  # ids of a sliding window, a chunk, a local attention: less than a scored window
_HEADS, _HEAD_SIZE, _HIDDEN, _INNER, _EXPERT = 4, 16, 64, 96, 32


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_SIZES: dict[str, Any] = {
    **_each(VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    **_each(
        _HIDDEN,
        "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim emb_dim lru_width "
        "embedding_dim input_embedding_size output_embedding_size",
    ),
    **_each(
        _INNER,
        "intermediate_size ffn_dim n_inner d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
        "dim_ff dff feed_forward_size intermediate_size_mlp dense_intermediate_size ",
    ),
    **_each(
        _EXPERT,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size",
    ),
    **_each(
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers "
        "encoder_layers num_encoder_layers",
    ),
    **_each(
        _HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "mamba_n_heads mamba_num_heads linear_num_heads linear_num_value_heads",
    ),
    **_each(2, "num_key_value_heads num_kv_heads linear_num_key_heads"),
    **_each(
        _HEAD_SIZE,
        "head_dim kv_channels d_kv attention_head_size attention_head_dim linear_head_dim "
        "linear_key_head_dim linear_value_head_dim v_head_dim qk_nope_head_dim kv_lora_rank "
        "index_head_dim",
    ),
    **_each(8, "qk_rope_head_dim rotary_dim state_size mamba_d_state mamba_state_dim"),
    **_each(24, "q_lora_rank qk_head_dim"),
    **_each(32, "mamba_d_head mamba_head_dim"),
    **_each(
        MAX_LENGTH,
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
        "max_source_positions model_max_length",
    ),
    **_each(
        4, "num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank "
        "mamba_dt_rank"
    ),
    **_each(
        2, "num_experts_per_tok num_experts_per_token moe_k moe_top_k moe_topk top_k_experts"
    ),
    **_each(
        1,
        "n_shared_experts num_shared_experts n_group topk_group num_expert_group "
        "first_k_dense_replace num_dense_layers mamba_n_groups n_groups",
    ),
    **_each(
        WINDOW,
        "sliding_window attention_window window_size local_attention sliding_window_size "
        "attention_window_size attention_chunk_size chunk_size mamba_chunk_size index_topk "
        "hidden_size_per_layer_input",
    ),
    **_each(16, "index_n_heads"),
    **_each(32, "image_size"),
    **_each(8, "patch_size"),
}  # fmt: skip
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # never among the ids scored

_QSA = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

# Narrower than others: so wide, a state of 48 steps makes 1e-4 nats of a batch's other rounding.
_SPREADS = {"mamba": 1.0, "zamba": 1.0, "zamba2": 1.0}

# What cannot be made tiny, and why.
NOT_MADE = {
    "blt": "its byte patcher, hash tables and cross attention are sized by each other",
    "dots3_note": "its sound adapter is bound to one size",
    "gemma3n": "its picture part needs the timm library",
    "gemma4_assistant": "drafts for another model, whose hidden states it takes",
    "gemma4_unified_assistant": "drafts for another model, whose hidden states it takes",
}
# What a class needs beyond smaller sizes, and what shows more of it.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "head_dim": 8},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh", "local"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """Return one model type for each class."""
    classes: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        classes.setdefault(name, model_type)
    return list(classes.values())


def class_of(model_type: str) -> Any:
    """Return the class that the mapping names."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return the small config of a model type, with `changes`."""
    kind = CONFIG_MAPPING[model_type]
    values = small_values(kind)
    for name, value in {**OVERRIDES.get(model_type, {}), **changes}.items():
        inner = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if inner else value
    return kind(**values)


def small_values(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the values of a config class, and of the configs inside it, that are to be smaller."""
    plain = kind()
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    held = {name: plain.__dict__.get(name) for name in names}
    small: dict[str, Any] = {n: v for n, v in _SPECIAL.items() if held.get(n) is not None}
    for name, value in held.items():
        if name in _SIZES and type(value) is int:
            small[name] = _SIZES[name]
        elif isinstance(value, PreTrainedConfig):
            small[name] = small_values(type(value))
    if "qk_rope_head_dim" in names:  # latent attention: keys for every head
        small.pop("head_dim", None)
        if "num_key_value_heads" in small:
            small["num_key_value_heads"] = _HEADS
    depth = held.get("num_hidden_layers") or plain.__dict__.get("num_hidden_layers")
    for name, value in plain.__dict__.items():
        if isinstance(value, list) and name in names and len(value) == depth:
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[n % len(kinds)] for n in range(LAYERS)]
    if "is_decoder" in names:
        small["is_decoder"] = True
    return small


def tiny_model(model_type: str, **changes: Any) -> nn.Module:
    """Return the tiny model of a type in evaluation mode, float32; the same each time."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, AttributeError):  # the class takes the text part of this config
        part = getattr(config, "decoder", None) or config.get_text_config(decoder=True)
        model = class_of(model_type)(part)
    _draw_weights(model, _SPREADS.get(model_type, 1.5))
    return model.eval()


@torch.no_grad()
def _draw_weights(model: nn.Module, width: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2 or "A_log" in name:  # a bias, a norm, a decay: near what it was
            parameter.add_(0.2 * noise)
        else:
            spread = 1.0 if "embed" in name else width / parameter.shape[-1] ** 0.5
            parameter.copy_(spread * noise)
