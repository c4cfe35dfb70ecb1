"""What is scored in a turn: windows of ids in a token file, the same for every contender."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from perplexit.cli.demo_files import TEXT_FILE, TEXT_PACKAGE, packaged_file
from perplexit.inputs.corpus_document import Document
from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.protocols import resolve_protocol
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.token_file_writer import TOKEN_FILE, TokenFileWriter
from perplexit.inputs.windows import WindowIds
from perplexit.protected_outputs import OutputFile

NUM_NEWEST = 4  # addresses: some 40,000 ids; the first is newer than the demo's model
NUM_RANDOM, ABOVE_RANDOM = 2**17 + 1, 4096  # ids below 4096 are ids of every model here


@dataclass(frozen=True, slots=True)
class Workload:
    """A token file of one text's windows, each of `max_length` ids, the last target included.

    strided:    windows advance by half a window and score what is new, as the guide of Hugging Face
        does. Else windows share one id with the one before, so that every id but the text's first
        is scored once, with the context that lm-evaluation-harness gives it.
    batch_size: windows per call, for those contenders that can be told; None: their own default.
    """

    path: Path
    max_length: int
    strided: bool = False
    batch_size: int | None = None

    @property
    def tokens(self) -> TokenFile:
        """Return the token file, opened."""
        return TokenFile.open(self.path)

    def windows(self) -> list[WindowIds]:
        """Return the ids of each window and the positions in it that are scored."""
        tokens = self.tokens
        return [tokens.window_ids(index) for index in range(tokens.num_windows)]


def write_workload(
    folder: Path,
    ids: NDArray[np.int32],
    num_windows: int,
    max_length: int,
    *,
    strided: bool = False,
    batch_size: int | None = None,
) -> Workload:
    """Write the workload of that many full windows (strided: of that many windows' ids).

    Raises ValueError where there are fewer ids.
    """
    num_ids = num_windows * max_length if strided else num_windows * (max_length - 1) + 1
    if len(ids) < num_ids:
        raise ValueError(f"expected {num_ids} ids, got {len(ids)}")
    if strided:
        protocol = resolve_protocol(
            "hf-guide", max_length=max_length, stride=max_length // 2, bos="none"
        )
        lengths, ids = [num_ids], ids[:num_ids]
    else:
        protocol = resolve_protocol("document", bos="none")
        lengths = [max_length] * num_windows
        starts = range(0, num_ids - 1, max_length - 1)
        ids = np.concatenate([ids[start : start + max_length] for start in starts])
    path = Path(tempfile.mkdtemp(dir=folder)) / "input.safetensors"
    with TokenFileWriter(OutputFile(path, TOKEN_FILE), masked=False, has_text=False) as writer:
        writer.append(
            EncodedBatch.without_text(ids, lengths),
            documents=[Document("", "")] * len(lengths),
            domains_D=np.full(len(lengths), -1, dtype=np.int32),
            windows=protocol.windows(lengths),
        )
        spec = {
            "protocol": protocol.to_json(),
            "tokenizer": {"vocab_size": int(ids.max()) + 1},
            "domains": [],
            "corpus": {"num_read": len(lengths), "skipped": {}},
        }
        writer.finish(spec, tokenizer_fingerprint="")
    return Workload(path, max_length, strided, batch_size)


def speeches(count: int) -> list[str]:
    """Return the newest State of the Union addresses, newest first."""
    folder = packaged_file(TEXT_PACKAGE, TEXT_FILE).parent
    files = sorted(folder.glob("*.txt"), reverse=True)[:count]
    return [file.read_text(encoding="utf-8") for file in files]


def ids_of_speeches(tokenizer_folder: Path) -> NDArray[np.int32]:
    """Return the ids of the newest addresses, one after the other."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    text = "\n\n".join(speeches(NUM_NEWEST))
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def random_ids() -> NDArray[np.int32]:
    """Return random ids, the same in each call."""
    ids = np.random.default_rng(0).integers(0, ABOVE_RANDOM, NUM_RANDOM)
    return ids.astype(np.int32)
