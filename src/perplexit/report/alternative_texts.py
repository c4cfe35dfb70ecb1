"""Token ids as text to show: what the runs spelled, and the tokenizer where it is at hand."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison.token_spelling import shown, spelled_by_models
from perplexit.errors import FingerprintMismatchError
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.report.labelled_runs import LabelledRuns


def vocabulary_of(
    labelled: LabelledRuns,
    ids: NDArray[np.integer],
    *,
    tokenizer: str | Path | None = None,
    tokens: TokenFile | None = None,
) -> dict[int, str]:
    """What each of `ids` stands for; ids that nothing at hand spells are left out.

    tokenizer: where to look; None tries the models' own folders. A tokenizer that was named is
        refused with FingerprintMismatchError where it is not the one of the runs; one that was
        found and is not, or cannot be read, is passed over.
    tokens: the runs' input, whose tokens spell themselves.
    """
    wanted = np.unique(ids)
    spelled = _spelled_by(labelled, tokenizer)
    if spelled is not None:
        known = wanted[(wanted >= 0) & (wanted < len(spelled))]
        return {int(i): shown(spelled[i]) for i in known.tolist() if spelled[i]}
    return _seen_in_text(labelled, wanted, tokens)


def _spelled_by(labelled: LabelledRuns, tokenizer: str | Path | None) -> list[bytes] | None:
    fingerprint = labelled.reference.tokenizer_fingerprint
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        if loaded.fingerprint != fingerprint:
            raise FingerprintMismatchError(
                f"expected the tokenizer of the runs ({fingerprint[:12]}…), got {tokenizer} "
                f"({loaded.fingerprint[:12]}…); name the one that the input was prepared with"
            )
        return loaded.spelled
    return spelled_by_models(labelled.runs)


def _seen_in_text(
    labelled: LabelledRuns, wanted: NDArray[np.integer], tokens: TokenFile | None
) -> dict[int, str]:
    """The ids that occur in the text, as they are spelled there."""
    if tokens is not None and tokens.has_text:
        ids, first = np.unique(tokens.token_ids, return_index=True)
        starts, data = tokens.byte_starts, tokens.text_bytes
        spell = {
            int(i): data[starts[at] : starts[at + 1]].tobytes()
            for i, at in zip(ids.tolist(), first.tolist(), strict=True)
        }
    else:
        rows = labelled.reference.tokens
        if rows.token_bytes is None:
            return {}
        ids, first = np.unique(rows.token_id, return_index=True)
        spelled = rows.token_bytes.take(first).to_pylist()
        spell = dict(zip(ids.tolist(), spelled, strict=True))
    return {i: shown(spell[i]) for i in wanted.tolist() if spell.get(i)}
