"""PyTorch: a checkpoint, or a model that is already in memory."""

from perplexit.sessions.pytorch.session import PytorchInferenceSession

__all__ = ["PytorchInferenceSession"]
