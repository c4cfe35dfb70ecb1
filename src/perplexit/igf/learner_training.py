"""Training secondary learners: articles are held out, the best learner is kept.

Articles are divided into three parts by their fingerprints: one to fit, one to choose (ridge's
penalty, the network's epoch), and one that only the reported scores see.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from perplexit.errors import UsageError
from perplexit.igf.learner_scores import score_predictions
from perplexit.igf.learners import ConvolutionLearner, Learner, RidgeLearner, input_embedding
from perplexit.igf.pairs import GainStatistics, Pairs
from perplexit.igf.training_options import NetworkOptions, network_options

LearnerKind = Literal["ridge", "cnn"]
_HELD_OUT = 0.2  # share of the articles to choose by, and of those to report on
PENALTIES = tuple(float(p) for p in np.geomspace(0.3, 3000, 17))


@dataclass(frozen=True, slots=True)
class DividedPairs:
    """Pairs with their rows to fit, to choose and to report on; no article is in two of them.

    statistics: of the gains to fit, in nats; z_N: all gains as z-scores under them.
    """

    pairs: Pairs
    fit: NDArray[np.int64]
    choose: NDArray[np.int64]
    report: NDArray[np.int64]
    statistics: GainStatistics
    z_N: NDArray[np.float64]
    seed: int


def divide_by_article(pairs: Pairs, *, seed: int = 0) -> DividedPairs:
    """Divide the pairs; each article goes whole to one of the three parts, by seed and content.

    Raises UsageError with fewer than three articles, and where the gains to fit do not vary.
    """
    articles = np.unique(pairs.article_N)
    if len(articles) < 3:
        raise UsageError(
            f"expected pairs from at least 3 articles, to hold some out, got {len(articles)}; "
            "collect from more articles"
        )
    order = np.random.default_rng(seed).permutation(articles)
    num_report = max(1, round(_HELD_OUT * len(order)))
    num_choose = max(1, min(num_report, len(order) - num_report - 1))
    in_report = np.isin(pairs.article_N, order[:num_report])
    in_choose = np.isin(pairs.article_N, order[num_report : num_report + num_choose])
    fit = np.flatnonzero(~in_report & ~in_choose)
    statistics = GainStatistics.of(pairs.gain_nats_N[fit])
    return DividedPairs(
        pairs,
        fit,
        np.flatnonzero(in_choose),
        np.flatnonzero(in_report),
        statistics,
        statistics.normalised(pairs.gain_nats_N),
        seed,
    )


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """One epoch of the network, or one penalty of the ridge: its losses on fit and choose parts."""

    number: int
    total: int
    fit_mse: float
    choose_mse: float


def train_learner(
    pairs: Pairs,
    *,
    kind: LearnerKind = "ridge",
    model: nn.Module | None = None,
    vocab_size: int | None = None,
    threshold: float = 1.0,
    seed: int = 0,
    progress: Callable[[TrainingProgress], None] | None = None,
    **network: Unpack[NetworkOptions],
) -> Learner:
    """Return a learner fitted to the pairs, with its held-out scores in `record["scores"]`.

    Labels are z-scores of the gain in nats under the fit part's statistics. The network takes its
    embedding from `model`; the best epoch on the choose part is kept, and training stops after
    `patience` epochs without a better one. Ridge takes the best penalty of PENALTIES.
    """
    options = network_options(**network)
    divided = divide_by_article(pairs, seed=seed)
    learner: RidgeLearner | ConvolutionLearner
    if kind == "ridge":
        vocab_size = vocab_size or (
            int(pairs.ids_NT.max()) + 1 if model is None else len(input_embedding(model))
        )
        learner = _best_ridge(divided, vocab_size, progress)
    elif kind == "cnn":
        if model is None:
            raise UsageError("expected a model whose embeddings the cnn starts from; name one")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            learner = ConvolutionLearner(input_embedding(model))
            fit_network(learner, divided, options, progress)
    else:
        raise UsageError(f"expected a learner of kind ridge or cnn, got {kind!r}")
    learner.record |= _record(learner, divided, threshold)
    return learner


def _record(learner: Learner, divided: DividedPairs, threshold: float) -> dict[str, Any]:
    pairs, rows = divided.pairs, divided.report
    scores = score_predictions(
        learner.predict(pairs.ids_NT[rows]),
        divided.z_N[rows],
        threshold=threshold,
        article_N=pairs.article_N[rows],
    )
    return {
        "statistics": asdict(divided.statistics),
        "scores": scores,
        "num_pairs": {"fit": len(divided.fit), "choose": len(divided.choose)},
        "seed": divided.seed,
        "context_length": int(pairs.ids_NT.shape[1]),
        "pairs": {k: v for k, v in pairs.record.items() if k not in ("kind", "version")},
    }


def _best_ridge(
    divided: DividedPairs, vocab_size: int, progress: Callable[[TrainingProgress], None] | None
) -> RidgeLearner:
    ids_NT, z_N, fit = divided.pairs.ids_NT, divided.z_N, divided.fit
    tried = []
    for number, penalty in enumerate(PENALTIES, start=1):
        learner = RidgeLearner.fit(ids_NT[fit], z_N[fit], vocab_size, penalty)
        fit_mse, choose_mse = (
            float(((learner.predict(ids_NT[rows]) - z_N[rows]) ** 2).mean())
            for rows in (fit, divided.choose)
        )
        if progress is not None:
            progress(TrainingProgress(number, len(PENALTIES), fit_mse, choose_mse))
        learner.record = {"penalty": penalty, "choose_mse": choose_mse}
        tried.append(learner)
    return min(tried, key=lambda learner: learner.record["choose_mse"])


def fit_network(
    network: ConvolutionLearner,
    divided: DividedPairs,
    options: dict[str, Any],
    progress: Callable[[TrainingProgress], None] | None = None,
) -> None:
    """Train on the fit part by Adam on the mean squared error; keep the best epoch's weights.

    options: see `network_options`. Dropout draws from PyTorch's global generator.
    """
    ids_NT = torch.from_numpy(divided.pairs.ids_NT).long()
    z_N = torch.from_numpy(divided.z_N).float()
    optimizer = torch.optim.Adam(network.parameters(), lr=options["learning_rate"])
    random = np.random.default_rng(divided.seed)

    def train_epoch() -> float:
        """Return the mean squared error on the fit part, each batch's before its step."""
        network.train()
        total = 0.0
        for rows in torch.split(
            torch.from_numpy(random.permutation(divided.fit)), options["batch_size"]
        ):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(network(ids_NT[rows])[:, 0], z_N[rows])
            torch.autograd.backward(loss)
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        return total / max(1, len(divided.fit))

    best_mse, best_epoch, kept = np.inf, 0, deepcopy(network.state_dict())
    for epoch in range(1, options["max_epochs"] + 1):
        fit_mse = train_epoch()
        network.eval()
        with torch.inference_mode():
            predicted = network(ids_NT[divided.choose])[:, 0]
            choose_mse = float(nn.functional.mse_loss(predicted, z_N[divided.choose]))
        if progress is not None:
            progress(TrainingProgress(epoch, options["max_epochs"], fit_mse, choose_mse))
        if choose_mse < best_mse:
            best_mse, best_epoch, kept = choose_mse, epoch, deepcopy(network.state_dict())
        elif epoch - best_epoch >= options["patience"]:
            break
    network.load_state_dict(kept)
    network.eval()
    network.record = {"best_epoch": best_epoch, "choose_mse": best_mse}
