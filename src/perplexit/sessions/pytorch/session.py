"""PyTorch: any causal language model of transformers, or a module that is already loaded.

Shape suffixes: N = targets, T = ids of a window, V = vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.checkpoints.module_call import activation_bytes_per_id, dtype_name, position_limit
from perplexit.errors import CapabilityError, UsageError
from perplexit.functional.output_head import OutputHead
from perplexit.inputs.windows import WindowIds
from perplexit.resources.memory_advice import return_freed_memory
from perplexit.session_descriptions import ModelDescription, SessionDescription
from perplexit.sessions.base import ClosedByWith, LogitsChunk
from perplexit.sessions.options import EngineOptions, engine_options
from perplexit.sessions.pytorch.batch import (
    check_windows,
    fed_length,
    out_of_memory,
    why_out_of_memory,
)
from perplexit.sessions.pytorch.cuda import DeviceMemory
from perplexit.sessions.pytorch.device_choice import batch_size_for
from perplexit.sessions.pytorch.forward import WholeForward
from perplexit.sessions.pytorch.key_value_cache import PytorchCache, cached_windows_for, check_cache
from perplexit.sessions.pytorch.model_setup import ready_model
from perplexit.sessions.pytorch.placement import devices_of
from perplexit.sessions.pytorch.written_head import written_head
from perplexit.token_columns import TokenDetails

_T = TypeVar("_T")


class PytorchInferenceSession(ClosedByWith):
    """A model in PyTorch; logits exist for one chunk of scored tokens at a time.

    model:   `[hf:]PATH_OR_ID[@REVISION]`, a folder, a `.gguf` (dequantized), or a loaded causal
             language model whose forward gives `.logits`, a tuple or a tensor. A loaded one keeps
             its dtype, device and training flags.
    kernels: packed, or plain for transformers' own bits; None asks PERPLEXIT_KERNELS, then packs.
    max_logits_bytes: how much float32 logits may take at a time.
    options: see EngineOptions. An address is loaded in float32 unless told otherwise, whatever
        the checkpoint's own dtype is.
    Raises ModelError, UsageError, QuantizationError, MissingPackageError.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        kernels: str | None = None,
        max_logits_bytes: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        given = engine_options("hf", options, taken=tuple(EngineOptions.__annotations__))
        ready = ready_model(model, given, kernels=kernels, max_logits_bytes=max_logits_bytes)
        self._opened, self._windows = ready.opened, ready.windows
        self._module, self._device = ready.opened.module, ready.opened.device
        self._id_limit, self._description = ready.id_limit, ready.description
        self._position_limit = position_limit(self._module)
        self._model_description: ModelDescription | None = None
        self._closed = False
        self._num_cached_layers: int | None = None
        self._memory = DeviceMemory(self._device)

    @property
    def module(self) -> nn.Module:
        """Return the loaded model."""
        return self._module

    @property
    def model(self) -> ModelDescription:
        """Describe the loaded model; the fingerprint is computed when first asked for."""
        if self._model_description is None:
            self._check_open()
            self._model_description = self._opened.describe(self._id_limit)
        return self._model_description

    @property
    def description(self) -> SessionDescription:
        """Describe PyTorch and the settings in effect."""
        return self._description

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return the nll of each target, window by window; see InferenceSession."""
        self._check(windows)
        launched = self._within_memory(windows, self._windows.launch, windows, False, 0)
        return [details.nll_N for details in self._within_memory(windows, launched)]

    def token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """Return the nll with entropy, rank and alternatives; see DetailedSession."""
        self._check(windows)
        launched = self._within_memory(windows, self._windows.launch, windows, True, top_k)
        return self._within_memory(windows, launched)

    @property
    def queues(self) -> bool:
        """Return whether work queued on a device continues by itself; see QueueingSession."""
        return self._device.type == "cuda"

    def queue_details(
        self, windows: Sequence[WindowIds], *, top_k: int = 0
    ) -> Callable[[], list[TokenDetails]]:
        """Launch `token_details` and return what waits for its results; see QueueingSession."""
        self._check(windows)
        launched = self._within_memory(windows, self._windows.launch, windows, True, top_k)
        return partial(self._within_memory, windows, launched)

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """Yield the logits of every target, chunk by chunk; see LogitsSession."""
        rows = self._target_rows(windows)
        for place, rows_NX in enumerate(rows):
            for start in range(0, len(rows_NX), chunk_rows):
                chunk = rows_NX[start : start + chunk_rows]
                yield LogitsChunk(place, start, self._head_logits(chunk))

    def target_hidden_states(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return what the head makes each target's logits of, by window; see HiddenStateSession."""
        if self._windows.forward.keeps_logits:
            raise self._no_head()
        return [rows.float().cpu().numpy() for rows in self._target_rows(windows)]

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits that the head makes of hidden states; see HiddenStateSession."""
        dtype = next(self._module.parameters()).dtype
        return self._head_logits(torch.from_numpy(hidden_ND).to(self._device, dtype))

    def head_to_keep(self) -> OutputHead | None:
        """Return the head, for states that are kept; None where the model's address gives it again.

        Raises CapabilityError where neither can be had.
        """
        self._check_open()
        if self._windows.forward.keeps_logits:
            raise self._no_head()
        if self._opened.gives_head_again:
            return None
        try:
            with self._opened.scoring():
                return written_head(self._module, self._windows.forward, self._device)
        except CapabilityError:  # it rounds its inputs: quantized in the same way, it is the same
            if self._opened.source is None:
                raise
            return None

    def _no_head(self) -> CapabilityError:
        return CapabilityError(
            f"expected a model whose head can be told from its layers, but "
            f"{self.model.address} is scored by its whole forward pass; compare with two "
            "models in one process instead: eval CANDIDATE --reference MODEL"
        )

    def _head_logits(self, rows_NX: Tensor) -> NDArray[np.float32]:
        with self._opened.scoring():
            logits: NDArray[np.float32] = self._windows.forward.head(rows_NX).float().cpu().numpy()
        return logits

    def _target_rows(self, windows: Sequence[WindowIds]) -> list[Tensor]:
        """Return what the head is given for each target, window by window."""
        self._check(windows)
        return self._within_memory(windows, self._windows.target_rows, windows)

    def max_batch_size(self, window_length: int) -> int:
        """Return how many windows half of the free memory holds; at least 1."""
        num_logits = self._windows.num_logits if self._windows.forward.keeps_logits else 0
        num_bytes = activation_bytes_per_id(self._module, window_length, num_logits)
        devices = devices_of(self._module, self._device)
        threads = self._windows.threads
        parts = threads.size if threads is not None else 1
        length = max(1, window_length)
        return min(batch_size_for(device, length, num_bytes, parts=parts) for device in devices)

    cache_rows: int | None = None  # a cache takes any number of windows; see CachingSession

    @property
    def rows_are_logits(self) -> bool:
        """Return whether a forward pass keeps logits for every position; see CachingSession."""
        return self._windows.forward.keeps_logits

    def caching(self) -> Mapping[str, Any]:
        """Describe how the cache is kept, after a probe that it works; see CachingSession."""
        self._check_open()
        self._num_cached_layers = check_cache(
            self._windows, self._module, self._id_limit, self._scoring
        )
        return {"dtype": dtype_name(self._module), "kind": "allocated once, sliding layers whole"}

    def open_cache(self, windows: Sequence[WindowIds]) -> PytorchCache:
        """Return an empty cache for these windows; see CachingSession."""
        self._check(windows)
        if self._num_cached_layers is None:
            self.caching()
        return PytorchCache(
            self._windows,
            partial(self._within_memory, windows),
            num_layers=self._num_cached_layers or 0,
            lengths=tuple(len(window.ids_T) for window in windows),
            num_ids=max(fed_length(window) for window in windows),
        )

    def max_cached_windows(self, window_length: int) -> int:
        """Return how many windows to decode together; see CachingSession."""
        return cached_windows_for(self._device, self._module, window_length)

    def peak_device_bytes(self) -> tuple[int | None, int | None]:
        """Return the peaks of torch's CUDA allocator since loading; see MeasuresDeviceMemory."""
        return self._memory.peak_bytes(), self._memory.peak_beyond_weights()

    def close(self) -> None:
        """Release the model; one that was handed in stays with its owner."""
        if self._closed:
            return
        self._closed = True
        if self._opened.group is not None:
            self._opened.group.stop()
        if self._windows.threads is not None:
            self._windows.threads.close()
        self._memory.close()
        self._module = nn.Identity()
        self._opened = replace(self._opened, module=self._module)
        self._windows = replace(self._windows, forward=WholeForward(self._module))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._opened.source is not None:
            return_freed_memory()

    def _scoring(self, work: Callable[[], _T]) -> _T:
        with self._opened.scoring():
            return work()

    def _within_memory(
        self, windows: Sequence[WindowIds], work: Callable[..., _T], *given: Any
    ) -> _T:
        """Return what `work` gives; raise EngineOutOfMemoryError where memory runs out."""
        try:
            with self._opened.scoring():
                return work(*given)
        except (MemoryError, RuntimeError, IndexError) as error:
            reason = why_out_of_memory(error, windows, self._module)
        # Raised out here (and not in a context manager, which would chain them): the engine's own
        # exception holds a traceback, which holds the failed batch's tensors.
        raise out_of_memory(windows, self._device, reason)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("expected an open session, but this one was closed; load it again")

    def _check(self, windows: Sequence[WindowIds]) -> None:
        self._check_open()
        check_windows(windows, id_limit=self._id_limit, position_limit=self._position_limit)
