"""Token files changed on purpose, every hash computed again: only their sense is wrong."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from perplexit.inputs.document_sources import KEPT_LAYOUT, SOURCE_LAYOUT
from perplexit.inputs.tensor_container import (
    DTYPES,
    TensorEntry,
    canonical_json,
    header_bytes,
    read_container,
)
from perplexit.inputs.token_file import input_fingerprint, tensor_identity

Content = tuple[dict[str, Any], dict[str, np.ndarray]]  # spec and tensors


def content_of(path: Path) -> Content:
    """The spec of a token file and copies of its tensors."""
    metadata, tensors = read_container(path)
    return json.loads(metadata["spec"]), {name: np.array(value) for name, value in tensors.items()}


def forge(
    source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]
) -> Path:
    """`source` with its spec and tensors as `change` leaves them, consistent to the last hash."""
    spec, tensors = content_of(source)
    change(spec, tensors)
    write_forged(target, json.dumps(spec, sort_keys=True, separators=(",", ":")), tensors, source)
    return target


def write_forged(target: Path, spec: str, tensors: dict[str, np.ndarray], source: Path) -> None:
    """A container whose metadata and fingerprints fit whatever spec and tensors are given."""
    metadata, _ = read_container(source)
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries = []
    for name, tensor in tensors.items():
        data = np.ascontiguousarray(tensor)
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        entries.append(TensorEntry(name, names[data.dtype], data.shape, digest))
    identities = {e.name: tensor_identity(e.dtype, e.shape, e.sha256) for e in entries}
    if "source" in metadata:
        own = {n: identities.pop(n) for n in (*SOURCE_LAYOUT, *KEPT_LAYOUT) if n in identities}
        source = canonical_json({**json.loads(metadata["source"]), "tensors": own})
        digest = hashlib.sha256(source.encode()).hexdigest()
        metadata |= {"source": source, "source_fingerprint": digest}
    metadata |= {"spec": spec, "tensors": canonical_json(identities)}
    metadata["input_fingerprint"] = input_fingerprint(metadata)
    ordered = sorted(entries, key=lambda e: (-DTYPES[e.dtype].itemsize, e.name))
    with target.open("wb") as file:
        file.write(header_bytes(entries, metadata))
        for entry in ordered:
            file.write(np.ascontiguousarray(tensors[entry.name]).tobytes())
