"""Questions to an OpenAI-compatible `/v1/completions`, and what its answers say of the prompt."""

import asyncio
import math
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar

import tenacity

from perplexit.errors import CapabilityError, ModelError, PerplexitError
from perplexit.sessions.completions.answers import (
    NUM_GENERATED,
    Card,
    Choice,
    PromptAnswer,
    PromptAnswerError,
    Style,
    answer_of_echo,
    answer_of_prompt_logprobs,
    cards_of,
    choice_of,
    generated_of,
)
from perplexit.sessions.completions.http import (
    KEY_VARIABLES,
    ConnectionFailedError,
    HttpServer,
    ReplyBoundError,
    StatusError,
    checked_url,
    key_of_environment,
)

T = TypeVar("T")

_ATTEMPTS = 6
_LONGEST_WAIT_SECONDS = 30.0
# A question with its repetitions and waits: slow processors read ten ids a second.
_SECONDS, _SECONDS_PER_ID = 120.0, 0.1
_REPLY_SECONDS, _REPLY_SECONDS_PER_ID = 30.0, 0.02  # from a reply's first byte to its last
_REPLY_BYTES, _REPLY_BYTES_PER_ENTRY = 1 << 20, 512
_MOST_REPLY_BYTES = 512 << 20
_MOST_NAMES = 10  # models that a message lists


class RequestRefusedError(ModelError):
    """The server understood a request and will not answer it, however often it is asked."""


