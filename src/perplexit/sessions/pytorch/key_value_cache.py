"""A key/value cache in PyTorch that is allocated once: a step writes its place and reads views.

transformers' own dynamic cache is copied whole for every token that is decoded.

Shape suffixes: B = rows fed, T = ids fed, H = key/value heads, S = ids in the cache, D = head
size, N = picked positions, X = what the forward pass gives a position.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope, held_at
from perplexit.checkpoints.module_call import Past, config_integer
from perplexit.errors import CacheMismatchError, CapabilityError
from perplexit.functional.nll import HeadRequest, head_statistics
from perplexit.sessions.base import MOST_CACHED_IDS, FedRows, Places
from perplexit.sessions.pytorch.device_choice import free_bytes
from perplexit.sessions.pytorch.forward import ForwardPass
from perplexit.sessions.pytorch.window_batches import WindowBatches
from perplexit.token_columns import TokenDetails

# Beyond, a decode step gains little: its matrix products are no longer bound by reading weights.
_MOST_WINDOWS = {"cpu": 96, "cuda": 256, "mps": 64}
_SHARE_OF_FREE_MEMORY = 0.4
_PROBE_IDS = 8
_PROBE_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}  # of the largest value; else 3e-2

Run = Callable[[Callable[[], Any]], Any]


@dataclass
class _Rows:
    """A cache's rows, one for each window, of whole length `lengths[row]`; all layers read it.

    num_ids: the most that are fed. rope: rotary embeddings that depend on a window's length.
    first_row, start: where the next ids go.
    """

    lengths: tuple[int, ...]
    num_ids: int
    rope: LengthDependentRope | None
    first_row: int = 0
    start: int = 0

    def parts(self, first: int, stop: int) -> Iterator[tuple[slice, int]]:
        """Yield rows from `first` to `stop` (counted from `first`) that run together, and a length.

        All rows at once, unless their windows' lengths ask for different frequencies.
        """
        keys = [self.rope.key(n) if self.rope else b"" for n in self.lengths[first:stop]]
        start = 0
        for _, same in groupby(keys):
            size = len(list(same))
            yield slice(start, start + size), max(self.lengths[first + start :][:size])
            start += size


class PytorchCache:
    """Rows of keys and values, and the forward pass that fills them; see KeyValueCache.

    lengths: of the whole windows, one for each row. num_ids: the most that are fed to a row.
    run: calls what it is given under the session's settings, and names a lack of memory.
    """

    def __init__(
        self,
        windows: WindowBatches,
        run: Run,
        *,
        num_layers: int,
        lengths: tuple[int, ...],
        num_ids: int,
    ) -> None:
        self._windows, self._run = windows, run
        self._rows = _Rows(lengths, num_ids, windows.rope)
        self._layers = Cache(layers=[_AllocatedLayer(self._rows) for _ in range(num_layers)])

    def feed(
        self, ids_BT: NDArray[np.int64], *, first_row: int, start: int, picked: Places
    ) -> FedRows:
        """Feed a block of ids; return the rows of the picked places. See KeyValueCache."""
        self._rows.start = start

        def work() -> Tensor:
            ids, parts = torch.from_numpy(ids_BT).to(self._windows.device), []
            for rows, length in self._rows.parts(first_row, first_row + len(ids_BT)):
                self._rows.first_row = first_row + rows.start
                with held_at(self._rows.rope, length):
                    past = Past(self._layers, start)
                    parts.append(self._windows.forward.rows(ids[rows], None, past))
            rows_BTX = parts[0] if len(parts) == 1 else torch.cat(parts)
            row_N, column_N = (torch.from_numpy(x).to(self._windows.device) for x in picked)
            return rows_BTX[row_N, column_N]

        return _PytorchRows(self._run(work), self._windows, self._run)


@dataclass(frozen=True, slots=True)
class _PytorchRows:
    rows_NX: Tensor
    windows: WindowBatches
    run: Run

    def details(self, ids_N: NDArray[np.int64], *, with_details: bool, top_k: int) -> TokenDetails:
        """Return the columns of the ids as the next tokens; see FedRows."""

        def work() -> TokenDetails:
            statistics = head_statistics(self.windows.forward.head)(
                self.rows_NX,
                torch.from_numpy(ids_N).to(self.rows_NX.device),
                HeadRequest(self.windows.chunk_rows, with_details, top_k),
            )
            return statistics.to_numpy()

        details: TokenDetails = self.run(work)
        return details

    def array(self) -> NDArray[np.float32]:
        """Return the rows as float32; see FedRows."""
        rows_NX: NDArray[np.float32] = self.rows_NX.float().cpu().numpy()
        return rows_NX


class _AllocatedLayer(DynamicLayer):
    """One layer's keys and values, whole from the start.

    A sliding layer keeps everything too: its mask hides what is too far back.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, rows: _Rows) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for all rows and ids."""
        rows = self._rows
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty(len(rows.lengths), states.shape[1], rows.num_ids, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of the new ids; return views of all so far, shape BHSD."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self._rows
        rows = slice(place.first_row, place.first_row + len(key_states))
        stop = place.start + key_states.shape[2]
        self.keys[rows, :, place.start : stop] = key_states
        self.values[rows, :, place.start : stop] = value_states
        return self.keys[rows, :, :stop], self.values[rows, :, :stop]

    def get_seq_length(self) -> int:
        """Return how many ids are in the cache before those being given."""
        return self._rows.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (ids that the queries may see, offset of the first)."""
        return self._rows.start + query_length, 0


