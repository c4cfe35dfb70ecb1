"""A window's losses depend on that window alone: whatever the batch, the order, a resume."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from perplexit.inputs.windows import WindowIds
from perplexit.sessions.cached import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import oracle_details, random_window

VOCAB, BORDER = 96, 64
LENGTHS = (100, 65, 64, 90, 20)  # beyond the border, one beyond, at it; not in order
TOLERANCE = 1e-4  # nats of one token, float32 against float64
_HALF_HEAD = 8  # frequencies of a head of 16

ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * n for n in range(_HALF_HEAD)],
        "long_factor": [3.0 + 0.5 * n for n in range(_HALF_HEAD)],
        "original_max_position_embeddings": BORDER,
        "factor": 4.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


def _config(rope: dict) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=BORDER if rope["rope_type"] == "dynamic" else 4 * BORDER,
        rope_parameters={"rope_theta": 10_000.0, **rope},
        initializer_range=0.2,
    )


@pytest.fixture(scope="module", params=sorted(ROPES))
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    LlamaForCausalLM(_config(ROPES[request.param])).save_pretrained(path)
    return path


def _windows() -> list[WindowIds]:
    return [random_window(n, size, VOCAB, index=n) for n, size in enumerate(LENGTHS)]


def _oracle(folder: Path, windows: list[WindowIds]) -> list[np.ndarray]:
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [oracle_details(copy.deepcopy(fresh), window).nll_N for window in windows]


def _assert_equal(got: list[np.ndarray], right: list[np.ndarray]) -> None:
    for place, (one, other) in enumerate(zip(got, right, strict=True)):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE, err_msg=str(place))


def test_b3_the_batch_and_the_order_change_nothing(folder: Path) -> None:
    windows, session = _windows(), PytorchInferenceSession(folder)
    right = _oracle(folder, windows)
    _assert_equal(session.token_nll(windows), right)
    _assert_equal([session.token_nll([window])[0] for window in windows], right)
    _assert_equal(session.token_nll(windows[::-1])[::-1], right)


@pytest.mark.parametrize(("prompt_len", "chunk"), [(1, 1), (10, 7), (80, 3)])
def test_b3_a_cache_crosses_no_border(folder: Path, prompt_len: int, chunk: int) -> None:
    windows = _windows()
    session = cached_session(
        PytorchInferenceSession(folder), prompt_len=prompt_len, decode_chunk=chunk
    )
    _assert_equal(session.token_nll(windows), _oracle(folder, windows))
