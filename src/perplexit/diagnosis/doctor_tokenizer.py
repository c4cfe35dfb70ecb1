"""The doctor's checks of tokenizer and BOS: which ids a text becomes, and what stands before them.

Shape suffixes: T = ids of one window, N = targets of one window.
"""

from typing import NamedTuple

import numpy as np

from perplexit.diagnosis.doctor_findings import (
    Finding,
    failed,
    passed,
    skipped,
    warned,
)
from perplexit.diagnosis.doctor_probe import HARD_TEXT, ExaminedModel, packaged_text
from perplexit.errors import TokenizerError
from perplexit.inputs.retokenizing import first_difference, match_tokenizer
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import SpellsTokens, TokenizesText

_NUM_BOS_TARGETS = 64
_NATS_OF_A_BOS = 0.5
_STANDARD_ERRORS = 4.0
_NUM_SPELLED = 64
_MOST_WINDOWS = 4096


def tokenizer(examined: ExaminedModel) -> Finding:
    """Tell whether input, model and engine turn one text into the same ids."""
    own = examined.tokenizer
    if own is None:
        return skipped("the model comes without a tokenizer; name one (--tokenizer)")
    compared = []
    for compare in (_input_compared, _engine_compared, _spelling_compared):
        found = compare(examined, own)
        if found is not None and found.differs:
            advice = "prepare with the tokenizer that the model was trained with"
            return failed(found.sentence, advice=advice)
        if found is not None:
            compared.append(found.sentence)
    if compared:
        return passed("; ".join(compared))
    return skipped("nothing to compare: the probe is made with the model's own")


def bos(examined: ExaminedModel) -> Finding:
    """Tell whether a BOS stands where the model was trained with one, once."""
    bos_id, added = _bos_of(examined)
    if bos_id is None:
        return passed("the tokenizer has no BOS, and none is fed")
    num_windows, num_with, num_double = _bos_counts(examined, bos_id)
    if num_double:
        return failed(
            f"{num_double} of {num_windows} windows begin with the BOS (id {bos_id}) twice",
            num_double,
            0,
            advice="one of the two comes from the text or its template: prepare with --bos none, "
            "or take it out of the text",
        )
    if bos_id in added and num_with == 0:
        return failed(
            f"the tokenizer puts a BOS (id {bos_id}) before a text, but no window begins with it",
            0,
            num_windows,
            advice="prepare with --bos auto (or first, or every)",
        )
    return _measured_bos(examined, bos_id, is_fed=num_with > 0, is_added=bos_id in added)


class _Compared(NamedTuple):
    """What came of holding another tokenizer against the model's own."""

    differs: bool
    sentence: str


def _input_compared(examined: ExaminedModel, own: Tokenizer) -> _Compared | None:
    tokens = examined.tokens
    if tokens is None:
        return None
    found = match_tokenizer(tokens, own)
    if found.by == "fingerprint":
        return _Compared(False, "the input's tokenizer is the model's own, by its fingerprint")
    if found.by == "nothing":
        return None
    if found.difference is not None:
        return _Compared(True, f"the input was prepared with another tokenizer: {found.difference}")
    return _Compared(False, "the input's ids are those of the model's own tokenizer")


def _engine_compared(examined: ExaminedModel, own: Tokenizer) -> _Compared | None:
    session = examined.session
    if not isinstance(session, TokenizesText):
        return None
    for text in (packaged_text(), HARD_TEXT):
        theirs = _engine_ids(session, text)
        if theirs is None:
            return None
        found = first_difference(own.encode_batch([text]).ids, theirs)
        if found:
            return _Compared(True, f"the engine's own tokenizer gives other ids: {found}")
    return _Compared(False, "the engine's own tokenizer gives the same ids")


def _spelling_compared(examined: ExaminedModel, own: Tokenizer) -> _Compared | None:
    session = examined.session
    if not isinstance(session, SpellsTokens):
        return None
    found = _spelling_difference(examined, own, session)
    if found:
        return _Compared(True, found)
    return _Compared(False, "the engine spells the ids as the tokenizer does")


