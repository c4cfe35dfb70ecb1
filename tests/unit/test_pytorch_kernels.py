"""Packed linear layers and fused blocks: the same numbers, the same checkpoint, the way back."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from perplexit.errors import UsageError
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.pytorch import causal_attention as causal_attention_module
from perplexit.sessions.pytorch import kernels as pytorch_kernels
from perplexit.sessions.pytorch.cpu_kernels.causal_attention import (
    causal_attention,
    folded_attention,
)
from perplexit.sessions.pytorch.cpu_kernels.fused_mlp import fuse_mlps, restore_forwards
from perplexit.sessions.pytorch.cpu_kernels.fused_norm import fuse_norms
from perplexit.sessions.pytorch.cpu_kernels.packed_linear import (
    PackedLinear,
    pack_linears,
    unpack_linears,
    why_no_packing,
)
from tests.oracles import oracle_details, random_window
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

WINDOWS = [random_window(seed, length, VOCAB_SIZE) for seed, length in ((0, 90), (1, 2), (2, 33))]
DTYPES = [d for d in (torch.float32, torch.bfloat16) if why_no_packing(d) is None]
pytestmark = pytest.mark.skipif(not DTYPES, reason="this PyTorch has no oneDNN")


def plain_model(name: str) -> nn.Module:
    return TINY_MODELS[name]().eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 70), (1, 70), (0, 70), (2, 3, 70), (70,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_what_the_plain_one_gives(dtype, shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(70, 33, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        added = layer.bias.double() if bias else None
        expected = functional.linear(x.double(), layer.weight.double(), added)
        got = PackedLinear(layer)(x)
    assert got.shape == expected.shape
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert torch.allclose(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_inputs_need_not_lie_in_one_piece():
    torch.manual_seed(0)
    layer = nn.Linear(70, 33)
    packed = PackedLinear(layer)
    with torch.inference_mode():
        for x in (torch.randn(7, 2, 70).transpose(0, 1), torch.randn(2, 5, 140)[..., ::2]):
            assert torch.allclose(packed(x), layer(x), atol=1e-6)


def test_conv1d_is_packed_too_and_comes_back_in_its_own_shape():
    torch.manual_seed(0)
    layer = Conv1D(33, 70)
    nn.init.normal_(layer.bias)
    packed = PackedLinear(layer)
    x = torch.randn(4, 70)
    with torch.inference_mode():
        assert torch.allclose(packed(x), layer(x), atol=1e-6)
    assert torch.equal(packed.weight, layer.weight)
    unpacked = packed.unpacked()
    assert isinstance(unpacked, Conv1D)
    assert torch.equal(unpacked.weight, layer.weight)
    assert torch.equal(unpacked.bias, layer.bias)


def test_what_is_shared_hooked_or_read_by_the_head_stays_plain():
    model = plain_model("llama")
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert pack_linears(model) == 2 * 7 - 3
    assert type(model.lm_head) is nn.Linear
    assert type(layers[0].self_attn.q_proj) is nn.Linear
    assert type(layers[1].self_attn.q_proj) is nn.Linear
    assert type(layers[0].mlp.up_proj) is nn.Linear
    assert type(layers[1].mlp.up_proj) is PackedLinear


def test_the_plain_weights_are_freed():
    model = plain_model("gpt2")
    freed = weakref.ref(model.transformer.h[0].mlp.c_fc)
    pack_linears(model)
    gc.collect()
    assert freed() is None


@pytest.mark.trap(38)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_saved_from_a_packed_session_is_the_one_that_was_loaded(name, request, tmp_path):
    """Trap 38: a state taken after a forward pass with packed weights holds the plain weights."""
    folder = request.getfixturevalue(f"tiny_{name}_dir")
    session = PytorchInferenceSession(folder)
    assert session.description.settings["kernels"] == "packed"
    before = session.token_nll(WINDOWS)
    session.module.save_pretrained(tmp_path)
    again = PytorchInferenceSession(tmp_path)
    for old, new in zip(before, again.token_nll(WINDOWS), strict=True):
        assert np.array_equal(old, new)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    state = session.module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_packed_session_agrees_with_the_float64_oracle(name, request):
    folder = request.getfixturevalue(f"tiny_{name}_dir")
    session = PytorchInferenceSession(folder)
    settings = session.description.settings
    assert settings["kernels"] == "packed"
    assert settings["packed_linears"] == (8 if name == "gpt2" else 14)
    assert settings["fused_mlps"] == 2
    for window, nll_N in zip(WINDOWS, session.token_nll(WINDOWS), strict=True):
        expected = oracle_details(plain_model(name), window).nll_N
        assert np.abs(nll_N - expected).max() < 1e-5


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="a CPU without bfloat16 products")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_bfloat16_packed_and_plain_are_equally_far_from_float32(name, request):
    folder = request.getfixturevalue(f"tiny_{name}_dir")
    exact = [oracle_details(plain_model(name), window).nll_N for window in WINDOWS]
    errors = {}
    for kernels in pytorch_kernels.KERNELS:
        session = PytorchInferenceSession(folder, dtype="bf16", kernels=kernels)
        assert session.description.settings["kernels"] == kernels
        found = session.token_nll(WINDOWS)
        errors[kernels] = np.abs(np.concatenate(found) - np.concatenate(exact)).mean()
    assert errors["packed"] < 1.5 * errors["plain"]
    assert errors["packed"] > 0


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_real_model_is_packed(real_model_dir, dtype):
    settings = PytorchInferenceSession(real_model_dir, dtype=dtype).description.settings
    assert settings["kernels"] == "packed"
    assert settings["packed_linears"] == 7 * settings["fused_mlps"] == 210


def test_plain_kernels_are_transformers_own_to_the_last_bit(tiny_llama_dir, monkeypatch):
    monkeypatch.setenv("PERPLEXIT_KERNELS", "plain")
    session = PytorchInferenceSession(tiny_llama_dir)
    assert session.description.settings["kernels"] == "plain"
    assert not any(isinstance(module, PackedLinear) for module in session.module.modules())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    window = WINDOWS[0]
    ids_1T = torch.from_numpy(window.ids_T[:-1].astype(np.int64))[None]
    with torch.inference_mode():
        expected_TD = model.model(ids_1T).last_hidden_state[0]
    assert np.array_equal(session.target_hidden_states([window])[0], expected_TD.numpy())


def test_an_option_goes_before_the_environment_and_an_unknown_name_is_an_error(
    tiny_llama_dir, monkeypatch
):
    monkeypatch.setenv("PERPLEXIT_KERNELS", "plain")
    packed = PytorchInferenceSession(tiny_llama_dir, kernels="packed")
    assert packed.description.settings["kernels"] == "packed"
    monkeypatch.setenv("PERPLEXIT_KERNELS", "fast")
    with pytest.raises(UsageError, match="PERPLEXIT_KERNELS to be packed or plain, got 'fast'"):
        PytorchInferenceSession(tiny_llama_dir)


def test_a_model_that_was_handed_in_is_left_as_it_is():
    model = plain_model("llama")
    session = PytorchInferenceSession(model)
    assert session.description.settings["kernels"] == "plain"
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_quantized_layers_keep_their_own_products(tiny_llama_dir):
    session = PytorchInferenceSession(tiny_llama_dir, quantization="mxfp6")
    assert session.description.settings["kernels"] == "plain"


def test_identity_does_not_depend_on_the_kernels(tiny_gpt2_dir):
    plain, packed = (
        PytorchInferenceSession(tiny_gpt2_dir, kernels=kernels).model
        for kernels in ("plain", "packed")
    )
    assert plain == packed


@pytest.mark.parametrize("name", TINY_MODELS)
def test_fused_blocks_give_what_the_blocks_own_forward_gives(name):
    model = plain_model(name)
    pack_linears(model)
    ids_BT = torch.randint(VOCAB_SIZE, (3, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids_BT).logits
        assert fuse_mlps(model) == 2
        assert torch.allclose(model(ids_BT).logits, expected, atol=2e-4)
        restore_forwards(model)
        assert torch.equal(model(ids_BT).logits, expected)


def test_a_block_with_the_names_but_another_arithmetic_is_not_fused():
    model = plain_model("llama")
    pack_linears(model)
    block = model.model.layers[0].mlp
    plain = type(block).forward

    class Doubled(type(block)):
        def forward(self, x):
            return 2 * plain(self, x)

    block.__class__ = Doubled
    model.model.layers[1].mlp.act_fn = nn.Softplus()
    with torch.inference_mode():
        assert fuse_mlps(model) == 0


def test_a_model_that_packing_would_change_is_put_back(tiny_llama_dir, monkeypatch):
    def wrong(self, input_XI, activation="none", algorithm=""):
        return functional.linear(input_XI, self.weight) * 1.01

    monkeypatch.setattr(PackedLinear, "product", wrong)
    session = PytorchInferenceSession(tiny_llama_dir)
    assert session.description.settings["kernels"] == "plain"
    nll_N = session.token_nll(WINDOWS[:1])[0]
    expected = oracle_details(plain_model("llama"), WINDOWS[0]).nll_N
    assert np.abs(nll_N - expected).max() < 1e-5


def test_unpacking_gives_the_same_bits_back():
    model, twin = plain_model("gpt2"), plain_model("gpt2")
    assert pack_linears(model) == 8
    unpack_linears(model)
    state, expected = model.state_dict(), twin.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [2, 127, 128, 129, 420])
@pytest.mark.parametrize("num_kv_heads", [2, 6])
def test_attention_by_query_blocks_is_causal_attention(dtype, length, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, length, heads, 16, generator=generator).to(dtype).transpose(1, 2)
        for heads in (6, num_kv_heads, num_kv_heads)
    )
    scores = query.double() @ key.double().repeat_interleave(6 // num_kv_heads, 1).transpose(2, 3)
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = (0.3 * scores).masked_fill(ahead, -torch.inf).softmax(-1)
    expected = weights @ value.double().repeat_interleave(6 // num_kv_heads, 1)
    got = causal_attention(query, key, value, 0.3)
    assert got.dtype == dtype
    assert (got - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_large_scores_are_not_rounded_to_bfloat16():
    """A score of 400 nats in bfloat16 is off by up to 1, and its probability by a factor of e."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 200, 16, generator=generator).bfloat16()
    query[..., 0], key[..., 0] = 20.0, 20.0  # the same large term in every score
    scores = (query.double() @ key.double().transpose(2, 3)).tril()
    ahead = torch.ones(200, 200, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ value.double()
    rounded = scores.bfloat16().double().masked_fill(ahead, -torch.inf).softmax(-1) @ value.double()
    assert (rounded - expected).abs().max() > 0.3
    assert (causal_attention(query, key, value, 1.0) - expected).abs().max() < 2e-2


@pytest.mark.parametrize("length", [1, 5])
def test_heads_that_share_keys_are_folded_into_queries(length):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, length, 16, generator=generator)
    key, value = torch.randn(2, 3, 2, 40, 16, generator=generator)
    mask = torch.ones(3, 1, length, 40, dtype=torch.bool).tril(40 - length)
    mask[1, :, :, :7] = False
    scores = 0.3 * query.double() @ key.double().repeat_interleave(3, 1).transpose(2, 3)
    for given in (mask, None):
        seen = scores if given is None else scores.masked_fill(~given, -torch.inf)
        expected = seen.softmax(-1) @ value.double().repeat_interleave(3, 1)
        got = folded_attention(query, key, value, given, 0.3)
        assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("chunk", [1, 5])
