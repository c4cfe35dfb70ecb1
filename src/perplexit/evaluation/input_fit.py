"""Models and inputs as people give them, and whether an input fits a model.

It fits where its ids are in the vocabulary, its windows are not too long and its tokenizer is the
model's own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perplexit.errors import FingerprintMismatchError, PerplexitError, UsageError, VocabularyError
from perplexit.inputs.retokenizing import match_tokenizer
from perplexit.inputs.text_inputs import prepared_texts
from perplexit.inputs.token_file import TokenFile, is_token_file
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.program_record import PROGRAM_FILE, ProgramMetadata
from perplexit.runs.measurement import depends_on_batch
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.registry import require_model, split_address

UNKNOWN_VOCABULARY = 2**31 - 1  # of a session that takes any id
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def own_tokenizer(address: str) -> Tokenizer | None:
    """Return the tokenizer that comes with a model, or with the checkpoint of a program.

    Returns None where there is none, or where it cannot be read without loading the model.
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
    """Return how the input's tokenizer was found to be the model's own, for the record.

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


def check_fits(session: InferenceSession, tokens: TokenFile) -> list[str]:
    """Return warnings about an input that the model can take but was not made for.

    Raises VocabularyError where the input holds ids that the model has no row for.
    """
    vocab_size = session.model.vocab_size
    prefix_id = int(tokens.windows.prefix_id.max(initial=-1))
    largest_id = max(int(tokens.token_ids.max(initial=-1)), prefix_id)
    if largest_id >= vocab_size:
        raise VocabularyError(
            f"expected token ids below the model's vocabulary of {vocab_size}, got "
            f"{largest_id} in the input; prepare the input with this model's own "
            f"tokenizer ({session.model.address})"
        )
    warnings = []
    longest = int(tokens.fed_lengths().max(initial=0))
    limit = session.model.max_length
    if limit is not None and longest > limit:
        warnings.append(
            f"windows of up to {longest} ids, but the model was made for {limit}: losses beyond "
            f"that position tell about extrapolation; prepare with --max-length {limit}"
        )
    known = vocab_size < UNKNOWN_VOCABULARY
    if known and tokens.vocab_size and tokens.vocab_size < vocab_size:
        warnings.append(
            f"the model has {vocab_size} vocabulary rows and the tokenizer {tokens.vocab_size}: "
            "the rows without a token keep their share of the probability"
        )
    described = asdict(session.description)
    if depends_on_batch(described):
        rounding = described["settings"]["weights"].get("activations", "over the whole batch")
        warnings.append(
            f"activations are rounded while the model runs ({rounding}): losses "
            "depend a little on what stands beside a window in its batch; compare runs of one "
            "batch size"
        )
    return warnings


LoadableModel = InferenceSession | str | Path | Any  # the last: a torch.nn.Module
Model = LoadableModel | tuple[Any, Any]
Texts = str | Path | Iterable[str | Path]


def model_and_tokenizer(model: Model, tokens: object) -> tuple[LoadableModel, Any]:
    """Return the model and the tokenizer that was given with it, None where none was.

    Raises UsageError for something else than a model, and where a tokenizer stands in the place of
    the input.
    """
    if _is_tokenizer(tokens):
        raise UsageError(
            f"expected an input or texts after the model, got a tokenizer "
            f"({type(tokens).__name__}); write perplexity(model, texts, tokenizer), or "
            "evaluate((model, tokenizer), texts)"
        )
    if not isinstance(model, tuple):
        require_model(model)
        return model, None
    require_model(model[0] if model else None)
    if len(model) != 2 or not _is_tokenizer(model[1]):
        raise UsageError(
            f"expected (module, tokenizer), got a tuple of {len(model)}: "
            f"{', '.join(type(each).__name__ for each in model)}"
        )
    return model


def token_file_of(
    tokens: TokenFile | Texts, model: LoadableModel, tokenizer: object | None
) -> TokenFile:
    """Return the token file that is given, opened and verified, or one that the texts become."""
    if isinstance(tokens, TokenFile):
        return tokens
    if isinstance(tokens, str | Path) and is_token_file(tokens):
        return TokenFile.open(tokens)
    return text_input(tokens, model, tokenizer)


def text_input(
    texts: Texts, model: LoadableModel, tokenizer: object | None, **options: Any
) -> TokenFile:
    """Return the token file of some texts, prepared with the given or the model's own tokenizer.

    Raises UsageError where there is no tokenizer.
    """
    own = _tokenizer_of(model) if tokenizer is None else tokenizer
    return prepared_texts(texts, own, **options)


def _tokenizer_of(model: LoadableModel) -> object:
    if isinstance(model, str | Path):
        address = ":".join(split_address(model))
    elif isinstance(model, InferenceSession):
        address = model.model.address
    else:
        raise UsageError(
            f"expected a tokenizer for the texts, got {type(model).__name__} alone; give "
            "(module, tokenizer), or perplexity(module, texts, tokenizer)"
        )
    own = own_tokenizer(address)
    if own is None:
        raise UsageError(
            f"expected a model that comes with its tokenizer, got {address}, which does not; give "
            "one (tokenizer=), or a token file made by prepare"
        )
    return own


def _is_tokenizer(given: object) -> bool:
    """Return whether this is a tokenizer of transformers or tokenizers, and no input."""
    return (
        not isinstance(given, TokenFile)
        and all(hasattr(given, name) for name in ("encode", "decode"))
        and not isinstance(given, str | bytes)
    )
