"""Token ids as text, from the runs' own text and from the models' tokenizers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perplexit.errors import FingerprintMismatchError, PerplexitError
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.runs.run import Run


def spell(runs: Sequence[Run], ids: Iterable[int]) -> dict[int, str]:
    """Return the text of each of `ids`, from the first run's text or else from a tokenizer.

    Ids that nothing at hand spells are left out.
    """
    wanted = set(ids)
    found = _spelled_in_text(runs[0], wanted)
    left = wanted - found.keys()
    return found | (_chosen(_spelled_by_models(runs) or [], left) if left else {})


def spell_alternatives(
    runs: Sequence[Run],
    ids: Iterable[int],
    *,
    tokenizer: str | Path | None = None,
    tokens: TokenFile | None = None,
) -> dict[int, str]:
    """Return the text of each of `ids`, from a tokenizer or else from the text of the runs' input.

    Ids that nothing at hand spells are left out.

    tokenizer: where to look; None tries the models' own folders.
    tokens:    the runs' input, which holds more text than the scored tokens.
    Raises FingerprintMismatchError where `tokenizer` is not the tokenizer of the runs.
    """
    wanted = set(ids)
    if tokenizer is None:
        spelled = _spelled_by_models(runs)
    else:
        loaded, fingerprint = load_tokenizer(tokenizer), runs[0].tokenizer_fingerprint
        if loaded.fingerprint != fingerprint:
            raise FingerprintMismatchError(
                f"expected the tokenizer of the runs ({fingerprint[:12]}…), got {tokenizer} "
                f"({loaded.fingerprint[:12]}…); name the one that the input was prepared with"
            )
        spelled = loaded.spelled
    if spelled is not None:
        return _chosen(spelled, wanted)
    return _spelled_in_text(runs[0], wanted, tokens)


def _chosen(spelled: Sequence[bytes], ids: Iterable[int]) -> dict[int, str]:
    return {i: _shown(spelled[i]) for i in ids if 0 <= i < len(spelled) and spelled[i]}


def _spelled_in_text(run: Run, wanted: set[int], tokens: TokenFile | None = None) -> dict[int, str]:
    """Return the text of the wanted ids that occur in the input or among the scored tokens."""

    def first_rows(ids: Any) -> dict[int, int]:
        present, first = np.unique(ids, return_index=True)
        rows = zip(present.tolist(), first.tolist(), strict=True)
        return {i: row for i, row in rows if i in wanted}

    if tokens is not None and tokens.has_text:
        starts, data = tokens.byte_starts, tokens.text_bytes
        spelled = {
            i: data[starts[row] : starts[row + 1]].tobytes()
            for i, row in first_rows(tokens.token_ids).items()
        }
    elif run.tokens.token_bytes is not None:
        pieces = run.tokens.token_bytes
        spelled = {i: pieces[row].as_py() for i, row in first_rows(run.tokens.token_id).items()}
    else:
        return {}
    return {i: _shown(piece) for i, piece in spelled.items() if piece}


def _spelled_by_models(runs: Sequence[Run]) -> list[bytes] | None:
    """Return what each id stands for, by a tokenizer beside a run's model on this machine.

    A tokenizer that is not the one of the first run's input, or cannot be read, is passed over;
    None where none is left.
    """
    for place in _local_places(run.model for run in runs):
        try:
            loaded = load_tokenizer(place)
        except (PerplexitError, OSError, ValueError, KeyError):
            continue
        if loaded.fingerprint == runs[0].tokenizer_fingerprint:
            return loaded.spelled
    return None


def _local_places(models: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Return where the models lie on this machine; no network is asked."""
    places = []
    for model in models:
        address = str(model.get("address", ""))
        for prefix in ("hf:", "gguf:", "onnx:", "openvino:", "tvm:"):
            address = address.removeprefix(prefix)
        if address and Path(address).exists():
            places.append(Path(address))
    return list(dict.fromkeys(places))


def _shown(data: bytes) -> str:
    """Return bytes as text; bytes that are no whole characters as `⟨E2 82⟩`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{data.hex(' ').upper()}⟩"
