"""Labels of information gain: the modes and the original's algorithm take turns; and how true.

The contexts are addresses up to 1999, the objective's are of 2000 to 2012. The workload says how
many contexts the objective has, and of how many ids.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import perplexit.igf as igf
from perplexit.igf.gain_measures import GainMeasure
from sidebyside.alternation import Bench
from sidebyside.contenders import Score, Scored, Setting, Workload
from sidebyside.workloads import speech_files

OBJECTIVE_YEARS, POOL_YEARS, CONTEXT = (2000, 2012), (1790, 1999), 32
# Labels of a turn, at most. The last two are floors: what one label of first-order takes at least,
# and half of what one of directional takes.
LABELS = {"original": 1, "exact": 1, "first-order": 8, "directional": 64}
LABELS |= {"context pass": 4, "forward": 32}
SGD = igf.StepRule("sgd", clip_norm=None)


def contexts_of(folder: Path, size: int, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the ids of an objective of `size` contexts, and of `count` candidates."""
    aim, pool = _articles(folder, *OBJECTIVE_YEARS), _articles(folder, *POOL_YEARS)
    objective = igf.objective_contexts(aim, number=size, length=length, seed=3)
    candidates = igf.ContextStream(pool, CONTEXT, 11).take(0, count)
    return torch.from_numpy(objective.ids_NT).long(), torch.from_numpy(candidates.ids_NT).long()


@cache  # reading takes longer than most turns
def _articles(folder: Path, first: int, last: int) -> Any:
    return igf.read_articles(speech_files(first, last), folder)


def measure_of(mode: Any, model: nn.Module, objective: Tensor, rule: Any = None) -> GainMeasure:
    """Set a mode up; its optimizer is SGD in the directional mode, else AdamW."""
    rule = rule or (SGD if mode == "directional" else igf.StepRule())
    measure: GainMeasure = igf.gain_measure(model, objective, mode=mode, rule=rule)
    return measure


def labels(setting: Setting, way: str) -> Score:
    """Open one way to label contexts. Its first turn sets the way up, and so has its memory."""
    torch.set_num_threads(setting.threads)
    model = igf.load_model(setting.model)

    @cache
    def labelling(workload: Workload) -> tuple[int, Callable[[], object]]:
        size, folder = workload.tokens.num_windows, Path(setting.model)
        count = min(LABELS[way], size)
        found = contexts_of(folder, size, workload.max_length, count)
        return count, _labelling(way, model, *found)

    def score(workload: Workload) -> Scored:
        count, label = labelling(workload)
        label()
        return Scored(None, count)

    return score


def _labelling(
    way: str, model: nn.Module, objective: Tensor, contexts: Tensor
) -> Callable[[], object]:
    if way == "original":
        return OriginalLabels(model, objective, contexts[0]).gain
    if way == "forward":
        return partial(torch.inference_mode()(model), contexts)
    if way == "context pass":
        return partial(_forward_and_backward, model, contexts)
    return partial(measure_of(way, model, objective).gains, contexts)


def _forward_and_backward(model: nn.Module, contexts: Tensor) -> None:
    for context in contexts:
        model(context[None], labels=context[None]).loss.backward()
        model.zero_grad(set_to_none=True)


class OriginalLabels:
    """The original's algorithm, as the original has it.

    A deep copy of the model and a new optimizer for each pair; the objective row by row, with the
    graph of every row.
    """

    def __init__(self, model: nn.Module, objective: Tensor, context: Tensor) -> None:
        self._model, self._objective, self._context = model, objective, context
        self._before = float(_original_perplexity(model, objective))
        self._new_copy()

    def _new_copy(self) -> None:
        self._copy = copy.deepcopy(self._model)
        weights = self._copy.parameters()
        self._optimizer = torch.optim.AdamW(weights, lr=5e-5, eps=1e-8, weight_decay=0.0)

    def gain(self) -> float:
        """Return the gain of the pair, and make the copy for the next."""
        context = self._context[None]
        self._optimizer.zero_grad()
        loss = self._copy(context, labels=context).loss
        _original_perplexity(self._copy, context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._copy.parameters(), 3.0)
        self._optimizer.step()
        after = _original_perplexity(self._copy, self._objective)
        self._new_copy()
        return self._before - float(after)


def _original_perplexity(model: nn.Module, rows: Tensor) -> Tensor:
    """Measure a row at a time, in evaluation mode."""
    model.eval()
    total = torch.zeros(1)
    for row in rows:
        context = torch.zeros((1, len(row)), dtype=torch.long)
        context[0, :] = row
        total += model(context, labels=context).loss.mean()
    model.train()
    return torch.exp(total / len(rows))


def fidelity(bench: Bench) -> dict[str, Any]:
    """Return how fast gains agree with exact ones: 104 contexts, an objective of 16 × 32 ids."""
    torch.set_num_threads(bench.threads)
    count, size = (12, 2) if bench.quick else (104, 16)
    folder = bench.model("demo")
    model = igf.load_model(folder)
    objective, candidates = contexts_of(folder, size, CONTEXT, count)
    ways = (("first-order", None), ("directional", None), ("exact", None), ("exact", SGD))
    gains = []
    for mode, rule in ways:
        measure = measure_of(mode, model, objective, rule)
        parts = [measure.gains(candidates[first : first + 8]) for first in range(0, count, 8)]
        gains.append(np.concatenate(parts))
    first_order, directional, exact, exact_sgd = gains
    pairs = {
        "first-order beside exact, AdamW": (first_order, exact),
        "directional beside exact, SGD": (directional, exact_sgd),
        "exact, AdamW beside exact, SGD": (exact, exact_sgd),
    }
    return {
        "rows": [
            {
                "gains": name,
                "contexts": count,
                "Spearman": float(stats.spearmanr(*pair).statistic),
                "Pearson": float(stats.pearsonr(*pair).statistic),
            }
            for name, pair in pairs.items()
        ]
    }
