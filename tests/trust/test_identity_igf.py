"""Fine-tunings, pairs and learners go on with the model that they began with, and no other."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from perplexit.errors import ResumeError
from perplexit.igf.articles import Articles
from perplexit.igf.collection import collect_pairs
from perplexit.igf.finetuning import finetune_model
from perplexit.igf.language_model import with_lora
from perplexit.igf.learners import RidgeLearner
from perplexit.igf.model_identity import unlike_pairs
from perplexit.igf.pairs import Pairs
from perplexit.igf.random_contexts import Contexts, ContextStream, objective_contexts
from perplexit.igf.selection import Selection, by_predicted_gain, random_skip
from perplexit.igf.training_options import FinetuneSettings
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

pytest.importorskip("peft")
LENGTH = 12
SETTINGS = FinetuneSettings(
    steps=2, batch_size=2, context_length=LENGTH, eval_interval=1, learning_rate=1e-3
)


def articles(seed: int) -> Articles:
    random = np.random.default_rng(seed)
    return Articles.of([random.integers(2, VOCAB_SIZE, 60).astype(np.int32) for _ in range(8)])


TRAIN, HELD = articles(0), articles(1)
TEST = objective_contexts(HELD, number=4, length=LENGTH, min_len=20)
CONTEXTS = ContextStream(TRAIN, LENGTH, 0).take(0, 4)


def llama() -> nn.Module:
    return TINY_MODELS["llama"]().eval()


def noisy() -> nn.Module:
    """Another base model of the same shapes."""
    model = llama()
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(0.1)
    return model


def lora(model: nn.Module, **options: Any) -> nn.Module:
    return with_lora(model, rank=2, targets=["q_proj"], **options)


def tune(model: nn.Module, where: Path, **options: Any) -> Any:
    return finetune_model(model, TRAIN, TEST, checkpoint=where, **{"settings": SETTINGS} | options)


def test_a4_lora_does_not_go_on_over_another_base_model(tmp_path: Path) -> None:
    tune(lora(llama()), tmp_path)
    with pytest.raises(ResumeError, match="weights"):
        tune(lora(noisy()), tmp_path)
    assert tune(lora(llama()), tmp_path).num_steps_resumed == 2  # fresh adapters, the same base


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: lora(llama(), alpha=64), "adapters"),
        (lambda: lora(llama().to(torch.bfloat16)), "weights"),
        (lambda: _eager(lora(llama())), "attention"),
        (llama, "adapters"),
    ],
    ids=["another scale of the adapter", "another dtype", "another attention", "no adapter"],
)
def test_a4_sibling_a_finetuning_goes_on_under_its_own_conditions(
    tmp_path: Path, change: Callable[[], nn.Module], said: str
) -> None:
    tune(lora(llama()), tmp_path)
    with pytest.raises(ResumeError, match=said):
        tune(change(), tmp_path)


def _eager(model: nn.Module) -> nn.Module:
    model.config._attn_implementation = "eager"
    return model


def test_a4_sibling_all_weights_begin_where_they_began(tmp_path: Path) -> None:
    tune(llama(), tmp_path)
    with pytest.raises(ResumeError, match="weights"):
        tune(noisy(), tmp_path)
    assert tune(llama(), tmp_path, settings=replace(SETTINGS, steps=3)).num_steps_resumed == 2


def ridge(seed: int) -> RidgeLearner:
    weights_V = np.random.default_rng(seed).normal(0, 1, VOCAB_SIZE).astype(np.float32)
    return RidgeLearner(weights_V, 0.0)


def test_a4_sibling_another_learner_or_seed_is_another_selection(tmp_path: Path) -> None:
    def selected(seed: int) -> Selection:
        return by_predicted_gain(ridge(seed), -5.0, name="igf-constant")

    tune(llama(), tmp_path / "learner", selection=selected(0))
    with pytest.raises(ResumeError, match="learner_fingerprint"):
        tune(llama(), tmp_path / "learner", selection=selected(1))
    tune(llama(), tmp_path / "seed", selection=random_skip(0.5, seed=0))
    with pytest.raises(ResumeError, match=r"selection\.seed \(0 and 1\)"):
        tune(llama(), tmp_path / "seed", selection=random_skip(0.5, seed=1))


def test_a4_sibling_an_older_checkpoint_does_not_say_its_model(tmp_path: Path) -> None:
    tune(lora(llama()), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del record["conditions"]["measurement"]
    save_file(tensors, path, metadata={"record": json.dumps(record)})
    with pytest.raises(ResumeError, match="older Perplexit"):
        tune(lora(llama()), tmp_path)


def collect(model: nn.Module, output: Path, contexts: Contexts = CONTEXTS) -> Pairs:
    return collect_pairs(model, contexts, TEST, output=output, mode="first-order")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: llama().to(torch.bfloat16), "dtype"),
        (lambda: _eager(llama()), "attention"),
        (noisy, "weights"),
    ],
    ids=["another dtype", "another attention", "another model"],
)
def test_a4_sibling_pairs_are_of_one_measurement(
    tmp_path: Path, change: Callable[[], nn.Module], said: str
) -> None:
    pairs = collect(llama(), tmp_path / "pairs.safetensors")
    assert len(pairs.record["measurement_fingerprint"]) == 64
    again = collect(copy.deepcopy(llama()), tmp_path / "pairs.safetensors")
    np.testing.assert_array_equal(again.gain_nats_N, pairs.gain_nats_N)
    with pytest.raises(ResumeError, match=said):
        collect(change(), tmp_path / "pairs.safetensors")


def test_a4_sibling_a_learner_of_another_model_is_said(tmp_path: Path) -> None:
    pairs = collect(llama(), tmp_path / "pairs.safetensors")
    record = {"pairs": pairs.record}
    assert unlike_pairs(record, llama()) is None
    assert "weights" in (unlike_pairs(record, noisy()) or "")
    assert unlike_pairs({}, noisy()) is None
    del record["pairs"]["measurement"]["settings"]["fingerprint_version"]  # of an older Perplexit
    assert unlike_pairs(record, noisy()) is None
