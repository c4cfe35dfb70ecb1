"""The original's functions by name, with its parameters in its order, over the functions here.

They differ from the original only where it was wrong: articles of the objective, of training and
of the test are disjoint; nothing is pickled (a name ending in `.jbl` or `.pt` is written as
`.safetensors`); the best learner is returned, not the last; a batch is the mean of its contexts
(`seed_compatible=True` gives the original's last context alone); dropout is off while measuring.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.errors import UsageError
from perplexit.igf.articles import Articles, read_articles
from perplexit.igf.collection import collect_pairs
from perplexit.igf.finetune_curve import FinetuneProgress
from perplexit.igf.finetuning import finetune_model
from perplexit.igf.gain_measures import Mode
from perplexit.igf.language_model import load_gpt2, model_output, recopy_gpt2, save_model
from perplexit.igf.learner_training import divide_by_article, fit_network
from perplexit.igf.learners import (
    ConvolutionLearner,
    Learner,
    SecondaryLearner,
    learner_output,
    save_learner,
)
from perplexit.igf.losses import ContextScorer, ids_on_device
from perplexit.igf.pairs import Pairs, pairs_of
from perplexit.igf.random_contexts import ContextStream, contexts_of, objective_contexts
from perplexit.igf.selection import (
    ShiftingThreshold,
    all_candidates,
    by_predicted_gain,
    reachable_threshold,
)
from perplexit.igf.training_options import FinetuneSettings, network_options
from perplexit.metrics.likelihood import exp_or_inf

DATA_FILE = "data/tokenized_stories_train_wikitext103.jbl"
_SEED = 4
LAST_STEP = 60  # the original leaves its loop after 60 batches, whatever max_steps says


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
    return torch.tensor(exp_or_inf(loss), dtype=torch.float64)


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


def collect_objective_set(  # noqa: PLR0917 - the original's
    model: nn.Module,
    orig_perp: float,
    context_len: int,
    train_data: Any,
    objective_set: Any,
    max_steps: int,
    device: Any,
    filename: str | Path = "dev.jbl",
    recopy_model: Callable[..., Any] = recopy_gpt2,
    *,
    mode: Mode = "exact",
    dropout: bool = False,
    seed: int = _SEED,
) -> Pairs:
    """Return `max_steps` pairs of a context and its information gain; write them to `filename`.

    orig_perp: the objective's perplexity before any step; checked against what is measured here.
    recopy_model: not needed, since the model's weights are never overwritten; kept for its place.
    """
    model = model.to(device)
    train = train_data if isinstance(train_data, Articles) else Articles.of(train_data)
    objective = contexts_of(objective_set, context_len)
    measured = float(compute_perplexity(model, objective, context_len))
    if not math.isclose(measured, float(orig_perp), rel_tol=1e-2):
        raise UsageError(
            f"expected orig_perp to be the objective's perplexity here, {measured:.4f}, "
            f"got {float(orig_perp):.4f}; take it from compute_perplexity"
        )
    contexts = ContextStream(train, context_len, seed).take(0, max_steps)
    return collect_pairs(
        model, contexts, objective, output=filename, mode=mode, dropout=dropout, seed=seed
    )


def generate_n_pairs(  # noqa: PLR0917 - the original's
    context_len: int = 32,
    max_steps: int = 10,
    size_objective_set: int = 100,
    min_len: int = 1026,
    trim: bool = True,
    data_file: Any = DATA_FILE,
    igf_data_file: str | Path = "igf_context_pairs.jbl",
    *,
    model: Any = None,
    mode: Mode = "exact",
    dropout: bool = False,
    allow_pickle: bool = False,
) -> Pairs:
    """Return `max_steps` pairs of a context and its gain; write them to `igf_data_file`.

    The objective set is `size_objective_set` contexts of articles of their own, see
    `generate_datasets`. model: names another model than GPT-2, or is one.
    """
    if not trim:
        raise UsageError("expected trim=True: an objective set is contexts of one length")
    loaded = load_gpt2(model=model)
    train, objective = generate_datasets(
        context_len,
        data_file,
        size_objective_set,
        min_len,
        trim,
        model=None if isinstance(model, nn.Module) else model,
        held_out="objective",
        seed=3,
        allow_pickle=allow_pickle,
    )
    contexts = ContextStream(train, context_len, _SEED).take(0, max_steps)
    return collect_pairs(
        loaded, contexts, objective, output=igf_data_file, mode=mode, dropout=dropout, seed=_SEED
    )


def train_secondary_learner(  # noqa: PLR0917 - the original's
    secondary_learner: ConvolutionLearner,
    train_dataset: Any,
    max_epochs: int,
    batch_size: int,
    eval_freq: int = 50,
    igf_model_path: str | Path = "secondary_learner.pt",
    *,
    learning_rate: float = 1e-5,
    patience: int = 5,
    seed: int = 42,
) -> ConvolutionLearner:
    """Return the learner with its best held-out weights; write it to `igf_model_path`.

    Adam on the squared error of z-scores. eval_freq: kept for its place; the held-out error is
    measured after every epoch.
    """
    learner_output(igf_model_path, force=True)  # fails before the training, not after it
    options = network_options(
        max_epochs=max_epochs, batch_size=batch_size, learning_rate=learning_rate, patience=patience
    )
    divided = divide_by_article(pairs_of(train_dataset), seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit_network(secondary_learner, divided, options)
    secondary_learner.record |= {"statistics": asdict(divided.statistics), "seed": seed}
    save_learner(secondary_learner, igf_model_path)
    return secondary_learner


def training_secondary_learner(
    secondary_learner_train_data: Any,
    secondary_learner_max_epochs: int = 15,
    secondary_learner_batch_size: int = 128,
    eval_freq: int = 100,
    igf_model_path: str | Path = "igf_model.pt",
    *,
    model: Any = None,
    learning_rate: float = 1e-5,
) -> ConvolutionLearner:
    """Return a new SecondaryLearner trained on the pairs; see `train_secondary_learner`.

    model: whose embeddings it starts from, where it is not GPT-2.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        learner = SecondaryLearner(load_gpt2(model=model))
    return train_secondary_learner(
        learner,
        secondary_learner_train_data,
        secondary_learner_max_epochs,
        secondary_learner_batch_size,
        eval_freq,
        igf_model_path,
        learning_rate=learning_rate,
    )


