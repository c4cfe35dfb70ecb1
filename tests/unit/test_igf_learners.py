"""Secondary learners: held out by article, better than the mean where there is a signal."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from perplexit.errors import UsageError, VocabularyError
from perplexit.igf.learner_scores import score_predictions
from perplexit.igf.learner_training import divide_by_article, train_learner
from perplexit.igf.learners import (
    ConvolutionLearner,
    RidgeLearner,
    SecondaryLearner,
    load_learner,
    save_learner,
    token_counts,
)
from perplexit.igf.pairs import Pairs
from tests.tiny_models import TINY_MODELS

VOCAB = 320


def learnable_pairs(count: int = 600, seed: int = 0, noise: float = 0.3) -> Pairs:
    """Gains that are linear in token counts, plus noise."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, VOCAB, (count, 32)).astype(np.int32)
    worth = random.normal(size=VOCAB) / np.sqrt(32)
    gains = 1e-3 * (5 + worth[ids].sum(1) + noise * random.normal(size=count))
    return Pairs(ids, random.integers(0, 30, count), gains, 50 * gains, {"mode": "exact"})


def test_ridge_in_its_dual_form_is_ridge() -> None:
    pairs = learnable_pairs(80)
    z = pairs.gain_nats_N * 1e3
    found = RidgeLearner.fit(pairs.ids_NT, z, VOCAB, penalty=2.5)
    counts = token_counts(pairs.ids_NT, VOCAB).toarray()
    centred = counts - counts.mean(0)
    expected = np.linalg.solve(centred.T @ centred + 2.5 * np.eye(VOCAB), centred.T @ z)
    assert found.weights_V == pytest.approx(expected, abs=1e-5)
    assert found.predict(pairs.ids_NT).mean() == pytest.approx(z.mean())


def test_ridge_beats_the_mean_on_held_out_articles_and_says_so() -> None:
    scores = train_learner(learnable_pairs(), vocab_size=VOCAB).record["scores"]
    assert scores["r2"] > 0.3
    assert scores["spearman"] > 0.6
    assert scores["mse"] < scores["mse_of_mean"]
    assert 0 < scores["base_rate"] < 0.3
    assert scores["precision"] > scores["base_rate"]


def test_nothing_to_learn_is_reported_as_nothing() -> None:
    pairs = learnable_pairs()
    random = np.random.default_rng(5)
    shuffled = Pairs(
        pairs.ids_NT,
        pairs.article_N,
        random.permutation(pairs.gain_nats_N),
        pairs.gain_perplexity_N,
        {},
    )
    assert train_learner(shuffled, vocab_size=VOCAB).record["scores"]["r2"] < 0.1


def test_no_article_is_in_two_parts() -> None:
    pairs = learnable_pairs()
    parts = divide_by_article(pairs)
    owned = [
        set(pairs.article_N[rows].tolist()) for rows in (parts.fit, parts.choose, parts.report)
    ]
    assert len(set.union(*owned)) == sum(map(len, owned))
    assert len(parts.fit) + len(parts.choose) + len(parts.report) == len(pairs)
    again = divide_by_article(pairs.take(np.arange(len(pairs))[::-1]))
    assert set(pairs.article_N[::-1][again.report].tolist()) == owned[2]


def test_fewer_than_three_articles_cannot_be_held_out() -> None:
    pairs = learnable_pairs(10)
    with pytest.raises(UsageError, match="at least 3 articles"):
        divide_by_article(
            Pairs(pairs.ids_NT, np.arange(10) % 2, pairs.gain_nats_N, pairs.gain_nats_N, {})
        )


def test_the_networks_architecture_is_the_papers() -> None:
    learner = SecondaryLearner(TINY_MODELS["gpt2"]())
    shapes = [tuple(p.shape) for p in learner.parameters()]
    assert shapes == [
        (VOCAB, 32),
        (256, 32, 3),
        (256,),
        (32, 256),
        (32,),
        (32, 32),
        (32,),
        (1, 32),
        (1,),
    ]
    assert learner(torch.zeros(2, 1, 32, dtype=torch.long)).shape == (2, 1)
    assert [m.p for m in learner.modules() if isinstance(m, torch.nn.Dropout)] == [0.1]


