"""The record of a compiled program: `program.json`, in the program's folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from perplexit.atomic_files import write_json
from perplexit.errors import ModelError
from perplexit.fingerprints import sha256_of_file
from perplexit.session_descriptions import QuantizationDescription
from perplexit.untrusted_files import Expected, FileName, read_json, typed

FORMAT_VERSION = 1
PROGRAM_FILE = "program.json"
_EXPECTED = Expected("a compiled program's record", ModelError, "compile the checkpoint again")


@dataclass(frozen=True, slots=True)
class ProgramShapes:
    """The sizes that the program was compiled for; None: any."""

    batch_size: int | None = None
    length: int | None = None  # ids of one window
    num_targets: int | None = None  # targets of one call, over all its windows


@dataclass(frozen=True, slots=True)
class ProgramModel:
    """The checkpoint that the program was made from."""

    address: str
    architecture: str
    num_parameters: int
    weights_fingerprint: str
    vocab_size: int
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class ProgramQuantization(QuantizationDescription):
    """What a quantization did to the weights, counted on the finished program.

    settings: the format and the arithmetic (bits, block size, accuracy level).
    """

    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProgramMemory:
    """What a window costs beyond the weights, roughly: for choosing a batch size.

    One window of T ids: `bytes_per_id`·T + `bytes_per_id_pair`·T².
    """

    bytes_per_id: int
    bytes_per_id_pair: int


@dataclass(frozen=True, slots=True)
class ProgramCache:
    """The key/value cache that a program takes and gives.

    bytes_per_id: keys and values of one id over all layers. dtype: theirs.
    """

    num_layers: int
    bytes_per_id: int
    dtype: str


@dataclass(frozen=True, slots=True)
class ProgramVerification:
    """How far the program's losses were from the checkpoint's when it was compiled.

    reference: what was compared with, in words. The difference is that of the worst token, in nats.
    """

    reference: str
    num_tokens: int
    max_abs_nll_difference: float


@dataclass(frozen=True, slots=True)
class ProgramFile:
    """One file of the program."""

    name: FileName
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ProgramMetadata:
    """Everything a session must know of a program before it runs.

    perplexity: True: ids and targets in, one nll per target out. False: ids in, logits out.
    head_rows:  rows of logits alive at a time inside a perplexity program.
    head_columns: the same of columns, in programs of earlier versions; None: all columns.
    request:    what `compile` was asked for; None: not recorded.
    cache:      of a program that can be fed a window in blocks; None: whole windows alone.
    """

    engine: str
    perplexity: bool
    dtype: str
    opset: int
    shapes: ProgramShapes
    model: ProgramModel
    memory: ProgramMemory
    verification: ProgramVerification
    files: tuple[ProgramFile, ...]
    quantization: ProgramQuantization | None = None
    head_rows: int | None = None
    head_columns: int | None = None
    cache: ProgramCache | None = None
    made_by: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the record as `program.json` holds it."""
        return asdict(self)

    @classmethod
    def from_json(
        cls, record: Mapping[str, Any], *, place: str | Path = PROGRAM_FILE
    ) -> "ProgramMetadata":
        """Return the record that `to_json` described.

        Raises ModelError for another format version, and for a field that is missing
        or of another type.
        """
        version = record.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelError(
                f"expected a program of format version {FORMAT_VERSION}, got {version!r:.40}; "
                "compile the checkpoint again with this version of Perplexit"
            )
        unknown = sorted(set(record) - {each.name for each in fields(cls)})
        if unknown:
            _EXPECTED.refuse(place, f"the unknown key {unknown[0][:60]!r}")
        return typed(record, _EXPECTED, cls, place=place)

    def write(self, folder: Path) -> None:
        """Write `program.json` into `folder`, whole or not at all."""
        write_json(folder / PROGRAM_FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path, *, engine: str = "ENGINE") -> "ProgramMetadata":
        """Return the record of the program in `folder`, which the caller takes for one of `engine`.

        Raises ModelError where there is none, or none that this version can read.
        """
        path = folder / PROGRAM_FILE
        if not path.is_file():
            raise ModelError(
                f"expected a folder made by `perplexit compile` (with a {PROGRAM_FILE}), got "
                f"{folder}; make one with: perplexit compile MODEL --to {engine} -o {folder}"
            )
        record = read_json(path, _EXPECTED, dict[str, Any])
        return cls.from_json(record, place=path)

    def check_files(self, folder: Path) -> None:
        """Raise ModelError unless every file is there, with the content that was compiled."""
        for file in self.files:
            path = folder / file.name
            if not path.is_file():
                raise ModelError(f"expected the program's file {path}, but it is missing")
            size = path.stat().st_size
            if size != file.num_bytes or sha256_of_file(path) != file.sha256:
                raise ModelError(
                    f"{path} is not the file that was compiled (expected {file.num_bytes} bytes "
                    f"with SHA-256 {file.sha256[:12]}…, got {size} bytes of other content); "
                    "compile the checkpoint again"
                )


def files_of(folder: Path) -> tuple[ProgramFile, ...]:
    """Return every file in `folder` but the record itself, with size and hash, sorted by name."""
    paths = sorted(path for path in folder.iterdir() if path.name != PROGRAM_FILE)
    return tuple(ProgramFile(p.name, p.stat().st_size, sha256_of_file(p)) for p in paths)
