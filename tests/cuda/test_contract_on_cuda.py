"""The contract suite, on a CUDA device: what every session promises, against the same oracle."""

from collections.abc import Iterator

import pytest
from transformers import AutoModelForCausalLM

from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.contract.engines import Engine
from tests.contract.test_session_contract import *  # noqa: F403 - its tests, collected here too
from tests.contract.test_session_contract import Opened


def _on_cuda(**options: object):
    return lambda folder: PytorchInferenceSession(folder, device="cuda", **options)


def _cached_on_cuda(folder):
    return cached_session(_on_cuda()(folder), prompt_len=5, decode_chunk=7)


ON_CUDA = {
    "cuda": Engine(_on_cuda(), ("llama", "gpt2", "gemma2", "cohere")),
    "cuda-small-chunks": Engine(_on_cuda(max_logits_bytes=7 * 320 * 4), ("llama",)),
    "cuda-compiled-head": Engine(_on_cuda(head="compiled"), ("gemma2",)),
    "cuda-spread": Engine(lambda folder: PytorchInferenceSession(folder, device="auto"), ("gpt2",)),
    "cuda-cached": Engine(_cached_on_cuda, ("llama", "gemma2")),
}
CASES = [(engine, model) for engine, entry in ON_CUDA.items() for model in entry.models]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    engine_name, model_name = request.param
    folder = request.getfixturevalue(f"tiny_{model_name}_dir")
    engine = ON_CUDA[engine_name]
    session = engine.open(folder)
    yield Opened(session, engine, AutoModelForCausalLM.from_pretrained(folder).eval())
    session.close()
