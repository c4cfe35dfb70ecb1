"""Checkpoints made into programs of other engines, with the perplexity head inside."""
