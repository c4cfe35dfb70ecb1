"""Training secondary learners: held out by article, the best kept, stopped early.

Articles are dealt to three parts by their fingerprints: one to fit, one to choose (ridge's penalty,
the network's epoch), one that only the reported scores see.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.errors import UsageError
from perplexit.igf.learners import (
    ConvolutionLearner,
    Learner,
    RidgeLearner,
    input_embedding,
)
from perplexit.igf.pairs import GainStatistics, Pairs
from perplexit.igf.scores import score_predictions

LearnerKind = Literal["ridge", "cnn"]
PENALTIES = tuple(float(p) for p in np.geomspace(0.3, 3000, 17))


@dataclass(frozen=True, slots=True)
class PairParts:
    """Rows of the pairs to fit, to choose, and to report on; no article is in two of them."""

    fit: NDArray[np.int64]
    choose: NDArray[np.int64]
    report: NDArray[np.int64]


def divide_by_article(
    pairs: Pairs, *, choose: float = 0.2, report: float = 0.2, seed: int = 0
) -> PairParts:
    """The three parts; whole articles are dealt in an order that seed and content decide.

    Raises UsageError with fewer than three articles.
    """
    articles = np.unique(pairs.article_N)
    if len(articles) < 3:
        raise UsageError(
            f"expected pairs from at least 3 articles, to hold some out, got {len(articles)}; "
            "collect from more articles"
        )
    order = np.random.default_rng(seed).permutation(articles)
    num_report = max(1, round(report * len(order)))
    num_choose = max(1, min(round(choose * len(order)), len(order) - num_report - 1))
    held, chosen = order[:num_report], order[num_report : num_report + num_choose]
    in_report, in_choose = np.isin(pairs.article_N, held), np.isin(pairs.article_N, chosen)
    return PairParts(
        np.flatnonzero(~in_report & ~in_choose),
        np.flatnonzero(in_choose),
        np.flatnonzero(in_report),
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
    max_epochs: int = 15,
    batch_size: int = 128,
    learning_rate: float = 1e-5,
    patience: int = 5,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> Learner:
    """A learner fitted to the pairs, its scores on held-out articles in `record["scores"]`.

    Labels are z-scores of the gain in nats under the fit part's statistics. The network takes its
    embedding from `model`; the best epoch on the choose part is kept, and training stops after
    `patience` epochs without a better one. Ridge takes the best penalty of PENALTIES.
    """
    parts = divide_by_article(pairs, seed=seed)
    statistics = GainStatistics.of(pairs.gain_nats_N[parts.fit])
    z_N = statistics.normalised(pairs.gain_nats_N)
    if kind == "ridge":
        size = vocab_size or _vocab_size(pairs, model)
        learner: Learner = _best_ridge(pairs, z_N, parts, size, progress)
    elif kind == "cnn":
        if model is None:
            raise UsageError("expected a model whose embeddings the cnn starts from; name one")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ConvolutionLearner(input_embedding(model))
            fit = NetworkFit(network, learning_rate, batch_size, seed)
            fit.run(pairs, z_N, parts, max_epochs, patience, progress)
        learner = network
    else:
        raise UsageError(f"expected a learner of kind ridge or cnn, got {kind!r}")
    learner.record |= _record(learner, pairs, z_N, parts, statistics, threshold, seed)
    return learner


def _vocab_size(pairs: Pairs, model: nn.Module | None) -> int:
    return int(pairs.ids_NT.max()) + 1 if model is None else len(input_embedding(model))


def _record(  # noqa: PLR0917 - the pieces of one record
    learner: Learner,
    pairs: Pairs,
    z_N: NDArray[np.float64],
    parts: PairParts,
    statistics: GainStatistics,
    threshold: float,
    seed: int,
) -> dict[str, Any]:
    scores = score_predictions(
        learner.predict(pairs.ids_NT[parts.report]),
        z_N[parts.report],
        threshold=threshold,
        article_N=pairs.article_N[parts.report],
    )
    return {
        "statistics": asdict(statistics),
        "scores": scores.to_json(),
        "num_pairs": {"fit": len(parts.fit), "choose": len(parts.choose)},
        "seed": seed,
        "context_length": int(pairs.ids_NT.shape[1]),
        "pairs": {k: v for k, v in pairs.record.items() if k not in ("kind", "version")},
    }


def _best_ridge(
    pairs: Pairs,
    z_N: NDArray[np.float64],
    parts: PairParts,
    vocab_size: int,
    progress: Callable[[TrainingProgress], None] | None,
) -> RidgeLearner:
    best: RidgeLearner | None = None
    best_mse = np.inf
    for number, penalty in enumerate(PENALTIES, start=1):
        learner = RidgeLearner.fit(pairs.ids_NT[parts.fit], z_N[parts.fit], vocab_size, penalty)
        fit_mse, choose_mse = (
            float(((learner.predict(pairs.ids_NT[rows]) - z_N[rows]) ** 2).mean())
            for rows in (parts.fit, parts.choose)
        )
        if progress is not None:
            progress(TrainingProgress(number, len(PENALTIES), fit_mse, choose_mse))
        if best is None or choose_mse < best_mse:
            best, best_mse = learner, choose_mse
            learner.record = {"penalty": penalty, "choose_mse": choose_mse}
    if best is None:
        raise UsageError("expected at least one penalty to try")
    return best


class NetworkFit:
    """Adam on the mean squared error, epoch by epoch; the network ends with its best weights."""

    def __init__(
        self, network: nn.Module, learning_rate: float, batch_size: int, seed: int
    ) -> None:
        self._network = network
        self._optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        self._batch_size = batch_size
        self._random = np.random.default_rng(seed)

    def run(  # noqa: PLR0917 - one call
        self,
        pairs: Pairs,
        z_N: NDArray[np.float64],
        parts: PairParts,
        max_epochs: int,
        patience: int,
        progress: Callable[[TrainingProgress], None] | None = None,
    ) -> None:
        """Train on the fit part; raises UsageError where no epoch is allowed."""
        if max_epochs < 1:
            raise UsageError(f"expected at least 1 epoch, got {max_epochs}")
        ids, z = torch.from_numpy(pairs.ids_NT).long(), torch.from_numpy(z_N).float()
        best_mse, best_epoch, kept = np.inf, 0, self._weights()
        for epoch in range(1, max_epochs + 1):
            fit_mse = self._epoch(ids, z, self._random.permutation(parts.fit))
            choose_mse = self._mse(ids[parts.choose], z[parts.choose])
            if progress is not None:
                progress(TrainingProgress(epoch, max_epochs, fit_mse, choose_mse))
            if choose_mse < best_mse:
                best_mse, best_epoch, kept = choose_mse, epoch, self._weights()
            elif epoch - best_epoch >= patience:
                break
        self._network.load_state_dict(kept)
        self._network.eval()
        self._network.record = {"best_epoch": best_epoch, "choose_mse": best_mse}  # type: ignore[assignment]

    def _epoch(self, ids_NT: Tensor, z_N: Tensor, order: NDArray[np.int64]) -> float:
        self._network.train()
        total = 0.0
        for rows in torch.split(torch.from_numpy(order), self._batch_size):
            self._optimizer.zero_grad()
            loss = nn.functional.mse_loss(self._network(ids_NT[rows])[:, 0], z_N[rows])
            torch.autograd.backward(loss)
            self._optimizer.step()
            total += float(loss.detach()) * len(rows)
        return total / max(1, len(order))

    def _mse(self, ids_NT: Tensor, z_N: Tensor) -> float:
        self._network.eval()
        with torch.inference_mode():
            return float(nn.functional.mse_loss(self._network(ids_NT)[:, 0], z_N))

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._network.state_dict().items()}
