"""OpenVINO: several windows at a time, each on threads of its own, and the same losses."""

import threading

import numpy as np
import pytest

from perplexit.compilation.targets import compile
from perplexit.errors import EngineOutOfMemoryError
from perplexit.quantization import openvino_engine
from perplexit.resources.cores import num_cores
from perplexit.sessions.openvino import OpenVinoInferenceSession
from tests.oracles import oracle_details, random_window
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

WINDOWS = [random_window(seed, length, VOCAB_SIZE) for seed, length in enumerate((90, 60, 60, 2))]


@pytest.fixture(scope="module")
def program(tiny_llama_dir, tmp_path_factory):
    return compile(tiny_llama_dir, to="openvino", output=tmp_path_factory.mktemp("program")).folder


@pytest.mark.parametrize("threads", [1, 2, 6])
def test_streams_share_the_threads(program, threads):
    session = OpenVinoInferenceSession(program, threads=threads)
    streams = min(threads, 4, num_cores())  # the engine takes no more threads than cores
    properties = session.description.settings["properties"]["program"]
    assert properties["NUM_STREAMS"] == str(streams)
    assert session.max_batch_size(1024) == max(2, streams)


@pytest.mark.skipif(num_cores() < 2, reason="ONE CORE: nothing runs side by side")
def test_windows_on_streams_have_the_oracle_s_losses(program, monkeypatch):
    seen = set()
    run = openvino_engine.OpenedProgram.run
    both = threading.Barrier(2, timeout=30)  # passes only where two calls are under way at a time

    def spied(self, feed):
        both.wait()
        seen.add(threading.current_thread().name)
        return run(self, feed)

    with monkeypatch.context() as patched:
        patched.setattr(openvino_engine.OpenedProgram, "run", spied)
        session = OpenVinoInferenceSession(program, threads=2)
        nll = session.token_nll(WINDOWS)
    assert len(seen) == 2
    for window, nll_N in zip(WINDOWS, nll, strict=True):
        expected = oracle_details(TINY_MODELS["llama"]().eval(), window).nll_N
        assert np.abs(nll_N - expected).max() < 1e-5


def test_memory_that_runs_out_on_a_stream_is_told(program, monkeypatch):
    session = OpenVinoInferenceSession(program, threads=2)
    whole = session.token_nll(WINDOWS)
    with monkeypatch.context() as patched:
        patched.setattr(
            openvino_engine.OpenedProgram,
            "_requests",
            lambda self: (_ for _ in ()).throw(MemoryError()),
        )
        with pytest.raises(EngineOutOfMemoryError):
            session.token_nll(WINDOWS)
    again = session.token_nll(WINDOWS)
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
