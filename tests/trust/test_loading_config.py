"""B5 and B1: what config.json says is read by the model, and chooses neither attention nor code."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from perplexit.checkpoints.loading import load_checkpoint
from perplexit.errors import ModelError
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.trust.loading_models import SIZES, edited, llama, losses, oracle, oracle_of, saved


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved(llama(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def right(plain):
    return oracle_of(plain)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError(f"asked the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # As where the hub may be asked: nothing is to be kept from it by a setting of the tests.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def refused(folder, *names):
    with pytest.raises(ModelError) as raised:
        load_checkpoint(folder)
    for name in names:
        assert name in str(raised.value)


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("_attn_implementation", "eager"),
        ("attn_implementation", "org/kernels"),
        ("_attn_implementation", "org/kernels@v1:fast"),
        ("attn_implementation", {"": "eager"}),
        ("_attn_implementation", "flash_attention_2"),
    ],
    ids=str,
)
def test_b5_attention_is_not_chosen_by_the_config(plain, right, tmp_path, name, choice):
    folder = edited(plain, tmp_path / "chosen", config={name: choice})
    session = PytorchInferenceSession(folder, kernels="plain")
    assert session.description.settings["attention"] == "sdpa"
    assert np.abs(losses(folder) - right).max() < 1e-4


def test_b5_attention_is_chosen_where_it_is_asked_for(plain, tmp_path):
    folder = edited(plain, tmp_path / "chosen", config={"_attn_implementation": "org/kernels"})
    session = PytorchInferenceSession(folder, attention="eager")
    assert session.description.settings["attention"] == "eager"


@pytest.mark.parametrize(
    "entries",
    [
        {"use_kernels": True, "kernel_config": {"RMSNorm": "org/kernels:RMSNorm"}},
        {"experts_implementation": "org/kernels", "_experts_implementation": "deepgemm"},
        {"auto_map": {"AutoModelForCausalLM": "org/code--modeling.Other"}},
        {"custom_generate": "org/code", "_commit_hash": "0" * 40, "trust_remote_code": True},
        {"torch_dtype": "float16", "dtype": "bfloat16"},
        {"_attn_implementation_internal": "eager"},
        {"do_sample": True, "temperature": 0.1, "repetition_penalty": 9.0, "min_length": 5},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_b5_sibling_other_entries_change_nothing(plain, right, tmp_path, entries):
    folder = edited(plain, tmp_path / "entries", config=entries)
    session = PytorchInferenceSession(folder, kernels="plain")
    assert session.description.settings["attention"] == "sdpa"
    assert session.description.dtype == "float32"
    assert np.abs(losses(folder) - right).max() < 1e-4


def test_b5_sibling_code_beside_the_weights_is_not_run(plain, tmp_path):
    folder = edited(plain, tmp_path / "code", config={
        "model_type": "other", "architectures": ["Other"],
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    })  # fmt: skip
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(ran)!r}, 'w')\n")
    refused(folder, "never run")
    assert not ran.exists()


def test_b5_sibling_layers_fetch_no_kernels_from_a_hub():
    """Where `kernels` is installed, transformers asks for code of Mamba's layers by itself."""
    script = (
        "import perplexit\n"
        "from transformers.integrations import hub_kernels\n"
        "hub_kernels.is_kernels_available = lambda: True\n"
        "def fetched(*args, **options): raise AssertionError(args)\n"
        "hub_kernels.get_kernel = fetched\n"
        "print(hub_kernels.lazy_load_kernel('causal-conv1d'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr[-2000:]


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "org/kernels"}, {"quant_method": "mxfp4"}, {"modules": []}, {}],
    ids=str,
)
def test_b5_sibling_a_quantization_is_refused_before_any_of_its_code(plain, tmp_path, quantization):
    folder = edited(plain, tmp_path / "q", config={"quantization_config": quantization})
    refused(folder, "already quantized")


FIELDS = {
    "sliding_window": 8,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 5.0,
    "logit_scale": 0.25,
    "logits_scaling": 3.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "use_qk_norm": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "num_local_experts": 4,
    "clip_qkv": 8.0,
}


