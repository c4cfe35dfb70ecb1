"""A completions server that echoes the prompt's log-probabilities."""

from perplexit.sessions.completions.session import CompletionsInferenceSession

__all__ = ["CompletionsInferenceSession"]
