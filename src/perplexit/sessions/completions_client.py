"""One request to an OpenAI-compatible `/v1/completions`, and what its answer says of the prompt."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import openai
import tenacity

from perplexit.errors import CapabilityError, ModelError, UsageError

# `prompt_logprobs` names ids and is looked up; `echo` names strings and is counted.
Style = Literal["prompt_logprobs", "echo"]
STYLES: tuple[Style, ...] = ("prompt_logprobs", "echo")

_KEY_VARIABLES = ("PERPLEXIT_API_KEY", "OPENAI_API_KEY")
_TRANSIENT = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
_ATTEMPTS = 6
_LONGEST_WAIT_SECONDS = 30.0
_NUM_GENERATED = 1  # servers disagree on what 0 means: none, or as many as fit


class PromptAnswerError(Exception):
    """An answer that cannot be the prompt's log-probabilities; the message says why."""


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """The log-probability and the text of each prompt id, as one answer reports them.

    logprobs: one an id; None for the first, which has no context.
    texts:    the server's text of each id, None where it gives none.
    """

    logprobs: tuple[float | None, ...]
    texts: tuple[str | None, ...]


class CompletionsClient:
    """A server and one of its models. Answers come back checked for length and identity.

    base_url: `http://HOST:PORT/v1` (`/v1` is added to an address without a path).
    model:    its name on the server; None takes the only one there.
    The API key comes from $PERPLEXIT_API_KEY or $OPENAI_API_KEY; it is sent to the server and
    kept nowhere else. Raises ModelError where the server cannot be reached or has no such model.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None,
        *,
        timeout_seconds: float = 600.0,
        attempts: int = _ATTEMPTS,
    ) -> None:
        self.base_url = _checked_url(base_url)
        key = next((os.environ[name] for name in _KEY_VARIABLES if os.environ.get(name)), "none")
        self._client = openai.OpenAI(
            base_url=self.base_url, api_key=key, max_retries=0, timeout=timeout_seconds
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TRANSIENT),
            stop=tenacity.stop_after_attempt(attempts),
            wait=_wait_seconds,
            reraise=True,
        )
        self.card = self._model_card(model)
        self.model = str(self.card["id"])

    def prompt_answer(self, ids: list[int], style: Style) -> PromptAnswer:
        """The log-probabilities of `ids` as a prompt. Raises PromptAnswerError, ModelError."""
        choice = self._complete(ids, **_request(style))
        if style == "prompt_logprobs":
            return _from_prompt_logprobs(choice.get("prompt_logprobs"), ids)
        return _from_echo(choice.get("logprobs"), ids)

    def next_tokens(self, ids: list[int]) -> dict[str, float]:
        """The log-probability of the few most likely texts after `ids`, where they are generated.

        Texts that two tokens share are left out. Raises PromptAnswerError, ModelError.
        """
        choice = self._complete(ids, logprobs=5)
        found = (choice.get("logprobs") or {}).get("top_logprobs") or [None]
        if not isinstance(found[0], Mapping):
            raise PromptAnswerError("it gives no log-probabilities even of what it generates")
        return {text: float(value) for text, value in found[0].items() if "\ufffd" not in text}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _complete(self, ids: list[int], **options: Any) -> dict[str, Any]:
        answer = self._asked(
            lambda: self._client.completions.create(
                model=self.model,
                prompt=ids,
                max_tokens=_NUM_GENERATED,
                temperature=0.0,
                **options,
            )
        )
        record = answer.model_dump()
        choice = dict((record.get("choices") or [{}])[0])
        choice.setdefault("prompt_logprobs", record.get("prompt_logprobs"))
        return choice

    def _model_card(self, name: str | None) -> dict[str, Any]:
        cards: list[dict[str, Any]] = [
            card.model_dump() for card in self._asked(self._client.models.list).data
        ]
        names = [str(card["id"]) for card in cards]
        if name is None and len(cards) == 1:
            return cards[0]
        if name not in names:
            raise ModelError(
                f"expected the model {name!r} at {self.base_url}, which has {', '.join(names)}; "
                "name one after the address: completions:URL#MODEL"
            )
        return cards[names.index(name)]

    def _asked(self, request: Any) -> Any:
        """The request's answer, after retries; an openai error becomes one of ours."""
        try:
            return self._retrying(request)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ModelError(
                f"{self.base_url} refuses the API key (HTTP {error.status_code}); set "
                f"{' or '.join(_KEY_VARIABLES)} in the environment"
            ) from error
        except openai.NotFoundError as error:
            raise CapabilityError(
                f"expected an OpenAI-compatible /completions at {self.base_url}, got HTTP 404; "
                "check the address (it usually ends in /v1)"
            ) from error
        except openai.APIStatusError as error:
            raise ModelError(
                f"{self.base_url} refused a request with HTTP {error.status_code}: "
                f"{_short(error.message)}; is the window longer than the server's context less "
                "one, or are token-id prompts not taken?"
            ) from error
        except openai.OpenAIError as error:
            raise ModelError(
                f"no usable answer from {self.base_url}: {_short(str(error))}"
            ) from error


