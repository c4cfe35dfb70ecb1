"""The identity of the model that gains were measured on and that a fine-tuning began with."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from perplexit.checkpoints.module_call import dtype_name
from perplexit.checkpoints.module_identity import module_fingerprint, settings_of
from perplexit.fingerprints import json_fingerprint
from perplexit.igf.resumable_work import FINGERPRINT_VERSION, identifies_its_model
from perplexit.runs.measurement import (
    measurement_differences,
    measurement_fingerprint,
    measurement_of,
)


def measurement_of_model(model: nn.Module) -> dict[str, Any]:
    """Return the identity of measurements with this model in its present state.

    See `runs.identity`. The fresh random weights of adapters to be trained (PEFT) are left out:
    their configuration and their shapes identify them.
    """
    adapters = _adapter_configs(model)
    fresh = {name for name, p in model.named_parameters() if p.requires_grad} if adapters else set()
    return measurement_of(
        {"weights_fingerprint": module_fingerprint(model, without=fresh)},
        {
            "engine": "pytorch",
            "version": torch.__version__,
            "dtype": dtype_name(model),
            "device": str(next(model.parameters()).device),
            "settings": {
                "fingerprint_version": FINGERPRINT_VERSION,
                "transformers": transformers.__version__,
                "architecture": type(model).__qualname__,
                "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
                "config": json_fingerprint(settings_of(model)),
                "adapters": adapters,
            },
        },
        on_non_finite="error",
    )


def recorded_identity(model: nn.Module) -> dict[str, Any]:
    """Return the identity of a model as pairs and experiments record it."""
    measurement = measurement_of_model(model)
    return {
        "weights_fingerprint": module_fingerprint(model),
        "measurement": measurement,
        "measurement_fingerprint": measurement_fingerprint(measurement),
    }


def unlike_pairs(learner_record: Mapping[str, Any], model: nn.Module) -> str | None:
    """Return a sentence where a learner's pairs were measured on another model; else None.

    A learner may be used so on purpose, but the person must be told. Pairs that do not identify
    their model (from an older Perplexit, or the original's file) cannot be judged.
    """
    measured: Any = (learner_record.get("pairs") or {}).get("measurement")
    if not identifies_its_model(measured):
        return None
    differences = measurement_differences(measured, measurement_of_model(model))
    if not differences:
        return None
    return (
        "the learner's pairs were measured on another model than the one that is tuned: they "
        f"differ in {', '.join(differences)}; its predictions are of that model's gains"
    )


def _adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Return a digest of PEFT's configuration of each adapter, without its base model's place."""
    configs: Any = getattr(model, "peft_config", None) or {}
    return {
        str(name): json_fingerprint(
            sorted(
                f"{key}={sorted(value) if isinstance(value, set) else value}"
                for key, value in config.to_dict().items()
                if key not in ("base_model_name_or_path", "revision", "inference_mode")
            )
        )
        for name, config in configs.items()
    }
