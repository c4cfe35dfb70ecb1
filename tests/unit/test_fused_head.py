"""Fused linear cross-entropy: refusals everywhere, and Liger's own kernels where they can run.

The kernels run on CUDA (tests/cuda), and in Triton's interpreter on the CPU: `make test-liger`.
"""

import os
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from perplexit.errors import CapabilityError, MissingPackageError, UsageError
from perplexit.functional import fused_head
from perplexit.functional.fused_head import fused_kernel
from perplexit.functional.nll import HeadRequest, head_statistics
from perplexit.sessions.base import DetailedSession
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

WINDOWS = [random_window(n, length, VOCAB_SIZE, index=n) for n, length in enumerate((48, 41, 9))]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(
    not INTERPRETED,
    reason="LIGER'S KERNELS WERE NOT RUN: no CUDA, no Triton interpreter (make test-liger)",
)


def naive_nll(hidden_ND, weight_VD, bias_V, targets_N):
    logits_NV = hidden_ND @ weight_VD.t()
    if bias_V is not None:
        logits_NV = logits_NV + bias_V  # rounded once more in bfloat16, as Liger does
    return nn.functional.cross_entropy(logits_NV.double(), targets_N, reduction="none")


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_ligers_kernel_gives_each_tokens_nll(dtype: torch.dtype, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = nn.Parameter(torch.randn(VOCAB_SIZE, 32, generator=generator).to(dtype))
    hidden_ND = torch.randn(37, 32, generator=generator).to(dtype)
    bias_V = torch.randn(VOCAB_SIZE, generator=generator).to(dtype) if with_bias else None
    targets_N = torch.randint(VOCAB_SIZE, (37,), generator=generator)
    head = fused_head.FusedHead("liger", weight_VD, bias_V)
    with torch.inference_mode():
        got = head_statistics(head)(hidden_ND, targets_N, HeadRequest(5))
        expected_N = naive_nll(hidden_ND, weight_VD, bias_V, targets_N)
    assert got.nll_N.dtype == torch.float32
    assert (got.nll_N - expected_N).abs().max() < 1e-5
    assert weight_VD.grad is None


@needs_liger
@pytest.mark.trap(33)
def test_a_session_with_liger_gives_the_same_losses_and_no_entropy(tiny_llama_dir) -> None:
    plain = PytorchInferenceSession(tiny_llama_dir, device="cpu")
    fused = PytorchInferenceSession(tiny_llama_dir, device="cpu", head="liger")
    for got, expected in zip(
        fused.token_details(WINDOWS), plain.token_details(WINDOWS), strict=True
    ):
        assert np.abs(got.nll_N - expected.nll_N).max() < 1e-5
        assert got.entropy_N is None
        assert got.rank_N is None
    settings = fused.description.settings
    assert settings["head"] == "liger (fused)"
    assert settings["head_library"].startswith("liger_kernel 0.")


@needs_liger
def test_liger_is_refused_over_a_soft_cap(tiny_gemma2_dir) -> None:
    with pytest.raises(CapabilityError, match="does more or something"):
        PytorchInferenceSession(tiny_gemma2_dir, device="cpu", head="liger")


class _NaiveFunction:
    """Stands for LigerFusedLinearCrossEntropyFunction: the same call, plain arithmetic."""

    @staticmethod
    def apply(
        hidden_ND, weight_VD, targets_N, bias_V, ce_weight, ignore, lse, smoothing, reduction
    ):
        assert (ce_weight, ignore, lse, smoothing, reduction) == (None, -100, 0.0, 0.0, "none")
        assert not weight_VD.requires_grad, "or it would make gradients in its forward pass"
        return naive_nll(hidden_ND, weight_VD, bias_V, targets_N).float(), None, None, None


@pytest.fixture
def naive_liger(monkeypatch) -> None:
    """The session's side of a fused head, with the kernels replaced: those run elsewhere."""
    ops = ModuleType("liger_kernel.ops")
    ops.LigerFusedLinearCrossEntropyFunction = _NaiveFunction
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_a_fused_head_in_a_session(naive_liger, tiny_llama_dir) -> None:
    plain = PytorchInferenceSession(tiny_llama_dir, device="cpu")
    fused = PytorchInferenceSession(tiny_llama_dir, device="cpu", head="liger")
    assert isinstance(fused, DetailedSession)
    for got, expected in zip(
        fused.token_details(WINDOWS), plain.token_details(WINDOWS), strict=True
    ):
        assert np.abs(got.nll_N - expected.nll_N).max() < 1e-5
        assert (got.entropy_N, got.rank_N) == (None, None)
    with pytest.raises(CapabilityError, match="--top-k 3 needs whole distributions"):
        fused.token_details(WINDOWS, top_k=3)
    with pytest.raises(CapabilityError, match="gives no entropy"):
        cached_session(fused)
    chunk = next(iter(fused.target_logits(WINDOWS[:1], chunk_rows=4)))  # a KL still has logits
    expected_chunk = next(iter(plain.target_logits(WINDOWS[:1], chunk_rows=4)))
    assert np.abs(chunk.logits_NV - expected_chunk.logits_NV).max() < 1e-5


def test_a_fused_head_is_refused_over_a_soft_cap_and_a_scale(
    naive_liger, tiny_gemma2_dir, tiny_cohere_dir
) -> None:
    for folder in (tiny_gemma2_dir, tiny_cohere_dir):
        with pytest.raises(CapabilityError, match="does more or something"):
            PytorchInferenceSession(folder, device="cpu", head="liger")


@pytest.mark.trap(33)
@pytest.mark.parametrize("name", ["liger", "cce"])
def test_fused_heads_are_refused_off_cuda_by_name(tiny_llama_dir, monkeypatch, name: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(CapabilityError, match=f"'{name}' is made of CUDA kernels.*cpu"):
        PytorchInferenceSession(tiny_llama_dir, device="cpu", head=name)


def test_another_head_is_a_usage_error(tiny_llama_dir) -> None:
    with pytest.raises(UsageError, match="chunked, compiled, liger, cce"):
        PytorchInferenceSession(tiny_llama_dir, head="fast")


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        ("liger", "liger_kernel", r"pip install 'perplexit\[liger\]'"),
        ("cce", "cut_cross_entropy", "pip install cut-cross-entropy .*own licence"),
    ],
)
def test_a_missing_kernel_says_what_to_install(monkeypatch, name, package, remedy) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.ops", None)
    with pytest.raises(MissingPackageError, match=remedy):
        fused_kernel(name, torch.device("cuda"))


def test_cut_cross_entropy_is_called_by_its_own_names(monkeypatch) -> None:
    """Its kernels run on CUDA alone: here, that the call is the one that its package documents."""
    calls = []

    def linear_cross_entropy(e, c, targets, *, reduction, impl, **more):
        calls.append((reduction, impl, more))
        return naive_nll(e, c, more.get("bias"), targets).float()

    package = ModuleType("cut_cross_entropy")
    package.linear_cross_entropy = linear_cross_entropy
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", package)
    function = fused_kernel("cce", torch.device("cuda"))
    weight_VD, hidden_ND = torch.randn(11, 4), torch.randn(5, 4)
    targets_N = torch.arange(5)
    got_N = function(weight_VD, hidden_ND, targets_N, None)
    assert torch.allclose(got_N.double(), naive_nll(hidden_ND, weight_VD, None, targets_N))
    assert calls == [("none", "cce", {})]