def _request(style: Style) -> dict[str, Any]:
    if style == "prompt_logprobs":
        return {"extra_body": {"prompt_logprobs": 0}}
    return {"echo": True, "logprobs": 1}


def _from_prompt_logprobs(entries: Any, ids: list[int]) -> PromptAnswer:
    """Entries are None for the first id, then {id: {logprob, decoded_token, …}, …}.

    The prompt's own id is looked up: beside it there may be likelier ones, in any order.
    """
    if entries is None:
        raise PromptAnswerError("it ignores prompt_logprobs")
    _check_count(len(entries), ids, "prompt_logprobs")
    if entries[0] is not None:
        raise PromptAnswerError("it gives the first id a log-probability: it has added a BOS")
    found = []
    for position, (index, entry) in enumerate(zip(ids[1:], entries[1:], strict=True), start=1):
        own = (entry or {}).get(str(index), (entry or {}).get(index))
        if own is None:
            raise PromptAnswerError(
                f"its prompt_logprobs do not hold the prompt's id {index} at position {position}"
            )
        found.append(own if isinstance(own, Mapping) else {"logprob": own})
    texts = (None, *(item.get("decoded_token") for item in found))
    return PromptAnswer(_checked_values((None, *(item["logprob"] for item in found))), texts)


def _from_echo(logprobs: Any, ids: list[int]) -> PromptAnswer:
    """`token_logprobs` of the echoed prompt, then of what was generated."""
    values = (logprobs or {}).get("token_logprobs")
    texts = (logprobs or {}).get("tokens")
    if values is None or texts is None:
        raise PromptAnswerError("it ignores echo with logprobs")
    if len(values) <= _NUM_GENERATED < len(ids):
        raise PromptAnswerError(
            f"it ignores echo: {len(values)} log-probabilities for {len(ids)} ids"
        )
    if len(values) != len(ids) + _NUM_GENERATED:
        _check_count(len(values), ids, "echo")
    if values[0] is not None:
        raise PromptAnswerError(
            "it gives the first id a log-probability: it has added a BOS, or shifted by one"
        )
    texts = [*texts, *[None] * len(ids)][: len(ids)]
    for position, (index, text) in enumerate(zip(ids, texts, strict=True)):
        if str(text).startswith("token_id:") and text != f"token_id:{index}":
            raise PromptAnswerError(f"it echoes {text} at position {position} for id {index}")
    return PromptAnswer(_checked_values(tuple(values[: len(ids)])), tuple(texts))


def _check_count(count: int, ids: list[int], what: str) -> None:
    if count != len(ids):
        raise PromptAnswerError(
            f"its {what} has {count} entries for {len(ids)} ids: a truncated answer (a prefix "
            "cache?), or ids that were decoded and tokenised again"
        )


def _checked_values(values: tuple[Any, ...]) -> tuple[float | None, ...]:
    for position, value in enumerate(values[1:], start=1):
        if not isinstance(value, int | float):
            raise PromptAnswerError(f"it gives no number at position {position}, but {value!r}")
        if value > 1e-4:
            raise PromptAnswerError(f"its log-probability at position {position} is {value} > 0")
    return (None, *(float(value) for value in values[1:]))


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"expected completions:URL#MODEL with an http(s) URL, got {url!r}; for example "
            "completions:http://127.0.0.1:8000/v1#my-model"
        )
    if parts.username or parts.password or parts.query:
        raise UsageError(
            "expected an address without a password, key or query in it: addresses are recorded. "
            f"Set {' or '.join(_KEY_VARIABLES)} in the environment instead"
        )
    return url.rstrip("/") if parts.path.strip("/") else url.rstrip("/") + "/v1"


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    """What the server's Retry-After asks for, else an exponential wait with jitter."""
    error = state.outcome.exception() if state.outcome else None
    header = str(getattr(getattr(error, "response", None), "headers", {}).get("retry-after"))
    try:
        return min(float(header), _LONGEST_WAIT_SECONDS)
    except ValueError:  # absent, or a date
        return float(tenacity.wait_random_exponential(multiplier=0.5, max=30.0)(state))


def _short(message: str) -> str:
    return " ".join(message.split())[:300]
