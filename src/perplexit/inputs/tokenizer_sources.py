"""`load_tokenizer`: from folders, files, hub ids, GGUF files and loaded objects.

A folder with a `tokenizer.json` is read by `tokenizers` alone; transformers is imported only for
what needs it. Remote code is never run.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import tokenizers

from perplexit.atomic_files import cache_folder, kept_folder
from perplexit.errors import TokenizerError, needing
from perplexit.inputs.gguf_header_check import metadata_fingerprint
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.tokenizer_backends import HuggingFaceBackend, SentencePieceBackend
from perplexit.untrusted_files import (
    LARGEST_TABLE,
    Expected,
    open_regular,
    read_bytes,
    read_json,
    stated,
    typed,
)

_EXPECTED = Expected(
    "a tokenizer that `tokenizers` or SentencePiece can read",
    TokenizerError,
    "give the tokenizer.json or .model that a tokenizer saves",
)
_CONFIGURATION = Expected(
    "a tokenizer's configuration", TokenizerError, "repair or remove the file"
)
_FOR_TRANSFORMERS = Expected(
    "a tokenizer that transformers can load", TokenizerError, "give a folder with its files"
)
_FOR_SENTENCEPIECE = Expected(
    "a SentencePiece model",
    TokenizerError,
    "a file named .model may be a tiktoken vocabulary: give the folder it is in instead",
)
_INSIDE_GGUF = Expected(
    "a tokenizer inside the GGUF file that transformers can read",
    TokenizerError,
    "give the folder of the checkpoint that the GGUF was made from",
)
_SPARSE_IDS, _SPARSENESS = 1 << 20, 64  # ids without a token: this many, and so many for each
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.tiktoken"]
_Id = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}$")]


class NamedToken(TypedDict):
    """A token with its flags, as a configuration writes it."""

    content: str


TokenEntry = str | NamedToken


class TokenizerConfiguration(TypedDict):
    """The keys of tokenizer_config.json and special_tokens_map.json that are read here."""

    bos_token: NotRequired[TokenEntry | None]
    eos_token: NotRequired[TokenEntry | None]
    unk_token: NotRequired[TokenEntry | None]
    sep_token: NotRequired[TokenEntry | None]
    pad_token: NotRequired[TokenEntry | None]
    cls_token: NotRequired[TokenEntry | None]
    mask_token: NotRequired[TokenEntry | None]
    added_tokens_decoder: NotRequired[dict[_Id, NamedToken] | None]
    extra_special_tokens: NotRequired[dict[str, TokenEntry] | list[TokenEntry] | None]
    additional_special_tokens: NotRequired[list[TokenEntry] | None]


_NAMED_TOKENS = [n for n in TokenizerConfiguration.__annotations__ if n.endswith("_token")]


def load_tokenizer(source: str | Path | object) -> Tokenizer:
    """Return the tokenizer at a path or hub id, or inside an object that another library loaded.

    Takes a folder, a `tokenizer.json`, a SentencePiece `.model`, a `.gguf`, a hub id (`ID` or
    `ID@REVISION`), or an object of transformers, tokenizers or sentencepiece. Raises TokenizerError
    where there is none, MissingPackageError where an optional package is needed to read it.
    """
    if isinstance(source, Tokenizer):
        return source
    if not isinstance(source, str | Path):
        return _from_object(source)
    address = str(source)
    for prefix in ("hf:", "gguf:"):
        address = address.removeprefix(prefix)
    path = Path(address)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    if _HUB_ID.fullmatch(address) and path.suffix not in {".json", ".model", ".gguf"}:
        name, _, revision = address.partition("@")
        return _from_hub(name, revision or None)
    raise TokenizerError(
        f"There is no tokenizer at {address!r}. Expected a folder with tokenizer.json, a "
        f"tokenizer.json, a SentencePiece .model, a .gguf, or a hub id (ID or ID@REVISION)."
    )


def _from_file(path: Path) -> Tokenizer:
    """Load by content, as file names vary (`tokenizer.model.v3`)."""
    with open_regular(path, _EXPECTED) as file:
        head = file.read(64)
    if head.startswith(b"GGUF"):
        return _from_gguf(path)
    if head.lstrip().startswith(b"{") or path.suffix == ".json":
        return _from_tokenizer_json(path)
    return _from_sentencepiece_file(path)


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    return _from_object(_loaded_by_transformers(str(folder), _FOR_TRANSFORMERS))


def _from_tokenizer_json(path: Path) -> Tokenizer:
    """Load as transformers would: the configuration's special tokens count."""
    text = read_bytes(path, _EXPECTED, largest=LARGEST_TABLE)
    with stated(path, _EXPECTED):
        tokenizer = tokenizers.Tokenizer.from_buffer(text)
        _check_ids(path, tokenizer)
    configuration = _configuration(path.parent)
    _add_named_tokens(tokenizer, configuration)
    backend = HuggingFaceBackend(tokenizer)
    bos_id = _named_id(tokenizer, configuration.get("bos_token"))
    eos_id = _named_id(tokenizer, configuration.get("eos_token"))
    return Tokenizer(backend, _only_prefix(backend) if bos_id is None else bos_id, eos_id)


