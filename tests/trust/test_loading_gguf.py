"""B2: everything that a GGUF file says of its model is in the model, or is refused by name."""

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from perplexit.checkpoints.gguf_rope import llama3_divisors, rope_parameters
from perplexit.checkpoints.loading import load_checkpoint
from perplexit.errors import ModelError
from tests.oracles import random_window
from tests.trust.gguf_files import write
from tests.trust.loading_models import SIZES, VOCAB_SIZE, llama, losses, oracle

WINDOWS = [random_window(seed, 100, VOCAB_SIZE, index=seed) for seed in range(2)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path / "cache"))


def by_llamacpp(path):
    """The same by llama.cpp: a second reader of the file's fields."""
    gguf_file = pytest.importorskip("perplexit.compilation.gguf_file")
    return np.concatenate([gguf_file.llamacpp_nll(path, window.ids_T) for window in WINDOWS])


def agree(path, model, *, llamacpp=1e-3):
    right = oracle(model, WINDOWS)
    assert np.abs(losses(f"hf:{path}", WINDOWS) - right).max() < 1e-4
    if llamacpp:
        assert np.abs(by_llamacpp(path) - right).max() < llamacpp
    return right


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 3.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def divisors(rope, dim=16):
    frequencies = rope["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
    return llama3_divisors(
        frequencies, length=32, factor=rope["factor"], low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
    )  # fmt: skip


def test_b2_llama3_scaling_by_rope_freqs(tmp_path):
    model = llama(rope_parameters=dict(LLAMA3))
    path = write(
        tmp_path / "llama3.gguf", model, keys={"rope.freq_base": 5000.0},
        tensors={"rope_freqs.weight": divisors(LLAMA3)},
    )  # fmt: skip
    right = agree(path, model)
    plain = llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert np.abs(oracle(plain, WINDOWS) - right).max() > 0.1


def test_b2_sibling_divisors_of_no_known_kind(tmp_path):
    rng = np.random.default_rng(0)
    odd = np.sort(rng.uniform(1.0, 5.0, 8))[::-1].copy()
    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model.model.rotary_emb.inv_freq /= torch.from_numpy(odd).float()
    path = write(tmp_path / "odd.gguf", model, tensors={"rope_freqs.weight": odd})
    agree(path, model)


SCALINGS = {
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
        {"rope_type": "linear", "factor": 3.0},
    ),
    "linear, type not said": (
        {"rope.scaling.factor": 3.0},
        {"rope_type": "linear", "factor": 3.0},
    ),
    "linear, old spelling": ({"rope.scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    "none with a factor": (
        {"rope.scaling.type": "none", "rope.scaling.factor": 3.0},
        {"rope_type": "default"},
    ),
    "yarn": (
        {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_b2_sibling_scaling_by_keys(tmp_path, name):
    keys, rope = SCALINGS[name]
    model = llama(rope_parameters={"rope_theta": 5000.0, **rope})
    path = write(tmp_path / "a.gguf", model, keys={"rope.freq_base": 5000.0, **keys})
    agree(path, model)


def test_b2_sibling_yarn_with_all_its_parameters():
    """llama.cpp's keys, each in transformers' spelling."""
    told = {
        "type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 1.5,
        "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "finetuned": True,
    }  # fmt: skip
    found = rope_parameters(told, {}, theta=1e4, head_dim=16, max_length=256)
    assert found == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 16.0, "beta_slow": 2.0,
        "attention_factor": pytest.approx(1.5 * (0.1 * np.log(4) + 1)),
    }  # fmt: skip
    with pytest.raises(ModelError, match="yarn_ext_factor"):
        rope_parameters({**told, "yarn_ext_factor": 0.5}, {}, theta=1e4, head_dim=16, max_length=9)


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize(("low", "high", "length"), [(1.0, 4.0, 8192), (1.0, 3.0, 32), (2, 8, 512)])
def test_b2_llama3_parameters_are_found_in_the_divisors(dim, low, high, length):
    theta = 500000.0
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    given = llama3_divisors(frequencies, length=length, factor=8.0, low=low, high=high)
    stored = given.astype(np.float32).astype(np.float64)
    found = rope_parameters(
        {}, {"rope_freqs": stored}, theta=theta, head_dim=dim, max_length=131072
    )
    assert found["rope_type"] == "llama3"
    again = llama3_divisors(
        frequencies, length=found["original_max_position_embeddings"], factor=found["factor"],
        low=found["low_freq_factor"], high=found["high_freq_factor"],
    )  # fmt: skip
    assert np.abs(again / given - 1).max() < 2e-6
    if length == 8192 and dim == 128:
        assert (found["low_freq_factor"], found["high_freq_factor"]) == (1.0, 4.0)


def test_b2_sibling_biases_that_only_the_tensors_tell_of(tmp_path):
    model = llama(attention_bias=True)
    agree(write(tmp_path / "biased.gguf", model), model)


def test_b2_sibling_head_size_epsilon_and_base(tmp_path):
    model = llama(head_dim=32, rms_norm_eps=0.05, rope_parameters={
        "rope_type": "default", "rope_theta": 700.0,
    })  # fmt: skip
    keys = {
        "rope.freq_base": 700.0, "attention.key_length": 32, "attention.value_length": 32,
        "rope.dimension_count": 32,
    }  # fmt: skip
    agree(write(tmp_path / "heads.gguf", model, keys=keys), model)


def test_b2_sibling_soft_caps_scale_and_window_of_gemma2(tmp_path):
    torch.manual_seed(1)
    config = Gemma2Config(
        **{**SIZES, "num_hidden_layers": 3}, head_dim=16, query_pre_attn_scalar=16,
        sliding_window=16, attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    keys = {
        "attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 16,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
    }  # fmt: skip
    agree(write(tmp_path / "gemma2.gguf", model, arch="gemma2", keys=keys), model, llamacpp=5e-3)


def test_b2_sibling_scaling_of_full_layers_alone_in_gemma3(tmp_path):
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 7}, head_dim=16, query_pre_attn_scalar=16,
        sliding_window=16, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    keys = {
        "attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 16,
        "rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    }  # fmt: skip
    agree(write(tmp_path / "gemma3.gguf", model, arch="gemma3", keys=keys), model, llamacpp=5e-3)


def test_b2_sibling_head_size_of_qwen3(tmp_path):
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)).eval()
    keys = {"attention.key_length": 32, "attention.value_length": 32, "rope.freq_base": 10000.0}
    agree(write(tmp_path / "qwen3.gguf", model, arch="qwen3", keys=keys), model)


REFUSED = {
    "attention.sliding_window": 8,
    "attention.scale": 0.5,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.25,
    "embedding_scale": 12.0,
    "residual_scale": 0.5,
    "expert_count": 4,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.value_length": 8,
    "rope.dimension_count": 8,
    "rope.freq_base_swa": 500.0,
    "rope.scaling.type": "unheard",
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.scaling.alpha": 1000.0,
    "attention.some_later_key": 7,
}


@pytest.mark.parametrize("key", REFUSED)
def test_b2_sibling_what_transformers_would_lose_is_refused_by_name(tmp_path, key):
    path = write(tmp_path / "a.gguf", llama(), keys={key: REFUSED[key]})
    with pytest.raises(ModelError) as raised:
        load_checkpoint(f"hf:{path}")
    assert key.rsplit(".", 1)[-1] in str(raised.value)
    assert f"gguf:{path}" in str(raised.value)


def test_b2_sibling_keys_that_say_nothing_are_no_reason(tmp_path):
    keys = {
        "expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none", "logit_scale": 1.0,
        "attention.causal": True, "attention.scale": 0.25, "attention.sliding_window": 128,
        "rope.dimension_count": 16, "tensor_data_layout": "Meta AI original pth",
    }  # fmt: skip
    model = llama()
    agree(write(tmp_path / "a.gguf", model, keys=keys), model, llamacpp=0)


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [("blk.0.ffn_gate_exps.weight", (4, 96, 64)), ("blk.0.attn_sinks.weight", (4,)),
     ("blk.2.attn_norm.weight", (64,)), ("cls.output.weight", (2, 64))],
)  # fmt: skip
def test_b2_sibling_a_tensor_without_a_place(tmp_path, tensor, shape):
    path = write(tmp_path / "a.gguf", llama(), tensors={tensor: np.ones(shape)})
    with pytest.raises(ModelError, match=f"would lose the tensor {tensor}"):
        load_checkpoint(f"hf:{path}")


def test_b2_sibling_a_missing_tensor_is_not_made_up(tmp_path):
    model = llama()
    del model.model.layers[1].mlp.up_proj
    path = write(tmp_path / "a.gguf", model)
    with pytest.raises(ModelError, match=r"missing .*layers\.1\.mlp\.up_proj"):
        load_checkpoint(f"hf:{path}")


def test_b2_sibling_longrope_of_phi3_is_in_the_configuration():
    from perplexit.checkpoints.gguf_config import _set_rope  # noqa: PLC0415

    class Told:
        architecture = "phi3"
        tensors = ("rope_factors_short.weight", "rope_factors_long.weight")

        def __init__(self):
            self.keys = {
                "rope.scaling.attn_factor": 1.19,
                "rope.scaling.original_context_length": 64,
            }
            self.left = set(self.keys)

        def take(self, key, default=None):
            return self.keys.get(key, default)

        def values_of(self, name):
            return np.full(8, 1.5 if name.endswith("short") else 4.0)

    config = Phi3Config(**SIZES)
    _set_rope(Told(), config)
    assert config.original_max_position_embeddings == 64
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["attention_factor"] == 1.19
    assert config.rope_parameters["long_factor"] == [4.0] * 8


def test_b2_sibling_what_is_written_is_read_back(tmp_path):
    """compile --to gguf, then hf:FILE.gguf: the same losses as the checkpoint's."""
    px = pytest.importorskip("perplexit")
    pytest.importorskip("llama_cpp")
    odd = np.linspace(4.0, 1.0, 16).tolist()
    ropes = [
        dict(LLAMA3),
        {
            "rope_type": "longrope", "short_factor": odd, "long_factor": odd, "rope_theta": 700.0,
            "original_max_position_embeddings": 128, "attention_factor": 1.0,
        },
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            "beta_fast": 16.0, "attention_factor": 1.3, "rope_theta": 700.0,
        },
    ]  # fmt: skip
    for number, rope in enumerate(ropes):
        config = LlamaConfig(**SIZES, attention_bias=True, head_dim=32, rope_parameters=rope)
        torch.manual_seed(number)
        model = LlamaForCausalLM(config).eval()
        folder = tmp_path / f"model-{number}"
        model.save_pretrained(folder)
        program = px.compile(folder, to="gguf", output=tmp_path / f"program-{number}")
        path = program.folder / "model.gguf"
        agree(path, model, llamacpp=5e-3)
        again = px.compile(f"hf:{path}", to="gguf", output=tmp_path / f"again-{number}")
        agree(again.folder / "model.gguf", model, llamacpp=5e-3)
