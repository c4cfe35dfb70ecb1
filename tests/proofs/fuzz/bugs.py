"""Mended readers with their bug put back, by which the proof is proved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perplexit.errors import RunError
from perplexit.inputs import tokenizer_sources
from perplexit.inputs.kl_base_file import KlBaseFile
from perplexit.inputs.token_file_checks import SenseChecks
from perplexit.runs import run


def token_file_unchecked() -> None:
    """A token file is believed as soon as its hashes are right."""

    SenseChecks.look = lambda self, name, first, piece: None
    SenseChecks.finish = lambda self: None


def run_record_untyped() -> None:
    """A run's record is parsed by the standard library alone, and nothing checks its types."""

    def read(path: Path, *_: object, **__: object) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise RunError(f"{path} cannot be read as JSON ({error})") from None

    run.read_json = read
    run.typed = lambda value, *_, **__: value


def tokenizer_ids_unbounded() -> None:
    """A table is made for every id up to the largest, however few tokens there are."""

    tokenizer_sources._check_ids = lambda path, tokenizer: None


def base_file_ids_unchecked() -> None:
    """The ids of a base file index its rows whatever they are."""

    def ids(self: KlBaseFile) -> Any:
        flat = self._read("<i4", self.num_chunks * self.num_context, 20)
        return flat.reshape(self.num_chunks, self.num_context)

    KlBaseFile.ids = property(ids)


BUGS: dict[str, Callable[[], None]] = {
    "token-file": token_file_unchecked,
    "run-record": run_record_untyped,
    "tokenizer": tokenizer_ids_unbounded,
    "kl-base-file": base_file_ids_unchecked,
}
