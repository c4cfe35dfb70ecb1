"""A checkpoint's config.json as transformers reads it, checked against what the file says.

transformers keeps a field that a model class does not read as a plain attribute, and takes from
the file which attention to run. Here a field that decides the arithmetic is read by the class or
the load is refused, and attention, kernels and code are chosen on the command line alone.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from inspect import getmodule, getsource
from typing import Any

from transformers import AutoConfig

from perplexit.checkpoints.identity import read_config
from perplexit.checkpoints.location import CheckpointSource
from perplexit.errors import ModelError

# Fields that change what a forward pass computes, in the configurations of some class or other.
_DECIDING = (
    "alibi", "attention_bias", "attention_chunk_size", "attention_logits_soft_cap",
    "attention_multiplier", "attn_logit_softcapping", "attn_temperature_tuning", "clip_qkv",
    "embedding_multiplier", "embedding_scale", "final_logit_softcapping", "layer_types",
    "logit_scale", "logits_scaling", "logits_soft_cap", "lm_head_multiplier", "max_window_layers",
    "mlp_bias", "no_rope_layers", "num_experts", "num_local_experts", "partial_rotary_factor",
    "qk_layernorm", "qk_norm", "query_pre_attn_scalar", "residual_multiplier", "rope_parameters",
    "rope_scaling", "rotary_pct", "sliding_window", "sliding_window_pattern", "use_qk_norm",
    "use_sliding_window",
)  # fmt: skip
# What a class that has `rope_parameters` reads under older names.
_ROPE_NAMES = ("rope_scaling", "rope_theta", "partial_rotary_factor")
_EVERY_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# "finetuned" and, outside yarn and longrope, the trained length decide nothing.
_EVERY_ROPE |= {"finetuned", "original_max_position_embeddings"}
_ROPE_FIELDS = {
    "default": set(),
    "axial": set(),
    "proportional": {"factor"},
    "linear": {"factor"},
    "dynamic": {"factor", "alpha"},
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", "short_mscale",
                 "long_mscale"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip
_QUANTIZED = ("quantization_config", "compression_config")


def checked_config(source: CheckpointSource) -> Any:
    """Return the configuration object of a checkpoint, with nothing in it that chooses code to run.

    Raises ModelError for an encoder-decoder and a field that the model's class does not read.
    """
    written = read_config(source.folder)
    config = AutoConfig.from_pretrained(
        source.folder, trust_remote_code=False, local_files_only=True
    )
    if config.is_encoder_decoder:
        raise ModelError(
            f"expected a causal language model in {source.folder}, got the encoder-decoder "
            f"{config.model_type}"
        )
    for part in _parts(config):
        _let_nothing_choose(part)
    for key, part in _text_parts(config, written):
        _check_read(source, key, part)
    return config


def check_weights_are_plain(source: CheckpointSource) -> None:
    """Raise ModelError for weights that are quantized already, and where two sets may be meant."""
    written = read_config(source.folder)
    nested = [value for value in written.values() if isinstance(value, Mapping)]
    for part in (written, *nested):
        for name in _QUANTIZED:
            if part.get(name) is not None:
                settings = part[name]
                known = isinstance(settings, Mapping) and settings.get("quant_method")
                raise ModelError(
                    f"{source.address} holds weights that are already quantized "
                    f"({known or 'unknown'}), which this version does not load; name the "
                    "checkpoint that they were made from"
                )
    other = written.get("transformers_weights")
    if other is not None:
        raise ModelError(
            f"expected the weights of {source.folder} in model.safetensors or the files of its "
            f"index, but config.json says transformers_weights: {str(other)[:80]!r}; remove that "
            "field, or name a folder that holds those weights alone"
        )
    if (source.folder / "adapter_config.json").is_file():
        raise ModelError(
            f"expected a checkpoint in {source.folder}, but an adapter (adapter_config.json) lies "
            "beside its weights, so that it is not clear which of the two is meant; move the "
            "adapter into a folder of its own, and name that with --adapter where it is wanted"
        )


def _parts(config: Any) -> Iterator[Any]:
    """Yield the configuration and the ones inside it."""
    yield config
    for name in getattr(type(config), "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _let_nothing_choose(config: Any) -> None:
    """Leave attention, experts and kernels to transformers' defaults, whatever the file says."""
    config._attn_implementation = None
    config._experts_implementation = None
    for name in ("quantization_config", "auto_map", "use_kernels", "kernel_config"):
        if name in vars(config):
            delattr(config, name)


