"""OpenVINO programs of a real model on real text: PyTorch's losses, in less memory than logits."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from perplexit.compilation.targets import compile
from perplexit.errors import CapabilityError
from perplexit.sessions.registry import load_session
from tests.contract.test_onnx_real_model import MEASURE
from tests.oracles import oracle_details, window_of

pytest.importorskip("openvino")
pytestmark = [pytest.mark.real_model, pytest.mark.slow]
LENGTHS = (384, 128)


@pytest.fixture(scope="module")
def programs(real_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    return {
        inside: compile(real_model_dir, to="openvino", output=root / str(inside), perplexity=inside)
        for inside in (True, False)
    }


@pytest.fixture(scope="module")
def scored(real_model_dir, real_text):
    """Windows of real text with PyTorch's losses by the float64 oracle."""
    encoded = Tokenizer.from_file(str(real_model_dir / "tokenizer.json")).encode(real_text)
    ids = np.array(encoded.ids)
    windows = [window_of(ids[a:b]) for a, b in pairwise(np.cumsum((0, *LENGTHS)))]
    model = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32).eval()
    return windows, np.concatenate([oracle_details(model, window).nll_N for window in windows])


def nll_of(program, windows, **options):
    session = load_session(program.folder, threads=1, **options)
    try:
        return np.concatenate(session.token_nll(windows)).astype(np.float64)
    finally:
        session.close()


@pytest.mark.trap(36)
@pytest.mark.parametrize("inside", [True, False])
def test_float32_programs_give_pytorchs_losses(programs, scored, inside):
    windows, reference = scored
    nll = nll_of(programs[inside], windows)
    assert np.abs(nll - reference).max() < 2e-3
    assert abs(nll.mean() - reference.mean()) < 1e-4


@pytest.mark.trap(41)
def test_a_bfloat16_body_keeps_the_mean(programs, scored):
    """Trap 41: bfloat16 over the whole graph gave 3.67 instead of 3.07."""
    windows, reference = scored
    try:
        nll = nll_of(programs[True], windows, dtype="bfloat16")
    except CapabilityError:
        pytest.skip("this processor has no bfloat16")
    assert abs(nll.mean() - reference.mean()) < 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_head_inside_needs_less_than_half_of_the_memory_of_logits(programs):
    measure = MEASURE.replace(
        "perplexit.sessions.onnx import OnnxInferenceSession",
        "perplexit.sessions.openvino import OpenVinoInferenceSession as OnnxInferenceSession",
    )
    inside, logits = (_peak(measure, programs[each].folder) for each in (True, False))
    assert logits > 4 * 1023 * 49_152
    assert inside < logits / 2


def _peak(measure, folder):
    command = [sys.executable, "-c", measure, str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
