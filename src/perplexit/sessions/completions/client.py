"""One request to an OpenAI-compatible `/v1/completions`, and what its answer says of the prompt."""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import openai
import tenacity

from perplexit.errors import CapabilityError, ModelError, UsageError
from perplexit.sessions.completions.answers import (
    NUM_GENERATED,
    PromptAnswer,
    PromptAnswerError,
    Style,
    answer_of_echo,
    answer_of_prompt_logprobs,
)

_KEY_VARIABLES = ("PERPLEXIT_API_KEY", "OPENAI_API_KEY")
_TRANSIENT = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
_ATTEMPTS = 6
_LONGEST_WAIT_SECONDS = 30.0


class RequestRefusedError(ModelError):
    """The server understood a request and will not answer it, however often it is asked."""


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

    def prompt_answer(self, ids: list[int], style: Style, *, top_k: int = 0) -> PromptAnswer:
        """The log-probabilities of `ids` as a prompt, with `top_k` alternatives of each.

        Raises PromptAnswerError, ModelError.
        """
        choice = self._complete(ids, **_request(style, top_k))
        if style == "prompt_logprobs":
            return answer_of_prompt_logprobs(choice.get("prompt_logprobs"), ids, top_k)
        return answer_of_echo(choice.get("logprobs"), ids, top_k)

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
                max_tokens=NUM_GENERATED,
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
            passing = isinstance(error, _TRANSIENT)
            raise (ModelError if passing else RequestRefusedError)(
                f"{self.base_url} refused a request with HTTP {error.status_code}: "
                f"{_short(error.message)}; is the window longer than the server's context less "
                "one, or are token-id prompts not taken?"
            ) from error
        except openai.OpenAIError as error:
            raise ModelError(
                f"no usable answer from {self.base_url}: {_short(str(error))}"
            ) from error


def _request(style: Style, top_k: int) -> dict[str, Any]:
    if style == "prompt_logprobs":
        return {"extra_body": {"prompt_logprobs": top_k}}
    if not top_k:
        return {"echo": True, "logprobs": 1}
    # texts do not tell which ids they are of: vLLM names ids when it is asked to
    names = {"return_tokens_as_token_ids": True}
    return {"echo": True, "logprobs": top_k, "extra_body": names}


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
