"""IGF's figures: what is not known stays not known, and a learner that predicts nothing says so."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from perplexit.cli import igf_options
from perplexit.igf.experiment_file import PairedOutcome
from perplexit.igf.experiment_summary import holm, summarise
from perplexit.igf.learner_scores import doubt_about, score_predictions
from perplexit.metrics.distribution import mean_by
from perplexit.metrics.likelihood import loss_by_position
from tests.report_experiments import document_of


def records(*differences: float) -> dict:
    def run(loss: float) -> dict:
        return {
            "steps": [0, 1],
            "test_loss": [3.0, loss],
            "tokens_trained": 4,
            "tokens_scored": 4,
            "tokens_judged": 8,
            "seconds": {"select": 0.0, "train": 1.0, "evaluate": 0.0},
        }

    base = {seed: run(2.0 + 0.1 * seed) for seed in range(len(differences))}
    other = {seed: run(2.0 + 0.1 * seed + d) for seed, d in enumerate(differences)}
    return {"standard": base, "igf": other}


def test_c4_a_p_value_that_is_nan_is_not_known() -> None:
    row = summarise(records(math.nan, -0.1, -0.2))["comparisons"][0]
    assert (row["p_t"], row["p_t_holm"]) == (None, None)


def test_c4_sibling_seeds_that_all_differ_alike_have_no_t_test() -> None:
    """Without spread there is no standard error; 0.0 was printed, as certain as can be."""
    row = summarise(records(-0.5, -0.5))["comparisons"][0]
    assert row["p_t_holm"] is None
    assert 0 < row["p_wilcoxon"] <= 1


def test_c4_sibling_a_known_p_value_is_scipys() -> None:
    differences = [-0.1, -0.3, -0.25]
    row = summarise(records(*differences))["comparisons"][0]
    assert row["p_t"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_c4_sibling_a_verdict_without_a_p_value_is_inconclusive() -> None:
    row = PairedOutcome("igf", 2, 0.5, 0.5, 0.5, 2, None, None, 0.5, None)
    assert row.verdict(0.95) == "inconclusive"


def test_c4_sibling_holm_keeps_what_is_not_known() -> None:
    assert holm([0.01, None, 0.04]) == pytest.approx([0.03, None, 0.08])
    assert holm([None]) == [None]


def test_c4_sibling_one_seed_has_no_interval() -> None:
    found = summarise({"standard": {0: records(0.0)["standard"][0]}})["methods"]["standard"]
    assert found["low_perplexity"] == found["high_perplexity"] == [None, None]
    assert found["median_perplexity"] == pytest.approx([math.exp(3), math.exp(2)])


def predictions(quality: float, num_articles: int = 40) -> dict:
    random = np.random.default_rng(1)
    article = np.repeat(np.arange(num_articles), 10)
    true = random.standard_normal(len(article))
    predicted = quality * true + 0.1 * random.standard_normal(len(article))
    return score_predictions(predicted, true, article_N=article)


def test_c4_a_learner_that_is_no_better_than_the_mean_is_said_to_predict_nothing() -> None:
    scores = predictions(-0.05)
    assert scores["r2"] < 0
    said = doubt_about(scores)
    assert said is not None
    assert "predicts nothing" in said
    assert "no better than predicting the mean" in said


def test_c4_sibling_a_learner_that_may_be_no_better_is_said_to_be_in_doubt() -> None:
    scores = predictions(0.0)
    assert scores["r2_low"] < 0 < scores["r2"]
    assert "not shown" in str(doubt_about(scores))


def test_c4_sibling_a_learner_that_predicts_is_let_pass() -> None:
    scores = predictions(0.6)
    assert scores["r2_low"] > 0
    assert doubt_about(scores) is None
    assert doubt_about(None) is doubt_about({}) is None  # trained elsewhere: not judged


def test_c4_sibling_gains_that_are_all_alike_give_no_r2() -> None:
    scores = score_predictions(np.ones(5), np.zeros(5))
    assert scores["r2"] is None
    assert "cannot be judged" in str(doubt_about(scores))


def test_c4_the_share_explained_has_the_jackknife_over_articles() -> None:
    scores = predictions(0.6, num_articles=12)
    assert scores["r2"] == pytest.approx(1 - scores["mse"] / scores["mse_of_mean"])
    assert scores["r2_low"] < scores["r2"] < scores["r2_high"] <= 1


def test_c4_a_learner_is_doubted_where_it_is_used(capsys, monkeypatch) -> None:
    learner = SimpleNamespace(record={"scores": predictions(-0.05)})
    monkeypatch.setattr("perplexit.igf.load_learner", lambda path: learner)
    assert igf_options.learner_to_use("learner.safetensors") is learner
    assert "predicts nothing" in capsys.readouterr().err.replace("\n", " ")


def test_c4_sibling_the_report_says_it_too() -> None:
    from perplexit.igf.experiment_file import Experiment  # noqa: PLC0415
    from perplexit.report.experiment_section import _notes  # noqa: PLC0415

    document = document_of() | {"learner": {"kind": "ridge", "scores": predictions(-0.05)}}
    assert any("predicts nothing" in note for note in _notes(Experiment.of(document)))


def test_c4_sibling_a_bucket_without_tokens_has_no_mean() -> None:
    """0.0 nats would be a perfect prediction."""
    buckets = loss_by_position(np.array([0, 9]), np.ones(2), num_buckets=5)
    assert [b.mean_nll for b in buckets] == [1.0, None, None, None, 1.0]
    assert mean_by(np.ones(1), np.zeros(1), (0.0, 0.5, 1.0))[1].mean is None
