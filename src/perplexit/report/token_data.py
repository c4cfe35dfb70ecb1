"""The token text as compact columns for the page's script: numbers as base64, text as one string.

Shape suffixes: M = tokens in reading order; K = alternatives per token.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison import Comparison
from perplexit.comparison.token_spelling import spell_alternatives
from perplexit.inputs.token_file import TokenFile
from perplexit.report.labelled_runs import LabelledRuns
from perplexit.runs.run import Run
from perplexit.runs.run_text import RunText

Packed = dict[str, Any]
ALTERNATIVES_BYTES = 8_000_000  # of a page that is to stay under 15 MB
THOUSANDTHS = 1000.0  # entropy and log-probabilities are kept to 0.001 nats


def token_data(
    labelled: LabelledRuns,
    *,
    tokens: TokenFile | None = None,
    tokenizer: str | Path | None = None,
    max_tokens: int,
    max_alternatives: int,
) -> Packed:
    """Return what the text view shows, for the first `max_tokens` tokens in reading order.

    tokens: the runs' input, which fills in what was not scored.
    Raises FingerprintMismatchError where `tokens` or `tokenizer` are others than the runs'.
    """
    text = RunText.of(labelled.reference, tokens)
    num_shown = min(len(text), max_tokens)
    rows_M = text.row[:num_shown]
    max_alternatives = min(max_alternatives, _affordable(labelled, num_shown))
    scored = rows_M >= 0
    position_M = np.where(scored, labelled.reference.tokens.position[rows_M], -1)
    comparisons = (None, *labelled.comparisons)
    runs = [
        _run_columns(run, rows_M, max_alternatives)
        | {"label": label, "kl": _kl_column(comparison, rows_M)}
        for label, run, comparison in zip(labelled.labels, labelled.runs, comparisons, strict=True)
    ]
    used = [np.asarray(run.pop("alternatives")) for run in runs]
    vocabulary = spell_alternatives(
        labelled.runs,
        np.unique(np.concatenate([np.empty(0, np.int64), *used])).tolist(),
        tokenizer=tokenizer,
        tokens=tokens,
    )
    pieces, kinds = _pieces(text, num_shown)
    return {
        "numTokens": len(text),
        "numShown": num_shown,
        "text": "".join(pieces),
        "units": packed(np.array([len(p.encode("utf-16-le")) // 2 for p in pieces])),
        "kind": packed(kinds),
        "document": packed(text.document[:num_shown]),
        "domain": _domains(labelled, text, num_shown),
        "tokenIndex": packed(text.token_index[:num_shown]),
        "position": packed(position_M),
        "id": packed(text.token_id[:num_shown]),
        "runs": runs,
        "vocabulary": {str(key): value for key, value in sorted(vocabulary.items())},
    }


def _affordable(labelled: LabelledRuns, num_shown: int) -> int:
    """Return how many alternatives per token fit into their share of the page: at least one."""
    largest_id = max(int(run.model.get("vocab_size") or 0) for run in labelled.runs)
    id_bytes = 2 if largest_id <= np.iinfo(np.uint16).max else 4
    bytes_each = (id_bytes + 2) * 4 / 3  # in base64
    return max(1, int(ALTERNATIVES_BYTES / (bytes_each * max(num_shown, 1) * len(labelled.runs))))


def packed(values: NDArray[Any], scale: float | None = None) -> Packed:
    """Return numbers as base64 in the smallest little-endian type that holds them.

    Integers as they are; floats as float32, or with `scale` as integers of 1 / scale (NaN: the
    type's largest value, which the script reads as NaN).
    """
    values = np.asarray(values)
    if values.dtype.kind == "f" and scale is None:
        return {"type": "f4", "data": _base64(values.astype("<f4"))}
    if scale is not None:
        bad = ~np.isfinite(values)
        scaled = np.round(np.where(bad, 0, values) * scale)
        kind = "u2" if scaled.max(initial=0) < np.iinfo(np.uint16).max else "u4"
        integers = np.where(bad, np.iinfo(kind).max, scaled).astype(f"<{kind}")
        return {"type": kind, "scale": scale, "data": _base64(integers)}
    lowest, highest = int(values.min(initial=0)), int(values.max(initial=0))
    kinds = ("u1", "u2", "u4") if lowest >= 0 else ("i2", "i4")
    kind = next(
        (k for k in kinds if highest <= np.iinfo(k).max and lowest >= np.iinfo(k).min), "f8"
    )
    return {"type": kind, "data": _base64(values.astype(f"<{kind}"))}


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _run_columns(run: Run, rows_M: NDArray[np.int64], max_alternatives: int) -> Packed:
    """Return one run's columns; `alternatives` are the ids that it names, to be spelled."""
    rows = run.tokens
    columns: Packed = {
        "nll": packed(_taken(rows.nll, rows_M)),
        "entropy": None
        if rows.entropy is None
        else packed(np.maximum(_taken(rows.entropy, rows_M), 0), THOUSANDTHS),
        "rank": None if rows.rank is None else packed(np.where(rows_M < 0, 0, rows.rank[rows_M])),
        "top": None,
        "alternatives": np.empty(0, dtype=np.int64),
    }
    if rows.top_ids is not None and rows.top_logprobs is not None and max_alternatives > 0:
        count = min(rows.top_ids.shape[1], max_alternatives)
        ids_MK = np.where(rows_M[:, None] < 0, 0, rows.top_ids[rows_M, :count])
        cost_MK = np.where(rows_M[:, None] < 0, np.nan, -rows.top_logprobs[rows_M, :count])
        columns["top"] = {
            "count": count,
            "id": packed(ids_MK.reshape(-1)),
            "nll": packed(np.maximum(cost_MK, 0).reshape(-1), THOUSANDTHS),
        }
        columns["alternatives"] = np.unique(ids_MK)
    return columns


def _kl_column(comparison: Comparison | None, rows_M: NDArray[np.int64]) -> Packed | None:
    """Return the KL of a candidate's comparison; None for the reference and without a valid KL."""
    kl_R = None
    if comparison is not None and comparison.tokens is not None:
        kl_R = comparison.tokens.kl_of_rows()
    return None if kl_R is None else packed(_taken(kl_R, rows_M))


def _taken(column: NDArray[Any], rows_M: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a column in reading order, NaN where a token was not scored."""
    taken: NDArray[np.float64] = np.where(rows_M < 0, np.nan, column[rows_M].astype(np.float64))
    return taken


PLAIN, CONTINUATION, GAP, NUMBER = range(4)


def _pieces(text: RunText, num_shown: int) -> tuple[list[str], NDArray[np.int64]]:
    """Return (the text of each token, its kind).

    A character belongs to the token that holds its first byte; a token that holds only later bytes
    of a character is a CONTINUATION with no text. A GAP stands for text that is not at hand, a
    NUMBER for an id without text.
    """
    kinds = np.full(num_shown, PLAIN)
    is_gap = text.token_id[:num_shown] < 0
    kinds[is_gap] = GAP
    if not text.has_text:
        kinds[~is_gap] = NUMBER
        return ["" if gap else " " for gap in is_gap.tolist()], kinds
    raw = text.text_bytes
    later = (np.frombuffer(raw, dtype=np.uint8) & 0xC0) == 0x80
    edges = _next_character(text.byte_starts[: num_shown + 1], later).tolist()
    pieces = [
        "" if gap else raw[start:stop].decode("utf-8", errors="replace")
        for gap, start, stop in zip(is_gap.tolist(), edges[:-1], edges[1:], strict=True)
    ]
    empty = np.array([not piece for piece in pieces], dtype=np.bool_) & ~is_gap
    kinds[empty] = CONTINUATION
    return pieces, kinds


def _next_character(at: NDArray[np.int64], later: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return each byte offset moved on to where the next character begins (at most 3 bytes)."""
    moved = at.copy()
    padded = np.concatenate((later, [False]))
    for _ in range(3):
        moved += padded[moved]
    return moved


def _domains(labelled: LabelledRuns, text: RunText, num_shown: int) -> Packed | None:
    """Return the domain's name of each document that has one."""
    rows = labelled.reference.tokens
    if not rows.domains or num_shown == 0:
        return None
    document, first = np.unique(rows.document, return_index=True)
    code = rows.domain[first]
    last = int(text.document[num_shown - 1])
    return {
        str(d): rows.domains[c]
        for d, c in zip(document.tolist(), code.tolist(), strict=True)
        if c >= 0 and d <= last
    }
