"""Pairs: contexts with their information gain, raw, and the statistics that normalise it.

Shape suffixes: N = pairs, T = ids of a context.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.atomic_files import write_json
from perplexit.errors import OutputError, UsageError
from perplexit.igf.pickles import read_pickle
from perplexit.igf.resumable_work import CONDITIONS_FILE
from perplexit.igf.tensors_with_record import (
    PICKLE_SUFFIXES,
    StoredFileError,
    TensorFile,
    json_kind,
    object_in,
    stored_as,
    tensor_path,
)
from perplexit.protected_outputs import OutputFile, paths_among
from perplexit.runs.parts_folder import LOCK_FILE, PartsFolder

_FILE = TensorFile("information gain pairs")
# The names of the columns in a file, with those of their fields.
_COLUMNS = {
    "context_ids": "ids_NT",
    "article": "article_N",
    "gain_nats": "gain_nats_N",
    "gain_perplexity": "gain_perplexity_N",
}


@dataclass(frozen=True, slots=True)
class GainStatistics:
    """Mean and standard deviation (of the population) of gains, for z-scores."""

    mean: float
    std: float

    @classmethod
    def of(cls, gains: NDArray[np.float64]) -> "GainStatistics":
        """Return the statistics of these gains. Raises UsageError where they do not vary."""
        std = float(gains.std()) if len(gains) else 0.0
        if not (std > 0 and np.isfinite(std)):
            raise UsageError(
                f"expected at least 2 pairs with different gains, got {len(gains)} with a standard "
                f"deviation of {std}; collect more pairs"
            )
        return cls(float(gains.mean()), std)

    def normalised(self, gains: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `(gain - mean) / std`."""
        z: NDArray[np.float64] = (gains - self.mean) / self.std
        return z


@dataclass(frozen=True)
class Pairs:
    """Contexts, and what a step on each does to the objective.

    ids_NT:            int32.
    article_N:         int64, the fingerprint of the article that the context comes from.
    gain_nats_N:       float64, the drop of the objective's mean nll.
    gain_perplexity_N: float64, the drop of the objective's perplexity.
    record:            how they were measured.
    """

    ids_NT: NDArray[np.int32]
    article_N: NDArray[np.int64]
    gain_nats_N: NDArray[np.float64]
    gain_perplexity_N: NDArray[np.float64]
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __iter__(self) -> Any:
        """Yield (context [1, T], normalised gain), as the original's file holds them."""
        z = GainStatistics.of(self.gain_nats_N).normalised(self.gain_nats_N)
        return iter([(ids[None], float(gain)) for ids, gain in zip(self.ids_NT, z, strict=True)])

    def take(self, rows: NDArray[Any]) -> "Pairs":
        """Return the pairs at these rows (indices or a mask)."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _COLUMNS.values()})

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; return its path. Equal pairs give equal bytes."""
        statistics = {
            name: {"mean": float(gains.mean()), "std": float(gains.std())}
            for name, gains in (("nats", self.gain_nats_N), ("perplexity", self.gain_perplexity_N))
        }
        tensors = {stored: getattr(self, name) for stored, name in _COLUMNS.items()}
        record = {**self.record, "num_pairs": len(self), "statistics": statistics}
        return _FILE.write(path, tensors, record)

    @classmethod
    def open(cls, path: str | Path) -> "Pairs":
        """Return the pairs that `save` wrote. Raises StoredFileError for any other file."""
        with _FILE.opened(path) as (tensors, record):
            ids, article, *gains = (tensors[stored] for stored in _COLUMNS)
            integers = ids.dtype.kind == article.dtype.kind == "i" and ids.ndim == 2
            floats = all(gain.dtype.kind == "f" and np.isfinite(gain).all() for gain in gains)
            columns = all(column.shape == (len(ids),) for column in (article, *gains))
            if not (integers and floats and columns) or int(ids.min(initial=0)) < 0:
                raise ValueError("columns of other types or lengths, or with values that are none")
            return cls(ids, article, gains[0], gains[1], record)


def pairs_output(path: str | Path, *, inputs: object = ()) -> OutputFile:
    """Return the file for pairs.

    Raises OutputError where it, its parts or its cost would replace what Perplexit did not write.
    """
    place = tensor_path(path)
    read = paths_among(inputs)
    OutputFile(_cost_path(place), json_kind("num_pairs_measured"), read)
    parts = parts_folder(place).folder
    names = {entry.name for entry in parts.iterdir()} if parts.is_dir() else set()
    if names - {LOCK_FILE} and CONDITIONS_FILE not in names:
        raise OutputError(
            f"expected the parts of a collection in {parts}, got other files; name another output"
        )
    return _FILE.output(place, inputs=read)


def parts_folder(path: Path) -> PartsFolder:
    """Return the folder beside a pairs' file that keeps the parts of an unfinished collection."""
    return PartsFolder(path.with_name(path.name + ".parts"), stored_as(f"a part of {_FILE.kind}"))


def write_cost(path: Path, num_pairs: int, seconds: float) -> None:
    """Write what measuring took beside the pairs' file, which itself is the same in every run."""
    cost = {"seconds": seconds, "num_pairs_measured": num_pairs}
    write_json(_cost_path(path), {**cost, "pairs_per_second": num_pairs / max(seconds, 1e-9)})


def cost_of(path: str | Path) -> dict[str, Any]:
    """Return what `write_cost` wrote beside a pairs' file; nothing where it is not there."""
    return object_in(_cost_path(tensor_path(path)))


def _cost_path(path: Path) -> Path:
    return path.with_suffix(".seconds.json")


def load(path: str | Path, *, allow_pickle: bool = False) -> Pairs:
    """Read pairs from Perplexit's file or, with `allow_pickle`, from the original's `.jbl`.

    The original's labels are already z-scores and it keeps no articles, so each of its contexts
    counts as an article.
    """
    stored = tensor_path(path)
    if Path(path).suffix not in PICKLE_SUFFIXES or stored.exists():
        return Pairs.open(stored)
    return pairs_of(read_pickle(path, allowed=allow_pickle), source=str(Path(path).name))


load_pairs = load


def pairs_of(items: Any, *, source: str = "memory") -> Pairs:
    """Return Pairs from Pairs themselves, or from the original's sequence of (context, gain)."""
    if isinstance(items, Pairs):
        return items
    try:
        ids = np.stack([np.asarray(context).reshape(-1) for context, _ in items]).astype(np.int32)
        gains = np.array([float(np.asarray(gain).item()) for _, gain in items], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StoredFileError(
            f"expected pairs of a context's ids and a number in {source}, got something else "
            f"({error}); collect them with `perplexit igf collect`"
        ) from None
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in ids]
    article = np.array([int.from_bytes(d, "big") >> 1 for d in digests], dtype=np.int64)
    record = {"mode": "unknown", "source": source, "unit": "as found"}
    return Pairs(ids, article, gains, gains.copy(), record)