def finetune(  # noqa: PLR0917 - the original's
    model: nn.Module,
    train_dataset: Any,
    test_dataset: Any,
    context_len: int = 32,
    max_steps: int = 1000,
    batch_size: int = 16,
    threshold: float = 1.0,
    recopy_model: Callable[..., Any] = recopy_gpt2,
    secondary_learner: Learner | None = None,
    eval_interval: int = 10,
    finetuned_model_name: str | Path = "openai-community/gpt2_finetuned.pt",
    *,
    seed_compatible: bool = False,
    dropout: bool = False,
    last_step: int = LAST_STEP,
    learning_rate: float = 5e-5,
    seed: int = 42,
    progress: Callable[[FinetuneProgress], None] | None = None,
) -> nn.Module:
    """Return `model`, fine-tuned in place with the filter (standard without a learner); save it.

    max_steps: the length of the linear schedule; at most `last_step` steps are taken, as in the
        original. threshold: for the first 10 steps, then -1; where the learner predicts so much
        for fewer than 1 % of contexts, the value that 1 % reach, and a warning says so. The test
        perplexities are in `model.igf_curve`. finetuned_model_name: a folder (a
        `.pt` at its end is dropped).
    recopy_model: kept for its place; the optimizer is the one it makes.
    """
    model_output(finetuned_model_name, force=True)  # fails before the training, not after it
    train = train_dataset if isinstance(train_dataset, Articles) else Articles.of(train_dataset)
    selection = all_candidates()
    if secondary_learner is not None:
        first = reachable_threshold(secondary_learner, threshold, train, context_len)
        selection = by_predicted_gain(secondary_learner, ShiftingThreshold(first=first))
    settings = FinetuneSettings(
        steps=min(max_steps, last_step),
        batch_size=batch_size,
        context_length=context_len,
        schedule_steps=max_steps,
        eval_interval=eval_interval,
        learning_rate=learning_rate,
        seed=seed,
        seed_compatible=seed_compatible,
        dropout=dropout,
    )
    test = contexts_of(test_dataset, context_len)
    curve = finetune_model(
        model, train, test, selection=selection, settings=settings, progress=progress
    )
    model.igf_curve = curve  # type: ignore[assignment]
    save_model(model, finetuned_model_name, force=True)  # as the original: the last one stays
    return model
