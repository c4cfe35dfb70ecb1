"""What people give as a model and as text, told apart: modules, tokenizers, paths and texts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perplexit.errors import UsageError
from perplexit.evaluation.input_fit import own_tokenizer
from perplexit.inputs.text_inputs import prepared_texts
from perplexit.inputs.token_file import TokenFile, is_token_file
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.registry import require_model, split_address

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
    texts: Texts, model: LoadableModel, tokenizer: object | None, **protocol: Any
) -> TokenFile:
    """Return the token file of some texts, prepared with the given or the model's own tokenizer.

    Raises UsageError where there is no tokenizer.
    """
    return prepared_texts(texts, tokenizer or _tokenizer_of(model), **protocol)


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
    """Whether this is a tokenizer of transformers or tokenizers, and no input."""
    return (
        not isinstance(given, TokenFile)
        and all(hasattr(given, name) for name in ("encode", "decode"))
        and not isinstance(given, str | bytes)
    )
