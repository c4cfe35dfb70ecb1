"""The options of fine-tuning and of a learner's network, declared once, with their help.

The command line makes its options of these entries. Needs no engine.
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, Unpack

from perplexit.declared_options import Option, declared
from perplexit.errors import UsageError


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    """How to fine-tune; the defaults are the paper's.

    eval_interval:   step 0 is evaluated too.
    schedule_steps:  the learning rate falls linearly to 0 over so many steps; None: constant.
    micro_batch:     changes memory and rounding, not the gradient.
    dropout:         train in training mode (the original does); a mask follows from seed and step.
    max_candidates:  one step looks at no more candidates; beyond them the filter is an error.
    """

    steps: Annotated[int, Option("Optimizer steps of a fine-tuning.", lowest=1)] = 60
    batch_size: Annotated[int, Option("Accepted contexts per step.", lowest=1)] = 16
    context_length: int = 32
    learning_rate: Annotated[float, Option("Learning rate of AdamW (no weight decay).")] = 5e-5
    clip_norm: float = 3.0
    schedule_steps: int | None = None
    eval_interval: Annotated[int, Option("Steps between evaluations.", lowest=1)] = 10
    seed: int = 0
    micro_batch: Annotated[int, Option("Contexts per forward pass.", lowest=1)] = 16
    dropout: Annotated[bool, Option("Train with dropout.")] = False
    seed_compatible: Annotated[
        bool, Option("Use the original's gradient: that of the last context alone.")
    ] = False
    max_candidates: int = 20000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_interval", "micro_batch", "max_candidates"):
            if getattr(self, name) < 1:
                raise UsageError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and self.clip_norm > 0):
            raise UsageError("expected a learning rate and a clip norm above 0")


class NetworkOptions(TypedDict, total=False):
    """How a learner's network is trained."""

    max_epochs: Annotated[int, Option("The cnn's largest number of epochs.", 15, lowest=1)]
    batch_size: Annotated[int, Option("The cnn's batch size.", 128, lowest=1)]
    learning_rate: Annotated[float, Option("The cnn's learning rate.", 1e-5)]
    patience: Annotated[
        int, Option("Epochs without improvement before the cnn stops.", 5, lowest=1)
    ]


def network_options(**given: Unpack[NetworkOptions]) -> dict[str, Any]:
    """Return every option of the network: the given ones, and the defaults of the others.

    Raises UsageError for an unknown name, and where no epoch is allowed.
    """
    defaults = {name: option.default for name, (_, option) in declared(NetworkOptions).items()}
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise UsageError(f"expected the options {', '.join(defaults)}; got {', '.join(unknown)}")
    options = {**defaults, **given}
    if options["max_epochs"] < 1:
        raise UsageError(f"expected at least 1 epoch, got {options['max_epochs']}")
    return options
