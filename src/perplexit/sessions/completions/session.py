"""A model behind an OpenAI-compatible `/v1/completions`: ids as the prompt, log-probabilities back.

Nothing is scored before the server has given the right answer to a known question (see
`probe`), and every later answer is checked for its length and, where the server gives
ids, for each id.

Shape suffixes: T = ids of a window, N = its targets, K = alternatives per target.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Unpack

import msgspec
import numpy as np
from numpy.typing import NDArray

from perplexit.errors import ModelError
from perplexit.inputs.windows import WindowIds
from perplexit.session_descriptions import ModelDescription, SessionDescription
from perplexit.sessions.base import ClosedByWith
from perplexit.sessions.completions.answers import (
    KnownTexts,
    PromptAnswer,
    PromptAnswerError,
    Style,
)
from perplexit.sessions.completions.client import CompletionsClient
from perplexit.sessions.completions.probe import (
    WorkingStyle,
    check_alternatives,
    check_still_the_same,
    working_style,
)
from perplexit.sessions.logit_rows import contradiction
from perplexit.sessions.options import EngineOptions, engine_options, without_settings
from perplexit.token_columns import TokenDetails

_ANY_ID = np.iinfo(np.int32).max
_ROUNDING_NATS = 1e-3  # of one answer's own numbers, which are of one computation
_ONLY = without_settings(
    "a served model",
    "the server decides it; start the server with that setting and leave the option out",
)


class CompletionsInferenceSession(ClosedByWith):
    """A served model. The server decides its dtype, quantization and device.

    location:    `URL#MODEL`; without `#MODEL`, the server's only model.
    concurrency: requests under way at a time.
    attempts, seconds: of one question, see CompletionsClient.
    The weights cannot be seen: `weights_fingerprint` identifies the address and what the server
    says of the model, no more. Raises ModelError, UsageError, CapabilityError.
    """

    def __init__(
        self,
        location: str,
        *,
        concurrency: int = 4,
        attempts: int = 6,
        seconds: float | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        engine_options("completions", options, only=_ONLY)
        url, _, name = location.removeprefix("completions:").partition("#")
        self._client = CompletionsClient(
            url, name or None, attempts=attempts, seconds=seconds, concurrency=concurrency
        )
        self._concurrency = concurrency
        self._checked: WorkingStyle | None = None
        self._texts = KnownTexts()
        self._checked_top_k = 0
        self._tells_ranks = False
        card = msgspec.structs.asdict(self._client.card)
        served = {"url": self._client.base_url, **card}
        max_length = card["max_model_len"]
        self.model = ModelDescription(
            address=f"completions:{self._client.base_url}#{self._client.model}",
            architecture="unknown (served)",
            num_parameters=0,
            weights_fingerprint=hashlib.sha256(
                json.dumps(served, sort_keys=True).encode()
            ).hexdigest(),
            vocab_size=_ANY_ID,
            max_length=max_length,
        )
        self.description = SessionDescription(
            engine=f"completions ({card['owned_by'] or 'unknown server'})",
            version=f"httpx2 {version('httpx2')}",
            dtype="unknown (served)",
            device="unknown (served)",
            settings={"served": served},
        )

    @property
    def style(self) -> Style | None:
        """Return how prompt log-probabilities are asked for; None before the probe."""
        return self._checked.style if self._checked else None

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return the nll of each target, one request per window; see InferenceSession.

        The first call probes the server. Raises CapabilityError where its answers are wrong.
        """
        return [found.nll_N for found in self._details(windows, top_k=0)]

    def token_alternatives(self, windows: Sequence[WindowIds], *, top_k: int) -> list[TokenDetails]:
        """Return the nll, the `top_k` most likely tokens, and ranks where the server gives them.

        The first call checks that the server gives so many. Raises CapabilityError where not, and
        ModelError where alternatives contradict the target's own log-probability.
        """
        return self._details(windows, top_k=top_k)

    def own_token_texts(self, ids: Sequence[int]) -> list[str | None]:
        """Return the server's text of each id, as it echoes them; see SpellsTokens."""
        style = self._probed(list(ids)).style
        try:
            return list(self._client.prompt_answer(list(ids), style).texts)
        except PromptAnswerError as problem:
            raise ModelError(
                f"expected {self.model.address} to tell the text of {len(ids)} ids, but {problem}"
            ) from None

    def max_batch_size(self, window_length: int) -> int:
        """Return as many windows as keep the allowed requests under way."""
        return max(1, min(4 * self._concurrency, (1 << 20) // max(1, window_length)))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _probed(self, ids: list[int]) -> WorkingStyle:
        """Return how to ask, found out with these ids the first time."""
        if self._checked is None:
            self._checked = working_style(self._client, ids)
        return self._checked

    def _details(self, windows: Sequence[WindowIds], *, top_k: int) -> list[TokenDetails]:
        if not windows:
            return []
        longest: list[int] = max(windows, key=lambda window: len(window.ids_T)).ids_T.tolist()
        checked = self._probed(longest)
        if top_k and top_k != self._checked_top_k:
            answer = check_alternatives(self._client, longest, checked.style, top_k)
            self._tells_ranks = len(answer.ranks) > 1 and None not in answer.ranks[1:]
            self._checked_top_k = top_k
        prompts = [window.ids_T.tolist() for window in windows]
        *answers, again = self._client.prompt_answers(
            [*prompts, checked.ids], checked.style, top_k=top_k
        )
        found = [self._window(w, a, top_k) for w, a in zip(windows, answers, strict=True)]
        try:
            check_still_the_same(checked.answer, again)
        except PromptAnswerError as problem:
            raise ModelError(
                f"expected {self.model.address} to be the model that it was at the start, but "
                f"{problem}; nothing of these {len(windows)} windows is used. Was it restarted "
                "with another model? Evaluate into a new run"
            ) from None
        return found

    def _window(
        self, window: WindowIds, answer: PromptAnswer | PromptAnswerError, top_k: int
    ) -> TokenDetails:
        try:
            if isinstance(answer, PromptAnswerError):
                raise answer
            self._texts.check(window.ids_T.tolist(), answer.texts)
            nll_N = (-answer.logprobs_T[window.targets_N]).astype(np.float32)
            if not top_k:
                return TokenDetails({"nll": nll_N})
            top_ids_NK, top_logprobs_NK = _alternatives(answer, window)
            return TokenDetails(
                {
                    "nll": nll_N,
                    "rank": _ranks(answer, window) if self._tells_ranks else None,
                    "top_ids": top_ids_NK,
                    "top_logprobs": top_logprobs_NK,
                }
            )
        except PromptAnswerError as problem:
            raise ModelError(
                f"expected a log-probability for each of the {len(window.ids_T)} ids of window "
                f"{window.index} from {self.model.address}, but {problem}; nothing of this window "
                "is used. Switch the server's prefix cache off and resume"
            ) from None


def _alternatives(
    answer: PromptAnswer, window: WindowIds
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return (ids, log-probabilities) of each target's alternatives. Raises PromptAnswerError."""
    at_N = window.targets_N
    found = (
        answer.top_ids_TK[at_N].astype(np.int32),
        answer.top_logprobs_TK[at_N].astype(np.float32),
    )
    targets_N = window.ids_T[at_N].astype(np.int64)
    wrong = contradiction(targets_N, answer.logprobs_T[at_N], found, slack=_ROUNDING_NATS)
    if wrong is not None:
        position = int(window.targets_N[wrong[0]])
        raise PromptAnswerError(f"its alternatives at position {position} hold {wrong[1]}")
    return found


def _ranks(answer: PromptAnswer, window: WindowIds) -> NDArray[np.int32]:
    """Return the server's rank of each target. Raises PromptAnswerError where one is missing."""
    ranks = [answer.ranks[int(target)] for target in window.targets_N]
    if any(rank is None or not 1 <= rank <= _ANY_ID for rank in ranks):
        raise PromptAnswerError("it tells ranks for some positions only, or impossible ones")
    return np.array(ranks, dtype=np.int32)
