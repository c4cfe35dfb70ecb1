"""Windows scored side by side on the CPU: each thread runs a forward pass of its own.

Several threads inside one product wait for each other after each of a thousand small steps of a
forward pass; threads that each have their windows wait once a batch. The model must be one whose
forward leaves nothing behind on its modules.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope
from perplexit.inputs.windows import WindowIds, balanced_parts
from perplexit.sessions.pytorch.batch import fed_length
from perplexit.sessions.pytorch.device_choice import CPU_IDS

_T = TypeVar("_T")


class WindowThreads:
    """Runs work on parts of a batch, a thread each; PyTorch itself uses one thread meanwhile.

    size: threads. Where parts are fewer than threads, the rest is run one after the other, with
    all threads inside the products.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool: ThreadPoolExecutor | None = None

    def split(self, places: list[int], windows: Sequence[WindowIds]) -> list[list[int]]:
        """Split the places of windows, one part for each forward pass; see `balanced_parts`."""
        lengths = [fed_length(windows[place]) for place in places]
        parts = balanced_parts(lengths, workers=self.size, most_ids=CPU_IDS)
        return [places[part.start : part.stop] for part in parts]

    def map(self, work: Callable[[list[int]], _T], parts: Sequence[list[int]]) -> list[_T]:
        """Return `work` of each part, in order; what it raises is raised here."""
        side_by_side = len(parts) - len(parts) % self.size
        results = self._run(work, parts[:side_by_side]) if side_by_side else []
        return results + [work(part) for part in parts[side_by_side:]]

    def _run(self, work: Callable[[list[int]], _T], parts: Sequence[list[int]]) -> list[_T]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                self.size, "perplexit", initializer=torch.set_num_threads, initargs=(1,)
            )

        def alone(part: list[int]) -> _T:
            with torch.inference_mode():  # a thread's own setting
                return work(part)

        torch.set_num_threads(1)  # MKL has one number for all threads of a process
        try:
            return list(self._pool.map(alone, parts))
        finally:
            torch.set_num_threads(self.size)

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class ForwardTrace:
    """What a model's modules held before a forward pass, to see whether one leaves anything behind.

    A model of code outside transformers may keep what this one pass does not show: not trusted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = list(_held(model))

    def leaves_nothing(self) -> bool:
        """Return whether forward passes of this model may run in several threads at a time."""
        if not type(self._model).__module__.startswith("transformers."):
            return False
        if LengthDependentRope.of(self._model) is not None:
            return False  # held at one length for all threads
        after = list(_held(self._model))
        return len(after) == len(self._before) and all(
            held is was and version == versioned
            for (held, version), (was, versioned) in zip(after, self._before, strict=True)
        )


def _held(model: nn.Module) -> Iterator[tuple[object, int]]:
    """Yield everything on the modules, with how often it was written to where that is counted."""
    for module in model.modules():
        for held in (*module.__dict__.values(), *module._buffers.values()):
            counted = isinstance(held, Tensor) and not held.is_inference()
            yield held, held._version if counted else 0
