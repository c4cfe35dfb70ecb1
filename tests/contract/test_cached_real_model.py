"""Prefill and decode of the real model on real text, at three lengths of the prefill."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import window_of

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.mark.parametrize("prompt_len", [1, 100, 159])
def test_cached_losses_are_those_of_whole_windows(real_model_dir, real_text, prompt_len):
    tokenizer = Tokenizer.from_file(str(real_model_dir / "tokenizer.json"))
    ids = np.array(tokenizer.encode(real_text).ids)
    windows = [window_of(ids[:160]), window_of(ids[160:320]), window_of(ids[320:420])]
    session = PytorchInferenceSession(real_model_dir, threads=1)
    whole = np.concatenate(session.token_nll(windows))
    cached = np.concatenate(cached_session(session, prompt_len=prompt_len).token_nll(windows))
    session.close()
    difference = np.abs(whole - cached).max()
    print(f"prompt_len {prompt_len}: largest difference {difference:.2e} nats")
    assert difference < 1e-4
