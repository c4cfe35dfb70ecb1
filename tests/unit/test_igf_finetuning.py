"""Fine-tuning with a filter, and experiments: gradients, thresholds, costs, determinism, resume."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perplexit.checkpoints.module_identity import module_fingerprint
from perplexit.errors import CorpusError, ResumeError, UsageError, VocabularyError
from perplexit.igf.articles import Articles
from perplexit.igf.experiment_summary import draw_experiment, holm, median_interval, summarise
from perplexit.igf.experiments import ExperimentPlan, run_experiment
from perplexit.igf.finetuning import finetune_model, last_context_gradient, mean_gradient
from perplexit.igf.language_model import with_lora
from perplexit.igf.learners import ConvolutionLearner, RidgeLearner
from perplexit.igf.losses import context_losses
from perplexit.igf.random_contexts import objective_contexts
from perplexit.igf.selection import (
    ShiftingThreshold,
    by_predicted_gain,
    loss_band,
    quantile_threshold,
    random_skip,
    selection_named,
    threshold_within_reach,
)
from perplexit.igf.training_options import FinetuneSettings
from tests.tiny_models import TINY_MODELS

VOCAB, LENGTH = 320, 12
SETTINGS = FinetuneSettings(
    steps=4, batch_size=3, context_length=LENGTH, eval_interval=2, learning_rate=1e-3
)


def articles(first: int, count: int = 6) -> Articles:
    random = [np.random.default_rng([first, i]) for i in range(count)]
    return Articles.of([r.integers(2, VOCAB, 60) for r in random])


TRAIN = articles(1)
TEST = objective_contexts(articles(2), number=6, length=LENGTH, min_len=20)


def ridge(seed: int = 0) -> RidgeLearner:
    return RidgeLearner(np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) / 3, 0.0)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return found


def batch(count: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(2, VOCAB, (count, LENGTH)))


# --- the gradient of a step ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_accumulation_in_any_pieces_is_the_gradient_of_the_mean(
    name: str, micro_batch: int
) -> None:
    model = TINY_MODELS[name]().double().eval()
    context_losses(model, batch()).mean().backward()
    expected = gradient(model)
    loss = mean_gradient(model, batch(), micro_batch)
    assert torch.allclose(gradient(model), expected, rtol=1e-6, atol=1e-9)
    assert loss == pytest.approx(float(context_losses(model, batch()).mean().detach()))


def test_the_originals_zero_grad_leaves_the_last_context_alone() -> None:
    """What `--seed-compatible` reproduces: a 'batch of 5' is its last context."""
    model = TINY_MODELS["gpt2"]().double().eval()
    last_context_gradient(model, batch())
    found = gradient(model)
    context_losses(model, batch()[-1:])[0].backward()
    alone = gradient(model)
    context_losses(model, batch()).mean().backward()
    right = gradient(model)
    assert torch.allclose(found, alone, rtol=1e-9, atol=1e-12)
    assert float(torch.nn.functional.cosine_similarity(found, right, dim=0)) < 0.9


def test_seed_compatible_steps_ignore_all_but_the_last_context() -> None:
    """The effect of the bug: change every context of the batch but the last, nothing changes."""
    ends = {}
    for compatible in (True, False):
        fingerprints = []
        for others in (7, 8):
            model = TINY_MODELS["gpt2"]().eval()
            contexts = np.random.default_rng(others).integers(2, VOCAB, (3, LENGTH))
            contexts[-1] = np.arange(2, 2 + LENGTH)
            train = torch.from_numpy(contexts)
            (last_context_gradient if compatible else lambda m, b: mean_gradient(m, b, 3))(
                model, train
            )
            fingerprints.append(gradient(model))
        ends[compatible] = torch.equal(*fingerprints)
    assert ends == {True: True, False: False}
    curves = [
        finetune_model(
            TINY_MODELS["gpt2"](), TRAIN, TEST, settings=replace(SETTINGS, seed_compatible=c)
        ).test_loss
        for c in (True, False)
    ]
    assert curves[0][0] == curves[1][0]
    assert curves[0][-1] != curves[1][-1]


# --- thresholds and selections ---------------------------------------------------------------


def test_the_shifting_threshold_shifts_after_ten_steps() -> None:
    assert [ShiftingThreshold().at(step) for step in (0, 9, 10, 59)] == [1.0, 1.0, -1.0, -1.0]
    ids = np.random.default_rng(5).integers(2, VOCAB, (50, LENGTH)).astype(np.int32)
    constant = by_predicted_gain(ridge(), 1.0)
    first, last = (constant.accepts(ids, 0, step, None) for step in (0, 59))
    assert np.array_equal(first, last)
    assert np.array_equal(first, ridge().predict(ids) >= 1.0)


def test_a_quantile_accepts_the_share_it_says() -> None:
    predicted = np.random.default_rng(0).normal(scale=0.1, size=4000)  # shrunk: +1 accepts none
    assert not (predicted >= 1.0).any()
    accepted = (predicted >= quantile_threshold(predicted, 0.25)).mean()
    assert accepted == pytest.approx(0.25, abs=1e-3)
    with pytest.raises(UsageError, match="share"):
        quantile_threshold(predicted, 0.0)


def test_random_skipping_is_the_same_however_it_is_asked() -> None:
    ids = np.zeros((400, LENGTH), np.int32)
    skip = random_skip(0.5, seed=3)
    whole = skip.accepts(ids, 0, 0, None)
    parts = np.concatenate(
        [skip.accepts(ids[:15], 0, 0, None), skip.accepts(ids[15:], 15, 1, None)]
    )
    assert np.array_equal(whole, parts)


def test_the_filter_comes_before_the_models_forward_pass() -> None:
    model = TINY_MODELS["gpt2"]().eval()
    fed: list[int] = []  # contexts that went through the layers, the head's probe left out

    def count(module: torch.nn.Module, arguments: tuple, named: dict) -> None:
        rows, length = (named.get("input_ids") if not arguments else arguments[0]).shape
        fed.append(rows if length == LENGTH - 1 else 0)

    model.transformer.register_forward_pre_hook(count, with_kwargs=True)
    selection = by_predicted_gain(ridge(), 0.5)
    curve = finetune_model(model, TRAIN, TEST, selection=selection, settings=SETTINGS)
    evaluated = 3 * len(TEST)
    assert sum(fed) == evaluated + SETTINGS.steps * SETTINGS.batch_size
    assert curve.tokens_scored == 0
    assert curve.tokens_trained == SETTINGS.steps * SETTINGS.batch_size * LENGTH
    assert curve.tokens_judged > curve.tokens_trained  # some were rejected
    assert curve.tokens_judged == curve.num_candidates[-1] * LENGTH


def test_only_accepted_contexts_are_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "perplexit.igf.finetuning.mean_gradient",
        lambda model, b, m: seen.append(b.numpy()) or mean_gradient(model, b, m),
    )
    learner = ridge()
    selection = by_predicted_gain(learner, ShiftingThreshold(0.8, -0.8, steps=2))
    finetune_model(TINY_MODELS["gpt2"](), TRAIN, TEST, selection=selection, settings=SETTINGS)
    lowest = [learner.predict(rows.astype(np.int32)).min() for rows in seen]
    assert min(lowest[:2]) >= 0.8
    assert min(lowest[2:]) >= -0.8
    assert min(lowest[2:]) < 0.8


def test_high_loss_asks_the_model_and_counts_it() -> None:
    curve = finetune_model(
        TINY_MODELS["gpt2"](), TRAIN, TEST, selection=loss_band(6.0), settings=SETTINGS
    )
    assert curve.tokens_scored >= curve.tokens_judged > 0


def test_a_filter_that_accepts_nothing_ends_with_advice() -> None:
    selection = by_predicted_gain(ridge(), 99.0)
    settings = replace(SETTINGS, max_candidates=50)
    with pytest.raises(UsageError, match="lower the threshold, or use a quantile"):
        finetune_model(TINY_MODELS["gpt2"](), TRAIN, TEST, selection=selection, settings=settings)


def test_a_threshold_that_the_learner_never_reaches_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    learner = RidgeLearner(np.zeros(320, dtype=np.float32), 0.4)  # predicts +0.4 for everything
    plan = ExperimentPlan(("standard", "igf-constant"), (0, 1), SETTINGS)
    with pytest.raises(UsageError, match=r"\+1 or more for some contexts, got at most \+0\.400"):
        run_experiment(
            TINY_MODELS["gpt2"](), TRAIN, TEST, plan=plan, output=tmp_path, learner=learner
        )
    assert not list((tmp_path / "runs").iterdir())
    assert threshold_within_reach(np.arange(1000.0), 5.0) == 5.0
    assert (np.arange(1000.0) >= threshold_within_reach(np.arange(1000.0), 1e6)).sum() == 10


def test_a_method_that_lacks_its_learner_is_refused() -> None:
    with pytest.raises(UsageError, match="secondary learner for igf-shifting"):
        selection_named("igf-shifting")
    with pytest.raises(UsageError, match="expected a method of standard"):
        selection_named("best")


# --- runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ridge", "cnn"])
def test_a_learner_of_another_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    learner = (
        RidgeLearner(np.ones(50_000, dtype=np.float32), 2.0)
        if kind == "ridge"
        else ConvolutionLearner(torch.ones(50_000, 4))
    )
    plan = ExperimentPlan(("standard", "igf-quantile"), (0, 1), SETTINGS)
    with pytest.raises(VocabularyError, match="got one of 50000"):
        run_experiment(
            TINY_MODELS["gpt2"](), TRAIN, TEST, plan=plan, output=tmp_path, learner=learner
        )


def test_training_lowers_the_loss_on_what_it_trains_on() -> None:
    train = TRAIN.take([0])
    test = objective_contexts(TRAIN.take([1]), number=4, length=LENGTH, min_len=20)
    settings = replace(SETTINGS, steps=20, eval_interval=20)
    curve = finetune_model(TINY_MODELS["llama"](), train, test, settings=settings)
    assert curve.train_loss[-1] < curve.train_loss[0] - 0.3
    assert curve.steps == [0, 20]


@pytest.mark.parametrize("dropout", [False, True])
def test_two_runs_with_one_seed_give_the_same_curve_and_weights(dropout: bool) -> None:
    ends = []
    for _ in range(2):
        model = TINY_MODELS["gpt2"]()
        curve = finetune_model(model, TRAIN, TEST, settings=replace(SETTINGS, dropout=dropout))
        ends.append((curve.test_loss, module_fingerprint(model)))
        torch.rand(3)  # what else the program draws does not matter
    assert ends[0] == ends[1]
    other = finetune_model(TINY_MODELS["gpt2"](), TRAIN, TEST, settings=replace(SETTINGS, seed=1))
    assert other.test_loss != ends[0][0]


def test_a_test_article_among_the_training_articles_is_refused() -> None:
    leak = objective_contexts(TRAIN, number=2, length=LENGTH, min_len=20)
    with pytest.raises(CorpusError, match="both in train and in test"):
        finetune_model(TINY_MODELS["gpt2"](), TRAIN, leak, settings=SETTINGS)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "cohere", "granite"])
def test_any_causal_language_model_can_be_tuned(name: str) -> None:
    settings = replace(SETTINGS, steps=1, eval_interval=1)
    curve = finetune_model(TINY_MODELS[name](), TRAIN, TEST, settings=settings)
    assert curve.test_loss[0] != curve.test_loss[1]


def test_lora_trains_its_adapters_and_nothing_else() -> None:
    pytest.importorskip("peft")
    base = TINY_MODELS["llama"]()
    kept = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = with_lora(base, rank=2, targets=["q_proj", "v_proj"])
    settings = replace(SETTINGS, learning_rate=1e-2, steps=8)
    curve = finetune_model(model, TRAIN, TEST, settings=settings)
    assert curve.test_loss[-1] != curve.test_loss[0]
    for name, parameter in model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, kept[name.replace(".base_layer", "")])


# --- experiments -----------------------------------------------------------------------------


def small_plan(**changes: object) -> ExperimentPlan:
    plan = ExperimentPlan(
        methods=("standard", "igf-quantile", "random-skip", "high-loss", "perplexity-band"),
        seeds=(0, 1, 2),
        settings=SETTINGS,
        share=0.5,
        num_calibration=64,
    )
    return replace(plan, **changes)


def test_an_experiment_is_paired_costed_and_resumed(tmp_path: Path) -> None:
    model = TINY_MODELS["gpt2"]().eval()
    before = module_fingerprint(model)
    stopped = run_experiment(
        model,
        TRAIN,
        TEST,
        plan=small_plan(),
        output=tmp_path / "a",
        learner=ridge(),
        seconds_limit=0,
    )
    assert stopped["status"] == "interrupted"
    assert len(list((tmp_path / "a" / "runs").iterdir())) < 15
    arguments = {"plan": small_plan(), "learner": ridge()}
    document = run_experiment(model, TRAIN, TEST, output=tmp_path / "a", **arguments)
    assert document["status"] == "complete"
    assert module_fingerprint(model) == before
    fresh = run_experiment(model, TRAIN, TEST, output=tmp_path / "b", **arguments)
    for method, found in document["methods"].items():
        assert found["num_seeds"] == 3
        for key in ("median_perplexity", "tokens_trained", "tokens_judged", "acceptance"):
            assert found[key] == fresh["methods"][method][key]
    assert [row["method"] for row in document["comparisons"]] == list(small_plan().methods[1:])
    assert document["methods"]["standard"]["acceptance"] == 1.0
    assert json.loads((tmp_path / "a" / "experiment.json").read_text()) == document
    paths = draw_experiment(document, tmp_path)
    assert [p.read_bytes()[:4] for p in paths] == [b"\x89PNG", b"<?xm"]


def test_another_experiment_in_the_folder_is_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["gpt2"]().eval()
    plan = small_plan(methods=("standard", "random-skip"))
    run_experiment(model, TRAIN, TEST, plan=plan, output=tmp_path, seconds_limit=0)
    changed = replace(plan, settings=replace(SETTINGS, learning_rate=1.0))
    with pytest.raises(ResumeError, match=r"plan\.\S+ \(.*\) differ"):
        run_experiment(model, TRAIN, TEST, plan=changed, output=tmp_path)


def test_methods_and_seeds_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="different methods"):
        small_plan(methods=("standard", "standard"))
    with pytest.raises(UsageError, match="2 different seeds"):
        small_plan(seeds=(1,))
    plan = small_plan(methods=("standard", "igf-constant"))
    with pytest.raises(UsageError, match="secondary learner"):
        run_experiment(TINY_MODELS["gpt2"](), TRAIN, TEST, plan=plan, output=tmp_path)
    assert not list((tmp_path / "runs").iterdir())


def curve(*losses: float) -> dict[str, object]:
    return {
        "steps": list(range(len(losses))),
        "test_loss": list(losses),
        "tokens_trained": 10,
        "tokens_scored": 0,
        "tokens_judged": 20,
        "seconds": {"train": 1.0},
    }


def test_comparisons_are_paired_by_seed() -> None:
    """Differences between seeds are large, the method's gain small and constant: it is found."""
    levels = np.random.default_rng(0).normal(4, 1, 12)
    noise = np.random.default_rng(1).normal(0, 0.001, 12)
    records = {
        "standard": {s: curve(5.0, level) for s, level in enumerate(levels)},
        "better": {
            s: curve(5.0, x - 0.05 + n) for s, (x, n) in enumerate(zip(levels, noise, strict=True))
        },
        "same": {s: curve(5.0, x + n) for s, (x, n) in enumerate(zip(levels, noise, strict=True))},
    }
    better, same = summarise(records)["comparisons"]
    assert better["ratio"] == pytest.approx(np.exp(-0.05), abs=2e-3)
    assert better["ratio_high"] < 1
    assert better["p_t_holm"] < 1e-6
    assert better["seeds_better"] == 12
    assert better["p_wilcoxon_holm"] == pytest.approx(2 * better["p_wilcoxon"])
    assert same["p_t_holm"] > 0.01


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_medians_interval_holds_the_median_and_narrows_with_seeds() -> None:
    random = np.random.default_rng(0)
    few, many = random.normal(size=(8, 1)), random.normal(size=(200, 1))
    widths = []
    for values in (few, many):
        low, high = median_interval(values, 0.95)
        assert low[0] <= np.median(values) <= high[0]
        widths.append(high[0] - low[0])
    assert widths[1] < widths[0] / 2
