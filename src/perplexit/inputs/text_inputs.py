"""Texts as they are given in Python → an opened token file, kept in the user's cache folder."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perplexit.atomic_files import cache_folder
from perplexit.errors import CorpusError, TokenFileError, UsageError
from perplexit.fingerprints import json_fingerprint, sha256_of_file
from perplexit.inputs.corpus import files_of
from perplexit.inputs.corpus_pass import Progress
from perplexit.inputs.preparing import prepare, protocol_for_tokenizer
from perplexit.inputs.token_file import FORMAT_VERSION, TokenFile
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.untrusted_files import Expected, check_regular

Texts = str | Path | Iterable[str | Path]

_EXPECTED = Expected("a text or a table", CorpusError, "name another file")
_LOOKS_LIKE_A_PATH = re.compile(r"\S*[/\\]\S*\.[A-Za-z]\w{0,9}")
_GIVE = "give a text, a list of texts, or the path of a file"


def prepared_texts(
    texts: Texts,
    tokenizer: str | Path | object,
    *,
    protocol: str = "sliding",
    max_length: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    text_key: str | None = None,
    domain_key: str | None = None,
    prompt_key: str | None = None,
    keep: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> TokenFile:
    """Return the texts as a verified token file, prepared once and then kept in the cache.

    texts: a text, the path of a file or folder, or several of them; each text is one document.
        A str that names an existing file (or, with a separator in it, an existing folder) is that
        file; any other str is the text itself.
    The other parameters are those of `prepare`, with the same defaults.

    The file lies in `inputs` of `cache_folder()`. Its name is the SHA-256 of the texts (of files:
    name and content), the tokenizer's fingerprint, the resolved protocol and the columns, so the
    same call finds it again. A damaged file there is made again. Where the cache folder cannot be
    written, the file is a temporary one.

    Raises UsageError for what is no text, for a str that looks like a path and names nothing, and
    where no text is given or all are empty; otherwise as `prepare` does.
    """
    corpus = _corpus(texts)
    loaded = load_tokenizer(tokenizer)
    plan = protocol_for_tokenizer(loaded, protocol, max_length=max_length, stride=stride, bos=bos)
    columns: dict[str, Any] = {
        "text_key": text_key,
        "domain_key": domain_key,
        "prompt_key": prompt_key,
        "keep": keep if isinstance(keep, str) else list(keep),
    }
    name = json_fingerprint(
        {
            "format_version": FORMAT_VERSION,
            "texts": [_identity(item) for item in corpus],
            "tokenizer": {"fingerprint": loaded.fingerprint, **loaded.to_json()},
            "protocol": plan.to_json(),
            **columns,
        }
    )
    output = _cached_path(name)
    if output is not None and output.exists():
        try:
            return TokenFile.open(output)
        except TokenFileError:
            output.unlink(missing_ok=True)  # damaged, or of another version
    return prepare(
        corpus,
        tokenizer=loaded,
        output=output,
        protocol=protocol,
        max_length=max_length,
        stride=stride,
        bos=bos,
        progress=progress,
        force=True,
        **columns,
    )


def _cached_path(name: str) -> Path | None:
    """Return where the token file is kept; None where the cache folder cannot be written."""
    path = cache_folder() / "inputs" / f"{name}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path.parent, os.W_OK) else None


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
        check_regular(file, _EXPECTED)
    return [str(item), [[str(file), sha256_of_file(file)] for file in files]]
