"""PyTorch: any causal language model of transformers, or a module that is already loaded.

Shape suffixes: N = targets, T = ids of a window, V = vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.errors import (
    CapabilityError,
    EngineOutOfMemoryError,
    UsageError,
)
from perplexit.functional.linear_nll import (
    DEFAULT_LOGITS_BYTES,
    rows_within,
    statistics_of_hidden_states,
)
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import LogitsChunk, ModelDescription, SessionDescription, TokenDetails
from perplexit.sessions.pytorch_batch import (
    PaddedBatch,
    batches_of,
    check_windows,
    details_by_window,
    fed_length,
    no_details,
)
from perplexit.sessions.pytorch_cached import (
    CacheRoom,
    PytorchCache,
    cached_windows_for,
    check_cache,
)
from perplexit.sessions.pytorch_device import batch_size_for, is_out_of_memory
from perplexit.sessions.pytorch_forward import ForwardPass, WholeForward, find_forward
from perplexit.sessions.pytorch_loading import ModuleChanges, open_module
from perplexit.sessions.pytorch_module import (
    activation_bytes_per_id,
    dtype_name,
    num_embeddings,
    position_limit,
)

_T = TypeVar("_T")


class PytorchInferenceSession:
    """A model in PyTorch; logits exist for one chunk of scored tokens at a time.

    model:   `[hf:]PATH_OR_ID[@REVISION]`, a folder, a `.gguf` (dequantized), or a loaded causal
             language model whose forward gives `.logits`, a tuple or a tensor. A loaded one keeps
             its dtype, device and training flags.
    dtype:   float32 for an address unless told otherwise, whatever the checkpoint's own is.
    device:  cpu, cuda, cuda:N or mps; None takes CUDA where there is one.
    threads: of the CPU; None takes OMP_NUM_THREADS, else the cores this process may use.
    quantization: the weights' precision, such as nf4 or int8: `known_precisions("pytorch")`.
    adapter: the folder of a PEFT adapter for the model; merge_adapter: merged into its weights.
    max_logits_bytes: how much float32 logits may take at a time.
    Raises ModelError, UsageError, QuantizationError, MissingPackageError.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        quantization: str | None = None,
        adapter: str | Path | None = None,
        merge_adapter: bool = False,
        max_logits_bytes: int = DEFAULT_LOGITS_BYTES,
    ) -> None:
        changes = ModuleChanges(quantization, adapter, merge_adapter)
        opened = open_module(model, dtype=dtype, device=device, threads=threads, changes=changes)
        self._opened, self._module, self._device = opened, opened.module, opened.device
        num_rows = num_embeddings(self._module)
        with opened.scoring():
            forward, self._num_logits = find_forward(
                self._module, num_rows or 2, row_by_row=opened.batch_invariant
            )
        self._forward: ForwardPass = forward
        self._id_limit = min(num_rows or self._num_logits, self._num_logits)
        self._chunk_rows = rows_within(max_logits_bytes, self._num_logits)
        self._position_limit = position_limit(self._module)
        self._description = self._describe()
        self._model_description: ModelDescription | None = None
        self._closed = False
        self._num_cached_layers: int | None = None
        self._peak_device_bytes: int | None = None

    @property
    def module(self) -> nn.Module:
        """The loaded model."""
        return self._module

    @property
    def model(self) -> ModelDescription:
        """Whose numbers these are; the fingerprint is computed when first asked for."""
        if self._model_description is None:
            self._check_open()
            self._model_description = self._opened.describe(self._id_limit)
        return self._model_description

    @property
    def description(self) -> SessionDescription:
        """PyTorch, and the settings in effect."""
        return self._description

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """The nll of each target, window by window; see InferenceSession."""
        return [d.nll_N for d in self._checked_and_scored(windows, False, 0)]

    def token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """The nll with entropy, rank and alternatives; see DetailedSession."""
        return self._checked_and_scored(windows, True, top_k)

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """The logits of every target, chunk by chunk; see LogitsSession."""
        rows = self._target_rows(windows)
        for place, rows_NX in enumerate(rows):
            for start in range(0, len(rows_NX), chunk_rows):
                chunk = rows_NX[start : start + chunk_rows]
                yield LogitsChunk(place, start, self._head_logits(chunk))

    def target_hidden_states(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """What the head makes each target's logits of, window by window; see HiddenStateSession."""
        if self._forward.keeps_logits:
            raise CapabilityError(
                f"expected a model whose head can be told from its layers, but "
                f"{self.model.address} is scored by its whole forward pass; compare with two "
                "models in one process instead: eval CANDIDATE --reference MODEL"
            )
        return [rows.float().cpu().numpy() for rows in self._target_rows(windows)]

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits that the model's own head makes of hidden states; see HiddenStateSession."""
        dtype = next(self._module.parameters()).dtype
        return self._head_logits(torch.from_numpy(hidden_ND).to(self._device, dtype))

    def _head_logits(self, rows_NX: Tensor) -> NDArray[np.float32]:
        with self._opened.scoring():
            logits: NDArray[np.float32] = self._forward.head(rows_NX).float().cpu().numpy()
        return logits

    def _target_rows(self, windows: Sequence[WindowIds]) -> list[Tensor]:
        """What the head is given for each target, window by window."""
        self._check(windows)
        return self._within_memory(windows, lambda: self._gathered_rows(windows))

    def _gathered_rows(self, windows: Sequence[WindowIds]) -> list[Tensor]:
        results = [torch.empty(0, 0)] * len(windows)
        for places in batches_of(windows, padded=self._forward.takes_mask):
            batch = PaddedBatch.of([windows[place] for place in places], self._device)
            rows_BTX = self._forward.rows(batch.ids_BT, batch.mask_BT)
            rows_NX = rows_BTX[batch.rows_N, batch.positions_N]
            start = 0
            for place, count in zip(places, batch.counts, strict=True):
                results[place] = rows_NX[start : start + count]
                start += count
        return results

    def max_batch_size(self, window_length: int) -> int:
        """How many windows half of the free memory holds; at least 1."""
        num_logits = self._num_logits if self._forward.keeps_logits else 0
        num_bytes = activation_bytes_per_id(self._module, window_length, num_logits)
        return batch_size_for(self._device, max(1, window_length), num_bytes)

    cache_rows: int | None = None  # a cache takes any number of windows; see CachingSession

    @property
    def rows_are_logits(self) -> bool:
        """Whether a forward pass keeps logits for every position; see CachingSession."""
        return self._forward.keeps_logits

    def caching(self) -> Mapping[str, Any]:
        """How the cache is kept, after a probe that it works; see CachingSession."""
        self._check_open()
        self._num_cached_layers = check_cache(
            self._forward, self._module, self._device, self._id_limit, self._scoring
        )
        return {"dtype": dtype_name(self._module), "kind": "allocated once, sliding layers whole"}

    def open_cache(self, windows: Sequence[WindowIds]) -> PytorchCache:
        """An empty cache for these windows; see CachingSession."""
        self._check(windows)
        if self._num_cached_layers is None:
            self.caching()
        longest = max(fed_length(window) for window in windows)
        return PytorchCache(
            self._forward,
            CacheRoom(self._num_cached_layers or 0, len(windows), longest),
            device=self._device,
            chunk_rows=self._chunk_rows,
            run=lambda work: self._within_memory(windows, work),
        )

    def max_cached_windows(self, window_length: int) -> int:
        """How many windows to decode together; see CachingSession."""
        return cached_windows_for(self._device, self._module, window_length)

    def peak_device_bytes(self) -> int | None:
        """The most that torch's CUDA allocator has held by the end of a call; None elsewhere."""
        return self._peak_device_bytes

    def close(self) -> None:
        """Release the model; one that was handed in stays with its owner."""
        self._closed = True
        self._module = nn.Identity()
        self._forward = WholeForward(self._module)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _checked_and_scored(
        self, windows: Sequence[WindowIds], with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        self._check(windows)
        return self._within_memory(windows, lambda: self._scored(windows, with_details, top_k))

    def _scoring(self, work: Callable[[], _T]) -> _T:
        with self._opened.scoring():
            return work()

    def _within_memory(self, windows: Sequence[WindowIds], work: Callable[[], _T]) -> _T:
        """What `work` gives; EngineOutOfMemoryError where memory runs out meanwhile."""
        try:
            return self._scoring(work)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Raised out here (and not in a context manager, which would chain them): the engine's own
        # exception holds a traceback, which holds the failed batch's tensors.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise EngineOutOfMemoryError(
            f"{len(windows)} windows of up to {max(len(w.ids_T) for w in windows)} ids do not fit "
            f"into the memory of {self._device} ({reason}); use a smaller batch or --max-length"
        )

    def _scored(
        self, windows: Sequence[WindowIds], with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        empty = no_details(with_details=with_details, num_alternatives=min(top_k, self._num_logits))
        results = [empty] * len(windows)
        for places in batches_of(windows, padded=self._forward.takes_mask):
            batch = PaddedBatch.of([windows[place] for place in places], self._device)
            rows_BTX = self._forward.rows(batch.ids_BT, batch.mask_BT)
            rows_NX = rows_BTX[batch.rows_N, batch.positions_N]
            del rows_BTX
            statistics = statistics_of_hidden_states(
                rows_NX,
                batch.targets_N,
                self._forward.head,
                chunk_rows=self._chunk_rows,
                with_details=with_details,
                top_k=top_k,
            )
            for place, details in zip(
                places, details_by_window(statistics, batch.counts), strict=True
            ):
                results[place] = details
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self._peak_device_bytes = max(self._peak_device_bytes or 0, peak)
        return results

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("expected an open session, but this one was closed; load it again")

    def _check(self, windows: Sequence[WindowIds]) -> None:
        self._check_open()
        check_windows(windows, id_limit=self._id_limit, position_limit=self._position_limit)

    def _describe(self) -> SessionDescription:
        config = getattr(self._module, "config", None)
        settings = {
            "transformers": transformers.__version__,
            "attention": getattr(config, "_attn_implementation", None),
            "head": self._forward.kind,
            "chunk_rows": self._chunk_rows,
            "num_logits": self._num_logits,
            "float32_matmul_precision": "highest",
        }
        if self._opened.quantization is not None:
            settings["weights"] = dict(self._opened.quantization.settings)
        return SessionDescription(
            engine="pytorch",
            version=torch.__version__,
            dtype=dtype_name(self._module),
            device=str(self._device),
            quantization=self._opened.describe_quantization(),
            threads=self._opened.threads,
            settings=settings,
        )
