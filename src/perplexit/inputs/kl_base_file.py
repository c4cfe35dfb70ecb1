"""llama.cpp's file of a reference's log-probabilities (`llama-perplexity --kl-divergence-base`).

    char[8]  "_logits_"
    uint32   n_ctx          ids a chunk
    int32    n_vocab
    int32    n_chunk
    int32    tokens[n_chunk · n_ctx]        as tokenised: no BOS written over a chunk's first id
    uint16   rows[n_chunk][n_ctx - 1 - n_ctx / 2][nv],   nv = 2 · ((n_vocab + 1) / 2) + 4

Row k of a chunk is the distribution of its id n_ctx / 2 + 1 + k: float32 scale, float32 lowest
log-probability, then a uint16 q a token with logp = lowest + scale · q. Logits more than 16 nats
below the largest were raised to there before: their q is 0, and only their sum is known.
Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/perplexity.cpp

Shape suffixes: N = targets, V = vocabulary.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import FingerprintMismatchError, ModelError, VocabularyError
from perplexit.fingerprints import sha256_of_file
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import PrefixMode
from perplexit.untrusted_files import Expected, open_regular, stated

MAGIC = b"_logits_"
CLAMP = 16.0  # nats below the largest logit
_HEADER_BYTES = 20
_STEPS = 65535
_ROUNDING = 1e-2  # nats that float32 may give a log-probability above 0
_EXPECTED = Expected(
    "log-probabilities that llama-perplexity --kl-divergence-base wrote",
    ModelError,
    "write the file again",
)
_LARGEST = 1 << 24  # ids of a chunk, and of a vocabulary


def is_kl_base_file(path: str | Path) -> bool:
    """Return whether a file begins as llama.cpp's log-probabilities do."""
    place = Path(path)
    if not place.is_file():
        return False
    with open_regular(place, _EXPECTED) as file:
        return file.read(len(MAGIC)) == MAGIC


@dataclass(frozen=True, slots=True)
class ClampedRows:
    """Distributions as the file holds them.

    logp_NV: float64, -inf where the value was raised to the clamp and is not known.
    tail_N:  what all those tokens have together; cap_N: the most that one of them can have.
    scale_N: the step of the file's rounding, nats.
    """

    logp_NV: NDArray[np.float64]
    tail_N: NDArray[np.float64]
    cap_N: NDArray[np.float64]
    scale_N: NDArray[np.float64]

    def floor(self) -> NDArray[np.float64]:
        """Return the KL, nats per token, that rounding alone gives a model with itself.

        Values are rounded to steps of `scale` (at most 16 / 65,535 nats): p changes by
        p · scale / √12 (standard deviation; the most likely token's is exact), and the tail, what
        is left to 1, by their sum: scale² / 24  +  scale / √12 · √Σ p².
        """
        p_NV = np.exp(self.logp_NV)
        squares_N = np.maximum((p_NV**2).sum(axis=-1) - p_NV.max(axis=-1) ** 2, 0)
        tail_error_N = self.scale_N / np.sqrt(12) * np.sqrt(squares_N)
        floor_N: NDArray[np.float64] = self.scale_N**2 / 24 + tail_error_N
        return floor_N