@pytest.mark.parametrize("name", FIELDS)
def test_b1_sibling_a_field_that_the_class_does_not_read(plain, tmp_path, name):
    refused(edited(plain, tmp_path / "field", config={name: FIELDS[name]}), name)


def test_b1_sibling_fields_that_say_nothing_are_no_reason(plain, right, tmp_path):
    entries = {
        "sliding_window": 128, "use_sliding_window": False, "attn_logit_softcapping": None,
        "max_window_layers": 2, "partial_rotary_factor": 1.0, "use_qk_norm": False,
        "layer_types": ["full_attention", "full_attention"], "rope_scaling": None,
    }  # fmt: skip
    folder = edited(plain, tmp_path / "fields", config=entries)
    assert np.abs(losses(folder) - right).max() < 1e-4


ROPES = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
}


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [("linear", "rope_parameters"), ("llama3", "rope_scaling"), ("yarn", "type")],
)
def test_b1_sibling_rotary_positions_under_either_name(plain, right, tmp_path, kind, spelling):
    rope = {"rope_type": kind, "rope_theta": 5000.0, **ROPES[kind]}
    scaled = oracle(llama(rope_parameters=dict(rope)))
    if spelling == "type":
        rope["type"] = rope.pop("rope_type")
    name = "rope_scaling" if spelling == "type" else spelling
    config = {"rope_parameters": None, "rope_theta": None, name: rope}
    folder = edited(plain, tmp_path / "rope", config=config)
    assert np.abs(losses(folder) - scaled).max() < 1e-4
    assert np.abs(scaled - right).max() > 0.1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "unheard"},
        {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5},
        {"rope_type": "default", "factor": 8.0},
        {"rope_type": "llama3", **ROPES["llama3"], "beta_fast": 16.0},
    ],
    ids=str,
)
def test_b1_sibling_rotary_fields_that_are_not_read(plain, tmp_path, rope):
    name = {"unheard": "unheard", "linear": "attention_factor", "default": "factor"}
    folder = edited(plain, tmp_path / "rope", config={"rope_parameters": rope})
    refused(folder, name.get(rope["rope_type"], "beta_fast"))


def test_b1_sibling_rotary_fields_that_contradict_each_other(plain, tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    both = {"rope_parameters": linear, "rope_scaling": {**linear, "factor": 4.0}}
    refused(edited(plain, tmp_path / "both", config=both), "rope_scaling and rope_parameters")
    theta = {"rope_parameters": linear, "rope_theta": 500000.0}
    refused(edited(plain, tmp_path / "theta", config=theta), "one rope_theta")


def test_b1_sibling_rotary_positions_of_a_class_without_any(tmp_path):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=64, n_layer=1, n_head=4)
    folder = saved(GPT2LMHeadModel(config), tmp_path / "gpt2")
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    refused(edited(folder, tmp_path / "rope", config=rope), "rope_scaling")


def test_b1_sibling_a_field_inside_the_text_part_of_a_larger_model(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration  # noqa: PLC0415

    torch.manual_seed(1)
    text = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 14,
        "num_attention_heads": 2, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    folder = saved(Gemma3ForConditionalGeneration(config), tmp_path / "gemma3")
    assert np.abs(losses(folder) - oracle_of(folder)).max() < 1e-4
    written = json.loads((folder / "config.json").read_text())["text_config"]
    capped = edited(
        folder, tmp_path / "inner", config={"text_config": {**written, "logits_scaling": 4.0}}
    )
    refused(capped, "logits_scaling")
    quantized = {"text_config": {**written, "quantization_config": {"quant_method": "gptq"}}}
    refused(edited(folder, tmp_path / "quantized", config=quantized), "gptq")
    attention = {"text_config": {**written, "_attn_implementation": "org/kernels"}}
    asks = edited(folder, tmp_path / "asks", config=attention)
    assert np.abs(losses(asks) - oracle_of(folder)).max() < 1e-4


def test_b1_sibling_partial_rotary_positions(tmp_path):
    torch.manual_seed(1)
    config = Phi3Config(**SIZES, partial_rotary_factor=0.5)
    folder = saved(Phi3ForCausalLM(config), tmp_path / "phi3")
    assert np.abs(losses(folder) - oracle_of(folder)).max() < 1e-4
