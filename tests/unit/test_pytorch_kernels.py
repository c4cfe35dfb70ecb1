"""Packed linear layers and fused blocks: the same numbers, the same checkpoint, the way back."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from perplexit.errors import UsageError
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.pytorch.cpu_kernels import layout
from perplexit.sessions.pytorch.cpu_kernels.fused_mlp import fuse_mlps, restore_forwards
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
    for kernels in layout.KERNELS:
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


def test_an_attention_that_does_more_keeps_its_own(tiny_gemma2_dir):
    """Gemma 2 caps the scores, which no kernel here does."""
    settings = PytorchInferenceSession(tiny_gemma2_dir).description.settings
    assert settings["attention"] == "eager"
    assert settings["kernels"] == "packed"
