"""Token ids as text: what the runs' own tokens spell, and the models' tokenizer where at hand."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perplexit.errors import PerplexitError
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.runs.run import Run


def shown(data: bytes) -> str:
    """Bytes as text; bytes that are no whole characters as `⟨E2 82⟩`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{data.hex(' ').upper()}⟩"


def spelled_by_models(runs: Sequence[Run]) -> list[bytes] | None:
    """What each id stands for, by the tokenizer beside a run's model on this machine, else None.

    A tokenizer that is not the one of the first run's input, or cannot be read, is passed over.
    """
    fingerprint = runs[0].tokenizer_fingerprint
    for place in local_places(run.model for run in runs):
        try:
            loaded = load_tokenizer(place)
        except (PerplexitError, OSError, ValueError, KeyError):
            continue
        if loaded.fingerprint == fingerprint:
            return loaded.spelled
    return None


def spell(runs: Sequence[Run], ids: Iterable[int]) -> dict[int, str]:
    """The text of each of `ids`; those that nothing at hand spells are left out."""
    wanted = set(ids)
    found: dict[int, str] = {}
    rows = runs[0].tokens
    if rows.token_bytes is not None:
        present, first = np.unique(rows.token_id, return_index=True)
        at = {int(i): int(row) for i, row in zip(present, first, strict=True) if int(i) in wanted}
        found = {i: shown(rows.token_bytes[row].as_py()) for i, row in at.items()}
    if wanted - found.keys():
        spelled = spelled_by_models(runs) or []
        found |= {i: shown(spelled[i]) for i in wanted - found.keys() if 0 <= i < len(spelled)}
    return {i: text for i, text in found.items() if text}


def local_places(models: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Where the models lie on this machine; no network is asked."""
    places = []
    for model in models:
        address = str(model.get("address", ""))
        for prefix in ("hf:", "gguf:", "onnx:", "openvino:", "tvm:"):
            address = address.removeprefix(prefix)
        if address and Path(address).exists():
            places.append(Path(address))
    return list(dict.fromkeys(places))
