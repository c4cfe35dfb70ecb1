"""Evaluation, the one place that scores: a session over an input, and the record of it."""

from perplexit.evaluation.evaluating import evaluate, perplexity

__all__ = ["evaluate", "perplexity"]
