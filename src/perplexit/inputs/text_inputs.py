"""Texts as they are given in Python → an opened token file, kept in the user's cache folder."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

from perplexit.atomic_files import cache_folder
from perplexit.errors import TokenFileError, UsageError
from perplexit.fingerprints import json_fingerprint, sha256_of_file
from perplexit.inputs.compressed_files import TEXT_OR_TABLE
from perplexit.inputs.corpus import files_of
from perplexit.inputs.corpus_pass import Progress
from perplexit.inputs.preparing import prepare, protocol_for_tokenizer
from perplexit.inputs.preparing_options import PreparingOptions
from perplexit.inputs.token_file import FORMAT_VERSION, TokenFile
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.untrusted_files import check_regular

Texts = str | Path | Iterable[str | Path]

_LOOKS_LIKE_A_PATH = re.compile(r"\S*[/\\]\S*\.[A-Za-z]\w{0,9}")
_GIVE = "give a text, a list of texts, or the path of a file"


def prepared_texts(
    texts: Texts,
    tokenizer: str | Path | object,
    *,
    progress: Progress | None = None,
    **options: Unpack[PreparingOptions],
) -> TokenFile:
    """Return the texts as a verified token file, prepared once and then kept in the cache.

    texts: a text, the path of a file or folder, or several of them; each text is one document.
        A str that names an existing file (or, with a separator in it, an existing folder) is that
        file; any other str is the text itself.
    The other parameters are those of `prepare`, with the same defaults.

    The file lies in `inputs` of the cache folder; its name is the SHA-256 of texts (of files: name
    and content), tokenizer, resolved protocol and columns. A damaged one is made again. Where the
    cache folder cannot be written, the file is a temporary one.

    Raises UsageError for what is no text, for a str that looks like a path and names nothing, and
    where no text is given or all are empty; otherwise as `prepare` does.
    """
    corpus = _corpus(texts)
    loaded = load_tokenizer(tokenizer)
    protocol = protocol_for_tokenizer(
        loaded,
        options.get("protocol", "sliding"),
        max_length=options.get("max_length"),
        stride=options.get("stride"),
        bos=options.get("bos", "auto"),
    )
    identity = {
        "format_version": FORMAT_VERSION,
        "texts": [_identity(item) for item in corpus],
        "tokenizer": {"fingerprint": loaded.fingerprint, **loaded.to_json()},
        "protocol": protocol.to_json(),
        "columns": [options.get("text_key"), options.get("domain_key"), options.get("prompt_key")],
        "keep": options.get("keep"),
    }
    folder = cache_folder() / "inputs"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        return prepare(corpus, tokenizer=loaded, progress=progress, **options)
    path = folder / f"{json_fingerprint(identity)}.safetensors"
    if path.exists():
        try:
            return TokenFile.open(path)
        except TokenFileError:
            path.unlink(missing_ok=True)  # damaged, or of another version
    return prepare(corpus, tokenizer=loaded, output=path, progress=progress, force=True, **options)


def _corpus(texts: Any) -> list[str | Path]:
    """Return the texts and paths that are meant. Raises UsageError where there are none."""
    if isinstance(texts, str | Path):
        given: list[Any] = [texts]
    elif isinstance(texts, Mapping | bytes) or hasattr(texts, "column_names"):
        raise UsageError(
            f"expected texts, got {type(texts).__name__}; {_GIVE}. A dataset is prepared by "
            "perplexit.prepare, and its text column is a list of texts: dataset['text']"
        )
    elif isinstance(texts, Iterable):
        given = list(texts)
    else:
        raise UsageError(f"expected texts, got {type(texts).__name__}; {_GIVE}")
    if not given:
        raise UsageError(f"expected at least one text, got an empty list; {_GIVE}")
    corpus = [_text_or_path(item) for item in given]
    if not any(isinstance(item, Path) or item.strip() for item in corpus):
        what = "an empty text" if len(corpus) == 1 else f"{len(corpus)} empty texts"
        raise UsageError(f"expected text to score, got {what}; {_GIVE} that is not empty")
    return corpus


def _text_or_path(item: Any) -> str | Path:
    if isinstance(item, Path):
        if not item.exists():
            raise UsageError(
                f"expected the path of a file, got {item}, which does not exist; {_GIVE}"
            )
        return item
    if not isinstance(item, str):
        raise UsageError(f"expected a text or a path, got {type(item).__name__}; {_GIVE}")
    # os.path answers no for a str that no file can be named by: one with a NUL, or a long one.
    if os.path.isfile(item) or (os.path.isdir(item) and re.search(r"[/\\]", item)):
        return Path(item)
    if _LOOKS_LIKE_A_PATH.fullmatch(item):
        raise UsageError(
            f"expected a text or the path of a file, got {item!r}, which looks like a path, and "
            "there is no such file; check the path, or, if it is the text itself, add a blank or a "
            "line end to it"
        )
    return item


def _identity(item: str | Path) -> Any:
    """Return what a text, or each file of a path, is known by."""
    if isinstance(item, str):
        return hashlib.sha256(item.encode("utf-8", "surrogatepass")).hexdigest()
    files = files_of([item])
    for file in files:
        check_regular(file, TEXT_OR_TABLE)
    return [str(item), [[str(file), sha256_of_file(file)] for file in files]]
