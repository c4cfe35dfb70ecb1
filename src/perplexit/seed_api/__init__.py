"""The seed documents' names with their parameters, over the package's own functions."""

from perplexit.seed_api.loader_perplexity import (
    calculate_perplexity,
    compute_perplexity,
    torch_perplexity,
)

__all__ = ["calculate_perplexity", "compute_perplexity", "torch_perplexity"]
