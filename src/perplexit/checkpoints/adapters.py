"""PEFT adapters (LoRA and its like): a folder's identity, and a model with the adapter on it."""

import warnings
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import nn

from perplexit.checkpoints.identity import file_digest
from perplexit.checkpoints.own_logits import OwnLogits
from perplexit.errors import CapabilityError, ModelError, needing
from perplexit.fingerprints import json_fingerprint
from perplexit.session_descriptions import AdapterDescription
from perplexit.untrusted_files import Expected, read_json, typed
from perplexit.untrusted_tensors import opened_tensors

_EXPECTED = Expected("a PEFT configuration", ModelError, "save the adapter again")
_TENSORS = Expected("an adapter's weights", ModelError, "is the copy complete?")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Where the base model lay and how the adapter was trained says nothing about its numbers.
_IRRELEVANT_KEYS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")

_PROBE_SHAPE = (2, 48)
# Of the logits' spread, as root mean squares, in float32 and float64: the weights' own rounding.
_TOLERANCE = 1e-4
# Narrow weights are rounded once more by a merge. The result may be this much farther from
# float32 than the same model in the same dtype with the adapter beside it.
_MOST_FARTHER = 2.0


class _AdapterConfig(TypedDict):
    """The keys of adapter_config.json that are read here; PEFT reads the others."""

    peft_type: str
    base_model_name_or_path: NotRequired[str | None]


def find_adapter(folder: str | Path, *, merged: bool = False) -> AdapterDescription:
    """Read the adapter in `folder`, as PEFT's save_pretrained writes it.

    merged: whether it is to be merged. The fingerprint is the SHA-256 of its weights and of what
    its configuration says of the arithmetic.
    Raises ModelError where there is none, and CapabilityError for prompts that are learned: they
    add tokens of their own to every window, so the windows would no longer be the input's.
    """
    path = Path(folder).expanduser()
    config_file, weights = path / _CONFIG, path / _WEIGHTS
    if not config_file.is_file():
        raise ModelError(
            f"expected the folder of a PEFT adapter, with {_CONFIG} and {_WEIGHTS}, but {path} has "
            f"no {_CONFIG}; name the folder that the adapter's save_pretrained wrote"
        )
    if not weights.is_file():
        raise ModelError(
            f"expected the adapter's weights in {weights}, which is not there (pickled weights are "
            "not read); save the adapter again as safetensors"
        )
    config = read_json(config_file, _EXPECTED, dict[str, Any], non_finite=True)
    kind = typed(config, _EXPECTED, _AdapterConfig, place=config_file)["peft_type"].upper()
    if kind in _PROMPTS or config.get("alora_invocation_tokens"):
        raise CapabilityError(
            f"expected an adapter that changes the model's layers (LoRA and its like), got {kind} "
            f"in {path}, which adds tokens or depends on them; its perplexity on the input's own "
            "windows is not defined here"
        )
    if kind == "XLORA":
        raise CapabilityError(
            f"expected an adapter that is whole in its folder, got XLORA in {path}, which names "
            "others that PEFT would fetch; score those adapters one by one"
        )
    with opened_tensors(weights, _TENSORS):
        pass  # it can be read
    return AdapterDescription(
        path=str(path.resolve()),
        kind=kind,
        fingerprint=_fingerprint(config, weights),
        merged=merged,
        base=config.get("base_model_name_or_path"),
    )


def with_adapter(model: nn.Module, adapter: AdapterDescription) -> nn.Module:
    """Return the model with the adapter beside its layers, or merged into their weights.

    A merged model is compared with the unmerged one first: merged into weights that are shared
    (LoRA on a tied embedding), an adapter also changes what it was not trained to change.
    Raises ModelError where the adapter was made for another model's shapes or layers,
    CapabilityError where it cannot be merged, MissingPackageError without PEFT.
    """
    with needing("evaluating an adapter", "pip install 'perplexit[adapters]'", "peft"):
        from peft import PeftModel, get_peft_model_state_dict  # noqa: PLC0415 - an optional package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that keys are missing is an error below
            adapted: Any = PeftModel.from_pretrained(model, adapter.path)
    except Exception as error:  # of PEFT, whatever the configuration says
        raise ModelError(_mismatch(adapter, model, " ".join(str(error).split())[:300])) from error
    _check_complete(adapter, model, get_peft_model_state_dict(adapted))
    unmerged: nn.Module = adapted.get_base_model().eval()
    if not adapter.merged:
        return unmerged
    before = OwnLogits.of(unmerged, _PROBE_SHAPE, tolerance=_TOLERANCE, most_farther=_MOST_FARTHER)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shared weights it warns; here they are measured
            merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # of PEFT's many methods
        raise CapabilityError(
            f"the adapter {adapter.path} ({adapter.kind}) cannot be merged: {error}; evaluate it "
            "without --merge-adapter"
        ) from error
    reason = before.why_not(merged.eval())
    if reason is not None:
        raise CapabilityError(
            f"expected the adapter {adapter.path} ({adapter.kind}) merged into "
            f"{type(merged).__name__} to give what it gives beside the layers, but {reason}; "
            "weights that it changes may be shared (a tied embedding and head), or too coarse for "
            "it: evaluate it without --merge-adapter"
        )
    return merged


def adapted_fingerprint(base: str, adapter: AdapterDescription) -> str:
    """Return the identity of the base model's weights with the adapter on them, merged or not."""
    return json_fingerprint({"base": base, "adapter": adapter.fingerprint})


def _fingerprint(config: dict[str, Any], weights: Path) -> str:
    settings = {key: value for key, value in config.items() if key not in _IRRELEVANT_KEYS}
    identity = {"config": settings, "weights": file_digest(weights)}
    return json_fingerprint(identity, allow_nan=True)


def _check_complete(
    adapter: AdapterDescription, model: nn.Module, expected: dict[str, Any]
) -> None:
    """Raise ModelError where PEFT dropped saved tensors or kept fresh weights for missing ones."""
    with opened_tensors(Path(adapter.path) / _WEIGHTS, _TENSORS) as file:
        saved = set(file.keys())
    odd = sorted(saved ^ set(expected))
    if odd:
        raise ModelError(
            _mismatch(adapter, model, f"{len(odd)} of its tensors differ, such as {odd[0]}")
        )


def _mismatch(adapter: AdapterDescription, model: nn.Module, reason: str) -> str:
    base = f" (it was trained on {adapter.base})" if adapter.base else ""
    return (
        f"expected an adapter for this {type(model).__name__}, but {adapter.path}{base} does not "
        f"fit: {reason}; name the base model that it was trained on"
    )
