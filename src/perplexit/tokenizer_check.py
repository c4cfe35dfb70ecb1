"""Whether an input was prepared with the tokenizer that comes with a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perplexit.errors import FingerprintMismatchError, PerplexitError
from perplexit.inputs.retokenizing import match_tokenizer
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.program_record import PROGRAM_FILE, ProgramMetadata

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def own_tokenizer(address: str) -> Tokenizer | None:
    """The tokenizer that comes with a model, or with the checkpoint that a program was made of.

    None where there is none, or where it cannot be read without loading the model.
    """
    folder = _folder_of(address)
    try:
        if (folder / PROGRAM_FILE).is_file():
            address = ProgramMetadata.read(folder).model.address
        if (folder / "model.gguf").is_file():
            address = f"gguf:{folder / 'model.gguf'}"
        prefix, _, location = address.partition(":")
        path = Path(location).expanduser()
        is_here = path.is_file() or any((path / name).is_file() for name in _TOKENIZER_FILES)
        if prefix not in ("hf", "gguf") or not (is_here or "@" in location):
            return None
        return load_tokenizer(address)
    except PerplexitError:
        return None


def _folder_of(address: str) -> Path:
    return Path(address.partition(":")[2]).expanduser()


def check_tokenizer(
    address: str, tokens: TokenFile, *, other_tokenizer: bool = False
) -> Mapping[str, Any] | None:
    """How the input's tokenizer was found to be the model's own, for the record.

    None where the model comes without a tokenizer. other_tokenizer: go on where it is another, and
    record that. A GGUF file tells its tokenizer's vocabulary, but how it splits text is lost in
    part when transformers reads it, so other splits over the same vocabulary count as its own.
    Raises FingerprintMismatchError.
    """
    own = own_tokenizer(address)
    if own is None:
        return None
    found = match_tokenizer(tokens, own)
    record = {"fingerprint": own.fingerprint, "compared_by": found.by, "same": True}
    if found.difference is None:
        return record
    in_gguf = address.endswith(".gguf") or (_folder_of(address) / "model.gguf").is_file()
    if found.same_vocabulary and in_gguf:
        return {**record, "compared_by": "vocabulary"}
    if other_tokenizer:
        return {**record, "same": False, "difference": found.difference}
    kind = "splits text otherwise" if found.same_vocabulary else "has another vocabulary"
    raise FingerprintMismatchError(
        f"expected an input of the tokenizer that comes with {address}, but {tokens.path} was "
        f"prepared with one that {kind}: {found.difference}. Prepare the text again with "
        f"--tokenizer {address.partition(':')[2]}; if you know that these are the model's own ids, "
        "go on with --other-tokenizer, which the run records"
    )
