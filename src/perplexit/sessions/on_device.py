"""What a session on an accelerator may be able to do beside `sessions.base`."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import DetailedSession
from perplexit.token_columns import TokenDetails


@runtime_checkable
class QueueingSession(DetailedSession, Protocol):
    """A session that can start a batch and go on while a device works on it."""

    @property
    def queues(self) -> bool:
        """Whether a started batch really goes on by itself, here and now."""
        ...

    def queue_details(
        self, windows: Sequence[WindowIds], *, top_k: int = 0
    ) -> Callable[[], list[TokenDetails]]:
        """`token_details` under way: what is returned waits for the results, and is called once.

        Both calls may raise what `token_details` raises, EngineOutOfMemoryError included.
        """
        ...


@runtime_checkable
class MeasuresWorkingMemory(Protocol):
    """A session that tells its working memory from the memory of its weights."""

    def peak_device_bytes_beyond_weights(self) -> int | None:
        """The peak since the model was loaded, less what it held then; None on the host."""
        ...
