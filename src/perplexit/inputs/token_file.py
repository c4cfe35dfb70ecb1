"""TokenFile: text as ids, the windows over them, and the fingerprints that identify both.

Nothing below this file ever tokenises: sessions are given ids. A token file is written once (see
`token_file_writer`), mapped into memory, and verified whenever it is opened.

Shape suffixes: D = documents, W = windows, N = targets of one window.
"""

import json
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import TokenFileError
from perplexit.fingerprints import json_fingerprint
from perplexit.inputs.document_sources import (
    KEPT_LAYOUT,
    SOURCE_KEYS,
    SOURCE_LAYOUT,
    DocumentSources,
    source_record,
)
from perplexit.inputs.tensor_container import DTYPES, Layout, content_hashes, read_container
from perplexit.inputs.token_file_checks import EXPECTED, SenseChecks
from perplexit.inputs.windows import COLUMNS, PrefixMode, WindowArray, WindowIds, WindowTable
from perplexit.untrusted_files import parse_json

FORMAT = "perplexit-token-file"
FORMAT_VERSION = "1"
_LONGEST_PATH = 4096  # characters; what is longer is a text
LAYOUT: Layout = {
    "token_ids": ("I32", ()),
    "document_starts": ("I64", ()),
    "document_domains": ("I32", ()),
    "byte_starts": ("I64", ()),
    "num_words": ("U16", ()),
    "text_bytes": ("U8", ()),
    "windows": ("I64", (len(COLUMNS),)),
}
MASK_LAYOUT: Layout = {"scored_mask": ("BOOL", ())}


def input_fingerprint(metadata: dict[str, str]) -> str:
    """Return the SHA-256 of the canonical spec, the other fingerprints and the tensors' hashes."""
    beside = ("input_fingerprint", *SOURCE_KEYS)  # where a document came from decides no number
    return json_fingerprint({k: value for k, value in metadata.items() if k not in beside})


def tensor_identity(dtype: str, shape: tuple[int, ...], sha256: str) -> str:
    """Return what the metadata records of one tensor: dtype, shape and content."""
    return f"{dtype}{list(shape)}:{sha256}"


def is_token_file(path: str | Path) -> bool:
    """Return whether a path is meant as a token file: by its suffix, or by how the file begins."""
    if "\n" in str(path) or len(str(path)) > _LONGEST_PATH:
        return False
    path = Path(path)
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
        size = path.stat().st_size
    except (OSError, ValueError):
        return False
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < size