def _spelling_difference(
    examined: ExaminedModel, own: Tokenizer, session: SpellsTokens
) -> str | None:
    ids = examined.probe.ids_S[:_NUM_SPELLED].tolist()
    texts = session.own_token_texts(ids)
    for index, text, spelled in zip(ids, texts, [own.spelled[i] for i in ids], strict=True):
        # Byte pieces of a character cannot be told from a text, and blanks are shown variously.
        if text is None or "\ufffd" in text or text.startswith("token_id:"):
            continue
        if text.strip(" ▁").encode() != spelled.strip():
            return f"the engine spells id {index} {text!r}, the tokenizer {spelled!r}"
    return None


def _bos_of(examined: ExaminedModel) -> tuple[int | None, tuple[int, ...]]:
    """Return (the BOS, the ids before a text): of the engine, else the model, else the input.

    The engine comes first: a file's conversion can lose what the engine still knows.
    """
    if examined.tokenizer is not None:
        bos_id, added = examined.tokenizer.bos_id, examined.tokenizer.added_prefix
    else:
        record = examined.tokens.spec["tokenizer"] if examined.tokens is not None else {}
        bos_id, added = record.get("bos_id"), tuple(record.get("added_prefix", ()))
    if isinstance(examined.session, TokenizesText):
        found = _engine_prefix(examined.session)
        added = added if found is None else found
    return (added[0] if bos_id is None and added else bos_id), added


def _engine_ids(session: TokenizesText, text: str, *, special: bool = False) -> list[int] | None:
    """Return the ids of `text` by the engine's own tokenizer; None where its model holds none."""
    try:
        return session.own_token_ids(text, special=special)
    except TokenizerError:
        return None


def _engine_prefix(session: TokenizesText) -> tuple[int, ...] | None:
    plain, whole = (_engine_ids(session, "a", special=special) for special in (False, True))
    if plain is None or whole is None:
        return None
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def _bos_counts(examined: ExaminedModel, bos_id: int) -> tuple[int, int, int]:
    """Return (windows, those that begin with the BOS, those that begin with it twice)."""
    if examined.tokens is not None:
        rows = range(min(examined.tokens.num_windows, _MOST_WINDOWS))
        starts = [tuple(examined.tokens.window_ids(row).ids_T[:2].tolist()) for row in rows]
    else:
        added = examined.tokenizer.added_prefix if examined.tokenizer is not None else ()
        starts = [(*added, *examined.probe.ids_S[:2].tolist())[:2]]
    num_with = sum(start[:1] == (bos_id,) for start in starts)
    return len(starts), num_with, sum(start == (bos_id, bos_id) for start in starts)


def _measured_bos(examined: ExaminedModel, bos_id: int, *, is_fed: bool, is_added: bool) -> Finding:
    """Return what a BOS before the text does to the loss of the same tokens."""
    fed = f"a BOS (id {bos_id}) is fed" if is_fed else f"no BOS is fed (id {bos_id})"
    if not examined.computes or bos_id >= examined.session.model.vocab_size:
        return passed(f"{fed}, as the tokenizer adds it" if is_added else fed)
    ids_T = examined.probe.ids_S[: min(_NUM_BOS_TARGETS + 1, examined.probe.max_length - 1)]
    targets_N = np.arange(1, len(ids_T), dtype=np.int64)
    with_T = np.concatenate((np.array([bos_id], np.int32), ids_T)).astype(np.int32)
    losses = [
        examined.session.token_nll([window])[0].astype(np.float64)
        for window in (WindowIds(30, ids_T, targets_N), WindowIds(31, with_T, targets_N + 1))
    ]
    gain_N = losses[0] - losses[1]
    gain = float(gain_N.mean())
    error = float(gain_N.std() / np.sqrt(len(gain_N)))
    sentence = f"{fed}; without one the same tokens cost {gain:+.3f} nats each"
    certain = abs(gain) > max(_NATS_OF_A_BOS, _STANDARD_ERRORS * error)
    if certain and gain > 0 and not is_fed:
        advice = "the model was trained with a BOS: prepare with --bos first (or every)"
        return failed(sentence, gain, _NATS_OF_A_BOS, advice=advice)
    if certain and gain < 0 and is_fed and not is_added:
        advice = "the model does without: prepare with --bos none"
        return warned(sentence, gain, -_NATS_OF_A_BOS, advice=advice)
    return passed(sentence, gain, _NATS_OF_A_BOS)
