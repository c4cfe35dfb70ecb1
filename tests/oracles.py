"""Dull, exact answers: a float64 loop over one window at a time, and models one can do by hand.

Nothing here is shared with the code under test.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from perplexit.inputs.windows import WindowIds


@dataclass(frozen=True)
class OracleDetails:
    """float64 nll and entropy (nats) and rank of each target of one window."""

    nll_N: np.ndarray
    entropy_N: np.ndarray
    rank_N: np.ndarray


def oracle_details(model: nn.Module, window: WindowIds) -> OracleDetails:
    """One forward pass over the window alone, then a log-softmax in float64, target by target."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([window.ids_T.tolist()])).logits[0].double()
    nll, entropy, rank = [], [], []
    for position in window.targets_N.tolist():
        logprobs_V = torch.log_softmax(logits_TV[position - 1], dim=-1)
        target = int(window.ids_T[position])
        nll.append(-float(logprobs_V[target]))
        entropy.append(-float((logprobs_V.exp() * logprobs_V).sum()))
        rank.append(1 + int((logits_TV[position - 1] > logits_TV[position - 1, target]).sum()))
    return OracleDetails(np.array(nll), np.array(entropy), np.array(rank))


def random_window(
    seed: int, length: int, vocab_size: int, targets: range | None = None, *, index: int = 0
) -> WindowIds:
    """`length` random ids; all but the first are targets unless a range says otherwise."""
    ids_T = np.random.default_rng(seed).integers(0, vocab_size, length).astype(np.int32)
    return window_of(ids_T, targets, index=index)


def window_of(ids_T: np.ndarray, targets: range | None = None, *, index: int = 0) -> WindowIds:
    """The window that feeds `ids_T`; targets as in `random_window`."""
    chosen = range(1, len(ids_T)) if targets is None else targets
    return WindowIds(index, np.asarray(ids_T, np.int32), np.array(list(chosen), np.int64))


class UniformModel(nn.Module):
    """Every token equally likely: perplexity is exactly `vocab_size`, whatever the text."""

    perplexity: float

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.perplexity = float(vocab_size)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocab_size))


class MarkovModel(nn.Module):
    """A Markov chain over `vocab_size` states that knows its own transition probabilities.

    On text sampled from the chain its perplexity tends to exp(entropy rate), where
    entropy rate = -Σ_i π_i Σ_j P_ij ln P_ij and π = π P.
    """

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        weights_VV = np.random.default_rng(seed).gamma(0.3, size=(vocab_size, vocab_size)) + 1e-3
        self.transitions_VV = weights_VV / weights_VV.sum(axis=1, keepdims=True)
        self.register_buffer("logprobs_VV", torch.tensor(np.log(self.transitions_VV)).float())

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logprobs_VV[input_ids])

    @property
    def perplexity(self) -> float:
        """exp(entropy rate)."""
        values, vectors = np.linalg.eig(self.transitions_VV.T)
        stationary_V = np.real(vectors[:, np.argmax(np.real(values))])
        stationary_V = stationary_V / stationary_V.sum()
        entropies_V = -(self.transitions_VV * np.log(self.transitions_VV)).sum(axis=1)
        return math.exp(float(stationary_V @ entropies_V))

    def sample(self, num_ids: int, seed: int = 1) -> np.ndarray:
        """Ids drawn from the chain."""
        draws = np.random.default_rng(seed).random(num_ids)
        cumulative_VV = np.cumsum(self.transitions_VV, axis=1)
        ids, state = [], 0
        for draw in draws:
            ids.append(state)
            state = min(int(np.searchsorted(cumulative_VV[state], draw)), len(cumulative_VV) - 1)
        return np.array(ids, np.int32)
