"""B6: packed kernels where they are as near to float32 as the model's own, and nowhere else."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from perplexit.checkpoints.own_logits import widened
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.pytorch.cpu_kernels import layout, packed_linear
from perplexit.sessions.pytorch.cpu_kernels.packed_linear import PackedLinear, why_no_packing
from tests.oracles import random_window
from tests.trust.loading_models import VOCAB_SIZE, llama, losses, oracle_of, saved

pytestmark = pytest.mark.skipif(
    why_no_packing(torch.float32) is not None, reason="this PyTorch has no oneDNN"
)
NARROW = pytest.mark.skipif(
    why_no_packing(torch.bfloat16) is not None, reason="this CPU has no bfloat16"
)
SHORT = [random_window(seed, length, VOCAB_SIZE) for seed, length in ((0, 16), (1, 7), (2, 2))]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved(llama(num_hidden_layers=3), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def right(plain):
    return oracle_of(plain)


def gpt2(positions):
    torch.manual_seed(4)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=positions, n_embd=64, n_layer=2, n_head=4,
            initializer_range=0.15, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def settings(session):
    return session.description.settings


def test_b6_a_model_with_fewer_positions_than_the_probe(tmp_path):
    folder = saved(gpt2(16), tmp_path / "short")
    session = PytorchInferenceSession(folder)
    assert settings(session)["kernels"] == "packed"
    got = np.concatenate(session.token_nll(SHORT))
    assert np.abs(got - oracle_of(folder, SHORT)).max() < 1e-4
    cached = np.concatenate(cached_session(session, prompt_len=3, decode_chunk=2).token_nll(SHORT))
    assert np.abs(cached - got).max() < 1e-4


def test_b6_sibling_positions_counted_from_two(tmp_path):
    torch.manual_seed(4)
    config = OPTConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=20, hidden_size=64, ffn_dim=96,
        num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, init_std=0.15,
    )  # fmt: skip
    folder = saved(OPTForCausalLM(config), tmp_path / "opt")
    session = PytorchInferenceSession(folder)
    assert settings(session)["kernels"] == "packed"
    got = np.concatenate(session.token_nll(SHORT))
    assert np.abs(got - oracle_of(folder, SHORT)).max() < 1e-4


@NARROW
def test_b6_bfloat16_is_accepted_as_near_to_float32_as_the_model_s_own(plain, right):
    packed = PytorchInferenceSession(plain, dtype="bfloat16")
    assert settings(packed)["kernels"] == "packed"

    def distance(**options):
        return np.sqrt(np.mean((losses(plain, dtype="bfloat16", **options) - right) ** 2))

    assert distance() <= 1.5 * distance(kernels="plain")


@NARROW
def test_b6_bfloat16_kernels_that_are_farther_are_put_back(plain, monkeypatch):
    """An error of 3 % of each product passes a fifth of the logits' spread, the rule before."""
    product = PackedLinear.product

    def worse(self, *args, **options):
        out = product(self, *args, **options)
        return out + 0.03 * out.abs().mean() * torch.sign(torch.sin(1e3 * out.float())).to(out)

    assert settings(PytorchInferenceSession(plain, dtype="bfloat16"))["kernels"] == "packed"
    monkeypatch.setattr(PackedLinear, "product", worse)
    monkeypatch.setattr(packed_linear, "why_no_packing", lambda dtype: None)
    monkeypatch.setattr(layout, "why_no_packing", lambda dtype: None)
    session = PytorchInferenceSession(plain, dtype="bfloat16")
    assert settings(session)["kernels"] == "plain"
    assert "farther from float32 than 1.25" in settings(session)["kernels_reason"]
    assert not any(isinstance(module, PackedLinear) for module in session.module.modules())


@pytest.mark.parametrize("name", ["_reorder_linear_weight", "_linear_pointwise"])
@pytest.mark.parametrize("change", ["gone", "other arguments", "other values"])
def test_b6_private_operators_that_changed_fall_back(plain, right, monkeypatch, name, change):
    ops = torch.ops.mkldnn

    class Changed:
        def __getattr__(self, asked):
            if asked != name:
                return getattr(ops, asked)
            if change == "gone":
                raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute '{asked}'")
            if change == "other arguments":
                return lambda one: one
            if asked == "_reorder_linear_weight":
                return lambda weight, size: (weight * 1.01).to_mkldnn()
            return lambda x, weight, bias, *rest: functional.linear(x, weight.to_dense()) * 1.01

    monkeypatch.setattr(torch.ops, "mkldnn", Changed())
    session = PytorchInferenceSession(plain)
    assert settings(session)["kernels"] == "plain"
    assert "PyTorch's packed products" in settings(session)["kernels_reason"]
    assert np.abs(losses(plain) - right).max() < 1e-4


def test_b6_sibling_an_operator_that_fails_only_on_the_model(plain, right, monkeypatch):
    product = PackedLinear.product

    def fails(self, input, *rest):
        if input.shape[-2] > 100:
            raise RuntimeError("could not create a primitive descriptor")
        return product(self, input, *rest)

    monkeypatch.setattr(PackedLinear, "product", fails)
    assert settings(PytorchInferenceSession(plain))["kernels_reason"].startswith("the packed model")
    assert np.abs(losses(plain) - right).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_b6_a_widened_model_computes_in_float32_and_comes_back(dtype):
    for model in (llama(), gpt2(64).eval()):
        narrow = model.to(dtype)
        before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
        ids = torch.arange(20)[None]
        with torch.inference_mode(), widened(narrow):
            got = narrow(ids).logits
        assert got.dtype == torch.float32
        assert all(torch.equal(before[k], v) for k, v in narrow.state_dict().items())
        assert all(p.dtype == dtype for p in narrow.parameters())
        with torch.inference_mode():
            assert (got - narrow.double()(ids).logits).abs().max() < 1e-3
