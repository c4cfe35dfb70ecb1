"""The reference of a KL divergence: hidden states on disk, or a second session in step."""

from perplexit.reference.scoring import ReferenceScoring, SavingScoring
from perplexit.reference.states import ReferenceStates, StatesWriter

__all__ = ["ReferenceScoring", "ReferenceStates", "SavingScoring", "StatesWriter"]
