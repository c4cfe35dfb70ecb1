"""What is scored in a turn: ids, and how they are cut; the same for every contender."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.protocols import resolve_protocol
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.token_file_writer import TokenFileWriter


@dataclass(frozen=True, slots=True)
class Workload:
    """Ids of one text, cut into windows of `max_length` ids, the last target included.

    stride None: windows share one id with the one before, so that every id but the text's first is
    scored once, with the context that lm-evaluation-harness gives it. Else: windows advance by
    `stride` and score what is new, as the guide of Hugging Face does.
    """

    ids_file: str  # .npy, int32
    num_ids: int  # of the file's first
    max_length: int
    stride: int | None = None

    @classmethod
    def of_windows(cls, ids_file: Path, num_windows: int, max_length: int) -> "Workload":
        """That many full windows."""
        return cls(str(ids_file), num_windows * (max_length - 1) + 1, max_length)

    @property
    def num_targets(self) -> int:
        """Every id but the first."""
        return self.num_ids - 1

    @property
    def text_ids(self) -> NDArray[np.int32]:
        """The text."""
        ids: NDArray[np.int32] = np.load(self.ids_file)
        if len(ids) < self.num_ids:
            raise ValueError(f"expected {self.num_ids} ids in {self.ids_file}, got {len(ids)}")
        return ids[: self.num_ids]

    def windows(self) -> list[NDArray[np.int32]]:
        """The ids of each window where no stride is given."""
        if self.stride is not None:
            raise ValueError(f"expected a workload without a stride, got {self}")
        ids, step = self.text_ids, self.max_length - 1
        return [ids[start : start + step + 1] for start in range(0, self.num_targets, step)]

    def fed_lengths(self) -> list[int]:
        """Ids that predictions of the targets need, a window: the last target is not fed."""
        if self.stride is None:
            return [len(window) - 1 for window in self.windows()]
        return [end - begin - 1 for begin, end, _ in self.strided()]

    def strided(self) -> list[tuple[int, int, int]]:
        """(begin, end, ids that are new) of each window where a stride is given."""
        if self.stride is None:
            raise ValueError(f"expected a workload with a stride, got {self}")
        found, previous = [], 0
        for begin in range(0, self.num_ids, self.stride):
            end = min(begin + self.max_length, self.num_ids)
            found.append((begin, end, end - previous))
            previous = end
            if end == self.num_ids:
                break
        return found

    def to_json(self) -> dict[str, Any]:
        """The fields, as a worker is sent them."""
        return asdict(self)


def token_file_of(workload: Workload, path: Path) -> TokenFile:
    """The workload as Perplexit's own input, written to `path`."""
    if workload.stride is None:
        protocol = resolve_protocol("document", bos="none")
        lengths = [len(window) for window in workload.windows()]
        ids = np.concatenate(workload.windows())
    else:
        protocol = resolve_protocol(
            "hf-guide", max_length=workload.max_length, stride=workload.stride, bos="none"
        )
        lengths, ids = [workload.num_ids], workload.text_ids
    with TokenFileWriter(path, masked=False, has_text=False) as writer:
        writer.append(
            EncodedBatch.without_text(ids, lengths),
            domains_D=np.full(len(lengths), -1, dtype=np.int32),
            windows=protocol.windows(lengths),
        )
        spec = {
            "protocol": protocol.to_json(),
            "tokenizer": {"vocab_size": int(ids.max()) + 1},
            "domains": [],
            "corpus": {"num_read": len(lengths), "skipped": {}},
        }
        return writer.finish(spec, tokenizer_fingerprint="")