class TokenFile:
    """A prepared input. Made by `prepare`, or opened and verified by `TokenFile.open`.

    protocol:         the protocol's name.
    vocab_size:       size of the tokenizer's vocabulary, added tokens included.
    has_text:         whether the text is known; imported ids have none.
    token_ids:        int32, all documents end to end; document d has
                      `token_ids[document_starts[d]:document_starts[d + 1]]`. There are `num_ids`
                      in `num_documents` documents, each with at least one.
    document_starts:  int64 [D + 1].
    document_domains: int32 [D], the index into `domains`, -1 where there are none.
    text_bytes:       uint8, the exact UTF-8 of all documents end to end.
    byte_starts:      int64 [ids + 1], where each token's bytes begin in `text_bytes`.
    num_words:        uint16, the words (maximal runs of non-blanks) that begin in each token.
    scored_mask:      bool per token; None: every target of a window is scored.
    windows:          the WindowTable, of `num_windows` rows.
    sources:          where each document came from; None in files of older versions.
    """

    def __init__(
        self, path: Path, metadata: dict[str, str], tensors: dict[str, NDArray[Any]]
    ) -> None:
        self.path = path
        self.spec: dict[str, Any] = json.loads(metadata["spec"])
        self._stat = path.stat()
        self.text_fingerprint = metadata["text_fingerprint"]
        self.tokenizer_fingerprint = metadata["tokenizer_fingerprint"]
        self.input_fingerprint = metadata["input_fingerprint"]
        self.token_ids: NDArray[np.int32] = tensors["token_ids"]
        self.document_starts: NDArray[np.int64] = np.array(tensors["document_starts"])
        self.document_domains: NDArray[np.int32] = tensors["document_domains"]
        self.byte_starts: NDArray[np.int64] = tensors["byte_starts"]
        self.num_words: NDArray[np.uint16] = tensors["num_words"]
        self.text_bytes: NDArray[np.uint8] = tensors["text_bytes"]
        self.scored_mask: NDArray[np.bool_] | None = tensors.get("scored_mask")
        self.windows = WindowTable(tensors["windows"])
        self.protocol = str(self.spec["protocol"]["name"])
        self.domains: tuple[str, ...] = tuple(self.spec["domains"])
        self.vocab_size = int(self.spec["tokenizer"]["vocab_size"])
        self.has_text = bool(self.spec["has_text"])
        self.num_documents = len(self.document_starts) - 1
        self.num_windows = len(self.windows)
        self.num_ids = len(self.token_ids)
        self.sources = DocumentSources.read(path, metadata, tensors)

    @classmethod
    def open(cls, path: str | Path) -> "TokenFile":
        """Open the token file at `path`, verified to the last bit.

        Raises TokenFileError where one bit of tensors or header differs from what was written, and
        for files of another kind or version.
        """
        place = Path(path)
        metadata, tensors = read_container(place)
        _check_content(place, metadata, tensors)
        return cls(place, metadata, tensors)

    def require_unchanged(self) -> None:
        """Raise TokenFileError where the file was cut short or rewritten since it was opened.

        The file is mapped: reading a page that was cut off would end the process with a bus error.
        A file that was replaced or removed as a whole does no harm: the opened one stays.
        """
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return
        opened = self._stat
        same_file = (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)
        if same_file and (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
            raise TokenFileError(
                f"expected {self.path} to stay as it was opened, but it was changed meanwhile "
                f"({opened.st_size:,} bytes then, {now.st_size:,} now); put the file back, then "
                "give the same command again: what was committed is kept"
            )

    def __repr__(self) -> str:
        return (
            f"TokenFile({str(self.path)!r}, protocol={self.protocol!r}, "
            f"num_documents={self.num_documents}, num_windows={self.num_windows}, "
            f"num_targets={self.num_targets}, input_fingerprint='{self.input_fingerprint[:12]}…')"
        )

    @cached_property
    def num_targets(self) -> int:
        """Count the scored tokens of all windows; one scored in two windows counts twice."""
        return int(self.target_counts().sum())

    def fed_lengths(self) -> NDArray[np.int64]:
        """Return how many ids each window feeds forward, the prefix included: int64 [W]."""
        return self.windows.fed_lengths()

    def target_counts(self) -> NDArray[np.int64]:
        """Count the scored tokens of each window: int64 [W]."""
        return target_counts(self.windows.array, self.document_starts, self.scored_mask)

    def documents_utf8(self) -> list[bytes]:
        """Return the UTF-8 of every document that was tokenised, in order."""
        data = np.asarray(self.text_bytes).tobytes()
        edges = np.asarray(self.byte_starts)[self.document_starts].tolist()
        return [data[begin:end] for begin, end in pairwise(edges)]

    def window_ids(self, index: int) -> WindowIds:
        """Return window `index` as an engine is fed it. Raises TokenFileError if it changed."""
        self.require_unchanged()
        row = self.windows.array[index].tolist()
        document, start, stop, _, _, mode, prefix_id = row
        base = int(self.document_starts[document])
        ids_T = np.array(self.token_ids[base + start : base + stop])  # a copy: it stays
        shift = start
        if mode == PrefixMode.INSERT:
            ids_T = np.concatenate((np.array([prefix_id], dtype=np.int32), ids_T))
            shift = start - 1
        elif mode == PrefixMode.OVERWRITE:
            ids_T[0] = prefix_id
        return WindowIds(index, ids_T, self.target_tokens(index) - (base + shift))

    def target_tokens(self, index: int) -> NDArray[np.int64]:
        """Return the indices in `token_ids` of the tokens that window `index` scores: int64 [N]."""
        document, _, _, target_start, target_stop = self.windows.array[index, :5].tolist()
        base = int(self.document_starts[document])
        tokens_N = np.arange(base + target_start, base + target_stop, dtype=np.int64)
        if self.scored_mask is None:
            return tokens_N
        return tokens_N[self.scored_mask[base + target_start : base + target_stop]]


def target_counts(
    windows: WindowArray,
    starts_D: NDArray[np.int64],
    scored_mask: NDArray[np.bool_] | None,
    first_document: int = 0,
) -> NDArray[np.int64]:
    """Count the scored tokens of each window: int64 [W].

    starts_D: where the ids of the documents `first_document …` begin in `scored_mask`.
    """
    if scored_mask is None:
        all_W: NDArray[np.int64] = windows[:, 4] - windows[:, 3]
        return all_W
    before = np.concatenate(([0], np.cumsum(scored_mask, dtype=np.int64)))
    base_W = starts_D[windows[:, 0] - first_document]
    counts_W: NDArray[np.int64] = before[base_W + windows[:, 4]] - before[base_W + windows[:, 3]]
    return counts_W


def _check_content(path: Path, metadata: dict[str, str], tensors: dict[str, NDArray[Any]]) -> None:
    """Raise TokenFileError unless all is what was fingerprinted, and makes sense."""
    if metadata.get("format") != FORMAT:
        EXPECTED.refuse(path, "another safetensors file")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        EXPECTED.refuse(path, f"one of version {version!r} (this Perplexit reads {FORMAT_VERSION})")
    if metadata.get("input_fingerprint") != input_fingerprint(metadata):
        EXPECTED.refuse(path, "damaged metadata, which do not hash to their input_fingerprint")
    missing = {"spec", "tensors", "text_fingerprint", "tokenizer_fingerprint"} - set(metadata)
    if missing:
        EXPECTED.refuse(path, f"metadata without {', '.join(sorted(missing))}")
    layout = LAYOUT | MASK_LAYOUT
    recorded = parse_json(metadata["tensors"], EXPECTED, dict[str, str], place=path)
    if "source" in metadata:
        layout = layout | SOURCE_LAYOUT | KEPT_LAYOUT
        recorded = recorded | source_record(path, metadata)["tensors"]
    needed = set(LAYOUT) | (set(SOURCE_LAYOUT) if "source" in metadata else set())
    if set(recorded) != set(tensors) or not needed <= set(tensors) <= set(layout):
        EXPECTED.refuse(path, f"the tensors {sorted(tensors)} where it has {sorted(recorded)}")
    for name, tensor in tensors.items():
        if tensor.dtype != DTYPES[layout[name][0]]:
            EXPECTED.refuse(path, f"the tensor {name} of dtype {tensor.dtype}")
    checks = SenseChecks(path, metadata["spec"], tensors)
    found = content_hashes(path, tensors, first=checks.ORDER, look=checks.look)
    for name, tensor in tensors.items():
        if recorded[name] != tensor_identity(layout[name][0], tensor.shape, found[name]):
            EXPECTED.refuse(path, f"damaged data: the tensor {name!r} is not what was written")
    checks.finish()
