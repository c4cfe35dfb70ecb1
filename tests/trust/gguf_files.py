"""Tiny GGUF files written key by key, for the tests of loading them: not by the code under test."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import nn

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def paired(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves to pairs, as llama.cpp wants them of Llama."""
    rows = array.reshape(num_heads, 2, len(array) // num_heads // 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


def gguf_name(name: str, *, gemma: bool = False) -> str:
    """llama.cpp's name of a tensor of a Llama-like model."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, suffix = rest.rsplit(".", 1)
    table = {**NAMES, **(GEMMA_NORMS if gemma else {})}
    return f"blk.{layer}.{table[part]}.{suffix}"


def write(
    path: Path,
    model: nn.Module,
    *,
    arch: str = "llama",
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """The file: the model's tensors in float32, its sizes, and the keys given (without `arch.`)."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, arch)
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    for key, value in {**sizes, **(keys or {})}.items():
        add(writer, f"{arch}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, array in state.items():
        stored = array
        if arch == "llama" and ".q_proj." in name:
            stored = paired(array, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            stored = paired(array, config.num_key_value_heads)
        if arch.startswith("gemma") and "norm" in name:
            stored = array + 1
        target = gguf_name(name, gemma=arch.startswith("gemma"))
        writer.add_tensor(target, np.ascontiguousarray(stored))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key of the type that its value has in real files."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
