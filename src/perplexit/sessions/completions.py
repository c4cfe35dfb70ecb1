"""A model behind an OpenAI-compatible `/v1/completions`: ids as the prompt, log-probabilities back.

Nothing is scored before the server has given the right answer to a known question (see
completions_probe), and every later answer is checked for its length and, where the server gives
ids, for each id.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, ModelError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import ModelDescription, SessionDescription
from perplexit.sessions.completions_client import CompletionsClient, PromptAnswerError, Style
from perplexit.sessions.completions_probe import working_style

_ANY_ID = np.iinfo(np.int32).max
_CARD_KEYS = ("id", "root", "max_model_len", "owned_by")


class CompletionsInferenceSession:
    """A served model. `dtype`, `quantization` and `device` are the server's affair.

    location:    `URL#MODEL`; without `#MODEL`, the server's only model.
    concurrency: requests under way at a time.
    The weights cannot be seen: `weights_fingerprint` identifies the address and what the server
    says of the model, no more. Raises ModelError, UsageError, CapabilityError.
    """

    def __init__(
        self,
        location: str,
        *,
        dtype: str | None = None,
        quantization: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        concurrency: int = 4,
        attempts: int = 6,
    ) -> None:
        del threads
        for name, value in {"dtype": dtype, "quantization": quantization, "device": device}.items():
            if value is not None:
                raise CapabilityError(
                    f"expected no --{name} for a served model, got {value!r}: the server decides "
                    "it; start the server with that setting and leave the option out"
                )
        url, _, name = location.removeprefix("completions:").partition("#")
        self._client = CompletionsClient(url, name or None, attempts=attempts)
        self._pool = ThreadPoolExecutor(max_workers=concurrency)
        self._concurrency = concurrency
        self._style: Style | None = None
        card = {key: self._client.card.get(key) for key in _CARD_KEYS}
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
            max_length=int(max_length) if max_length else None,
        )
        self.description = SessionDescription(
            engine=f"completions ({card['owned_by'] or 'unknown server'})",
            version=f"openai {version('openai')}",
            dtype="unknown (served)",
            device="unknown (served)",
            settings={"served": served},
        )

    @property
    def style(self) -> Style | None:
        """How prompt log-probabilities are asked for; None before the probe."""
        return self._style

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """The nll of each target, one request a window; see InferenceSession.

        The first call probes the server. Raises CapabilityError where its answers are wrong.
        """
        if not windows:
            return []
        if self._style is None:
            longest = max(windows, key=lambda window: len(window.ids_T))
            self._style = working_style(self._client, longest.ids_T.tolist())
        return list(self._pool.map(self._window_nll, windows))

    def own_token_texts(self, ids: Sequence[int]) -> list[str | None]:
        """The server's text of each id, as it echoes them; see SpellsTokens."""
        if self._style is None:
            self._style = working_style(self._client, list(ids))
        try:
            return list(self._client.prompt_answer(list(ids), self._style).texts)
        except PromptAnswerError as problem:
            raise ModelError(
                f"expected {self.model.address} to tell the text of {len(ids)} ids, but {problem}"
            ) from problem

    def max_batch_size(self, window_length: int) -> int:
        """As many windows as keep the allowed requests under way."""
        return max(1, min(4 * self._concurrency, (1 << 20) // max(1, window_length)))

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    def _window_nll(self, window: WindowIds) -> NDArray[np.float32]:
        if self._style is None:
            raise ModelError("the server has not been probed; call token_nll")
        try:
            answer = self._client.prompt_answer(window.ids_T.tolist(), self._style)
        except PromptAnswerError as problem:
            raise ModelError(
                f"expected a log-probability for each of the {len(window.ids_T)} ids of window "
                f"{window.index} from {self.model.address}, but {problem}; nothing of this window "
                "is used. Switch the server's prefix cache off and resume"
            ) from problem
        logprobs_T = np.array([np.nan, *answer.logprobs[1:]], dtype=np.float64)
        return (-logprobs_T[window.targets_N]).astype(np.float32)
