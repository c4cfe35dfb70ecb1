"""LogitsModuleSession: any `torch.nn.Module` that turns token ids into logits.

Shape suffixes: B = windows of one length, T = ids of a window, V = vocabulary.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.errors import EngineOutOfMemoryError, ModelError, VocabularyError
from perplexit.functional.nll import token_statistics
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import ModelDescription, SessionDescription

_LOGITS_BUDGET_BYTES = 1 << 30


class LogitsModuleSession:
    """A session over a module of the caller's own: `module(ids_BT)` gives logits of [B, T, V].

    The logits may be the result itself, its first item, its `logits` attribute or key. The module
    is moved to `device` where one is given, and scored in its own dtype (the log-softmax in float32
    or better). While it is scored it is in evaluation mode; after that every submodule is in the
    mode it was in. Windows of unequal length are never padded: they go in separate calls.
    """

    def __init__(self, module: nn.Module, *, device: str | torch.device | None = None) -> None:
        self._module = module if device is None else module.to(device)
        tensor = next(iter(module.parameters()), None)
        self._device = torch.device(device or "cpu") if tensor is None else tensor.device
        self.model = ModelDescription(
            address=f"module:{type(module).__name__}",
            architecture=type(module).__name__,
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            weights_fingerprint="",
            vocab_size=int(getattr(getattr(module, "config", None), "vocab_size", 0) or 0),
        )
        self.description = SessionDescription(
            engine="pytorch",
            version=torch.__version__,
            dtype="float32" if tensor is None else str(tensor.dtype).removeprefix("torch."),
            device=str(self._device),
            threads=torch.get_num_threads(),
        )

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """One array a window: the nll of each target in nats."""
        of_length: dict[int, list[int]] = defaultdict(list)
        for place, window in enumerate(windows):
            of_length[len(window.ids_T)].append(place)
        results: dict[int, NDArray[np.float32]] = {}
        modes = {module: module.training for module in self._module.modules()}
        self._module.eval()
        try:
            for places in of_length.values():
                group = [windows[place] for place in places]
                results.update(zip(places, self._scored(group), strict=True))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return [results[place] for place in range(len(windows))]

    def _scored(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        ids_BT = torch.from_numpy(np.stack([window.ids_T for window in windows])).long()
        # no_grad, not inference_mode: what a module caches now must still serve its training.
        with torch.no_grad():
            logits_BTV = self._logits(ids_BT.to(self._device))
            scored = []
            for row, window in enumerate(windows):
                targets_N = torch.from_numpy(window.targets_N).to(self._device)
                ids_N = ids_BT[row, window.targets_N].to(self._device)
                statistics = token_statistics(
                    logits_BTV[row].index_select(0, targets_N - 1), ids_N, with_details=False
                )
                scored.append(statistics.nll_N.float().cpu().numpy())
        return scored

    def _logits(self, ids_BT: Tensor) -> Tensor:
        try:
            result = self._module(ids_BT)
        except IndexError as error:
            raise VocabularyError(
                f"{self.model.architecture} has no row for an id up to {int(ids_BT.max())} "
                f"({error}): tokenise with the model's own tokenizer"
            ) from None
        except torch.OutOfMemoryError as error:
            raise EngineOutOfMemoryError(str(error)) from None
        logits = _logits_in(result)
        if logits is None or logits.ndim != 3 or logits.shape[:2] != ids_BT.shape:
            got = type(result).__name__ if logits is None else f"shape {tuple(logits.shape)}"
            raise ModelError(
                f"expected logits of shape {(*ids_BT.shape, 'vocabulary')} from "
                f"{self.model.architecture}, got {got}: give a module that predicts every position"
            )
        if int(ids_BT.max()) >= logits.shape[2]:
            raise VocabularyError(
                f"{self.model.architecture} predicts {logits.shape[2]} ids, got id "
                f"{int(ids_BT.max())}: tokenise with the model's own tokenizer"
            )
        return logits

    def max_batch_size(self, window_length: int) -> int:
        """How many windows' float32 logits fit into 1 GiB; 1 where the vocabulary is unknown."""
        num_bytes = 4 * window_length * self.model.vocab_size
        return max(1, _LOGITS_BUDGET_BYTES // num_bytes) if num_bytes else 1

    def close(self) -> None:
        """Nothing: the module is the caller's."""


def _logits_in(result: Any) -> Tensor | None:
    if isinstance(result, Mapping):
        result = result.get("logits")
    elif hasattr(result, "logits"):
        result = result.logits
    elif isinstance(result, tuple | list) and result:
        result = result[0]
    return result if isinstance(result, Tensor) else None
