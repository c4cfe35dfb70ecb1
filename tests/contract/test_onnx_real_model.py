"""ONNX programs of a real model on real text: the same losses as PyTorch, in less memory."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from perplexit.compilation.targets import compile
from perplexit.sessions.onnx import OnnxInferenceSession
from perplexit.sessions.prefill_decode import cached_session
from tests.oracles import oracle_details, window_of

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
LENGTHS = (1024, 512)

# Anonymous memory alone: the weights' file, which is mapped, comes and goes as the system likes.
MEASURE = """
import sys, threading, time
import numpy as np
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.onnx import OnnxInferenceSession

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("RssAnon"))

session = OnnxInferenceSession(sys.argv[1], threads=1)
ids = np.random.default_rng(0).integers(0, session.model.vocab_size, 1024).astype(np.int32)
peaks, done = [anonymous_bytes()], threading.Event()
def sample():
    while not done.wait(0.002):
        peaks.append(anonymous_bytes())
thread = threading.Thread(target=sample)
thread.start()
session.token_nll([WindowIds(0, ids, np.arange(1, 1024))])
done.set()
thread.join()
print(max(peaks) - peaks[0])
"""


@pytest.fixture(scope="module")
def programs(real_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    options = {"float32": {}, "int4": {"quantization": "int4"}, "logits": {"perplexity": False}}
    return {
        name: compile(real_model_dir, to="onnx", output=root / name, **chosen)
        for name, chosen in options.items()
    }


@pytest.fixture(scope="module")
def scored(programs, real_model_dir, real_text):
    """Windows of real text with PyTorch's losses by the float64 oracle."""
    ids = np.array(
        Tokenizer.from_file(str(real_model_dir / "tokenizer.json")).encode(real_text).ids
    )
    starts = np.cumsum((0, *LENGTHS))
    windows = [window_of(ids[a:b]) for a, b in pairwise(starts)]
    model = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32).eval()
    return windows, np.concatenate([oracle_details(model, window).nll_N for window in windows])


def nll_of(program, windows):
    session = OnnxInferenceSession(program.folder, threads=1)
    try:
        return np.concatenate(session.token_nll(windows)).astype(np.float64)
    finally:
        session.close()


@pytest.mark.parametrize("name", ["float32", "logits"])
def test_float32_programs_give_pytorchs_losses(programs, scored, name):
    windows, reference = scored
    nll = nll_of(programs[name], windows)
    assert np.abs(nll - reference).max() < 1e-3
    assert abs(nll.mean() - reference.mean()) < 1e-5


def test_prefill_and_decode_give_the_losses_of_whole_windows(programs, scored):
    windows = [window_of(scored[0][0].ids_T[start : start + 96]) for start in (0, 96)]
    session = OnnxInferenceSession(programs["logits"].folder, threads=1)
    whole = np.concatenate(session.token_nll(windows))
    for prompt_len in (1, 50, 95):
        cached = cached_session(session, prompt_len=prompt_len).token_nll(windows)
        difference = np.abs(whole - np.concatenate(cached)).max()
        print(f"prompt_len {prompt_len}: largest difference {difference:.2e} nats")
        assert difference < 1e-4
    session.close()


def test_four_bits_are_worse_and_say_what_they_are(programs, scored):
    windows, reference = scored
    nll = nll_of(programs["int4"], windows)
    assert 0.01 < nll.mean() - reference.mean() < 1
    record = programs["int4"].metadata.quantization
    assert record.num_modules == 210
    assert 4 < record.effective_bits < 16
    assert record.unquantized == ("lm_head.weight",)


def peak_beyond_the_weights(program):
    command = [sys.executable, "-c", MEASURE, str(program.folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_head_inside_needs_less_than_half_of_the_memory_of_logits(programs):
    inside, logits = (peak_beyond_the_weights(programs[name]) for name in ("float32", "logits"))
    assert logits > 4 * 1023 * 49_152
    assert inside < logits / 2