def check_cache(windows: WindowBatches, module: nn.Module, id_limit: int, run: Run) -> int:
    """Return the number of cached layers, after a probe: cached in blocks as in one pass.

    Raises CapabilityError where the forward takes no cache, CacheMismatchError where it gives
    something else with one.
    """
    forward, name = windows.forward, type(module).__name__
    _refuse_cache(forward)
    num_layers = _num_layers(module)
    if not forward.takes_cache or num_layers is None:
        raise CapabilityError(
            f"expected a model of transformers whose forward takes past_key_values, but {name} "
            "does not; use --mode full"
        )
    ids_BT = np.random.default_rng(0).integers(0, id_limit, (2, _PROBE_IDS))
    ids = torch.from_numpy(ids_BT).to(windows.device)
    with held_at(windows.rope, _PROBE_IDS):
        whole_BTX = run(lambda: forward.rows(ids, None))
    tolerance = _PROBE_TOLERANCE.get(str(whole_BTX.dtype).removeprefix("torch."), 3e-2)
    try:
        lengths = (_PROBE_IDS, _PROBE_IDS)
        cache = PytorchCache(
            windows, run, num_layers=num_layers, lengths=lengths, num_ids=_PROBE_IDS
        )
        blocks = ((0, 3), (3, 4), (4, _PROBE_IDS))
        rows = [_all_rows(cache, ids_BT, slice(*block)) for block in blocks]
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CapabilityError(
            f"expected {name} to take a key/value cache, but with one its forward fails "
            f"({type(error).__name__}: {reason}); use --mode full"
        ) from error
    difference = float((torch.cat(rows, 1).float() - whole_BTX.float()).abs().max())
    if not difference <= tolerance * max(1e-6, float(whole_BTX.float().abs().max())):
        raise CacheMismatchError(
            f"expected {name} to give the same with a key/value cache as without, got hidden "
            f"states that differ by {difference:.3g}: its cache is of another kind; use --mode "
            "full"
        )
    return num_layers


def _refuse_cache(forward: ForwardPass) -> None:
    """Raise CapabilityError with the reason why this forward pass takes no key/value cache."""
    if forward.alone:
        raise CapabilityError(
            "expected a model whose predictions depend on earlier ids alone, which a key/value "
            "cache takes for granted, but this one's change with the batch, its padding or the "
            "ids after them; use --mode full, which runs each window by itself"
        )
    reason = getattr(forward, "why_no_cache", None)
    if reason is not None:
        raise CapabilityError(str(reason))


def _all_rows(cache: PytorchCache, ids_BT: NDArray[np.int64], columns: slice) -> Tensor:
    block = np.ascontiguousarray(ids_BT[:, columns])
    row_N, column_N = (x.ravel() for x in np.indices(block.shape))
    fed = cache.feed(block, first_row=0, start=columns.start, picked=(row_N, column_N))
    return torch.from_numpy(fed.array().reshape(*block.shape, -1))


def _num_layers(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = getattr(text_config, "num_hidden_layers", None)
    return int(found) if isinstance(found, int) else None


def cached_windows_for(device: torch.device, module: nn.Module, window_length: int) -> int:
    """Return how many windows' keys and values take two fifths of the free memory; at least 1."""
    heads = config_integer(module, "num_attention_heads", "n_head") or 1
    hidden = config_integer(module, "hidden_size", "n_embd") or 1024
    size = config_integer(module, "head_dim") or hidden // heads
    kv_heads = config_integer(module, "num_key_value_heads") or heads
    element = next((p.element_size() for p in module.parameters()), 4)
    an_id = 2 * (_num_layers(module) or 1) * kv_heads * size * element
    num_ids = min(MOST_CACHED_IDS, int(_SHARE_OF_FREE_MEMORY * free_bytes(device)) // an_id)
    return max(1, min(_MOST_WINDOWS[device.type], num_ids // max(1, window_length)))
