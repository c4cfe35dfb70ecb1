"""PEFT adapters on their base model: merged, beside the layers, and refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.checkpoints.adapters import find_adapter
from perplexit.errors import CapabilityError, ModelError, ResumeError, UsageError
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.registry import load_session
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

peft = pytest.importorskip("peft")

WINDOWS = [random_window(seed, 40, VOCAB_SIZE, index=seed) for seed in range(3)]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def losses(session):
    return np.concatenate(session.token_nll(WINDOWS))


def save_adapter(base, folder, config=None):
    torch.manual_seed(7)
    config = config or peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora_dir(tiny_llama_dir, tmp_path_factory):
    return save_adapter(tiny_llama_dir, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def tokens(tiny_llama_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "in.safetensors"
    text = ["An adapter's text. " * 20]
    return px.prepare(text, tokenizer=str(tiny_llama_dir), max_length=32, stride=16, output=path)


def by_hand(base, adapter):
    """The base model with W + (alpha / r)·B·A in place of W."""
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = load_file(adapter / "adapter_model.safetensors")
    num_changed = 0
    for name, lora_a in weights.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").split(".lora_A.")[0]
            lora_b = weights[name.replace(".lora_A.", ".lora_B.")]
            with torch.no_grad():
                model.get_submodule(layer).weight += 12 / 4 * (lora_b @ lora_a)
            num_changed += 1
    assert num_changed == 2 * len(TARGETS)
    return model


def test_merged_beside_the_layers_and_by_hand_score_the_same(tiny_llama_dir, lora_dir):
    beside = losses(load_session(f"hf:{tiny_llama_dir}", adapter=lora_dir))
    merged = losses(load_session(f"hf:{tiny_llama_dir}", adapter=lora_dir, merge_adapter=True))
    manual = losses(PytorchInferenceSession(by_hand(tiny_llama_dir, lora_dir)))
    assert np.abs(beside - merged).max() < 1e-5
    assert np.abs(beside - manual).max() < 1e-5
    assert np.abs(beside - losses(load_session(f"hf:{tiny_llama_dir}"))).max() > 0.1


def test_an_adapter_on_conv1d_layers(tiny_gpt2_dir, tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    adapter = save_adapter(tiny_gpt2_dir, tmp_path, config)
    beside, merged = (
        losses(load_session(f"hf:{tiny_gpt2_dir}", adapter=adapter, merge_adapter=merge))
        for merge in (False, True)
    )
    assert np.abs(beside - merged).max() < 1e-5
    assert np.abs(beside - losses(load_session(f"hf:{tiny_gpt2_dir}"))).max() > 1e-2


@pytest.mark.parametrize("precision", ["int8", "nf4", "mxint8"])
def test_an_adapter_on_a_quantized_model(precision, tiny_llama_dir, lora_dir):
    """Beside the layers the base alone is quantized (as QLoRA trains); merged, the sum is."""
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}.get(precision, "torch"))
    exact = losses(load_session(f"hf:{tiny_llama_dir}", adapter=lora_dir))
    address, most = f"hf:{tiny_llama_dir}", 5.0 if precision == "nf4" else 1.0
    for merge in (False, True):
        session = load_session(
            address, adapter=lora_dir, merge_adapter=merge, quantization=precision
        )
        difference = np.abs(losses(session) - exact)
        assert 1e-3 < difference.max() < most
        assert session.description.quantization.num_modules == 14


@pytest.mark.trap(26)
def test_the_adapter_is_part_of_the_model_s_identity(tiny_llama_dir, lora_dir, tokens, tmp_path):
    """Trap 26: another adapter, or none, is another model; merging rounds otherwise."""
    address, run = f"hf:{tiny_llama_dir}", tmp_path / "run"
    made = px.evaluate(address, tokens, adapter=lora_dir, run=run)
    recorded = made.to_json()["model"]["adapter"]
    assert recorded["path"] == str(lora_dir)
    assert recorded["kind"] == "LORA"
    assert recorded["merged"] is False
    assert len(recorded["fingerprint"]) == 64
    base = px.evaluate(address, tokens)
    assert base.model["weights_fingerprint"] != made.model["weights_fingerprint"]
    assert base.model["adapter"] is None
    assert base.model["num_parameters"] == made.model["num_parameters"]
    moved = shutil.copytree(lora_dir, tmp_path / "moved")
    assert px.evaluate(address, tokens, adapter=moved, run=run).perplexity == made.perplexity
    with pytest.raises(ResumeError, match="adapter"):
        px.evaluate(address, tokens, adapter=lora_dir, merge_adapter=True, run=run)
    with pytest.raises(ResumeError, match="model weights"):
        px.evaluate(address, tokens, run=run)


def test_the_fingerprint_is_of_content_not_of_where_the_base_lay(lora_dir, tmp_path):
    before = find_adapter(lora_dir).fingerprint
    copy = shutil.copytree(lora_dir, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "x"})
    )
    assert find_adapter(copy).fingerprint == before
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert find_adapter(copy).fingerprint != before


def test_no_adapter_in_the_folder(tiny_llama_dir, lora_dir, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", tiny_llama_dir):
        with pytest.raises(ModelError, match=r"PEFT adapter.*adapter_config\.json"):
            load_session(f"hf:{tiny_llama_dir}", adapter=folder)
    shutil.copy(lora_dir / "adapter_config.json", tmp_path)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load_session(f"hf:{tiny_llama_dir}", adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="peft_type"):
        load_session(f"hf:{tiny_llama_dir}", adapter=tmp_path)


def test_an_adapter_that_was_cut_short_is_refused(tiny_llama_dir, lora_dir, tmp_path):
    folder = shutil.copytree(lora_dir, tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelError, match="is the copy complete"):
        load_session(tiny_llama_dir, adapter=folder)


def test_an_adapter_of_another_base_model_is_refused(tiny_gpt2_dir, tiny_llama_dir, lora_dir):
    with pytest.raises(ModelError, match="trained on"):
        load_session(f"hf:{tiny_gpt2_dir}", adapter=lora_dir)


@pytest.mark.parametrize("fault", ["shape", "missing", "another layer"])
def test_an_adapter_that_fits_in_part_is_refused(fault, tiny_llama_dir, lora_dir, tmp_path):
    """PEFT would warn, or say nothing, and score with fresh weights."""
    adapter = shutil.copytree(lora_dir, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if "layers.1" in name and "lora_A" in name)
    tensor = weights.pop(name)
    if fault == "shape":
        weights[name] = torch.zeros(tensor.shape[0], tensor.shape[1] + 1)
    elif fault == "another layer":
        weights[name] = tensor
        weights[name.replace("layers.1", "layers.7")] = tensor.clone()
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not fit"):
        load_session(f"hf:{tiny_llama_dir}", adapter=adapter)


def test_learned_prompts_are_refused(tiny_llama_dir, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    adapter = save_adapter(tiny_llama_dir, tmp_path, config)
    with pytest.raises(CapabilityError, match="PROMPT_TUNING"):
        load_session(f"hf:{tiny_llama_dir}", adapter=adapter)


def test_other_engines_take_no_adapter(lora_dir, tmp_path):
    file = tmp_path / "recorded.jsonl"
    file.write_text("")
    for address in (f"recorded:{file}", f"gguf:{file}"):
        with pytest.raises(CapabilityError, match="merge the adapter into the checkpoint"):
            load_session(address, adapter=lora_dir)


def test_merging_needs_an_adapter(tiny_llama_dir, tokens):
    with pytest.raises(UsageError, match="adapter"):
        px.evaluate(f"hf:{tiny_llama_dir}", tokens, merge_adapter=True)
    with pytest.raises(UsageError, match="adapter"):
        PytorchInferenceSession(tiny_llama_dir, merge_adapter=True)


def test_an_open_session_takes_no_adapter(tiny_llama_dir, lora_dir, tokens):
    session = load_session(f"hf:{tiny_llama_dir}")
    with pytest.raises(UsageError, match="load_session"):
        px.evaluate(session, tokens, adapter=lora_dir)
