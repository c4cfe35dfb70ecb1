"""The sessions that the contract suite runs against. An engine joins with one entry here.

Each factory takes a tiny checkpoint's folder and returns an open session and the PyTorch model
that the oracle asks. A factory whose package is missing skips.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from perplexit.sessions.base import InferenceSession
from perplexit.sessions.pytorch import PytorchInferenceSession

TINY = ("llama", "gpt2", "gemma2", "cohere", "granite")


@dataclass(frozen=True)
class Engine:
    """How an engine opens a tiny checkpoint, on which of them it runs, and how exact it is.

    tolerance: largest difference in nats a token from the float64 oracle of the same weights.
    batch_tolerance: the same between two batches.
    """

    open: Callable[[Path], InferenceSession]
    models: tuple[str, ...] = TINY
    tolerance: float = 2e-5
    batch_tolerance: float = 1e-5


def _whole_forward(folder: Path) -> InferenceSession:
    """PyTorch over a model of which nothing is known but its forward."""

    class Opaque(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask=None):
            return (self.model(input_ids, attention_mask=attention_mask).logits,)

    return PytorchInferenceSession(Opaque(AutoModelForCausalLM.from_pretrained(folder)))


def _bare(folder: Path) -> InferenceSession:
    """PyTorch over a module that takes no mask, so that nothing may be padded."""

    class Bare(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    return PytorchInferenceSession(Bare(AutoModelForCausalLM.from_pretrained(folder)))


ENGINES = {
    "pytorch": Engine(PytorchInferenceSession),
    "pytorch-small-chunks": Engine(
        lambda folder: PytorchInferenceSession(folder, max_logits_bytes=7 * 320 * 4)
    ),
    "pytorch-whole-forward": Engine(_whole_forward),
    "pytorch-no-mask": Engine(_bare, models=("llama", "gemma2")),
}