def _check_ids(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse ids that leave nearly all of the vocabulary empty: each takes a place in tables."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    largest = max(ids, default=-1)
    if largest >= _SPARSE_IDS + _SPARSENESS * len(ids):
        _EXPECTED.refuse(path, f"the id {largest:,} among only {len(ids):,} tokens")


def _configuration(folder: Path) -> dict[str, Any]:
    """Read the files beside a tokenizer.json; tokenizer_config.json wins, the newer one."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        content = read_json(file, _CONFIGURATION, dict[str, Any], non_finite=True)
        typed(content, _CONFIGURATION, TokenizerConfiguration, place=file)
        found |= {key: value for key, value in content.items() if value is not None}
    return found


def _add_named_tokens(tokenizer: tokenizers.Tokenizer, configuration: dict[str, Any]) -> None:
    """Make the tokens that a configuration names special, as transformers does on loading."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    listed = configuration.get("added_tokens_decoder", {})
    entries = [listed[key] for key in sorted(listed, key=int)]
    entries += [configuration[name] for name in _NAMED_TOKENS if name in configuration]
    extra = configuration.get("extra_special_tokens", [])
    entries += configuration.get("additional_special_tokens", [])
    entries += list(extra.values()) if isinstance(extra, dict) else extra
    for entry in entries:
        token = _added_token(entry)
        if token.content and token.content not in known:
            known[token.content] = token
            add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
            add([token])


def _added_token(entry: Any) -> tokenizers.AddedToken:
    if isinstance(entry, str):
        return tokenizers.AddedToken(entry, special=True, normalized=False)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    chosen = {flag: bool(entry[flag]) for flag in flags if flag in entry}
    return tokenizers.AddedToken(entry["content"], **({"special": True} | chosen))


def _named_id(tokenizer: tokenizers.Tokenizer, token: Any) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(content) if isinstance(content, str) else None


def _only_prefix(backend: HuggingFaceBackend) -> int | None:
    """Return the token that the tokenizer puts before a text, where it is one."""
    return backend.added[0][0] if len(backend.added[0]) == 1 else None


def _from_hub(name: str, revision: str | None) -> Tokenizer:
    """Download the tokenizer's files at once: one by one, a hub out of reach takes minutes."""
    hub = _optional("huggingface_hub", "pytorch")
    try:
        folder = hub.snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
        )
    except Exception as error:  # of the hub's library, and of the network below it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TokenizerError(
            f"There is no tokenizer file or folder {name!r} here, and none could be loaded from "
            f"the hub under that name ({reason}). Check the path; a hub id must exist, and the hub "
            "be reached or the model downloaded."
        ) from error
    return _from_folder(Path(folder))


def _loaded_by_transformers(name: str, expected: Expected, **options: Any) -> Any:
    transformers = _optional("transformers", "pytorch")
    with stated(name, expected):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def _from_object(source: object) -> Tokenizer:
    """Load from an object of transformers, tokenizers or sentencepiece, which stays as it is."""
    inner = getattr(source, "backend_tokenizer", source)
    if isinstance(inner, tokenizers.Tokenizer):
        backend = HuggingFaceBackend(tokenizers.Tokenizer.from_str(inner.to_str()))
        if inner is not source:
            bos_id, eos_id = (getattr(source, f"{name}_token_id", None) for name in ("bos", "eos"))
            return Tokenizer(backend, bos_id, eos_id)
        return Tokenizer(backend, _only_prefix(backend), None)
    if hasattr(source, "serialized_model_proto"):
        return _from_sentencepiece(source)
    raise TokenizerError(
        f"Expected a path, a hub id, or a tokenizer of transformers (fast), tokenizers or "
        f"sentencepiece; got {type(source).__name__}. Slow tokenizers do not say which bytes a "
        f"token stands for: load the fast one, or the .model file itself."
    )


def _from_sentencepiece_file(path: Path) -> Tokenizer:
    sentencepiece = _optional("sentencepiece", "sentencepiece")
    with stated(path, _FOR_SENTENCEPIECE):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return _from_sentencepiece(processor)


def _from_sentencepiece(processor: Any) -> Tokenizer:
    ids = [int(processor.bos_id()), int(processor.eos_id())]
    bos_id, eos_id = (index if index >= 0 else None for index in ids)
    return Tokenizer(SentencePieceBackend(processor), bos_id, eos_id)


def _from_gguf(path: Path) -> Tokenizer:
    """Load what is inside a GGUF: transformers converts it once, and the cache keeps it."""
    kept = cache_folder() / "tokenizers" / metadata_fingerprint(path)
    return _from_folder(kept_folder(kept, "tokenizer.json", lambda to: _convert_gguf(path, to)))


def _convert_gguf(path: Path, folder: Path) -> None:
    _optional("gguf", "pytorch")
    name = str(path.parent.resolve())
    loaded = _loaded_by_transformers(name, _INSIDE_GGUF, gguf_file=path.name)
    loaded.save_pretrained(folder)


def _optional(package: str, extra: str) -> Any:
    """Import an optional package; this is the one place. Raises MissingPackageError."""
    with needing("this tokenizer", f"pip install 'perplexit[{extra}]'", package):
        return import_module(package)