def _text_parts(config: Any, written: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield (the JSON, the configuration object) of the parts that process text."""
    text = config.get_text_config()
    if text is config:
        yield written, config
        return
    for name in getattr(type(config), "sub_configs", None) or {}:
        inner = written.get(name)
        if getattr(config, name, None) is text and isinstance(inner, Mapping):
            yield inner, text


def _check_read(source: CheckpointSource, written: Mapping[str, Any], config: Any) -> None:
    """Raise ModelError by name for a field that decides a figure and that the class leaves."""
    known = {field.name for field in fields(type(config))} | set(config.attribute_map)
    known |= {config.attribute_map[name] for name in config.attribute_map}
    if "rope_parameters" in known:
        known.update(_ROPE_NAMES)
    unread = [
        name
        for name in _DECIDING
        if name not in known and _says(written, name) and not _mentioned(config, name)
    ]
    if unread:
        raise ModelError(
            f"expected config.json of {source.folder} to be read whole, but "
            f"{type(config).__name__} does not read {', '.join(unread)}, and the model would "
            "silently differ; if the weights were trained without it, remove the field"
        )
    if "rope_parameters" in known:
        _check_rope(source, written, config)


def _mentioned(config: Any, name: str) -> bool:
    """Return whether a configuration class reads the field in a way of its own (older names)."""
    home = getmodule(type(config))
    if name in _ROPE_NAMES or home is None:
        return False  # every class has a property of that name
    return hasattr(type(config), name) or bool(re.search(rf"\b{name}\b", getsource(home)))


def _says(written: Mapping[str, Any], name: str) -> bool:
    """Return whether a field changes what a class without it does."""
    value = written.get(name)
    if value in (None, False, 0, {}, []) or (value == 1 and name.endswith(("factor", "pct"))):
        return False
    if name == "sliding_window":
        longest = written.get("max_position_embeddings") or written.get("n_positions") or 0
        return not (isinstance(value, int) and value >= longest > 0)
    if name == "layer_types":
        return not isinstance(value, list) or set(value) != {"full_attention"}
    if name in ("rope_scaling", "rope_parameters") and isinstance(value, Mapping):
        return (
            not set(value) <= {"rope_type", "type", "rope_theta"}
            or (value.get("rope_type") or value.get("type") or "default") != "default"
        )
    return name != "max_window_layers"  # a length that only use_sliding_window gives a meaning


def _check_rope(source: CheckpointSource, written: Mapping[str, Any], config: Any) -> None:
    """Raise ModelError by name for rotary fields that are not read, or contradict each other."""
    scaling, parameters = written.get("rope_scaling"), written.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise ModelError(
            f"expected one description of rotary positions in config.json of {source.folder}, got "
            "rope_scaling and rope_parameters that differ; remove one of them"
        )
    theta, inner = written.get("rope_theta"), (parameters or scaling or {}).get("rope_theta")
    if theta is not None and inner is not None and float(theta) != float(inner):
        raise ModelError(
            f"expected one rope_theta in config.json of {source.folder}, got {theta} and, with the "
            f"rotary positions, {inner}; remove one of them"
        )
    rope = config.rope_parameters or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    ignored = set(config.ignore_keys_at_rope_validation or ())
    for part in nested or [rope]:
        kind = str(part.get("rope_type") or part.get("type") or "default")
        if kind not in _ROPE_FIELDS and kind != "mrope":
            raise ModelError(
                f"expected rotary positions of type {', '.join(_ROPE_FIELDS)}, got {kind!r} in "
                f"config.json of {source.folder}, which this version of transformers does not know"
            )
        read = _EVERY_ROPE | _ROPE_FIELDS.get(kind, set()) | ignored | {"mrope_section"}
        unread = sorted(
            name
            for name, value in part.items()
            if name not in read and value not in (None, 1, 1.0, False)
        )
        if unread:
            raise ModelError(
                f"expected rotary positions of type {kind} in config.json of {source.folder}, but "
                f"they carry {', '.join(unread)}, which that type does not read; remove what the "
                "model was trained without, or mend the type"
            )
