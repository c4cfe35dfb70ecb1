"""The tensors that lie in a checkpoint's files, and whether a loaded model uses every one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perplexit.checkpoints.identity import weight_files, weight_map
from perplexit.checkpoints.location import CheckpointSource
from perplexit.errors import ModelError
from perplexit.untrusted_files import Expected
from perplexit.untrusted_tensors import opened_tensors

_EXPECTED = Expected(
    "weights in a safetensors file",
    ModelError,
    "a file that cannot be read may be cut short: is the download complete?",
)
# Buffers of other versions that a model computes for itself, none of which is a weight.
_HARMLESS = re.compile(
    r"rotary(_pos)?_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$"
    r"|\.(attn|attention|self_attn)\.(masked_bias|rotary_emb\.inv_freq|causal_mask)$"
    r"|(^|\.)position_ids$|\._extra_state$|\.num_batches_tracked$"
)
# Causal masks, by name and by their shape: a bias of that name may be a weight elsewhere.
_MASK = re.compile(r"(attn|attention)\.bias$")
# What a text does not go through: towers for images and sound, and heads that draft tokens.
_ASIDE = re.compile(
    r"(^|\.)(vision_tower|vision_model|vision_encoder|visual|multi_modal_projector|mm_projector"
    r"|image_newline|embed_vision|audio_tower|audio_model|embed_audio|talker|token2wav|code2wav"
    r"|mtp|mtp_layers)\."
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """dtype (safetensors' name) and shape of every tensor in a checkpoint's files, by its name."""

    source: CheckpointSource
    entries: dict[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def of(cls, source: CheckpointSource) -> "StoredTensors":
        """Return the entries of the folder's files, which must agree with its index and each other.

        Raises ModelError for a file that cannot be read, a tensor in another file than the index
        says, in two files, or in none, and for two sets of weights in one folder.
        """
        files = weight_files(source.folder)
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        places: dict[str, str] = {}
        for file in files:
            entries = _entries_of(file)
            twice = sorted(set(entries) & set(found))
            if twice:
                raise ModelError(
                    f"expected every tensor of {source.folder} in one file, but {file.name} and "
                    f"{places[twice[0]]} both hold {_names(twice)}; save the checkpoint again"
                )
            found |= entries
            places |= dict.fromkeys(entries, file.name)
        _check_index(source, files, places)
        return cls(source, found)

    def check_used(self, model: nn.Module, loading_info: dict[str, Any]) -> None:
        """Raise ModelError where a tensor is left out, missing, or of another kind or shape.

        loading_info: of `from_pretrained(output_loading_info=True)`.
        """
        for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
            problems = sorted(str(problem) for problem in loading_info.get(kind, ()))
            if problems:
                raise ModelError(
                    f"expected every weight of the model in {self.source.folder}, but "
                    f"{len(problems)} are not there or of another shape ({_names(problems)}); is "
                    "it a causal language model, and the download complete?"
                )
        unused = set(loading_info.get("unexpected_keys", ()))
        unused |= self._left_out_by_class(model)
        self._refuse_unused(model, unused)
        self._check_numbers(model)
        self._check_once(model)
        self._check_ties(model)

    def _left_out_by_class(self, model: nn.Module) -> set[str]:
        """Return the tensors of layers that the class leaves out by their number."""
        patterns: Iterable[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        numbered = [p for p in patterns if re.search(r"layers\\?\.(\\d|\d)", p)]
        if not numbered:
            return set()
        skipped = re.compile("|".join(f"({pattern})" for pattern in numbered))
        return {name for name in self.entries if skipped.search(name)} - set(model.state_dict())

    def _refuse_unused(self, model: nn.Module, unused: set[str]) -> None:
        left = sorted(name for name in unused if not self._is_harmless(model, name))
        if left:
            raise ModelError(
                f"expected to use every tensor in {self.source.folder}, but {len(left)} have no "
                f"place in {type(model).__name__} as config.json describes it ({_names(left)}): "
                "the model would be another than the one on disk. Mend config.json (biases, "
                "number of layers, a quantization_config), or save the checkpoint without them"
            )

    def _is_harmless(self, model: nn.Module, name: str) -> bool:
        if _HARMLESS.search(name) or _ASIDE.search(name):
            return True
        shape = self.entries.get(name, ("", ()))[1]
        if _MASK.search(name) and len(shape) == 4 and shape[:2] == (1, 1):
            return shape[2] == shape[3]
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = _LAYER.search(name)
        layers = getattr(config, "num_hidden_layers", None)
        drafting = getattr(config, "num_nextn_predict_layers", None)
        if found is None or not isinstance(layers, int) or not isinstance(drafting, int):
            return False
        return layers <= int(found[1]) < layers + drafting

    def _check_numbers(self, model: nn.Module) -> None:
        """Raise ModelError for integers where the model has numbers with a fraction."""
        state = model.state_dict()
        takes_integers = any(not tensor.is_floating_point() for tensor in state.values())
        for name, (dtype, _) in self.entries.items():
            if dtype in _FLOATS or self._is_harmless(model, name):
                continue
            target = state.get(name)
            if (not takes_integers) if target is None else target.is_floating_point():
                raise ModelError(
                    f"expected floating-point weights in {self.source.folder}, got {name} as "
                    f"{dtype}: integers mean something only with the scales of a quantization, of "
                    "which config.json says nothing; name the checkpoint that they were made from"
                )

    def _check_once(self, model: nn.Module) -> None:
        """Raise ModelError where two names mean one tensor: transformers drops a base prefix."""
        base = str(getattr(model, "base_model_prefix", "") or "")
        if not base:
            return
        seen: dict[str, str] = {}
        for name in self.entries:
            plain = re.sub(rf"^({re.escape(base)}\.)+", "", name)
            if plain in seen:
                raise ModelError(
                    f"expected each tensor of {self.source.folder} once, got {seen[plain]} and "
                    f"{name}, which are one tensor of {type(model).__name__}; save it again"
                )
            seen[plain] = name

    def _check_ties(self, model: nn.Module) -> None:
        """Raise ModelError where config.json ties two tensors that the files hold apart."""
        ties = getattr(model, "get_expanded_tied_weights_keys", None)
        for target, source in (ties(all_submodels=True) if ties is not None else {}).items():
            one, other = _parameter(model, target), _parameter(model, source)
            if one is None or other is None or one is other or one.device.type == "meta":
                continue
            elsewhere = one.data_ptr() != other.data_ptr()  # layers may be spread over devices
            if elsewhere and not torch.equal(one, other.to(one.device)):
                raise ModelError(
                    f"expected {target} to be {source}, as config.json of {self.source.folder} "
                    "says (tie_word_embeddings), but the files hold two that differ; set "
                    "tie_word_embeddings to false, or remove the one that is not the model's"
                )


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _entries_of(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with opened_tensors(file, _EXPECTED, framework="pt") as stored:
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        return {x: (s.get_dtype(), tuple(s.get_shape())) for x, s in slices.items()}


def _check_index(source: CheckpointSource, files: list[Path], places: dict[str, str]) -> None:
    """Raise ModelError where the index says otherwise than the files."""
    index = source.folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    said = weight_map(index)
    if set(said.values()) != {file.name for file in files}:
        raise ModelError(
            f"expected one set of weights in {source.folder}, got {files[0].name} and, beside it, "
            f"{index.name}, which names other files; remove the set that is not the model's"
        )
    apart = sorted(x for x in {*said, *places} if said.get(x) != places.get(x))
    if apart:
        name = apart[0]
        raise ModelError(
            f"expected the files of {source.folder} to hold what {index.name} says, but "
            f"{len(apart)} tensors are elsewhere: {name} is in {places.get(name, 'no file')} "
            f"and should be in {said.get(name, 'none')}; download or save the checkpoint again"
        )


def _names(names: list[str]) -> str:
    more = ", …" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
