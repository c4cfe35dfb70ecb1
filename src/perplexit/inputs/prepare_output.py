"""Where `prepare` may write, and whether a token file that is there is the one asked for."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from perplexit.errors import OutputError, PerplexitError
from perplexit.inputs.corpus import Keys, documents, files_of, is_read_in_folder, paths_of
from perplexit.inputs.id_lines import id_lines_output
from perplexit.inputs.protocols import ResolvedProtocol
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.token_file_writer import TOKEN_FILE, frame
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.protected_outputs import OutputFile, is_within, paths_among


def output_file(
    target: Path, corpus: Any, *, read: Iterable[object] = (), force: bool = False
) -> OutputFile:
    """The token file to write. Raises OutputError where something else is there.

    read: what is read beside the corpus. A name that the next call would take for a part of the
    corpus is refused too.
    """
    paths = paths_of(corpus)
    check_is_not_read_back(target, paths)
    return OutputFile(target, TOKEN_FILE, (*files_of(paths), *paths_among(*read)), force)


def check_id_lines_output(path: Path, token_file: Path, corpus: Any) -> None:
    """Raise OutputError unless lines of ids can be written beside the token file."""
    check_is_not_read_back(path, paths_of(corpus))
    file = id_lines_output(path)
    if file.place == OutputFile(token_file, TOKEN_FILE).place:
        raise OutputError(f"expected two outputs, got {path} twice; name another for the ids")


def check_is_not_read_back(target: Path, paths: Iterable[Path]) -> None:
    """Raise OutputError for a file in a folder of the corpus that the next call would read."""
    for folder in paths:
        if is_read_in_folder(target.name) and is_within(target, folder):
            raise OutputError(
                f"expected an output outside the corpus, got {target}, which the next call would "
                f"read as a part of {folder}; name a file elsewhere, or one that ends in "
                ".safetensors"
            )


def check_same_input(
    file: OutputFile, corpus: Any, keys: Keys, plan: ResolvedProtocol, tokenizer: Tokenizer
) -> None:
    """Raise OutputError where another token file is there: another protocol, tokenizer or text.

    It is told before anything is tokenised. The same file is simply made again, and compared once
    more when it is put in place. A corpus that can be read once only is not read for this.
    """
    if not file.exists or file.force:
        return
    try:
        found = TokenFile.open(file.path)
    except PerplexitError:
        raise file.refused_as_other() from None
    same = (
        found.spec["protocol"] == plan.to_json()
        and found.tokenizer_fingerprint == tokenizer.fingerprint
    )
    if not same or (paths_of(corpus) and not _has_text(found, corpus, keys, plan)):
        raise file.refused_as_other()


def _has_text(found: TokenFile, corpus: Any, keys: Keys, plan: ResolvedProtocol) -> bool:
    """Whether the text of the corpus is that of a token file.

    A document of white space alone has tokens with some tokenizers and none with others, where it
    is left out; so either text may be the one.
    """
    whole, without_blank = hashlib.sha256(), hashlib.sha256()
    read = documents(corpus, keys)
    texts: Iterator[str] = ((d.prompt or "") + (d.text or "") for d in read if d.text)
    if plan.joined_with is not None:
        texts = iter([plan.joined_with.join(d.text or "" for d in read)])
    for text in texts:
        utf8 = text.encode("utf-8", "surrogatepass")
        data = frame(len(utf8)) + utf8
        whole.update(data)
        if text.strip():
            without_blank.update(data)
    return found.text_fingerprint in (whole.hexdigest(), without_blank.hexdigest())
