"""What is scored: windows of ids in a token file, the same for every contender; and the texts."""

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from perplexit.cli.demo_files import TEXT_FILE, TEXT_PACKAGE, packaged_file
from perplexit.inputs.corpus_document import Document
from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.protocols import resolve_protocol
from perplexit.inputs.token_file_writer import TOKEN_FILE, TokenFileWriter
from perplexit.protected_outputs import OutputFile
from sidebyside.contenders import Workload

NUM_NEWEST = 4  # addresses: some 40,000 ids; the first is newer than the demo's model
NUM_RANDOM, ABOVE_RANDOM = 2**22, 4096  # ids below 4096 are ids of every model here


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
        sizes = {"max_length": max_length, "stride": max_length // 2}
        protocol = resolve_protocol("hf-guide", bos="none", **sizes)
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


def speech_files(first: int = 0, last: int = 9999) -> list[Path]:
    """Return the State of the Union addresses of these years, oldest first."""
    folder = packaged_file(TEXT_PACKAGE, TEXT_FILE).parent
    return [p for p in sorted(folder.glob("*.txt")) if first <= int(p.name.split("-")[0]) <= last]


def speeches(count: int) -> list[str]:
    """Return the texts of the newest addresses, newest first."""
    return [path.read_text(encoding="utf-8") for path in speech_files()[::-1][:count]]


def ids_of_speeches(tokenizer_folder: Path) -> NDArray[np.int32]:
    """Return the ids of the newest addresses, one after the other."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    text = "\n\n".join(speeches(NUM_NEWEST))
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def random_ids() -> NDArray[np.int32]:
    """Return random ids, the same in each call."""
    ids = np.random.default_rng(0).integers(0, ABOVE_RANDOM, NUM_RANDOM)
    return ids.astype(np.int32)