class CompletionsClient:
    """A server and one of its models. Answers come back checked for length and identity.

    base_url:    `http://HOST:PORT/v1` (`/v1` is added to an address without a path).
    model:       its name on the server; None takes the only one there.
    attempts:    how often a question is asked while the server is busy or out of reach.
    seconds:     that one question may take, repetitions included. None: two minutes and a tenth of
                 a second for each id.
    concurrency: questions under way at a time.
    The API key comes from $PERPLEXIT_API_KEY or $OPENAI_API_KEY; it is sent to the server and
    kept nowhere else. Raises ModelError where the server cannot be reached or has no such model.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None,
        *,
        seconds: float | None = None,
        attempts: int = _ATTEMPTS,
        concurrency: int = 1,
    ) -> None:
        self.base_url = checked_url(base_url)
        self._seconds = seconds
        self._attempts = attempts
        self._at_once = asyncio.Semaphore(concurrency)
        self._http = HttpServer(self.base_url, key_of_environment())
        try:
            self.card = self._model_card(model)
        except BaseException:
            self.close()
            raise
        self.model = self.card.id

    def prompt_answer(self, ids: list[int], style: Style, *, top_k: int = 0) -> PromptAnswer:
        """Return the log-probabilities of `ids` as a prompt, with `top_k` alternatives of each.

        Raises PromptAnswerError, ModelError.
        """
        return self._run(self._prompt_answer(ids, style, top_k))

    def prompt_answers(
        self, prompts: Sequence[list[int]], style: Style, *, top_k: int = 0
    ) -> list[PromptAnswer | PromptAnswerError]:
        """Return what `prompt_answer` gives or raises for each prompt. Raises ModelError."""

        async def one(ids: list[int]) -> PromptAnswer | PromptAnswerError:
            try:
                return await self._prompt_answer(ids, style, top_k)
            except PromptAnswerError as problem:
                return PromptAnswerError(self._http.without_key(str(problem)))

        async def every() -> list[PromptAnswer | PromptAnswerError]:
            tasks = [asyncio.ensure_future(one(ids)) for ids in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return self._run(every())

    def next_tokens(self, ids: list[int]) -> dict[str, float]:
        """Return the log-probabilities of the few most likely texts that are generated after `ids`.

        Texts that two tokens share are left out. Raises PromptAnswerError, ModelError.
        """
        return generated_of(self._run(self._complete(ids, 5, logprobs=5)))

    def close(self) -> None:
        """Abort what is under way and close the connections."""
        self._http.close()

    async def _prompt_answer(self, ids: list[int], style: Style, top_k: int) -> PromptAnswer:
        choice = await self._complete(ids, top_k, **_request(style, top_k))
        read = answer_of_prompt_logprobs if style == "prompt_logprobs" else answer_of_echo
        return read(choice, ids, top_k).without(self._http.without_key)

    async def _complete(self, ids: list[int], top_k: int, **options: Any) -> Choice:
        question = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": NUM_GENERATED,
            "temperature": 0.0,
            **options,
        }
        largest = _REPLY_BYTES + _REPLY_BYTES_PER_ENTRY * len(ids) * (2 + top_k)
        async with self._at_once:
            body = await self._asked(
                "/completions", question, min(largest, _MOST_REPLY_BYTES), len(ids)
            )
        return choice_of(body, self.base_url)

    def _model_card(self, name: str | None) -> Card:
        body = self._run(self._asked("/models", None, _REPLY_BYTES, 0))
        with self._key_kept_out():
            cards = cards_of(body, self.base_url)
        for card in cards:
            if self._http.without_key(str(card)) != str(card):
                raise ModelError(
                    f"{self.base_url} repeats the API key in its list of models, which would be "
                    "recorded; it is not used"
                )
        if name is None and len(cards) == 1:
            return cards[0]
        found = next((card for card in cards if card.id == name), None)
        if found is None:
            names = [self._http.printable(card.id) for card in cards[:_MOST_NAMES]]
            more = f" and {len(cards) - _MOST_NAMES} more" if len(cards) > _MOST_NAMES else ""
            raise ModelError(
                f"expected the model {name!r} at {self.base_url}, which has "
                f"{', '.join(names) or 'none'}{more}; name one after the address: "
                "completions:URL#MODEL"
            )
        return found

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._key_kept_out():
            return self._http.run(work)

    @contextmanager
    def _key_kept_out(self) -> Iterator[None]:
        """Take the key out of parsers' messages too: they quote what they read."""
        try:
            yield
        except PerplexitError as error:
            message = self._http.without_key(str(error))
            if message == str(error):
                raise
            raise type(error)(message) from None

    async def _asked(
        self, path: str, question: dict[str, Any] | None, largest: int, num_ids: int
    ) -> bytes:
        """Return the reply's body, after retries within the seconds that so many ids may take."""
        seconds = self._seconds or _SECONDS + _SECONDS_PER_ID * num_ids
        reply_seconds = min(seconds, _REPLY_SECONDS + _REPLY_SECONDS_PER_ID * num_ids)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_passes),
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=_wait_seconds,
            sleep=asyncio.sleep,
            before_sleep=lambda state: last.append(state.outcome and state.outcome.exception()),
            reraise=True,
        )
        last: list[Any] = []  # errors of the tries before
        try:
            async with asyncio.timeout(seconds):
                return await retrying(
                    self._http.reply, path, question, largest=largest, seconds=reply_seconds
                )
        except StatusError as error:
            raise self._refused(error) from None
        except TimeoutError:
            if last and isinstance(last[-1], StatusError):
                raise self._refused(last[-1]) from None
            raise ReplyBoundError(
                f"{self.base_url} gave no whole reply within {seconds:.0f} seconds"
                + (f" (the last of {len(last)} tries: {last[-1]})" if last else "")
                + "; is it overloaded, or still loading the model? Evaluate again with the same "
                "--run"
            ) from None

    def _refused(self, error: StatusError) -> PerplexitError:
        if error.status in (401, 403):
            return ModelError(
                f"{self.base_url} refuses the API key (HTTP {error.status}); set "
                f"{' or '.join(KEY_VARIABLES)} in the environment"
            )
        if error.status == 404:
            return CapabilityError(
                f"expected an OpenAI-compatible /completions at {self.base_url}, got HTTP 404; "
                "check the address (it usually ends in /v1)"
            )
        told = f"{self.base_url} refused a request with {error}"
        if error.passes and error.status != 500:
            return ModelError(f"{told}; it is overloaded or out of order. Try again later")
        if error.status < 400:
            return RequestRefusedError(f"{told}, which is no answer; is it a completions server?")
        return (ModelError if error.passes else RequestRefusedError)(
            f"{told}; is the window longer than the server's context less one, or are token-id "
            "prompts not taken?"
        )


def _request(style: Style, top_k: int) -> dict[str, Any]:
    if style == "prompt_logprobs":
        return {"prompt_logprobs": top_k}
    if not top_k:
        return {"echo": True, "logprobs": 1}
    # texts do not tell which ids they are of: vLLM names ids when it is asked to
    return {"echo": True, "logprobs": top_k, "return_tokens_as_token_ids": True}


def _passes(error: BaseException) -> bool:
    return isinstance(error, ConnectionFailedError) or (
        isinstance(error, StatusError) and error.passes
    )


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    """Return what Retry-After asks for, else an exponential wait with jitter; at most 30 s."""
    error = state.outcome.exception() if state.outcome else None
    asked = _retry_after(error.retry_after) if isinstance(error, StatusError) else None
    if asked is None:
        longest = _LONGEST_WAIT_SECONDS
        return float(tenacity.wait_random_exponential(multiplier=0.5, max=longest)(state))
    return min(max(asked, 0.0), _LONGEST_WAIT_SECONDS)


def _retry_after(header: str | None) -> float | None:
    """Return seconds, from a number or a date; None where the header is absent or neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time()
        except (ValueError, OverflowError, OSError, TypeError):
            return None
    return None if math.isnan(seconds) else seconds
