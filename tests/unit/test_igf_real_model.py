"""The fast gains rank real contexts as the exact step does, on the packaged model."""

from pathlib import Path

import pytest
import torch
from scipy import stats

from perplexit.igf.articles import read_articles
from perplexit.igf.gain_measures import gain_measure
from perplexit.igf.language_model import load_model
from perplexit.igf.optimizer_step import StepRule
from perplexit.igf.random_contexts import ContextStream, objective_contexts

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
SGD = StepRule("sgd", clip_norm=None)


def test_fast_gains_agree_with_exact_ones_on_real_contexts(
    real_model_dir: Path, real_text: str
) -> None:
    """Ten contexts, an objective of four: `bench/run.py --only igf-fidelity` does it at length."""
    half = len(real_text) // 2
    model = load_model(real_model_dir)
    known, wanted = (
        read_articles([text], real_model_dir) for text in (real_text[:half], real_text[half:])
    )
    objective = objective_contexts(wanted, number=4, min_len=100).ids_NT
    candidates = torch.from_numpy(ContextStream(known, 32, 5).take(0, 10).ids_NT).long()
    for fast, rule in (("first-order", StepRule()), ("directional", SGD)):
        gains = [
            gain_measure(model, torch.from_numpy(objective).long(), mode=mode, rule=rule).gains(
                candidates
            )
            for mode in ("exact", fast)
        ]
        assert stats.spearmanr(*gains).statistic > 0.9
        assert gains[1] == pytest.approx(gains[0], rel=0.35, abs=2e-3)
        assert float(abs(gains[0]).max()) > 1e-4
