"""The doctor's checks of what was put together: vocabulary, tokenizer, BOS, windows, precision.

Shape suffixes: T = ids of one window, N = targets of one window.
"""

import numpy as np

from perplexit.diagnosis.doctor_findings import Finding, failed, passed, skipped, warned
from perplexit.diagnosis.doctor_probe import HARD_TEXT, ExaminedModel, packaged_text
from perplexit.errors import TokenizerError
from perplexit.evaluation.input_fit import UNKNOWN_VOCABULARY
from perplexit.inputs.retokenizing import first_difference, match_tokenizer
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.windows import WindowIds
from perplexit.quantization.precisions import canonical_dtype, canonical_precision
from perplexit.sessions.base import SpellsTokens, TokenizesText

_NUM_BOS_TARGETS = 64
_NATS_OF_A_BOS = 0.5
_STANDARD_ERRORS = 4.0
_NUM_SPELLED = 64
_MOST_WINDOWS = 4096


def vocabulary(examined: ExaminedModel) -> Finding:
    """Tell whether every id has a row in the model, and how many rows have no token."""
    rows = examined.session.model.vocab_size
    if rows >= UNKNOWN_VOCABULARY:
        return skipped("this engine does not tell how many rows the model has")
    largest = int(examined.probe.ids_S.max())
    if examined.tokens is not None:
        prefix_id = int(examined.tokens.windows.prefix_id.max(initial=-1))
        largest = max(int(examined.tokens.token_ids.max(initial=-1)), prefix_id)
    sizes = [
        entry.vocab_size for entry in (examined.tokenizer, examined.tokens) if entry is not None
    ]
    num_tokens = max(sizes, default=0)
    if max(largest + 1, num_tokens) > rows:
        return failed(
            f"the tokenizer has {num_tokens} ids (the largest fed is {largest}), the model "
            f"{rows} rows",
            max(largest + 1, num_tokens),
            rows,
            advice="use the tokenizer that the model was trained with",
        )
    spare = rows - num_tokens
    sentence = f"every id has a row; the largest fed is {largest}"
    if num_tokens and spare:
        sentence += f"; rows {num_tokens} to {rows - 1} ({spare}) have no token"
    if num_tokens and spare > max(1024, rows // 10):
        advice = "padding rarely takes so many rows: is this the model's own tokenizer?"
        return warned(sentence, spare, max(1024, rows // 10), advice=advice)
    return passed(sentence, max(largest + 1, num_tokens), rows)


def window_length(examined: ExaminedModel) -> Finding:
    """Tell whether the windows are ones that the model was made for."""
    made_for = examined.session.model.max_length
    longest = examined.probe.max_length
    if examined.tokens is not None:
        longest = int(examined.tokens.fed_lengths().max(initial=0))
    if made_for is None:
        return skipped("this engine does not tell what the model was made for")
    sentence = f"windows of up to {longest} ids; the model was made for {made_for}"
    if longest <= made_for:
        return passed(sentence, longest, made_for)
    advice = f"prepare with --max-length {made_for}, or call it a test of extrapolation"
    return warned(sentence, longest, made_for, advice=advice)


def dtype(examined: ExaminedModel) -> Finding:
    """Tell whether the precision in effect is the one asked for; float32 where none was."""
    description = examined.session.description
    quantization = description.quantization
    asked = canonical_dtype(examined.dtype) if examined.dtype else None
    sentence = f"computed in {description.dtype}"
    if quantization is not None:
        sentence += (
            f"; weights {quantization.name} by {quantization.library} "
            f"({quantization.effective_bits:.3g} bits per parameter)"
        )
    if examined.quantization is not None and (
        quantization is None
        or canonical_precision(quantization.name) != canonical_precision(examined.quantization)
    ):
        return failed(
            f"{sentence}, but {examined.quantization} was asked for",
            advice="compile or load the model again with that quantization",
        )
    if description.dtype.startswith("unknown"):
        return skipped(f"{sentence}: the engine does not tell")
    if asked is not None and description.dtype != asked:
        return failed(
            f"{sentence}, but {asked} was asked for",
            description.dtype,
            asked,
            advice="see the engine's settings in the record",
        )
    if asked is None and description.dtype not in ("float32", "float64"):
        return warned(
            f"{sentence}: losses carry its rounding",
            description.dtype,
            "float32",
            advice="load with --dtype float32 for reference figures",
        )
    return passed(sentence, description.dtype, asked or "float32")


def tokenizer(examined: ExaminedModel) -> Finding:
    """Tell whether input, model and engine turn one text into the same ids."""
    own = examined.tokenizer
    if own is None:
        return skipped("the model comes without a tokenizer; name one (--tokenizer)")
    compared = []
    for compare in (_input_compared, _engine_compared, _spelling_compared):
        found = compare(examined, own)
        if found is not None and found.status == "fail":
            return found
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


def _differs(sentence: str) -> Finding:
    return failed(sentence, advice="prepare with the tokenizer that the model was trained with")


def _input_compared(examined: ExaminedModel, own: Tokenizer) -> Finding | None:
    """Return how the input's tokenizer compares with the model's own; None where nothing tells."""
    if examined.tokens is None:
        return None
    found = match_tokenizer(examined.tokens, own)
    if found.by == "fingerprint":
        return passed("the input's tokenizer is the model's own, by its fingerprint")
    if found.by == "nothing":
        return None
    if found.difference is not None:
        return _differs(f"the input was prepared with another tokenizer: {found.difference}")
    return passed("the input's ids are those of the model's own tokenizer")


def _engine_compared(examined: ExaminedModel, own: Tokenizer) -> Finding | None:
    """Return how the engine's tokenizer compares; None where it has none."""
    if not isinstance(examined.session, TokenizesText):
        return None
    for text in (packaged_text(), HARD_TEXT):
        theirs = _engine_ids(examined.session, text)
        if theirs is None:
            return None
        found = first_difference(own.encode_batch([text]).ids, theirs)
        if found:
            return _differs(f"the engine's own tokenizer gives other ids: {found}")
    return passed("the engine's own tokenizer gives the same ids")


def _spelling_compared(examined: ExaminedModel, own: Tokenizer) -> Finding | None:
    """Return how the engine's spelling of ids compares; None where it spells none."""
    if not isinstance(examined.session, SpellsTokens):
        return None
    ids = examined.probe.ids_S[:_NUM_SPELLED].tolist()
    for index, text in zip(ids, examined.session.own_token_texts(ids), strict=True):
        # Byte pieces of a character cannot be told from a text, and blanks are shown variously.
        if text is None or "\ufffd" in text or text.startswith("token_id:"):
            continue
        spelled = own.spelled[index]
        if text.strip(" ▁").encode() != spelled.strip():
            return _differs(f"the engine spells id {index} {text!r}, the tokenizer {spelled!r}")
    return passed("the engine spells the ids as the tokenizer does")


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
