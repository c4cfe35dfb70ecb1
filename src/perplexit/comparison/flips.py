"""Tokens at which the two models' first choices differ, the reference's surest ones first.

Shape suffixes: M = tokens that both runs scored with a finite loss, in window order; R = rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison.divergences import held_against
from perplexit.comparison.pairing import Pairs
from perplexit.comparison.token_spelling import spell
from perplexit.metrics.bounded_intervals import share_interval
from perplexit.metrics.estimate import Estimate
from perplexit.runs.run import Run
from perplexit.runs.run_tokens import RunTokens

CONTEXT_TOKENS = 12
AFTER_TOKENS = 4
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Flip:
    """One changed first choice, with the text around it.

    *_top1:      the text of a model's most likely token; None where it was not recorded, `<id>`
                 where nothing at hand spells it.
    reference_p: the probability that the reference gave to its first choice; None if not recorded.
    """

    document: int
    token_index: int
    token: str
    context: str
    after: str
    reference_top1: str | None
    candidate_top1: str | None
    reference_p: float | None
    nll_reference: float
    nll_candidate: float


@dataclass(frozen=True, slots=True)
class Flips:
    """How many first choices changed, and the `listed` ones.

    complete: false where only ranks are known: a change from one wrong choice to another is then
              not seen, and `count` is a lower bound.
    agreement: the share of tokens with the same first choice, with its interval; None where
              `complete` is false.
    """

    count: int
    num_tokens: int
    complete: bool
    listed: tuple[Flip, ...]
    agreement: Estimate | None = None


@dataclass(frozen=True, slots=True)
class FirstChoices:
    """At which tokens the first choices differ, and how sure the reference was of its own.

    changed:  M; true where the two models' most likely tokens are known to differ.
    complete: whether that is all of them; else only ranks are known.
    sureness: M probabilities that the reference gave to its first choice; None if not recorded.
    """

    changed: NDArray[np.bool_]
    complete: bool
    sureness: NDArray[np.float64] | None


def first_choices(reference: Run, candidate: Run, pairs: Pairs) -> FirstChoices | None:
    """Return where two runs over one input have other first choices; None if neither run tells."""
    changed = _changed_rows(reference, candidate)
    if changed is None:
        return None
    changed_R, complete = changed
    return FirstChoices(changed_R[pairs.rows], complete, _sureness(reference, candidate, pairs))


def flips_of(
    reference: Run,
    candidate: Run,
    pairs: Pairs,
    choices: FirstChoices | None,
    *,
    limit: int,
    confidence: float,
) -> Flips | None:
    """Return the changed first choices, with the `limit` of which the reference was surest."""
    if choices is None:
        return None
    ours, theirs = reference.tokens, candidate.tokens
    changed_M, sureness_M = choices.changed, choices.sureness
    places = np.flatnonzero(changed_M)
    if sureness_M is None:
        order = np.argsort(-np.abs(pairs.delta[places]), kind="stable")
    else:
        order = np.argsort(-sureness_M[places], kind="stable")
    chosen = places[order[:limit]]
    tops = [_first_choices(rows, pairs.rows[chosen]) for rows in (ours, theirs)]
    tops[1][tops[0] == tops[1]] = UNKNOWN  # rank 1 shared by two tokens: the other one was chosen
    texts = spell([reference, candidate], {int(i) for top in tops for i in top if i != UNKNOWN})
    listed = tuple(
        Flip(
            document=int(ours.document[row]),
            token_index=int(ours.token_index[row]),
            token=ours.text_of(row),
            context=text_around(ours, row, -CONTEXT_TOKENS),
            after=text_around(ours, row, AFTER_TOKENS),
            reference_top1=_text(int(tops[0][index]), texts),
            candidate_top1=_text(int(tops[1][index]), texts),
            reference_p=None if sureness_M is None else float(sureness_M[place]),
            nll_reference=float(pairs.reference[place]),
            nll_candidate=float(pairs.candidate[place]),
        )
        for index, (place, row) in enumerate(
            zip(chosen.tolist(), pairs.rows[chosen].tolist(), strict=True)
        )
    )
    agreement = None
    if choices.complete:
        agreement = share_interval((~changed_M).astype(np.float64), pairs.clusters, confidence)
    return Flips(len(places), len(changed_M), choices.complete, listed, agreement)


def text_around(tokens: RunTokens, row: int, count: int) -> str:
    """Return the text of the scored tokens right before (`count` < 0) or after a row."""
    step = 1 if count > 0 else -1
    last = row
    for _ in range(abs(count)):
        following = last + step
        if not 0 <= following < len(tokens) or (
            tokens.document[following] != tokens.document[row]
            or tokens.token_index[following] != tokens.token_index[last] + step
        ):
            break
        last = following
    first, stop = (row + 1, last + 1) if step > 0 else (last, row)
    if tokens.token_bytes is None:
        return " ".join(f"<{int(token)}>" for token in tokens.token_id[first:stop])
    return b"".join(tokens.token_bytes[first:stop].to_pylist()).decode("utf-8", errors="replace")


def _changed_rows(reference: Run, candidate: Run) -> tuple[NDArray[np.bool_], bool] | None:
    """Return (where first choices are known to differ, whether that is all of them)."""
    ours, theirs = reference.tokens, candidate.tokens
    if theirs.same_top1 is not None and held_against(reference, candidate):
        return ~theirs.same_top1.astype(np.bool_), True
    if ours.top_ids is not None and theirs.top_ids is not None:
        return ours.top_ids[:, 0] != theirs.top_ids[:, 0], True
    if ours.rank is not None and theirs.rank is not None:
        return (ours.rank == 1) != (theirs.rank == 1), False
    return None


def _sureness(reference: Run, candidate: Run, pairs: Pairs) -> NDArray[np.float64] | None:
    top = reference.tokens.top_logprobs
    if top is not None:
        return np.asarray(np.exp(top[pairs.rows, 0], dtype=np.float64))
    recorded = candidate.tokens.reference_top_p
    if recorded is None or not held_against(reference, candidate):
        return None
    return np.asarray(recorded[pairs.rows], np.float64)


def _first_choices(tokens: RunTokens, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the id of each row's most likely token; UNKNOWN where it was not recorded."""
    if tokens.top_ids is not None:
        return np.asarray(tokens.top_ids[rows, 0], np.int64)
    if tokens.rank is None:
        return np.full(len(rows), UNKNOWN)
    first = tokens.rank[rows] == 1
    return np.asarray(np.where(first, tokens.token_id[rows], UNKNOWN), np.int64)


def _text(token_id: int, texts: dict[int, str]) -> str | None:
    return None if token_id == UNKNOWN else texts.get(token_id, f"<{token_id}>")
