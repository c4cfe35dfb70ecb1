"""What an evaluation is asked for: known, and checked, before a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from perplexit.errors import UsageError
from perplexit.option_ranges import check_numbers
from perplexit.sessions.options import EngineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The parameters of `evaluate`, except for model, input, folder and progress.

    options: those of ScoringOptions that differ from their defaults.
    loads_model: whether a model is loaded; an open session has settings of its own.
    """

    batch_size: int | Literal["auto"]
    top_k: int
    confidence: float
    on_non_finite: str
    saves_reference: bool
    has_reference: bool
    options: Mapping[str, Any]
    loads_model: bool

    @property
    def engine_options(self) -> EngineOptions:
        """Return the options that a model is loaded with."""
        own = EngineOptions.__annotations__
        return cast(EngineOptions, {n: x for n, x in self.options.items() if n in own})

    @property
    def states_dtype(self) -> Any:
        """Return how hidden states are stored."""
        return self.options.get("reference_dtype", "float32")

    @property
    def mode(self) -> str:
        """Return "full" or "cached"."""
        return str(self.options.get("mode", "full"))

    @property
    def prompt_len(self) -> int:
        """Return how many ids the prefill takes in cached mode."""
        return int(self.options.get("prompt_len", 1))

    @property
    def decode_chunk(self) -> int:
        """Return how many ids each decode call takes in cached mode."""
        return int(self.options.get("decode_chunk", 1))

    def check(self) -> None:
        """Raise UsageError for a value that is out of range, or that another one rules out."""
        sizes = {name: self.options.get(name) for name in ("prompt_len", "decode_chunk")}
        check_numbers(
            batch_size=self.batch_size,
            top_k=self.top_k,
            threads=self.options.get("threads"),
            tensor_parallel=self.options.get("tensor_parallel"),
            **sizes,
        )
        if self.batch_size != "auto" and not isinstance(self.batch_size, int):
            raise UsageError(f"batch_size must be 'auto' or at least 1, got {self.batch_size!r}")
        if not 0 < self.confidence < 1:
            raise UsageError(
                f"confidence must lie between 0 and 1, got {self.confidence}; 0.95 is usual"
            )
        if self.on_non_finite not in ("error", "count"):
            raise UsageError(
                f"on_non_finite must be 'error' or 'count', got {self.on_non_finite!r}"
            )
        if self.mode not in ("full", "cached"):
            raise UsageError(f"mode must be 'full' or 'cached', got {self.mode!r}")
        for name, value in sizes.items():
            if value is not None and self.mode == "full":
                raise UsageError(
                    f"{name} is a setting of prefill and decode, but the mode is 'full', which has "
                    "neither; ask for mode 'cached', or leave it out"
                )
