"""Both ways to ask for losses, for sessions that compute whole distributions either way."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import ClosedByWith
from perplexit.token_columns import TokenDetails


class ScoresByDetails(ClosedByWith, ABC):
    """`token_nll` and `token_details` from one method, so that the two give the same nll."""

    @abstractmethod
    def _details(
        self, windows: Sequence[WindowIds], *, with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        """The details of each window; without `with_details` the nll alone is needed."""

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """The nll of each target; see InferenceSession."""
        return [details.nll_N for details in self._details(windows, with_details=False, top_k=0)]

    def token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """The nll with entropy, rank and alternatives; see DetailedSession."""
        return self._details(windows, with_details=True, top_k=top_k)