def test_decode_reads_shared_keys_once(tiny_llama_dir, monkeypatch, chunk):
    calls = []
    monkeypatch.setattr(
        causal_attention_module,
        "folded_attention",
        lambda *args: calls.append(args[0].shape[2]) or folded_attention(*args),
    )
    window = random_window(3, 40, VOCAB_SIZE)
    cached = cached_session(
        PytorchInferenceSession(tiny_llama_dir), prompt_len=9, decode_chunk=chunk
    )
    calls.clear()  # opening probes the cache
    nll_N = cached.token_nll([window])[0]
    assert calls == [chunk] * (30 // chunk) * 2
    expected = oracle_details(plain_model("llama"), window).nll_N
    assert np.abs(nll_N - expected).max() < 1e-5


def test_whole_windows_go_by_query_blocks_and_padded_ones_by_the_model_s_mask(
    tiny_llama_dir, monkeypatch
):
    session = PytorchInferenceSession(tiny_llama_dir)
    assert session.description.settings["attention"] == causal_attention_module.NAME
    lengths = []
    monkeypatch.setattr(
        causal_attention_module,
        "causal_attention",
        lambda query, *rest: lengths.append(query.shape[2]) or causal_attention(query, *rest),
    )
    window = random_window(3, 200, VOCAB_SIZE)
    alone = session.token_nll([window])[0]
    assert lengths == [199, 199]
    together = session.token_nll([window, WINDOWS[2]])[0]
    assert lengths == [199, 199]
    expected = oracle_details(plain_model("llama"), window).nll_N
    assert np.abs(alone - expected).max() < 1e-5
    assert np.abs(together - expected).max() < 1e-5


def test_an_attention_that_does_more_keeps_its_own(tiny_gemma2_dir):
    """Gemma 2 caps the scores, which no kernel here does."""
    settings = PytorchInferenceSession(tiny_gemma2_dir).description.settings
    assert settings["attention"] == "eager"
    assert settings["kernels"] == "packed"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_stays_with_the_process_until_it_is_given_back():
    """Large blocks freed and asked for again cost page faults by default."""
    script = (
        "import resource, torch\n"
        "from perplexit.resources.freed_memory import keep_freed_memory, return_freed_memory\n"
        "kept = keep_freed_memory()\n"
        "blocks = lambda: len([torch.ones(2**20) for _ in range(3)])\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "blocks(); before = faults(); [blocks() for _ in range(20)]; again = faults() - before\n"
        "return_freed_memory(); before = faults(); blocks()\n"
        "print(kept, again, faults() - before)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, again, after = done.stdout.split()
    if kept == "False":
        pytest.skip("another C library")
    # 20 times 12 MiB are 61,440 pages; where blocks land in the arenas varies between runs
    assert int(again) < 30_000
    assert int(after) > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_as_one_operator_give_the_same_bits(dtype):
    model = plain_model("llama").to(dtype)
    ids_BT = torch.randint(VOCAB_SIZE, (3, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids_BT).logits
        assert fuse_norms(model) == 2 * 2 + 1
        assert torch.equal(model(ids_BT).logits, expected)
        restore_forwards(model)
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_norms_that_do_more_keep_their_own_forward():
    assert fuse_norms(plain_model("gemma2")) == 0  # its weight is an offset from one
    model = plain_model("llama")
    model.model.norm.register_forward_hook(lambda *_: None)
    model.model.layers[0].input_layernorm.variance_epsilon = torch.tensor(1e-5)
    assert fuse_norms(model) == 5 - 2
