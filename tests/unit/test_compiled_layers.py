"""`torch.compile` over the layers, and over the head's log-sum-exp: the same figures."""

import numpy as np
import pytest
import torch

from perplexit.errors import CapabilityError, UsageError
from perplexit.functional import fused_head
from perplexit.functional.fused_head import CompiledHead
from perplexit.functional.nll import HeadRequest, head_statistics, token_statistics
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.pytorch.compiled import CompiledForward, bucket
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

WINDOWS = [random_window(n, length, VOCAB_SIZE, index=n) for n, length in enumerate((48, 41, 20))]


@pytest.fixture(scope="module")
def plain(tiny_llama_dir):
    return PytorchInferenceSession(tiny_llama_dir)


@pytest.fixture(scope="module")
def compiled(tiny_llama_dir):
    return PytorchInferenceSession(tiny_llama_dir, compile_mode="default")


def largest_difference(left, right):
    assert [len(a) for a in left] == [len(b) for b in right]
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


@pytest.mark.slow
@pytest.mark.trap(33)
def test_compiled_layers_run_give_the_same_losses_and_are_recorded(plain, compiled) -> None:
    torch._dynamo.utils.counters.clear()
    for windows in (WINDOWS, WINDOWS[:1]):  # with a mask, and without
        difference = largest_difference(compiled.token_nll(windows), plain.token_nll(windows))
        assert difference < 1e-4
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    handed_in = PytorchInferenceSession(compiled.module, compile_mode="default")
    difference = largest_difference(handed_in.token_nll(WINDOWS), plain.token_nll(WINDOWS))
    assert difference < 1e-4, "outside inference mode"
    assert compiled.description.settings["compile"] == "default"
    assert "compile" not in plain.description.settings


def test_compiled_layers_refuse_a_cache_and_cuda_graphs_off_cuda(compiled, tiny_llama_dir) -> None:
    with pytest.raises(CapabilityError, match="use --mode full"):
        cached_session(compiled)
    with pytest.raises(CapabilityError, match="CUDA graphs"):
        PytorchInferenceSession(tiny_llama_dir, compile_mode="reduce-overhead", device="cpu")
    with pytest.raises(UsageError, match="default or reduce-overhead"):
        PytorchInferenceSession(tiny_llama_dir, compile_mode="fastest")
    with pytest.raises(CapabilityError, match="padding included"):
        PytorchInferenceSession(tiny_llama_dir, compile_mode="default", quantization="8da4w")


class _Recorder:
    """A forward pass that keeps what it was fed and returns each id as its row."""

    kind, keeps_logits, takes_mask, takes_cache, alone = "recorder", False, True, False, False

    def __init__(self) -> None:
        self.fed: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def rows(self, ids_BT, mask_BT, cache=None):
        self.fed.append((ids_BT, mask_BT))
        return ids_BT[..., None].float()

    def head(self, rows_NX):
        return rows_NX


def test_batches_are_padded_to_a_bucket_and_the_padding_is_cut_off(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inner = _Recorder()
    forward = CompiledForward(inner, "default", torch.device("cpu"))
    ids_BT = torch.arange(17 * 33).reshape(17, 33)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[3, 20:] = 0
    assert torch.equal(forward.rows(ids_BT, mask_BT)[..., 0].long(), ids_BT)
    fed_BT, fed_mask_BT = inner.fed[0]
    assert fed_BT.shape == fed_mask_BT.shape == (18, 36)
    assert torch.equal(fed_BT[:17, 33:], ids_BT[:, -1:].expand(-1, 3))
    assert not fed_mask_BT[:, 33:].any()
    assert torch.equal(fed_mask_BT[:17, :33], mask_BT)


def test_a_bucket_is_never_an_eighth_more_than_asked_for_and_there_are_few() -> None:
    sizes = np.arange(1, 5000)
    buckets = np.array([bucket(int(size)) for size in sizes])
    assert (buckets >= sizes).all()
    assert ((buckets - sizes) * 8 <= sizes).all()
    assert bucket(1023) == 1024
    assert len(set(buckets[sizes <= 4096])) < 90


def test_the_compiled_head_gives_what_the_plain_one_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(997, 16, generator=generator)
    hidden_ND = torch.randn(37, 16, generator=generator) * 3
    targets_N = torch.randint(997, (37,), generator=generator)

    def head(rows_ND):
        return rows_ND @ weight_VD.t()

    compiled_head = CompiledHead(head, torch.device("cpu"))
    got = head_statistics(compiled_head)(
        hidden_ND, targets_N, HeadRequest(10, with_details=True, top_k=4)
    )
    expected = token_statistics(head(hidden_ND).double(), targets_N, top_k=4)
    assert torch.allclose(got.nll_N.double(), expected.nll_N, atol=1e-5)
    assert torch.allclose(got.entropy_N.double(), expected.entropy_N, atol=1e-5)
    assert torch.equal(got.rank_N, expected.rank_N)
    assert torch.equal(got.top_ids_NK, expected.top_ids_NK)
    assert torch.allclose(got.top_logprobs_NK.double(), expected.top_logprobs_NK, atol=1e-5)
    alone = head_statistics(compiled_head)(hidden_ND, targets_N, HeadRequest(10))
    assert torch.equal(alone.nll_N, got.nll_N)  # to the last bit, with and without details
    assert alone.entropy_N is None


@pytest.mark.trap(23)
def test_the_compiled_head_takes_minus_infinity_and_keeps_a_nan() -> None:
    logits_NV = torch.tensor([[0.0, -torch.inf, 0.0], [torch.nan, 0.0, 0.0], [1.0, 2.0, 3.0]])
    head = CompiledHead(lambda rows_NV: rows_NV, torch.device("cpu"))
    got = head.statistics(logits_NV, torch.tensor([0, 1, 2]), HeadRequest(8, with_details=True))
    assert got.nll_N[0] == pytest.approx(np.log(2))
    assert got.entropy_N[0] == pytest.approx(np.log(2))
    assert got.nll_N[1].isnan()
    assert got.rank_N[2] == 1


@pytest.mark.trap(33)
def test_a_session_with_the_compiled_head_records_it(plain, tiny_gemma2_dir) -> None:
    """Over a soft-cap too: it reduces whatever logits the model's own head makes."""
    session = PytorchInferenceSession(tiny_gemma2_dir, head="compiled")
    expected = PytorchInferenceSession(tiny_gemma2_dir).token_details(WINDOWS)
    for got, wanted in zip(session.token_details(WINDOWS), expected, strict=True):
        assert np.abs(got.nll_N - wanted.nll_N).max() < 1e-5
        assert (got.rank_N == wanted.rank_N).all()
    assert session.description.settings["head"].endswith("compiled log-sum-exp")


def test_where_nothing_can_be_compiled_it_says_so(monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler g++\n  at depth")

    monkeypatch.setattr(fused_head.torch, "compile", lambda function: fails)
    with pytest.raises(CapabilityError, match=r"no compiler g\+\+.*Install one"):
        CompiledHead(lambda rows: rows, torch.device("cpu"))
