"""The original's `compute_perplexity` and `generate_datasets`, with its parameters in its order."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perplexit.errors import UsageError
from perplexit.igf.articles import Articles, read_articles
from perplexit.igf.losses import ContextScorer, ids_on_device, perplexity_of
from perplexit.igf.random_contexts import Contexts, objective_contexts

DATA_FILE = "data/tokenized_stories_train_wikitext103.jbl"


def compute_perplexity(model: nn.Module, test_data: Any, context_len: int) -> Tensor:
    """Return the perplexity of `model` on contexts of `context_len` ids, a tensor of one number.

    test_data: Contexts, or rows of at least `context_len` ids, which are cut there. Batched, in
    evaluation mode, without a gradient; the model's mode is put back.
    """
    was_training = model.training
    try:
        rows_NT = ids_on_device(model, contexts_of(test_data, context_len).ids_NT)
        loss = ContextScorer(model).mean_loss(rows_NT)
    finally:
        model.train(was_training)
    return torch.tensor(perplexity_of(loss), dtype=torch.float64)


def generate_datasets(
    context_len: int,
    file: Any = DATA_FILE,
    number: int = 100,
    min_len: int = 1026,
    trim: bool = True,
    *,
    model: Any = None,
    held_out: str = "test",
    seed: int = 42,
    allow_pickle: bool = False,
) -> tuple[Articles, Any]:
    """Return training articles, and `number` contexts of held-out articles, disjoint by article.

    file:     text, JSON Lines, Parquet, a folder, tokenised articles (`Articles.save`), or with
        `allow_pickle` the original's `.jbl`. model: whose tokenizer reads text.
    trim:     only articles longer than `min_len`, one random context each (further ones in turn
        where there are fewer articles than `number`); False: whole held-out articles, untrimmed.
    held_out: "test", or "objective" for the split that information gain is measured on. The
        three are disjoint by article, so that nothing is both measured on and tested on.
    """
    if held_out not in ("test", "objective"):
        raise UsageError(f"expected held_out to be 'test' or 'objective', got {held_out!r}")
    articles = read_articles(file, model, allow_pickle=allow_pickle)
    train, held = articles.split("train"), articles.split(held_out)  # type: ignore[arg-type]
    if not trim:
        return train, held.take(range(min(number, len(held))))
    contexts = objective_contexts(
        held, number=number, length=context_len, min_len=min_len, seed=seed
    )
    return train.longer_than(max(min_len, context_len - 1)), contexts


def contexts_of(data: Any, context_len: int) -> Contexts:
    """Return Contexts from Contexts, or from rows of at least `context_len` ids, cut there."""
    if isinstance(data, Contexts):
        return data
    rows = [np.asarray(row).reshape(-1)[:context_len] for row in data]
    if not rows or min(map(len, rows)) < context_len:
        raise UsageError(
            f"expected contexts of {context_len} ids, got "
            f"{min(map(len, rows)) if rows else 'none'}; take them from generate_datasets"
        )
    articles = Articles.of(data)
    return Contexts(np.stack(rows).astype(np.int32), articles.fingerprints())