class KlBaseFile:
    """A base file, mapped. Raises ModelError where it is damaged or of another kind."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not is_kl_base_file(self.path):
            _EXPECTED.refuse(self.path, f"a file that does not begin with {MAGIC.decode()!r}")
        header = np.fromfile(self.path, dtype="<i4", count=3, offset=len(MAGIC))
        sound = len(header) == 3 and 2 < header[0] < _LARGEST and 0 < header[1] < _LARGEST
        if not sound or header[2] <= 0:
            _EXPECTED.refuse(self.path, "a damaged header")
        self.num_context, self.vocab_size, self.num_chunks = (int(value) for value in header)
        self.num_targets = self.num_context - 1 - self.num_context // 2
        row_width = 2 * ((self.vocab_size + 1) // 2) + 4
        tokens = self.num_chunks * self.num_context
        self._rows_offset = _HEADER_BYTES + 4 * tokens
        self._shape = (self.num_chunks, self.num_targets, row_width)
        expected = self._rows_offset + 2 * math.prod(self._shape)
        found = self.path.stat().st_size
        if found != expected:
            chunks = f"{self.num_chunks} chunks of {self.num_context} ids"
            _EXPECTED.refuse(
                self.path,
                f"{found:,} bytes where {chunks}, with a vocabulary of {self.vocab_size:,}, take "
                f"{expected:,}: it was cut off, or its header is damaged",
            )

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """Return the ids of each chunk as tokenised: (chunks, n_ctx)."""
        flat = self._read("<i4", self.num_chunks * self.num_context, _HEADER_BYTES)
        wrong = np.flatnonzero((flat < 0) | (flat >= self.vocab_size))
        if len(wrong):
            replace(_EXPECTED, error=VocabularyError).refuse(
                self.path,
                f"the id {int(flat[wrong[0]])} in chunk {int(wrong[0]) // self.num_context}, "
                f"outside its vocabulary of {self.vocab_size:,}",
            )
        return flat.reshape(self.num_chunks, self.num_context).astype(np.int32)

    def _read(self, dtype: str, count: int, offset: int) -> NDArray[Any]:
        """Read values of the file, not mapped: a file cut short meanwhile is an error."""
        with open_regular(self.path, _EXPECTED) as file, stated(self.path, _EXPECTED):
            file.seek(offset)
            data = file.read(count * np.dtype(dtype).itemsize)
        values = np.frombuffer(data, dtype=dtype) if len(data) % 4 == 0 else np.empty(0, dtype)
        if len(values) != count:
            _EXPECTED.refuse(self.path, "a file that was cut short while it was read")
        return values

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the file, which does not name its model."""
        return sha256_of_file(self.path)

    def rows(self, chunk: int, start: int, stop: int) -> ClampedRows:
        """Read the distributions of the targets `start … stop - 1` of a chunk."""
        width = self._shape[-1]
        first = (chunk * self.num_targets + start) * width
        flat = self._read("<u2", (stop - start) * width, self._rows_offset + 2 * first)
        rows_NW = flat.reshape(stop - start, width)
        with np.errstate(invalid="ignore"):  # a NaN is refused below
            pairs_N2 = rows_NW[:, :4].copy().view("<f4").astype(np.float64)
        scale_N1, lowest_N1 = np.hsplit(pairs_N2, 2)
        self._check_rows(chunk, scale_N1, lowest_N1)
        steps_NV = rows_NW[:, 4 : 4 + self.vocab_size]
        logp_NV = lowest_N1 + scale_N1 * steps_NV
        is_tail_NV = (steps_NV == 0) & (scale_N1 * _STEPS >= CLAMP - 1e-3)
        cap_N = np.exp(lowest_N1[:, 0])
        logp_NV[is_tail_NV] = -np.inf
        left_N = 1 - np.exp(logp_NV).sum(axis=-1)
        tail_N = np.clip(left_N, 0, is_tail_NV.sum(axis=-1) * cap_N)
        return ClampedRows(logp_NV, tail_N, cap_N, scale_N1[:, 0])

    def _check_rows(
        self, chunk: int, scale_N1: NDArray[np.float64], lowest_N1: NDArray[np.float64]
    ) -> None:
        """Raise ModelError for a row whose log-probabilities cannot be any."""
        finite = np.isfinite(scale_N1).all() and np.isfinite(lowest_N1).all()
        highest_N1 = lowest_N1 + scale_N1 * _STEPS
        if not finite or scale_N1.min(initial=0) < 0 or highest_N1.max(initial=0) > _ROUNDING:
            _EXPECTED.refuse(self.path, f"rows in chunk {chunk} that are no log-probabilities")

    def require_input(self, tokens: TokenFile) -> None:
        """Raise FingerprintMismatchError unless the input's windows are the file's chunks."""
        problem = self._difference(tokens)
        if problem is not None:
            raise FingerprintMismatchError(
                f"expected an input whose windows are the chunks of {self.path}, but {problem}; "
                "prepare the very text that llama-perplexity was given, with its tokenizer: "
                f"prepare TEXT --protocol llama-cpp --max-length {self.num_context}"
            )

    def _difference(self, tokens: TokenFile) -> str | None:
        if tokens.protocol != "llama-cpp":
            return f"the input's protocol is {tokens.protocol}, not llama-cpp"
        if tokens.scored_mask is not None:
            return "the input scores only some of the tokens (a scored mask)"
        lengths = set(tokens.fed_lengths().tolist())
        if lengths != {self.num_context}:
            return f"the input's windows have {sorted(lengths)} ids, the chunks {self.num_context}"
        if tokens.num_windows != self.num_chunks:
            return (
                f"the input has {tokens.num_windows} windows and the file {self.num_chunks} chunks "
                "(was it written with --chunks?)"
            )
        for window in range(tokens.num_windows):
            differing = np.flatnonzero(_as_tokenised(tokens, window) != self.ids[window])
            if len(differing):
                at = int(differing[0])
                ours = int(_as_tokenised(tokens, window)[at])
                return (
                    f"{len(differing)} ids of window {window} differ: at position {at} the input "
                    f"has {ours} and the file {int(self.ids[window, at])}"
                )
        return None


def _as_tokenised(tokens: TokenFile, window: int) -> NDArray[np.int32]:
    """Return a window's ids before a BOS was written over the first of them."""
    ids_T = np.array(tokens.window_ids(window).ids_T)
    row = tokens.windows[window]
    if row.prefix_mode is PrefixMode.OVERWRITE:
        ids_T[0] = tokens.token_ids[int(tokens.document_starts[row.document]) + row.start]
    return ids_T
