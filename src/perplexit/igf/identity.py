"""Which model a gain was measured on, and which one a fine-tuning began with."""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from perplexit.fingerprints import canonical_json
from perplexit.runs.identity import measurement_differences, measurement_of, plain_json
from perplexit.sessions.pytorch.module_facts import dtype_name


def measurement_of_model(model: nn.Module) -> dict[str, Any]:
    """The identity of measurements with this model as it is now; see `runs.identity`.

    Of a model with adapters to be trained (PEFT), their fresh random weights are left out: they
    are known by their configuration and their shapes.
    """
    adapters = _adapter_configs(model)
    fresh = {name for name, p in model.named_parameters() if p.requires_grad} if adapters else set()
    config: Any = getattr(model, "config", None)
    settings = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    for irrelevant in ("_name_or_path", "transformers_version"):
        settings.pop(irrelevant, None)
    return measurement_of(
        {"weights_fingerprint": weights_fingerprint(model, without=fresh)},
        {
            "engine": "pytorch",
            "version": torch.__version__,
            "dtype": dtype_name(model),
            "device": str(next(model.parameters()).device),
            "settings": {
                "transformers": transformers.__version__,
                "architecture": type(model).__qualname__,
                "attention": getattr(config, "_attn_implementation", None),
                "config": _digest(sorted(f"{key}={value}" for key, value in settings.items())),
                "adapters": adapters,
            },
        },
        on_non_finite="error",
    )


def weights_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """The SHA-256 of every parameter's and buffer's name, dtype, shape and bytes.

    without: names of parameters whose bytes are left out.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if name not in without:
            data = tensor.detach().cpu().contiguous()
            content.update(memoryview(data.view(torch.uint8).numpy().reshape(-1)))
    return content.hexdigest()


def differing_conditions(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between the conditions that were kept and those asked for; "" where nothing.

    An older file that does not say which model it is of differs in that.
    """
    names = [name for name in wanted if name != "measurement_fingerprint"]  # its parts say more
    unknown = []
    if "measurement" in wanted and not found.get("measurement"):
        names.remove("measurement")
        unknown = ["the model (an older Perplexit did not record its identity)"]
    differences = measurement_differences(
        plain_json({name: found.get(name) for name in names}),
        plain_json({name: wanted[name] for name in names}),
    )
    return ", ".join([*unknown, *differences])


def unlike_pairs(learner_record: Mapping[str, Any], model: nn.Module) -> str | None:
    """A sentence where a learner's pairs were measured on another model than this; else None.

    A learner may be used so on purpose; that it is must not stay unsaid. One whose pairs do not
    say their model (from an older Perplexit, or the original's file) cannot be told.
    """
    measured = (learner_record.get("pairs") or {}).get("measurement")
    if not measured:
        return None
    differences = measurement_differences(measured, measurement_of_model(model))
    if not differences:
        return None
    return (
        "the learner's pairs were measured on another model than the one that is tuned: they "
        f"differ in {', '.join(differences)}; its predictions are of that model's gains"
    )


def _adapter_configs(model: nn.Module) -> dict[str, Any]:
    """PEFT's configuration of each adapter, without where its base model lay."""
    configs: Any = getattr(model, "peft_config", None) or {}
    return {
        str(name): _digest(
            sorted(
                f"{key}={sorted(value) if isinstance(value, set) else value}"
                for key, value in config.to_dict().items()
                if key not in ("base_model_name_or_path", "revision", "inference_mode")
            )
        )
        for name, config in configs.items()
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