def test_its_embeddings_are_a_copy_that_is_trained() -> None:
    model = TINY_MODELS["llama"]()
    before = model.get_input_embeddings().weight.detach().clone()
    learner = train_learner(
        learnable_pairs(100), kind="cnn", model=model, max_epochs=2, learning_rate=1e-2
    )
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert isinstance(learner, ConvolutionLearner)
    assert not torch.equal(learner.embeddings.weight, before)


def test_the_best_epoch_is_kept_and_training_stops_early() -> None:
    seen = []
    learner = train_learner(
        learnable_pairs(300),
        kind="cnn",
        model=TINY_MODELS["gpt2"](),
        max_epochs=40,
        learning_rate=3e-3,
        batch_size=32,
        patience=3,
        progress=seen.append,
    )
    best = min(seen, key=lambda p: p.choose_mse)
    assert learner.record["best_epoch"] == best.number
    assert learner.record["choose_mse"] == best.choose_mse
    assert len(seen) == min(40, best.number + 3)
    pairs = learnable_pairs(300)
    parts = divide_by_article(pairs)
    statistics = learner.record["statistics"]
    z = (pairs.gain_nats_N[parts.choose] - statistics["mean"]) / statistics["std"]
    mse = ((learner.predict(pairs.ids_NT[parts.choose]) - z) ** 2).mean()
    assert mse == pytest.approx(best.choose_mse, rel=1e-4)


@pytest.mark.parametrize("kind", ["ridge", "cnn"])
def test_a_learner_comes_back_and_predicts_the_same_bits(tmp_path: Path, kind) -> None:
    pairs = learnable_pairs(120)
    learner = train_learner(pairs, kind=kind, model=TINY_MODELS["gpt2"](), max_epochs=1)
    path = save_learner(learner, tmp_path / "igf_model.pt")
    assert path.suffix == ".safetensors"
    found = load_learner(tmp_path / "igf_model.pt")
    assert np.array_equal(found.predict(pairs.ids_NT), learner.predict(pairs.ids_NT))
    assert found.record["scores"] == learner.record["scores"]
    assert json.loads(path.with_suffix(".json").read_text())["learner"] == kind


@pytest.mark.parametrize("kind", ["ridge", "cnn"])
def test_two_trainings_with_one_seed_are_equal(kind) -> None:
    first, second = (
        train_learner(learnable_pairs(90), kind=kind, model=TINY_MODELS["gpt2"](), max_epochs=2)
        for _ in range(2)
    )
    assert np.array_equal(
        first.predict(learnable_pairs(9).ids_NT), second.predict(learnable_pairs(9).ids_NT)
    )


@pytest.mark.trap(18)
@pytest.mark.parametrize("kind", ["ridge", "cnn"])
def test_ids_outside_the_vocabulary_are_refused(kind) -> None:
    learner = train_learner(
        learnable_pairs(60), kind=kind, model=TINY_MODELS["gpt2"](), max_epochs=1
    )
    with pytest.raises(VocabularyError, match="below 320"):
        learner.predict(np.full((1, 8), VOCAB, np.int32))


def test_scores_by_hand() -> None:
    scores = score_predictions(np.array([2.0, 1.0, -1.0, 0.0]), np.array([2.0, 0.0, -1.0, 1.5]))
    assert scores["mse"] == pytest.approx((1 + 2.25) / 4)
    assert (scores["accepted"], scores["precision"], scores["base_rate"]) == (0.5, 0.5, 0.5)
    nothing = score_predictions(np.zeros(4), np.array([2.0, 0.0, -1.0, 1.5]))
    assert (nothing["precision"], nothing["spearman"], nothing["r2"]) == (None, None, 0.0)
