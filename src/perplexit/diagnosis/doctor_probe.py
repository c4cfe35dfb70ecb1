"""What the doctor feeds: a stretch of real text as ids, and windows cut from it.

Shape suffixes: S = ids of the stretch, T = ids of one window, N = targets of one window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import ModelError, UsageError
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.windows import PrefixMode, WindowIds
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.loss_file import RecordedInferenceSession

Losses = list[NDArray[np.float32]]

# Where tokenizers of one name differ: blanks, digits, case, scripts, code, marks.
HARD_TEXT = (
    "Two  blanks,\ttab,\n\n  lines; 3.14159 and 1,234,567; don't, I'LL, naïve Łódź Übermaß; "
    "Один 東京 🙂; def f(x):\n    return x**2  # done\n"
)
DEFAULT_LENGTH = 1024
_SHORTEST = 16  # ids without which nothing can be compared
_SHORT_LENGTHS = (96, 61, 33, 8)
_EQUAL_LENGTH, _NUM_EQUAL = 48, 4
_NUM_RECORDED = 64


@dataclass(frozen=True)
class Probe:
    """Ids of one stretch of text, and the id (a BOS) that goes before every window of it.

    max_length: ids of the longest window, prefix included.
    """

    ids_S: NDArray[np.int32]
    prefix_id: int | None
    max_length: int

    def window(
        self, start: int, length: int, *, first_target: int = 1, index: int = 0
    ) -> WindowIds:
        """Return a window of `length` ids of the stretch from `start` on, behind the prefix.

        Scored are the stretch's ids `start + first_target …`.
        """
        ids_T = self.ids_S[start : start + length]
        prefix = [] if self.prefix_id is None else [self.prefix_id]
        fed_T = np.concatenate((np.array(prefix, np.int32), ids_T)).astype(np.int32)
        first = len(prefix) + first_target
        return WindowIds(index, fed_T, np.arange(first, len(fed_T), dtype=np.int64))

    @property
    def room(self) -> int:
        """Return ids of the stretch that fit into one window behind the prefix."""
        return min(len(self.ids_S), self.max_length - (self.prefix_id is not None))

    @cached_property
    def short_windows(self) -> tuple[WindowIds, ...]:
        """Return windows of unequal length from all over the stretch."""
        return self._cut(_SHORT_LENGTHS, first_index=0)

    @cached_property
    def equal_windows(self) -> tuple[WindowIds, ...]:
        """Return windows of one length: a batch of them is not padded."""
        return self._cut((_EQUAL_LENGTH,) * _NUM_EQUAL, first_index=10)

    @cached_property
    def long_window(self) -> WindowIds:
        """Return the longest window."""
        return self.window(0, self.room, index=20)

    def _cut(self, lengths: Sequence[int], *, first_index: int) -> tuple[WindowIds, ...]:
        windows = []
        for number, wanted in enumerate(lengths):
            length = min(wanted, self.room)
            start = (len(self.ids_S) - length) * number // len(lengths)
            windows.append(self.window(start, length, index=first_index + number))
        return tuple(windows)


@dataclass
class ExaminedModel:
    """What is examined: a session, its own tokenizer, the input, the probe, and what was asked.

    Losses that several checks need are computed once.
    """

    session: InferenceSession
    tokenizer: Tokenizer | None
    tokens: TokenFile | None
    probe: Probe
    dtype: str | None = None
    quantization: str | None = None

    @property
    def computes(self) -> bool:
        """Tell whether the session computes anything; a recording gives back what it holds."""
        return not isinstance(self.session, RecordedInferenceSession)

    @cached_property
    def recorded_windows(self) -> list[WindowIds]:
        """Return the first windows of the input: all that a recording can be asked."""
        if self.tokens is None:
            raise UsageError("a recording can only be examined with its INPUT; name the token file")
        return [
            self.tokens.window_ids(i) for i in range(min(_NUM_RECORDED, len(self.tokens.windows)))
        ]

    @cached_property
    def repeated(self) -> tuple[Losses, Losses, Losses]:
        """Return the short windows three times over, one request a window."""
        first, second, third = (
            [self.session.token_nll([window])[0] for window in self.probe.short_windows]
            for _ in range(3)
        )
        return first, second, third

    @cached_property
    def long_losses(self) -> NDArray[np.float32]:
        """Return the losses of the longest window."""
        return self.session.token_nll([self.probe.long_window])[0]


def make_probe(
    session: InferenceSession,
    tokenizer: Tokenizer | None,
    tokens: TokenFile | None,
    max_length: int | None,
) -> Probe:
    """Make the probe from the input's longest window, or the packaged text and the tokenizer.

    Raises UsageError where there is neither an input nor a tokenizer, or too little of either.
    """
    if tokens is not None:
        ids_S, prefix_id, longest = _from_input(tokens)
    elif tokenizer is not None:
        encoded = tokenizer.encode_batch([packaged_text()])
        ids_S, longest = encoded.ids, DEFAULT_LENGTH
        # one prefix, however many the tokenizer adds: two would be a fault of its own (check "bos")
        prefix_id = tokenizer.added_prefix[0] if tokenizer.added_prefix else None
    else:
        raise UsageError(
            f"expected a tokenizer beside {session.model.address}, which has none of its own; name "
            "one with --tokenizer, or give an INPUT that `perplexit prepare` made"
        )
    if len(ids_S) < _SHORTEST:
        raise UsageError(
            f"expected at least {_SHORTEST} ids in one window to examine with, got {len(ids_S)}; "
            "give an INPUT with longer documents, or none"
        )
    return Probe(ids_S, prefix_id, _length_limit(session, max_length or longest))


def packaged_text() -> str:
    """Return 14,000 characters of the State of the Union address of 1928 (public domain)."""
    return resources.files("perplexit.diagnosis").joinpath("probe.txt").read_text(encoding="utf-8")


def _from_input(tokens: TokenFile) -> tuple[NDArray[np.int32], int | None, int]:
    """Return (ids of the longest window without its prefix, the prefix, the window's length)."""
    lengths_W = tokens.fed_lengths()
    if not len(lengths_W):
        raise UsageError(f"expected an INPUT with windows, got {tokens.path} without one")
    row = int(np.argmax(lengths_W))
    ids_S, prefix_id = tokens.window_ids(row).ids_T, None
    if tokens.windows.array[row, 5] != PrefixMode.NONE:
        prefix_id, ids_S = int(ids_S[0]), ids_S[1:]
    bos_id = tokens.spec.get("tokenizer", {}).get("bos_id")
    while prefix_id is None and len(ids_S) and ids_S[0] == bos_id:  # it stands in the text itself
        prefix_id, ids_S = bos_id, ids_S[1:]
    return np.asarray(ids_S), prefix_id, int(lengths_W[row])


def _length_limit(session: InferenceSession, wanted: int) -> int:
    """Return `wanted`, less where the model, the program or the server takes no more."""
    shapes: Any = session.description.settings.get("shapes") or {}
    limits = [wanted, session.model.max_length, shapes.get("length")]
    limit = min(int(value) for value in limits if value)
    if session.description.engine.startswith("completions"):
        limit -= 1  # a server generates an id after the prompt
    if limit < _SHORTEST:
        raise ModelError(
            f"expected a model that takes windows of at least {_SHORTEST} ids, got {limit}"
        )
    return limit
