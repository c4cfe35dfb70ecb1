"""`prepare`: a corpus → a token file, streamed; and where it may be written."""

import hashlib
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perplexit.atomic_files import TemporaryFolder
from perplexit.errors import OutputError, PerplexitError, TokenizerError, UsageError
from perplexit.inputs.corpus import documents, files_of, is_read_in_folder, is_table, paths_of
from perplexit.inputs.corpus_document import Keys
from perplexit.inputs.corpus_pass import CorpusPass, Progress
from perplexit.inputs.id_lines import id_lines_output
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.protocols import ResolvedProtocol, resolve_protocol
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.token_file_writer import TOKEN_FILE, TokenFileWriter, frame
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.protected_outputs import OutputFile, is_within, paths_among


def prepare(
    corpus: Any,
    *,
    tokenizer: str | Path | object,
    output: str | Path | None = None,
    protocol: str = "sliding",
    max_length: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    text_key: str | None = None,
    domain_key: str | None = None,
    prompt_key: str | None = None,
    keep: str | Sequence[str] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> TokenFile:
    """Tokenise a corpus into a verified token file at `output` (a temporary one without it).

    corpus:     a path (a str is one) or several Paths, a `datasets` object, or a list of texts.
    tokenizer:  whatever `load_tokenizer` takes.
    bos:        auto (what the tokenizer itself adds, resolved and recorded), none, first, every.
    text_key:   the column with the text of a table; None: "text".
    prompt_key: the column with prompts; only the tokens of the answer (`text_key`) are scored.
    keep:       columns that stay with each document, beside its file and row (`TokenFile.sources`).
    force:      whether another token file at `output` is replaced; the same is, without it.

    Raises OutputError where `output` holds something else, UsageError for options that contradict
    each other, CorpusError and TokenizerError for what cannot be read, EmptyScoreError where no
    token would be scored.
    """
    with ExitStack() as temporary:
        if output is None:
            output = Path(temporary.enter_context(TemporaryFolder("input"))) / "input.safetensors"
        target = Path(output)
        check_is_not_read_back(target, paths_of(corpus))
        read = (*files_of(paths_of(corpus)), *paths_among(tokenizer))
        file = OutputFile(target, TOKEN_FILE, read, force)
        keys = _keys(corpus, text_key, domain_key, prompt_key, keep)
        loaded = load_tokenizer(tokenizer)
        plan = protocol_for_tokenizer(
            loaded, protocol, bos=bos, max_length=max_length, stride=stride
        )
        _check_joining(plan, keys)
        _check_same_input(file, corpus, keys, plan, loaded)
        with (
            TokenFileWriter(
                file, masked=prompt_key is not None, has_text=True, keep=keys.keep
            ) as writer,
            ThreadPoolExecutor(1) as aside,
        ):
            fingerprint = aside.submit(lambda: loaded.fingerprint)  # wanted at the end
            corpus_pass = CorpusPass(loaded, plan, writer, progress)
            corpus_pass.run(documents(corpus, keys, stream=True))
            result = writer.finish(corpus_pass.spec(), tokenizer_fingerprint=fingerprint.result())
        weakref.finalize(result, temporary.pop_all().close)  # a temporary file goes with the object
    return result


def protocol_for_tokenizer(
    tokenizer: Tokenizer, protocol: str, *, max_length: int | None, stride: int | None, bos: str
) -> ResolvedProtocol:
    """Return the protocol with the options settled for a tokenizer.

    Raises UsageError for options that contradict each other, TokenizerError where the tokenizer
    puts several tokens before a text.
    """
    prefix = tokenizer.added_prefix
    if bos == "auto" and len(prefix) > 1:
        raise TokenizerError(
            f"The tokenizer puts {len(prefix)} tokens {list(prefix)} before a text, and a window "
            f"has room for one. Say which with bos 'none', 'first' or 'every'."
        )
    return resolve_protocol(
        protocol,
        max_length=max_length,
        stride=stride,
        bos=bos,
        added_prefix_id=prefix[0] if len(prefix) == 1 else None,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


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


def _keys(
    corpus: Any,
    text_key: str | None,
    domain_key: str | None,
    prompt_key: str | None,
    keep: str | Sequence[str] | None,
) -> Keys:
    """Return the columns to read. Raises UsageError where columns are named and no file has any."""
    kept = (keep,) if isinstance(keep, str) else tuple(keep or ())
    named = {"text": text_key, "domain": domain_key, "prompt": prompt_key, "keep": kept or None}
    given = [name for name, key in named.items() if key is not None]
    files = files_of(path for path in paths_of(corpus) if path.exists())
    if given and files and not any(map(is_table, files)):
        raise UsageError(
            f"expected a table (JSON Lines, CSV, TSV, Parquet) for the {given[0]} column that is "
            f"named, got {files[0]}, a text without columns; leave the name out"
        )
    if len(set(kept)) != len(kept):
        raise UsageError(
            f"expected each column to keep once, got {', '.join(kept)}; name each once"
        )
    return Keys(text_key or "text", domain_key, prompt_key, kept)


def _check_joining(plan: ResolvedProtocol, keys: Keys) -> None:
    if plan.joined_with is not None and keys.beside_text:
        alone = [name for name, entry in PROTOCOLS.items() if entry.joined_with is None]
        raise UsageError(
            f"The protocol {plan.name!r} joins all documents into one, in which prompts, domains "
            f"and kept columns are lost. Use one of {', '.join(alone)}."
        )


def _check_same_input(
    file: OutputFile, corpus: Any, keys: Keys, plan: ResolvedProtocol, tokenizer: Tokenizer
) -> None:
    """Raise OutputError where another token file is there: another protocol, tokenizer or text.

    This is checked before anything is tokenised. The same file is simply made again, and compared
    once more when it is put in place. A corpus that can be read once only is not read for this.
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
    """Return whether the text of the corpus is that of a token file.

    A document of white space alone has tokens with some tokenizers and none with others, where it
    is left out; so the text with or without such documents may be the one.
    """
    whole, without_blank = hashlib.sha256(), hashlib.sha256()
    read = documents(corpus, keys)
    texts: Iterable[str] = ((d.prompt or "") + (d.text or "") for d in read if d.text)
    if plan.joined_with is not None:
        texts = [plan.joined_with.join(d.text or "" for d in read)]
    for text in texts:
        utf8 = text.encode("utf-8", "surrogatepass")
        data = frame(len(utf8)) + utf8
        whole.update(data)
        if text.strip():
            without_blank.update(data)
    return found.text_fingerprint in (whole.hexdigest(), without_blank.hexdigest())
