"""B4: a merged adapter is used only where it gives what it gives beside the layers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from perplexit.errors import CapabilityError
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import random_window
from tests.trust.loading_models import VOCAB_SIZE, llama, losses, oracle, saved

peft = pytest.importorskip("peft")
WINDOWS = [random_window(seed, 30, VOCAB_SIZE, index=seed) for seed in range(2)]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return saved(llama(), tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return saved(llama(tie_word_embeddings=True), tmp_path_factory.mktemp("tied"))


def adapter(base, folder, config):
    """The folder, with a random adapter in it that is far from doing nothing."""
    torch.manual_seed(7)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name and "ia3" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
        elif parameter.requires_grad:
            parameter.data *= 1 + 0.5 * torch.rand_like(parameter)
    model.save_pretrained(folder)
    return folder


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})


def right(base, folder):
    """The adapter beside the layers, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    adapted = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return oracle(adapted.get_base_model(), WINDOWS)


def test_b4_a_merge_into_tied_weights_is_refused_with_its_difference(tied, tmp_path):
    folder = adapter(tied, tmp_path, lora(target_modules=["embed_tokens"]))
    expected = right(tied, folder)
    assert np.abs(losses(tied, WINDOWS, adapter=folder) - expected).max() < 1e-4
    with pytest.raises(CapabilityError, match=r"nats apart .* tied .* without --merge-adapter"):
        losses(tied, WINDOWS, adapter=folder, merge_adapter=True)


def test_b4_sibling_an_adapter_on_a_tied_head(tied, tmp_path):
    folder = adapter(tied, tmp_path, lora(target_modules=["lm_head"]))
    assert np.abs(losses(tied, WINDOWS, adapter=folder) - right(tied, folder)).max() < 1e-4
    with pytest.raises(CapabilityError, match="nats apart"):
        losses(tied, WINDOWS, adapter=folder, merge_adapter=True)


CONFIGS = {
    "lora": lora(target_modules=ALL),
    "dora": lora(target_modules=ALL, use_dora=True),
    "rslora": lora(target_modules=ALL, use_rslora=True),
    "head": lora(target_modules=["lm_head"]),
    "embedding": lora(target_modules=["embed_tokens"]),
    "saved modules": lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_b4_sibling_merges_that_are_right_are_used(untied, tmp_path, name):
    folder = adapter(untied, tmp_path, CONFIGS[name])
    expected = right(untied, folder)
    for merge in (False, True):
        got = losses(untied, WINDOWS, adapter=folder, merge_adapter=merge)
        assert np.abs(got - expected).max() < 1e-4
    assert np.abs(expected - losses(untied, WINDOWS)).max() > 0.1


def test_b4_sibling_saved_modules_over_tied_weights(tied, tmp_path):
    """A copy of the embedding that was trained leaves the head on the weights before."""
    folder = adapter(
        tied, tmp_path, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    expected = right(tied, folder)
    assert np.abs(losses(tied, WINDOWS, adapter=folder) - expected).max() < 1e-4
    merged = losses(tied, WINDOWS, adapter=folder, merge_adapter=True)
    assert np.abs(merged - expected).max() < 1e-4


def test_b4_sibling_conv1d_layers(tmp_path):
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=40, n_embd=64, n_layer=2, n_head=4,
        initializer_range=0.15, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    base = saved(GPT2LMHeadModel(config), tmp_path / "gpt2")
    targets = ["c_attn", "c_fc", "c_proj"]
    folder = adapter(base, tmp_path / "lora", lora(target_modules=targets, fan_in_fan_out=True))
    for merge in (False, True):
        got = losses(base, WINDOWS, adapter=folder, merge_adapter=merge)
        assert np.abs(got - right(base, folder)).max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_b4_sibling_narrow_merges(untied, tied, tmp_path, dtype):
    """The measure is float32: a merge in bfloat16 may be twice as far from it as no merge."""
    folder = adapter(untied, tmp_path / "all", lora(target_modules=ALL))
    session = PytorchInferenceSession(untied, dtype=dtype, adapter=folder, merge_adapter=True)
    assert session.model.adapter is not None
    assert session.model.adapter.merged
    shared = adapter(tied, tmp_path / "shared", lora(target_modules=["embed_tokens"]))
    with pytest.raises(CapabilityError, match=f"in {dtype}"):
        losses(tied, WINDOWS, dtype=dtype, adapter=shared, merge_adapter=True)


def test_b4_sibling_a_merge_that_is_quantized_afterwards(untied, tied, tmp_path):
    """It is held against the unmerged adapter before its weights are rounded."""
    folder = adapter(untied, tmp_path / "all", lora(target_modules=["q_proj", "down_proj"]))
    merged = losses(untied, WINDOWS, adapter=folder, merge_adapter=True, quantization="int8")
    assert np.abs(merged - right(untied, folder)).mean() < 0.5
    shared = adapter(tied, tmp_path / "shared", lora(target_modules=["embed_tokens"]))
    with pytest.raises(CapabilityError, match="nats apart"):
        losses(tied, WINDOWS, adapter=shared, merge_adapter=True, quantization="int8")
