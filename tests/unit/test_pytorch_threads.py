"""Windows side by side, a thread each: the same numbers, and only for models that allow it."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from perplexit.errors import EngineOutOfMemoryError
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.pytorch.cpu_kernels.packed_linear import why_no_packing
from perplexit.sessions.pytorch.cpu_kernels.window_threads import ForwardTrace
from tests.oracles import oracle_details, random_window
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

pytestmark = pytest.mark.skipif(
    why_no_packing(torch.float32) is not None, reason="this PyTorch has no oneDNN"
)
# Longest first, as runs score them; three parts for two threads, so that one is left over.
WINDOWS = [random_window(seed, length, VOCAB_SIZE) for seed, length in enumerate((90, 60, 60, 2))]
PLAIN_IDS = torch.arange(12)[None]


@pytest.fixture
def session(tiny_llama_dir):
    session = PytorchInferenceSession(tiny_llama_dir, threads=2)
    yield session
    session.close()


def threads_of_forwards(session, monkeypatch):
    """The thread, and PyTorch's number of threads in it, of each forward pass from now on."""
    seen = []
    rows = type(session._windows.forward).rows

    def spied(self, *args):
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        return rows(self, *args)

    monkeypatch.setattr(type(session._windows.forward), "rows", spied)
    return seen


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_windows_side_by_side_have_the_oracle_s_losses(session, count):
    for window, details in zip(
        WINDOWS[:count], session.token_details(WINDOWS[:count]), strict=True
    ):
        expected = oracle_details(TINY_MODELS["llama"]().eval(), window)
        assert np.abs(details.nll_N - expected.nll_N).max() < 1e-5
        assert np.abs(details.entropy_N - expected.entropy_N).max() < 1e-5
        assert (details.rank_N == expected.rank_N).all()


def test_alternatives_and_hidden_states_do_not_share_room(session, tiny_llama_dir):
    alone = PytorchInferenceSession(tiny_llama_dir, threads=1)
    for got, expected in zip(
        session.token_details(WINDOWS, top_k=3), alone.token_details(WINDOWS, top_k=3), strict=True
    ):
        assert (got.top_ids_NK == expected.top_ids_NK).all()
        assert np.abs(got.top_logprobs_NK - expected.top_logprobs_NK).max() < 1e-5
    for got, expected in zip(
        session.target_hidden_states(WINDOWS), alone.target_hidden_states(WINDOWS), strict=True
    ):
        assert np.abs(got - expected).max() < 1e-5


def test_each_thread_has_its_windows_and_the_rest_all_threads(session, monkeypatch):
    assert session.description.settings["windows_side_by_side"] is True
    seen = threads_of_forwards(session, monkeypatch)
    session.token_nll(WINDOWS[:2])
    assert {threads for _, threads in seen} == {1}
    assert all(name.startswith("perplexit") for name, _ in seen)
    assert len(seen) == 2
    seen.clear()
    session.token_nll(WINDOWS[:1])
    assert seen == [(threading.current_thread().name, 2)]


def test_one_thread_scores_a_batch_whole(tiny_llama_dir, monkeypatch):
    session = PytorchInferenceSession(tiny_llama_dir, threads=1)
    seen = threads_of_forwards(session, monkeypatch)
    session.token_nll(WINDOWS)
    assert seen == [(threading.current_thread().name, 1)]


def test_plain_kernels_keep_transformers_own_batches(tiny_llama_dir, monkeypatch):
    session = PytorchInferenceSession(tiny_llama_dir, threads=2, kernels="plain")
    seen = threads_of_forwards(session, monkeypatch)
    session.token_nll(WINDOWS)
    assert [threads for _, threads in seen] == [2]


def test_batches_are_as_large_as_the_threads_can_share(tiny_llama_dir):
    sizes = [
        PytorchInferenceSession(tiny_llama_dir, threads=threads).max_batch_size(512)
        for threads in (1, 2, 3)
    ]
    assert sizes == [1, 2, 3]


def test_memory_that_runs_out_in_a_thread_is_told_and_the_session_goes_on(session, monkeypatch):
    whole = session.token_nll(WINDOWS)
    rows, calls = type(session._windows.forward).rows, []

    def fails(self, *args):
        calls.append(threading.current_thread().name)
        if len(calls) == 2:
            raise MemoryError
        return rows(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(type(session._windows.forward), "rows", fails)
        with pytest.raises(EngineOutOfMemoryError, match="4 windows of up to 90 ids"):
            session.token_nll(WINDOWS)
    assert calls[1].startswith("perplexit")
    assert torch.get_num_threads() == 2
    again = session.token_nll(WINDOWS)
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))


def test_closing_ends_the_threads(tiny_llama_dir):
    session = PytorchInferenceSession(tiny_llama_dir, threads=2)
    session.token_nll(WINDOWS)
    pool = session._windows.threads._pool
    session.close()
    assert not any(thread.is_alive() for thread in pool._threads)


class TestForwardTrace:
    def trusted(self, model: nn.Module) -> bool:
        trace = ForwardTrace(model)
        with torch.inference_mode():
            model(PLAIN_IDS)
        return trace.leaves_nothing()

    @pytest.mark.parametrize("name", sorted(TINY_MODELS))
    def test_models_of_transformers_leave_nothing(self, name):
        assert self.trusted(TINY_MODELS[name]().eval())

    def test_a_forward_that_sets_an_attribute(self):
        model = TINY_MODELS["llama"]().eval()
        layer = model.model.layers[1]
        layer.register_forward_hook(lambda module, *_: setattr(module, "seen", object()))
        assert not self.trusted(model)

    def test_a_forward_that_writes_into_a_buffer(self):
        model = TINY_MODELS["llama"]().eval()
        layer = model.model.layers[1]
        layer.register_buffer("count", torch.zeros(1))
        layer.register_forward_hook(lambda module, *_: module.count.add_(1) and None)
        assert not self.trusted(model)

    def test_a_rotary_embedding_that_changes_with_the_length(self):
        model = TINY_MODELS["llama"]().eval()
        model.model.rotary_emb.rope_type = "dynamic"
        model.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
        assert not self.trusted(model)

    def test_code_from_outside_transformers(self):
        assert not self.trusted(nn.Sequential(nn.Embedding(20, 4)))
